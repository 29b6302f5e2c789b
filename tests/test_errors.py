"""The tree of errors is the one that is drawn, and each says what it is."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from longmem import errors

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}


def drawn_parents() -> dict[str, str | None]:
    """Error → parent, read from the drawing in the module's docstring."""
    parents: dict[str, str | None] = {}
    ancestors: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([\s│├└─]*)(\w+Error)\b", line)
        if found is None:
            continue
        depth, name = len(found[1]), found[2]
        ancestors = [(d, n) for d, n in ancestors if d < depth]
        parents[name] = ancestors[-1][1] if ancestors else None
        ancestors.append((depth, name))
    return parents


def test_every_error_is_drawn_under_its_parent() -> None:
    parents = drawn_parents()
    assert set(parents) == set(CLASSES)
    for name, parent in parents.items():
        base = CLASSES[name].__base__
        assert base is (CLASSES[parent] if parent else Exception)


def test_every_error_can_be_caught_at_once_and_explains_itself() -> None:
    for error in CLASSES.values():
        assert issubclass(error, errors.LongMemError) and error.__doc__


def test_every_error_that_has_no_kinds_is_raised_somewhere() -> None:
    raised: set[str] = set()
    for path in Path(errors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                raised.add(node.func.id)
    leaves = {name for name, error in CLASSES.items() if not error.__subclasses__()}
    assert leaves <= raised
