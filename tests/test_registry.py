"""A part is found by its file being there, or by the file's path."""

from __future__ import annotations

from pathlib import Path

import pytest

import longmem.contenders
import longmem.tasks
from longmem.contenders.contender import Contender
from longmem.contenders.oracle import Oracle
from longmem.contenders.window import Window
from longmem.errors import ConfigError
from longmem.registry import chosen, found
from longmem.tasks.task import Task


def test_every_file_is_found_in_order() -> None:
    contenders, tasks = found(longmem.contenders, Contender), found(longmem.tasks, Task)
    assert {"window", "extended", "rag-bm25", "longmem", "oracle"} <= set(contenders)
    assert {"passkey", "pairs", "facts", "xquad"} <= set(tasks)
    orders = [each.order for each in contenders.values()]
    assert orders == sorted(orders)
    for name, each in (contenders | tasks).items():
        assert each.name == name and each.title and ("," not in name)


def test_names_keep_the_order_they_are_given_in() -> None:
    assert chosen(["oracle", "window", "oracle"], longmem.contenders, Contender) == [Oracle, Window]
    assert chosen([], longmem.contenders, Contender) == list(found(longmem.contenders, Contender).values())


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no contender 'windoww'\. Choose among window, extended"):
        chosen(["windoww"], longmem.contenders, Contender)
    with pytest.raises(ConfigError, match=r"mine\.py is no file"):
        chosen([str(tmp_path / "mine.py")], longmem.contenders, Contender)
    (tmp_path / "mine.py").write_text("from longmem.contenders.window import Window\n")
    with pytest.raises(ConfigError, match="defines no subclass"):
        chosen([str(tmp_path / "mine.py")], longmem.contenders, Contender)
    (tmp_path / "mine.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"mine\.py cannot be loaded: ZeroDivisionError"):
        chosen([str(tmp_path / "mine.py")], longmem.contenders, Contender)
    (tmp_path / "mine.py").write_text(
        "from longmem.contenders.window import Window\nclass Mine(Window):\n    name = 'window'\n"
    )
    with pytest.raises(ConfigError, match="2 different contenders are called 'window'"):
        chosen(["window", str(tmp_path / "mine.py")], longmem.contenders, Contender)
