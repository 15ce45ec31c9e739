"""One experiment per file, with its question, its bounds and what was not run."""

import importlib

CORE = ("e7", "e8", "e9", "e10", "e11", "e12", "e13")
MORE = ("e8_more", "e9_more", "e10_more", "e11_more", "e12_more", "e13_more")
NAMES = (*CORE, *MORE)


def load() -> dict:
    """The experiments by name."""
    folder = "benchmarks.learning.experiments"
    return {
        name: importlib.import_module(f"{folder}.{name}").EXPERIMENT for name in NAMES
    }
