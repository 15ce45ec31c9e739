"""A release is one version everywhere, and the workflow tries what the page says."""

import pathlib
import re
import tomllib

import versions

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github/workflows/release.yml").read_text()


def test_the_changelog_has_the_version_and_what_comes_after_it():
    """The newest version that it names is the one of the project."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    named = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.M)
    assert named[0] == PROJECT["version"]
    assert named == sorted(named, key=lambda v: [*map(int, v.split("."))], reverse=True)
    assert changelog.index("## [Unreleased]") < changelog.index(f"## [{named[0]}]")


def test_all_name_the_same_pythons():
    language = "Programming Language :: Python :: 3."
    named = [c for c in PROJECT["classifiers"] if c.startswith(language)]
    assert tuple(c.split(" :: ")[-1] for c in named) == versions.PYTHONS
    smoked = re.search(r"python: \[(.*)\]", WORKFLOW)
    assert smoked and tuple(re.findall(r"[\d.]+", smoked[1])) == versions.PYTHONS
    assert PROJECT["requires-python"] == f">={versions.PYTHONS[0]}"


def test_the_workflow_checks_and_tries_before_it_publishes():
    publish = WORKFLOW.index("  publish:")
    assert "needs: [build, smoke, tests]" in WORKFLOW[publish:]
    for step in ("twine check --strict", "smoke.py --installed", "pytest -n"):
        assert WORKFLOW.index(step) < publish
    page = (ROOT / "docs/releasing.md").read_text()
    assert ".github/workflows/release.yml" in page


def test_the_sdist_has_what_its_tests_and_the_workflow_read():
    with open(ROOT / "pyproject.toml", "rb") as file:
        sdist = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["sdist"]
    assert {".ci", ".github", "benchmarks", "docs", "tests"} <= set(sdist["include"])


def test_the_oldest_row_runs_what_ci_runs():
    files = versions.without_extras()
    assert len(files) > 15
    assert all((ROOT / file).exists() for file in files), files
