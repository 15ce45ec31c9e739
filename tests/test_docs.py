"""The code in the README and the pages runs, and their numbers are checked."""

import ast
import fnmatch
import functools
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib

import jax
import jax.numpy as jnp
import pytest
import tables

import memoptax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
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
API = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


# The Python on the pages

WITH_PYTHON = sorted(
    page.name for page in DOCS.glob("*.md") if blocks(page.read_text(), "python")
)


@functools.cache
def run(page):
    """The names that the Python of a page defines, run from top to bottom."""
    namespace = {}
    for block in blocks(page.read_text(), "python"):
        exec(block, namespace)
    return namespace


def test_the_python_of_the_readme_runs():
    namespace = run(ROOT / "README.md")
    assert float(namespace["loss"]) < 1e-3


@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.few(2)
def test_the_python_of_a_page_runs(page):
    run(DOCS / page)


def test_a_selection_without_buffers_keeps_all_that_is_held():
    namespace = run(DOCS / "training_step.md")
    step, params = namespace["guarded_step"], jnp.ones((64, 64))
    params, state = step(params, namespace["tx"].init(params), jnp.ones((8, 64)))
    before = jax.tree.map(jnp.copy, (params, state))
    after = step(params, state, jnp.full((8, 64), jnp.nan))
    # The spare slot holds no entry.
    for _, state in (before, after):
        assert memoptax.buffer_stats(state)["fill"] == 1
    before, after = (
        (params, state[1:], state[0].buffer._replace(slots=None))
        for params, state in (before, after)
    )
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, before, after)))


# The numbers on the pages


def test_ci_runs_the_test_command_of_the_readme():
    lines = "".join(blocks(README, "bash")).splitlines()
    (tests,) = (line for line in lines if "venv" in line and "pytest" in line)
    assert tests in (ROOT / ".ci" / "run").read_text()


def rows(text):
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


SIZES = rows(README.split("<!-- sizes -->")[1].split("<!-- end -->")[0])


def name_of(call):
    """The benchmarks' name for a call."""
    name, _, arguments = call.strip("`").rstrip(")").partition("(")
    if name.startswith("sm3") and "cm" not in name:
        return name
    capacity = re.search(r"topc=(\d+)", arguments)
    few = " slots and m" if "mu_dtype" in arguments else ""
    few = f", int8{few}" if "int8" in arguments else ""
    return f"{name}, C = {capacity[1] if capacity else 5}{few}"


@pytest.mark.parametrize(("call", "stated"), [(row[0], row[2]) for row in SIZES])
def test_state_sizes_of_the_readme(call, stated):
    params = {
        "w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        "b": jax.ShapeDtypeStruct((1024,), jnp.float32),
    }
    tx = eval(call.strip("`"), dict(vars(memoptax)))
    per_parameter = memoptax.memory_report(tx, params).per_parameter
    assert f"{per_parameter:.{1 if float(stated) >= 1 else 4}f}" == stated


def test_times_of_the_readme_are_those_of_the_results():
    times = tables.sections()["times"]["rows"]
    for call, *_, stated in SIZES:
        row = tables.find(times, optimizer=name_of(call))
        assert f"{row['/ adam']:.2f}" == stated


def test_bytes_moved_of_the_readme_are_those_of_the_page():
    text = (DOCS / "holding.md").read_text()
    moved = {row[0].replace("`", ""): row[1] for row in rows(text)}
    assert {name_of(row[0]): row[3] for row in SIZES}.items() <= moved.items()


@pytest.mark.parametrize(("device", "column"), [("h100", 1), ("v5e", 2)])
def test_bytes_moved_of_the_page_are_those_of_the_results(device, column):
    name = f"benchmarks/results/ahead-of-time-{device}.json"
    kept = json.loads((ROOT / name).read_text())["float32"]["rows"]
    moved = {row["optimizer"]: row["moved"] for row in kept}
    text = (DOCS / "holding.md").read_text().split("# Bytes moved")[1].split("\n## ")[0]
    for row in rows(text):
        exact = moved[row[0].replace("`", "").removesuffix(" (sum)")]
        assert float(row[column]) == round(exact, 1), row[0]


def test_the_speed_on_the_page_is_that_of_the_results():
    page = tables.PAGE.read_text()
    assert all(f"<!-- speed: {name} -->" in page for name in tables.TABLES)
    assert tables.fill(page, tables.sections()) == page


# The pages as a whole


def test_every_page_is_in_the_contents():
    contents = blocks((DOCS / "index.md").read_text(), "{toctree}")
    entries = "".join(contents).splitlines()
    for page in [*DOCS.glob("*.md"), *DOCS.glob("api/*.md")]:
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "index" or any(fnmatch.fnmatch(name, e) for e in entries), name


def test_links_of_the_readme_and_the_pages_lead_to_files():
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_files_named_on_the_pages_exist():
    folders = "benchmarks|docs|examples|memoptax|notebooks|tests"
    name = rf"\b(?:{folders})/[\w/.-]+\.(?:py|md|ipynb|json|png)\b"
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / ".ci" / "run"]:
        for file in re.findall(name, page.read_text()):
            assert (ROOT / file).exists(), f"{page.name} names {file}"


def test_the_citation_has_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation


# The diffs of CONTRIBUTING


def apply(diff, folder):
    """Apply a unified diff. Its hunks are found by their text."""
    for part in re.split(r"^--- .*\n\+\+\+ b/", diff, flags=re.M)[1:]:
        name, _, text = part.partition("\n")
        for hunk in re.split(r"^@@\n", text, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            after = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            source = (folder / name).read_text()
            assert source.count(before) == 1, f"{name} has no single {before!r}"
            (folder / name).write_text(source.replace(before, after))


def test_the_diffs_of_contributing_apply_and_run(tmp_path):
    for name in ("memoptax", "docs/api", "tests/contract.py"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, target)
    for diff in blocks(CONTRIBUTING, "diff"):
        apply(diff, tmp_path)
    subprocess.run(
        [sys.executable, "-c", "".join(blocks(CONTRIBUTING, "python"))],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )


# The package itself


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_document_themselves(name):
    doc = PUBLIC[name].__doc__
    for heading in ("Args:", "Returns:", "Examples:"):
        assert re.search(rf"^\s*{heading}$", doc, re.M), f"{name} has no {heading}"
    # Readers of the source see the same text.
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(PUBLIC[name])))
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert ast.get_docstring(function) == inspect.cleandoc(doc)
    assert re.search(rf"^\.\. autofunction:: (memoptax\.)?{name}$", API, re.M)


@pytest.mark.parametrize("name", STATES)
def test_states_document_themselves(name):
    # A NamedTuple without a docstring gets one that lists its fields.
    assert not PUBLIC[name].__doc__.startswith(f"{name}(")
    assert f"autoclass:: {name}\n" in API


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
    assert len(lines) < 80
