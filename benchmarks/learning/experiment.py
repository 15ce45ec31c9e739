"""An experiment: a question, tasks with rows, and what was not run."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.learning.optimizers import Row
from benchmarks.learning.protocol import QUICK, Size, measure
from benchmarks.learning.results import Results
from benchmarks.learning.task import Task


class Experiment(NamedTuple):
    name: str
    question: str
    bounds: str  # the size of what was run
    plan: Callable[[], list[tuple[Task, list[Row]]]]
    size: Size = Size()
    not_run: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("adam", "adam_c C=5 FIFO")  # rows of --quick, or none
    against: dict[str, str] = {}  # task -> the task whose bases it is compared with

    def quick_plan(self) -> list[tuple[Task, list[Row]]]:
        """The first task with twenty steps, a few rows, and no more lanes than runs."""
        task, rows = self.plan()[0]
        task = task._replace(steps=20, points=min(task.points, 2), lanes=QUICK.seeds)
        return [(task, [row for row in rows if row.name in self.quick])]


def run(
    experiment: Experiment,
    results: Results,
    quick=False,
    lanes: int | None = None,
    only: list[str] | None = None,
) -> None:
    """Make the runs that ``results`` lack, ``lanes`` at once.

    ``only`` names the rows, by their first words. Several processes can share an
    experiment if each has its own rows and its own file.
    """
    plan = experiment.quick_plan() if quick else experiment.plan()
    for task, rows in plan:
        task = task._replace(lanes=lanes or task.lanes)
        if only:
            rows = [row for row in rows if any(_named(row, text) for text in only)]
        measure(task, rows, QUICK if quick else experiment.size, results)


def _named(row, text):
    return f"{row.name} ".startswith(f"{text} ")
