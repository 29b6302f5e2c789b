"""Parts that are found by being there: every file of a package may define classes with a name, and so may a user's own
file, given by its path."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Protocol, TypeVar

from longmem.errors import ConfigError


class Named(Protocol):
    """What a registered class tells about itself: its name on the command line, and its place among others."""

    name: ClassVar[str]
    order: ClassVar[int]


Kind = TypeVar("Kind", bound=Named)


def found(package: ModuleType, base: type[Kind]) -> dict[str, type[Kind]]:
    """Name → class, of all files of a package, in their order."""
    modules = [
        importlib.import_module(f"{package.__name__}.{each.name}") for each in pkgutil.iter_modules(package.__path__)
    ]
    classes = [each for module in modules for each in _defined(module, base)]
    return {each.name: each for each in sorted(classes, key=lambda each: (each.order, each.name))}


def chosen(names: Sequence[str], package: ModuleType, base: type[Kind]) -> list[type[Kind]]:
    """Classes by name, or by the path of a Python file that defines some; all of the package's if no name is given.

    Raises:
        ConfigError: there is no such name or file, or the file defines none.
    """
    known = found(package, base)
    classes: list[type[Kind]] = []
    for name in names or known:
        if name in known:
            classes.append(known[name])
        elif name.endswith(".py"):
            classes += _of_file(Path(name), base)
        else:
            raise ConfigError(
                f"There is no {base.__name__.lower()} {name!r}. Choose among {', '.join(known)}, or give the path of a "
                f"Python file that defines a subclass of {base.__module__}.{base.__name__}."
            )
    classes = list(dict.fromkeys(classes))
    for name, count in Counter(each.name for each in classes).items():
        if count > 1:
            raise ConfigError(
                f"{count} different {base.__name__.lower()}s are called {name!r}; give yours another name."
            )
    return classes


def _of_file(path: Path, base: type[Kind]) -> list[type[Kind]]:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise ConfigError(f"{path} is no file. Give the path of a Python file that defines a {base.__name__}.")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be loaded: {type(error).__name__}: {error}.") from error
    if not (classes := _defined(module, base)):
        raise ConfigError(f"{path} defines no subclass of {base.__module__}.{base.__name__} that has a `name`.")
    return classes


def _defined(module: ModuleType, base: type[Kind]) -> list[type[Kind]]:
    """Subclasses with a name of their own that a module itself defines."""
    classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, base)]
    return [each for each in classes if each.__module__ == module.__name__ and "name" in vars(each)]
