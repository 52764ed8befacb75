"""Imports go down the floors of the design, never up, never in a circle; and what no module may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmprune

PACKAGE = Path(llmprune.__file__).parent
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))

# Top first. A module may import from its own floor and from those below; within a floor, circles are found apart.
FLOORS = [
    "__main__.py",
    "cli/",
    "__init__.py",
    "evaluation/",
    "report/",
    "pipeline/",
    "forecast/",
    "publish/",
    "exits/",
    "recover/",
    "baselines/",
    "search/",
    "tables/",
    "blocks/",
    "measure/",
    "formats/",
    "resize/",
    "models/",
    "data/",
    "choices/",
    "numerics/",
    "core/",
]
WITHOUT_TORCH = "core/"
# Copied beside a checkpoint, or run as a script by a stranger's interpreter.
ALONE = (
    "models/modeling_pruned.py",
    "models/proof.py",
    "formats/configuration_decilm.py",
    "formats/decilm_proof.py",
)


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def imported_names(module: str) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: imports name their module in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> set[str]:
    """Our own modules that a module imports, as paths within the package."""
    found = set()
    for name in imported_names(module):
        path = name.removeprefix("llmprune.").replace(".", "/")
        if name.startswith("llmprune.") and f"{path}.py" in MODULES:
            found.add(f"{path}.py")
    return found


def floor_of(module: str) -> int:
    (floor,) = (i for i, name in enumerate(FLOORS) if module == name or (name[-1] == "/" and module.startswith(name)))
    return floor


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    upwards = {other for other in imports_of(module) if floor_of(other) < floor_of(module)}
    assert not upwards, f"{module} imports from above it"


def test_imports_make_no_circle() -> None:
    left = {module: imports_of(module) for module in MODULES}
    while free := [module for module, imports in left.items() if not imports & left.keys()]:
        for module in free:
            del left[module]
    assert not left, "each of these imports another of them"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(WITHOUT_TORCH)])
def test_words_need_no_torch(module: str) -> None:
    heavy = {name for name in imported_names(module) if name.split(".")[0] in ("torch", "transformers", "optuna")}
    assert not heavy


@pytest.mark.parametrize("module", ALONE)
def test_what_travels_needs_nothing_of_ours(module: str) -> None:
    assert not any(name.split(".")[0] == "llmprune" for name in imported_names(module))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled_and_no_shell_is_asked(module: str) -> None:
    assert not {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"} & set(imported_names(module))
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("torch.load", "torch.save", "os.system", "os.popen", "eval", "exec"), (
            f"line {node.lineno}"
        )
        assert not any(keyword.arg == "shell" for keyword in node.keywords), f"line {node.lineno}"
