"""Build a release, check it, and install it without the source tree on each Python.

    python benchmarks/smoke.py               # needs build and twine
    python benchmarks/smoke.py --installed   # only try what is installed here

The sdist and the wheel are installed one after the other in a new environment of every
Python that benchmarks/versions.py finds, and tried from an empty folder.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def installed():
    """Try the package that is installed: it trains, checks, reports and is typed."""
    begin = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import optax

    between = time.perf_counter()
    import memoptax

    end = time.perf_counter()
    place = Path(memoptax.__file__).parent
    assert "site-packages" in place.parts, f"{place} is not an installed package"
    assert (place / "py.typed").exists()
    assert memoptax.__version__ == importlib.metadata.version("memoptax")
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    for tx in (
        memoptax.adam_c(0.1, topc=2),
        memoptax.adam_cm(0.1, topc=1, buffer_dtype="int8", mu_dtype="int8"),
        memoptax.sm3(0.1),
        memoptax.sm3_cm(0.1),
    ):
        state = tx.init(params)
        step = jax.jit(tx.update)
        for _ in range(3):
            updates, state = step(params, state, params)
        memoptax.check_state(tx, params, state)
        assert jnp.isfinite(optax.tree.norm(updates))
        assert memoptax.state_bytes(tx, params) > 0
    assert memoptax.sparse.apply_updates
    print(
        f"memoptax {memoptax.__version__}, jax {jax.__version__}, Python "
        f"{sys.version.split()[0]}: it works. Imports: jax and optax "
        f"{between - begin:.2f} s, memoptax {end - between:.2f} s."
    )


def build(folder):
    """The wheel and the sdist, both checked."""
    dist = folder / "dist"
    build = [sys.executable, "-m", "build", "-q", "--outdir", dist, ROOT]
    subprocess.run(build, check=True)
    files = sorted(dist.iterdir())
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], check=True
    )
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--pythons", nargs="*", default=None)
    options = parser.parse_args(argv)
    if options.installed:
        installed()
        return
    import versions

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        away = folder / "away"
        away.mkdir()
        files = build(folder)
        for version in options.pythons or versions.PYTHONS:
            python = versions.find(version)
            if python is None:
                print(f"Python {version} is not here.")
                continue
            venv = folder / version
            subprocess.run([python, "-m", "venv", venv], check=True)
            inside = venv / "bin/python"
            again = []
            for file in files:
                # Compiling all that is installed takes longer than trying it.
                install = [inside, "-m", "pip", "install", "-q", "--no-compile"]
                subprocess.run([*install, *again, file], check=True)
                once = [inside, "-c", "import jax, optax, memoptax"]  # compiles these
                subprocess.run(once, cwd=away, check=True)
                script = [inside, Path(__file__).absolute(), "--installed"]
                subprocess.run(script, cwd=away, check=True)
                again = ["--force-reinstall", "--no-deps"]


if __name__ == "__main__":
    main()
