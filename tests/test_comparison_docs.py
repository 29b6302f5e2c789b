"""What is published of a comparison can be written again from what was published."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from longmem.comparison.result import Comparison

ROOT = Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("comparison_docs", ROOT / "benchmarks" / "comparison_docs.py")
assert _SPEC is not None and _SPEC.loader is not None
docs = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = docs
_SPEC.loader.exec_module(docs)
WRITTEN = ("README.md", "docs/comparison.md", "docs/comparison.html", str(docs.FIGURES))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in WRITTEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_same_is_written_again(root: Path) -> None:
    figures = root / docs.FIGURES
    docs.main(figures, "", root)
    once = {name: (root / name).read_text() for name in WRITTEN}
    docs.main(figures, "", root)
    assert {name: (root / name).read_text() for name in WRITTEN} == once
    # What the README and the page say is what is published.
    assert once["docs/comparison.html"] == (ROOT / "docs/comparison.html").read_text()
    assert once["README.md"] == (ROOT / "README.md").read_text()


def test_nothing_of_the_data_sets_is_published(root: Path) -> None:
    published = Comparison.load(root / docs.FIGURES)
    assert published.cells
    for cell in published.cells.values():
        assert not any({"query", "answers"} & set(case) for case in cell.cases)


def test_every_empty_cell_has_its_reason(root: Path) -> None:
    comparison = Comparison.load(root / docs.FIGURES)
    text = docs.results(comparison, "")
    tables = [part for part in text.split("### ")[0].split("\n\n") if part.startswith("| ")]
    cells = [
        cell.strip() for table in tables for line in table.splitlines()[2:] for cell in line.strip("| ").split("|")
    ]
    assert cells and all(cells)
    for number in {cell for cell in cells if cell.startswith("– (")}:
        assert f"{number.removeprefix('– ')} " in text


def test_a_file_without_marks_is_left_alone(root: Path) -> None:
    (root / "README.md").write_text("nothing here")
    with pytest.raises(SystemExit, match=r"README\.md must hold the line"):
        docs.main(root / docs.FIGURES, "", root)
    assert (root / "README.md").read_text() == "nothing here"
