"""The house rules that a machine can check: one-way imports, cheap imports, no pickle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["core", "sae", "probes", "steerkit.steering", "steerkit.adapters", "steerkit.cli"]
SOURCES = [
    path for package in ("steerkit", "sae", "probes") for path in sorted((ROOT / package).rglob("*.py"))
]


def floor_of(module: str) -> int | None:
    """The floor a module stands on, or None for one that is not ours."""
    top = module.split(".")[0]
    if top in ("sae", "probes"):
        return FLOORS.index(top)
    if top != "steerkit":
        return None
    prefix = ".".join(module.split(".")[:2])
    return FLOORS.index(prefix) if prefix in FLOORS else 0


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, at module level outside TYPE_CHECKING) of every absolute import of a file, also inside functions."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module or "", top))
                found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                visit(child, False)
            else:
                nested = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                visit(child, top and not nested)

    visit(ast.parse(path.read_text()), True)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_stands_before_it(path):
    own = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own is not None
    for module, _ in imports_of(path):
        other = floor_of(module)
        assert other is None or other <= own, f"{path.name} imports {module}, which stands above it"


def test_there_are_no_import_cycles():
    graph: dict[str, set[str]] = {}
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    for name, path in names.items():
        graph[name] = {module for module, _ in imports_of(path) if module in names and module != name}
    # A package's __init__ that gathers its own submodules is the one direction that is not a cycle.
    for name in graph:
        graph[name] = {other for other in graph[name] if not name.startswith(other + ".")}
    visiting: list[str] = []
    done: set[str] = set()

    def walk(name: str) -> None:
        assert name not in visiting, f"cycle: {' -> '.join([*visiting[visiting.index(name) :], name])}"
        if name in done:
            return
        visiting.append(name)
        for other in sorted(graph[name]):
            walk(other)
        visiting.pop()
        done.add(name)

    for name in graph:
        walk(name)


def test_importing_the_packages_is_cheap():
    program = (
        "import sys, torch; before = set(sys.modules); import steerkit, sae, probes\n"
        "heavy = {'transformers', 'transformer_lens', 'sae_lens', 'plotly', 'sklearn', 'pandas', 'datasets', 'peft'}\n"
        "print(sorted(heavy & set(sys.modules) - before))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert output.stdout.strip() == "[]"


def test_nothing_is_unpickled():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
            ):
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert safe, f"{path}:{node.lineno} unpickles"
