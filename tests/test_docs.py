"""What the README says is run, and what it counts is counted again."""

import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import tables

import memoptax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = {"": memoptax, "covers.": memoptax.covers, "sparse.": memoptax.sparse}
PUBLIC = {
    prefix + name: value
    for prefix, module in MODULES.items()
    for name, value in vars(module).items()
    if not name.startswith("_")
}
FUNCTIONS = sorted(name for name, value in PUBLIC.items() if inspect.isfunction(value))
STATES = sorted(
    name for name, value in vars(memoptax).items() if hasattr(value, "_fields")
)


PAGES = {page.stem: page.read_text() for page in (ROOT / "docs").glob("*.md")}


def run(text):
    """The names that the Python of a page leaves behind, block after block."""
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, namespace)
    return namespace


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in PAGES[p]])
def test_the_python_of_the_pages_runs(page):
    run(PAGES[page])


def test_the_python_of_the_readme_runs():
    namespace = run(README)
    assert float(namespace["loss"]) < 1e-3
    assert jnp.isfinite(namespace["sharded_loss"])
    # What the last block made is still where the one before had put it.
    params = namespace["params"]
    assert params.sharding.spec == namespace["P"]("data") and jnp.all(params != 0)


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.S)
    (tests,) = (line for line in commands if "venv" in line and "pytest" in line)
    assert tests in (ROOT / ".ci" / "run").read_text()


def _sizes():
    table = README.split("<!-- sizes -->")[1].split("<!-- end -->")[0]
    rows = [line.split("|")[1:-1] for line in table.strip().splitlines()[2:]]
    return [(cells[0].strip(" `"), float(cells[-1])) for cells in rows]


@pytest.mark.parametrize(("call", "stated"), _sizes())
def test_state_sizes_of_the_readme(call, stated):
    params = {
        "w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        "b": jax.ShapeDtypeStruct((1024,), jnp.float32),
    }
    tx = eval(call, vars(memoptax))
    per_parameter = memoptax.memory_report(tx, params).per_parameter
    assert f"{per_parameter:.{1 if stated >= 1 else 4}f}" == f"{stated}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_document_themselves(name):
    doc = PUBLIC[name].__doc__
    for heading in ("Args:", "Returns:", "Examples:"):
        assert re.search(rf"^\s*{heading}$", doc, re.M), f"{name} has no {heading}"
    assert "{" + "buffer}" not in doc
    assert re.search(rf"(`|memoptax\.){name}\b", README), "not in the README"


@pytest.mark.parametrize("name", STATES)
def test_states_document_themselves(name):
    # A NamedTuple without a docstring gets one that lists its fields.
    assert not PUBLIC[name].__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("module", ["covers", "sparse"])
def test_public_modules_export_their_functions(module):
    exported = getattr(memoptax, module).__all__
    assert [f"{module}.{name}" for name in exported] == [
        name for name in FUNCTIONS if name.startswith(f"{module}.")
    ]


def test_every_state_is_exported():
    sources = (ROOT / "memoptax").rglob("*.py")
    found = {
        name
        for source in sources
        for name in re.findall(r"^class (\w+State|Buffer)\(", source.read_text(), re.M)
    }
    assert found == set(STATES)


def test_the_face_is_thin():
    lines = (ROOT / "memoptax" / "__init__.py").read_text().splitlines()
    assert len(lines) < 60


def test_the_speed_in_the_readme_is_that_of_the_results():
    sections = json.loads(tables.RESULTS.read_text())
    assert all(f"<!-- speed: {name} -->" in README for name in tables.TABLES)
    assert tables.fill(README, sections) == README
