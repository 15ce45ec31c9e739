"""The fast suite over a matrix of Pythons and versions of jax, each in a new venv.

    python benchmarks/versions.py                      # every Python that is found
    python benchmarks/versions.py --pythons 3.13 --rows newest
    python benchmarks/versions.py --use .venv/bin/python --select tests/test_buffer.py

A row is a Python with the newest packages that pip finds, or with the oldest jax and
optax of pyproject.toml. The package is installed from its sdist, and the tests run from
there. In each row a state is saved, and each other row restores it and goes on. The
results are kept in benchmarks/results/versions.json; ``python benchmarks/trust.py``
writes them into docs/trust.md. ``--use`` takes environments that are there already.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/versions.json"
PYTHONS = ("3.11", "3.12", "3.13")
PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "equinox")

# Runs in each environment. It saves a state after five steps to a file, or goes on from
# the files of the others. Only arrays are kept, so that any version can read them.
STATES = """
import sys
import jax, jax.numpy as jnp, memoptax, numpy as np, optax

TX = {
    "adam_c": memoptax.adam_c(0.1, fifo_probability=0.5),
    "adam_cm": memoptax.adam_cm(0.1, topc=1, buffer_dtype="int8", mu_dtype="int8"),
    "sm3": memoptax.sm3(0.1, momentum=0.9),
}
STREAM = [np.float32(np.random.default_rng(t).normal(size=(4, 3))) for t in range(9)]
PARAMS = jnp.ones((4, 3))

def run(tx, carry, stream):
    step = jax.jit(tx.update)
    params, state = carry
    for gradient in stream:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state

for name, tx in TX.items():
    start = PARAMS, tx.init(PARAMS)
    carry = run(tx, start, STREAM[:5])
    end = run(tx, carry, STREAM[5:])[0]
    for file in sys.argv[2:]:
        leaves = list(np.load(f"{file}-{name}.npz").values())
        like, treedef = jax.tree.flatten(start)
        leaves = [jnp.asarray(a.view(x.dtype)) for a, x in zip(leaves, like)]
        found = treedef.unflatten(leaves)
        memoptax.check_state(tx, *found)
        np.testing.assert_allclose(run(tx, found, STREAM[5:])[0], end, 1e-5, 1e-6)
    if len(sys.argv) == 2:
        np.savez(f"{sys.argv[1]}-{name}.npz", *jax.tree.leaves(jax.device_get(carry)))
"""


def find(version):
    """A Python of this version, on the path or from pyenv, or None."""
    candidates = [shutil.which(f"python{version}")]
    if shutil.which("pyenv"):
        prefix = subprocess.run(
            ["pyenv", "prefix", version], capture_output=True, text=True
        )
        candidates.append(f"{prefix.stdout.strip()}/bin/python3")
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, candidates):
        if Path(python).exists():
            told = subprocess.run([python, "-c", ask], capture_output=True, text=True)
            if told.stdout.strip() == version:
                return python
    return None


def oldest():
    """The oldest jax, jaxlib and optax that pyproject.toml names, as pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line.replace(">=", "==") for line in project["dependencies"]]
    jaxlib = [pin.replace("jax", "jaxlib") for pin in pins if pin.startswith("jax=")]
    return pins + jaxlib


def without_extras():
    """The test files that need no more than jax and optax: .ci/run names them."""
    text = (ROOT / ".ci/run").read_text()
    part = text.split(".venv-oldest/bin/python -m pytest")[1].split("\n\n")[0]
    words = " ".join(word for word in part.split() if word.startswith("tests/test_"))
    # Bash expands its braces.
    command = ["bash", "-c", f"printf '%s\\n' {words}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


def install(python, kind, venv, sdist):
    """The Python of a new venv with the packages of a row."""
    subprocess.run([python, "-m", "venv", venv], check=True)
    inside = venv / "bin/python"
    pip = [inside, "-m", "pip", "install", "-q"]
    if kind == "newest":
        subprocess.run([*pip, f"{sdist}[test]"], check=True)
    else:
        extras = ["chex", "hypothesis", "pytest", "pytest-xdist"]
        subprocess.run([*pip, *oldest(), *extras], check=True)
        subprocess.run([*pip, "--no-deps", sdist], check=True)
    return inside


def versions(python):
    ask = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"kept = {{p: found[p] for p in {PACKAGES!r} if p in found}}\n"
        "print(json.dumps({'python': platform.python_version(), **kept}))"
    )
    told = subprocess.run([python, "-c", ask], capture_output=True, check=True)
    return json.loads(told.stdout)


def tests(python, kind, folder, select, workers):
    """How many tests passed, failed and were skipped."""
    chosen = select or (without_extras() if kind == "oldest" else [])
    marks = ["-m", "not slow and not long"] if kind == "oldest" else []
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [python, "-m", "pytest", "-q", f"-n{workers}", *marks, *chosen]
        begin = time.perf_counter()
        subprocess.run([*command, f"--junitxml={report}"], cwd=folder)
        minutes = (time.perf_counter() - begin) / 60
        suite = ET.parse(report).getroot().find("testsuite")
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors")}
    bad, skipped = count["failures"] + count["errors"], int(suite.get("skipped"))
    return {
        "passed": count["tests"] - bad - skipped,
        "failed": bad,
        "skipped": skipped,
        "minutes": round(minutes, 1),
    }


def states(python, folder, *files):
    command = [python, "-c", STATES, *map(str, files)]
    return subprocess.run(command, cwd=folder).returncode == 0


def build(folder):
    """The sdist, and where it is unpacked."""
    build = [sys.executable, "-m", "build", "-q", "--sdist", "--outdir", folder, ROOT]
    subprocess.run(build, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    return sdist, folder / sdist.name.removesuffix(".tar.gz")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pythons", nargs="*", default=PYTHONS)
    parser.add_argument("--rows", nargs="*", default=("newest", "oldest"))
    parser.add_argument("--use", nargs="*", help="Pythons of existing venvs")
    parser.add_argument("--select", nargs="*", default=[], help="tests to run instead")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--states-only", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        if options.use:
            rows, folder = [(Path(p).absolute(), "given") for p in options.use], ROOT
        else:
            sdist, folder = build(place)
            rows = []
            for version in options.pythons:
                python = find(version)
                if python is None:
                    print(f"Python {version} is not here.")
                    continue
                for kind in options.rows:
                    venv = place / f"{version}-{kind}"
                    rows.append((install(python, kind, venv, sdist), kind))
        kept, results = [], []
        for number, (python, kind) in enumerate(rows):
            row = versions(python) | {"packages": kind}
            if not options.states_only:
                row |= tests(python, kind, folder, options.select, options.workers)
            results.append(row | {"selected": " ".join(options.select)})
            kept.append(place / f"state-{number}")
            assert states(python, folder, kept[-1])
        for row, (python, _), own in zip(results, rows, kept):
            others = [file for file in kept if file != own]
            row["states restored"] = sum(
                states(python, folder, own, file) for file in others
            )
            row["states of others"] = len(others)
            print(row)
    command = "python benchmarks/versions.py " + " ".join(argv or sys.argv[1:])
    found = {"command": command.strip(), "rows": results}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
