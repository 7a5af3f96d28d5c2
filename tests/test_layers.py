"""Imports go down: from a wing to itself or to one below it, and never in a circle."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]

LAYERS = (
    "cme_kernels",
    "cme.errors",
    "cme.options",
    "cme.command_line",
    "cme.text",
    "cme.files",
    "cme.demo",
    "cme.engine",
    "cme.models",
    "cme.scores",
    "cme.diagnostics",
    "cme.verifier",
    "cme.policy",
    "cme.fingerprint",
    "cme.reward",
    "cme.rewards",
    "cme.tasks",
    "cme.score_file",
    "cme.evaluation",
    "cme.train",
    "cme.cli",
    "cme.__main__",
    "cme",
)
"""From the ground up. A module belongs to the longest name that it begins with."""

MAX_LEVELS = 10
"""Most modules of `cme` in a chain of imports, below the command lines."""

COMMAND_LINES = ("cli", "__main__")
"""Modules that import what they run in functions, once it is known what is asked for: for a help text, nothing."""


def imports() -> dict[str, set[str]]:
    """For each module of the packages, the modules of them that it imports, anywhere in its code."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("cme", "cme_kernels")
        for path in (ROOT / package).rglob("*.py")
    }
    return {name: _imported(ast.parse(path.read_text()), paths.keys()) - {name} for name, path in paths.items()}


def _imported(tree: ast.AST, modules) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(modules)


def layer(module: str) -> int:
    return max((len(name), i) for i, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}."))[1]


def test_imports_go_down():
    upward = [f"{a} -> {b}" for a, found in imports().items() for b in found if layer(b) > layer(a)]
    assert not upward


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(imports()).prepare()  # raises CycleError


def test_chains_of_imports_are_short():
    graph = {name: {b for b in found if b.startswith("cme.")} for name, found in imports().items()}
    levels: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        levels[name] = 1 + max((levels[b] for b in graph.get(name, ())), default=0)
    deep = {name: level for name, level in levels.items() if name.startswith("cme.") and level > MAX_LEVELS}
    assert not {name: level for name, level in deep.items() if name.rpartition(".")[2] not in COMMAND_LINES}
