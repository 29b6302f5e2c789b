from __future__ import annotations

import sys

import pytest

from longmem.drawing import new_figure
from longmem.errors import MissingExtraError


def test_a_figure_is_as_large_as_asked() -> None:
    pytest.importorskip("matplotlib")
    assert new_figure(5, 3).get_size_inches().tolist() == [5, 3]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="pip install 'longmem\\[plot\\]'"):
        new_figure(5, 3)
