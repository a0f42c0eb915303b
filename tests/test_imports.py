"""Imports point one way, and what a GPU machine may lack is only imported where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {"kernels", "models", "data", "training", "configs"}
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "data": set(),
    "training": {"kernels", "models"},
    "configs": {"data", "models", "training"},
    "eval": BASE,
    "bench": BASE | {"eval"},  # its speed is one of the ratios
    "train": BASE | {"eval"},  # the commands at the top call the judges; no room does
    "ablate": BASE | {"eval"},
}
OPTIONAL = {"triton", "lm_eval", "datasets", "wandb", "transformers", "matplotlib", "faiss"}


def is_quarantined(module: str) -> bool:
    """Whether a module may need an optional library to be imported at all."""
    parts = module.split(".")
    if parts[0] == "kernels" and (parts[-1] == "triton" or parts[-1].startswith("triton_")):
        return True
    return parts[:2] == ["models", "hf"] or module == "eval.harness"


def sources() -> dict[str, Path]:
    """Every module of the project by dotted name."""
    files = [p for room in MAY_IMPORT for p in (ROOT / room).rglob("*.py")]
    files += [p for room in MAY_IMPORT if (p := ROOT / f"{room}.py").is_file()]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


MODULES = sources()


def _imports(node: ast.AST, everywhere: bool) -> Iterator[str]:
    """Dotted names a tree imports; without ``everywhere`` only what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import of {child.module}"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif everywhere or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if not everywhere and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield from _imports(child, everywhere)


def imports(module: str, everywhere: bool = True) -> set[str]:
    """Modules of the project (with the packages above them) and top names of others."""
    found: set[str] = set()
    for name in _imports(ast.parse(MODULES[module].read_text()), everywhere):
        parts = name.split(".")
        found.add(parts[0])
        found |= {prefix for n in range(2, len(parts) + 1) if (prefix := ".".join(parts[:n])) in MODULES}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module: str):
    room = module.split(".")[0]
    wrong = {name for name in imports(module) if (top := name.split(".")[0]) in MAY_IMPORT and top != room}
    wrong = {name for name in wrong if name.split(".")[0] not in MAY_IMPORT[room]}
    assert not wrong, f"{module} may not import {sorted(wrong)}"
    assert "tests" not in imports(module)


def tainted() -> dict[str, str]:
    """Modules that cannot be imported without an optional library, and through what."""
    direct = {m: imports(m, everywhere=False) for m in MODULES}
    found = {m: min(names & OPTIONAL) for m, names in direct.items() if names & OPTIONAL}
    while True:
        more = {
            m: through
            for m, names in direct.items()
            if m not in found and (through := next((n for n in sorted(names) if n in found), None))
        }
        if not more:
            return found
        found |= more


def test_optional_libraries_are_imported_where_they_are_used():
    wrong = {m: through for m, through in tainted().items() if not is_quarantined(m)}
    assert not wrong, f"imported at module level: {wrong}"


def test_the_walk_sees_imports():
    """The rules above find what they look for."""
    tree = ast.parse("import os\nif True:\n    import wandb\ndef f():\n    from eval.cache import x\n")
    assert set(_imports(tree, everywhere=True)) == {"os", "wandb", "eval.cache.x"}
    assert set(_imports(tree, everywhere=False)) == {"os", "wandb"}
    assert {"kernels.cross_entropy", "kernels", "models.types", "torch"} <= imports("models.lm")


def test_everything_imports_without_optional_libraries():
    """In a process where none of them can be imported, as on a machine that lacks them all."""
    names = sorted(m for m in MODULES if not is_quarantined(m))
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(OPTIONAL)!r}))\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
