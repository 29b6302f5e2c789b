"""Imports point one way, the memory side and the network side meet in the model alone, and nothing is pickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import longmem

PACKAGE = Path(longmem.__file__).parent
# A module imports from the lines above its own, never from its own line or below.
LAYERS = (
    {"errors"},
    {"config", "ops", "families", "pretrained", "quantize", "codec", "clusters", "data", "drawing", "registry"},
    {"decoding", "encoding", "evidence", "grid"},
    {"windows"},
    {"backbone", "retrieved", "sketch"},
    {"ivf", "lists"},
    {"approximate"},
    {"bank"},
    {"group"},
    {"focus", "index", "retention", "probe"},
    {"store", "streams"},
    {"attention"},
    {"sidenet"},
    {"checkpoint"},
    {"model"},
    {"steps"},
    {"attribution", "recall", "text"},
    {"local_window"},
    {"generation", "indexing", "keeping", "bench", "evals"},
    {"batch", "contenders"},
    {"chat", "histories", "tasks", "train"},
    {"comparison", "harness"},
    {"cli"},
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
# Not layers: the public names (imported when used), and `python -m longmem`.
OUTSIDE = {"__init__", "__main__"}


def parts_of_the_package() -> dict[str, list[Path]]:
    """Top-level modules and subpackages, with their files."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        parts.setdefault(name, []).append(path)
    return parts


def statements(tree: ast.Module, *, lazily: bool) -> list[ast.stmt]:
    """Import statements that run when the module is imported; `lazily`, also those inside functions."""
    found: list[ast.stmt] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazily:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def imported_modules(path: Path, *, lazily: bool = False) -> set[str]:
    """Dotted names of what a file imports; `from a import b` gives both a and a.b."""
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), lazily=lazily):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def siblings(name: str, *, lazily: bool = False) -> set[str]:
    """Parts of longmem that a part imports, itself left out."""
    modules = {m for path in PARTS[name] for m in imported_modules(path, lazily=lazily) if m.startswith("longmem.")}
    return {module.split(".")[1] for module in modules} & set(HEIGHT) - {name}


PARTS = parts_of_the_package()


def test_every_module_has_its_place() -> None:
    assert set(PARTS) - OUTSIDE == set(HEIGHT)


def test_imports_point_one_way() -> None:
    wrong = [f"{name} imports {other}" for name in HEIGHT for other in siblings(name) if HEIGHT[other] >= HEIGHT[name]]
    assert wrong == []


def test_memory_and_network_meet_in_the_model_alone() -> None:
    for name in ("bank", "group", "store", "index", "streams", "retention", "sketch", "ivf", "lists", "approximate"):
        assert siblings(name, lazily=True) <= {
            "approximate",
            "bank",
            "clusters",
            "codec",
            "config",
            "data",
            "errors",
            "grid",
            "group",
            "index",
            "ivf",
            "lists",
            "ops",
            "retention",
            "retrieved",
            "sketch",
        }, name
    for name in ("families", "backbone", "attention", "sidenet"):
        assert not siblings(name, lazily=True) & {"bank", "store"}, name
    # What the network knows of the search is its types.
    for name, types in (("attention", {"Retrieved"}), ("sidenet", {"Retrieve"})):
        assert {m for m in imported_modules(PACKAGE / f"{name}.py") if m.startswith("longmem.retrieved.")} == {
            f"longmem.retrieved.{imported}" for imported in types
        }


def test_the_disk_is_no_business_of_the_core() -> None:
    for name in (
        "bank",
        "index",
        "retrieved",
        "streams",
        "retention",
        "attention",
        "sidenet",
        "families",
        "ops",
        "quantize",
        "codec",
        "sketch",
        "clusters",
        "ivf",
        "lists",
        "approximate",
    ):
        used = {module for path in PARTS[name] for module in imported_modules(path, lazily=True)}
        assert not used & {"pathlib", "os", "io", "shutil", "sqlite3", "safetensors"}, name


def test_nothing_is_pickled() -> None:
    for paths in PARTS.values():
        for path in paths:
            used = {module.split(".")[0] for module in imported_modules(path, lazily=True)}
            assert not used & {"pickle", "shelve", "joblib", "dill", "marshal"}, path.name
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert not calls & {"torch.load", "torch.save"}, path.name


def test_the_public_names_exist() -> None:
    assert list(longmem.__all__) == sorted(set(longmem.__all__), key=lambda name: (name.startswith("_"), name))
    for name in longmem.__all__:
        assert getattr(longmem, name) is not None
    assert set(dir(longmem)) >= set(longmem.__all__)
    assert not hasattr(longmem, "no_such_name")


def test_importing_longmem_is_light() -> None:
    code = "import sys, longmem; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == "[]"
