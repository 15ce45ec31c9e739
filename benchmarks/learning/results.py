"""Results as data: one tidy file per experiment, one line per run, only appended to.

A run is identified by its task, optimizer, rate, seed and steps. A run that is in the
file already is not repeated, so a stopped experiment resumes.
"""

import csv
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
KEY = ("task", "optimizer", "rate", "seed", "steps")
TEXT = ("task", "optimizer", "curve")


class Results:
    """The runs in a file, by key. Each is a dict of numbers and text."""

    def __init__(self, path: Path):
        self.path = path
        self.runs: dict[tuple, dict] = {}
        self._rows: dict[tuple[str, str], dict[tuple, dict]] = {}
        if path.exists():
            with path.open(newline="") as file:
                for line in csv.DictReader(file):
                    self._add({name: _parse(name, line[name]) for name in line})

    def __contains__(self, key):
        return _key(*key) in self.runs

    def append(self, runs: list[dict]):
        """Add runs to the file. Their columns must be those that it has."""
        if not runs:
            return
        columns = list(next(iter(self.runs.values()), runs[0]))
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if new:
                writer.writeheader()
            for run in runs:
                writer.writerow({name: _format(value) for name, value in run.items()})
        for run in runs:
            self._add(run)

    def select(self, task: str, optimizer: str, **wanted: float) -> list[dict]:
        """The runs of an optimizer on a task, whose columns have these numbers."""
        return [
            run
            for run in self._rows.get((task, optimizer), {}).values()
            if all(_same(run[name], value) for name, value in wanted.items())
        ]

    def _add(self, run):
        key = _key(*(run[name] for name in KEY))
        self.runs[key] = run
        self._rows.setdefault(key[:2], {})[key] = run


def _key(task, optimizer, rate, seed, steps):
    return task, optimizer, f"{rate:.6g}", int(seed), int(steps)


def _same(one, other):
    return f"{one:.6g}" == f"{other:.6g}"


def _format(value):
    return value if isinstance(value, str) else f"{value:.6g}"


def _parse(name, text):
    return text if name in TEXT else float(text)
