"""The layout of the package: imports point down, and SM3 never uses the buffer."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "memoptax"
# Levels from the bottom up. A room is a package or a single file.
FLOORS = [
    {"_bases", "_check", "_parameters", "_tensors"},
    {"_buffer"},
    {"_critical_gradients", "_critical_momenta", "_momentum"}
    | {"_sm3", "_sm3_momenta", "_sm3_rules"}
    | {"covers", "sparse"}
    | {"_buffer_tools", "_bytes", "_check_state", "_schedules", "_sharding"},
    {"memoptax"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def name(path):
    """The dotted name of a module below the package, or that of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "memoptax"


FILES = {name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """The modules of the package that a file imports, including inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                known = module.removeprefix("memoptax.") in FILES
                found.add(module if known else node.module)
    ours = {module for module in found if module.split(".")[0] == "memoptax"}
    return {module.removeprefix("memoptax.") for module in ours}


GRAPH = {module: imports(path) for module, path in FILES.items()}


def room(module):
    return module.split(".")[0]


def reached(module):
    """All that a module imports, directly or through others."""
    found, new = set(), GRAPH[module]
    while new:
        found |= new
        new = set().union(*(GRAPH[module] for module in new)) - found
    return found


def test_every_file_has_a_level_and_a_sentence():
    assert {room(module) for module in FILES} == set(LEVEL)
    page = (ROOT / "docs" / "architecture.md").read_text()
    described = re.findall(r"^\| `(\S+\.py)` \|", page, re.M)
    files = [path.relative_to(PACKAGE).as_posix() for path in FILES.values()]
    # The __init__.py of a subpackage has a docstring and no code.
    packages = [file for file in files if file.endswith("/__init__.py")]
    assert sorted(described) == sorted(set(files) - set(packages))


def test_no_import_points_up():
    assert not [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if LEVEL[room(other)] > LEVEL[room(module)]
    ]


def test_imports_have_no_cycle():
    rooms = {}
    for module, others in GRAPH.items():
        others = {room(other) for other in others} - {room(module)}
        rooms.setdefault(room(module), set()).update(others)
    for graph in (GRAPH, rooms):
        graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("module", ["_sm3", "_sm3_rules", "covers", "sparse"])
def test_sm3_never_reaches_the_buffer(module):
    assert not [other for other in reached(module) if room(other) == "_buffer"]


def test_eviction_knows_no_tensors():
    assert GRAPH["_buffer.eviction"] == set()


def test_sparse_is_loaded_on_first_use():
    program = """
import sys

import jax.numpy as jnp
import memoptax

tx = memoptax.sm3(0.1)
tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
assert "jax.experimental.sparse" not in sys.modules
memoptax.sparse.apply_updates
assert "jax.experimental.sparse" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
