"""From runs to lines: the results of one optimizer on one task, and its controls."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.learning import cost, intervals, protocol
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.intervals import Interval
from benchmarks.learning.results import Results

# Columns beside the score whose differences to the base are reported.
DIFFERENCES = ("rare", "top", "trace")


class Line(NamedTuple):
    """Means over fresh seeds. A difference is None if there is nothing to pair."""

    name: str
    rate: float
    tried: int  # number of rates, 0 for a base at a multiple of its rate
    at_edge: bool
    lost: int  # fresh seeds whose score is not finite
    seeds: int
    score: Interval | None
    over_base: Interval | None
    over_fifo: Interval | None
    base: str
    means: dict[str, float]  # of the other columns
    differences: dict[str, Interval]  # to the base, of those in DIFFERENCES
    bytes: float  # of state per parameter, NaN if another line has it
    time: dict[str, float]  # of a step, ms and ratio; empty if not measured


def lines(experiment: Experiment, folder: Path, quick=False):
    """The tasks of an experiment, each with its lines, as far as they were run."""
    results = Results(folder / f"{experiment.name}.csv")
    times = cost.read(folder / f"{experiment.name}-cost.csv")
    plan = experiment.quick_plan() if quick else experiment.plan()
    by_name = {task.name: (task, rows) for task, rows in plan}
    for task, rows in plan:
        made = []
        home, home_rows = by_name[experiment.against.get(task.name, task.name)]
        named = {row.name: row for row in home_rows}
        for row in rows:
            choice = protocol.choose(task, row, results)
            if choice is None:
                continue
            base = row.base or (row.name if home is not task else "")
            ours = _scores(task, row.name, choice.rate, results)
            if not ours:
                continue
            factors = (1,) if row.base or home is not task else (0.5, 1, 2, 4)
            for factor in factors:
                found = _scores(task, row.name, choice.rate * factor, results)
                alone = factor == 1
                against = base if alone else row.name
                made.append(
                    Line(
                        name=row.name
                        if alone
                        else f"{row.name}, {_times(factor)} × rate",
                        rate=choice.rate * factor,
                        tried=len(choice.rates) if alone else 0,
                        at_edge=alone and choice.at_edge,
                        lost=sum(not math.isfinite(x) for x in found.values()),
                        seeds=len(found),
                        score=_interval(found),
                        over_base=_over(found, home, named.get(against), results),
                        over_fifo=_over(found, task, _row(rows, row.fifo), results),
                        base=against,
                        means=_means(task, row.name, choice.rate * factor, results),
                        differences=_differences(
                            task,
                            row.name,
                            choice.rate * factor,
                            named.get(against),
                            results,
                        ),
                        bytes=(
                            cost.bytes_per_parameter(task, row) if alone else math.nan
                        ),
                        time=times.get((task.name, row.name), {}) if alone else {},
                    )
                )
        yield task, made


class Pending(NamedTuple):
    """A row whose rate is chosen, but whose fresh seeds were not run."""

    name: str
    choice: protocol.Choice
    validation: float  # the mean of the chosen rate, the best of several


def pending(experiment: Experiment, folder: Path):
    """The tasks of an experiment, each with the rows that wait for fresh seeds."""
    results = Results(folder / f"{experiment.name}.csv")
    for task, rows in experiment.plan():
        waiting = []
        for row in rows:
            choice = protocol.choose(task, row, results)
            if choice and not _scores(task, row.name, choice.rate, results):
                runs = results.select(
                    task=task.name,
                    optimizer=row.name,
                    rate=choice.rate,
                    steps=task.steps,
                )
                mean = float(np.mean([run["validation"] for run in runs]))
                waiting.append(Pending(row.name, choice, mean))
        yield task, waiting


def _times(factor):
    return "½" if factor == 0.5 else f"{factor:g}"


def _row(rows, name):
    return next((row for row in rows if row.name == name), None)


def _fresh(task, name, rate, results):
    found = results.select(task=task.name, optimizer=name, rate=rate, steps=task.steps)
    return [run for run in found if run["seed"] >= protocol.FRESH]


def _scores(task, name, rate, results, column="test"):
    runs = _fresh(task, name, rate, results)
    return {run["seed"]: run[column] for run in runs if column in run}


def _means(task, name, rate, results):
    runs = _fresh(task, name, rate, results)
    known = {"task", "optimizer", "rate", "seed", "steps", "validation", "curve"}
    names = [name for name in (runs[0] if runs else {}) if name not in known]
    return {name: float(np.mean([run[name] for run in runs])) for name in names}


def _interval(scores):
    finite = all(map(math.isfinite, scores.values()))
    return (
        intervals.of_mean(list(scores.values())) if len(scores) > 1 and finite else None
    )


def _differences(task, name, rate, base, results):
    """The paired differences to the base of the columns in ``DIFFERENCES``."""
    made = {}
    for column in DIFFERENCES:
        ours = _scores(task, name, rate, results, column)
        if ours and all(map(math.isfinite, ours.values())):
            made[column] = _over(ours, task, base, results, column)
    return {column: value for column, value in made.items() if value}


def _over(ours, task, row, results, column="test"):
    """The paired difference to a row at its own rate."""
    if row is None:
        return None
    choice = protocol.choose(task, row, results)
    theirs = _scores(task, row.name, choice.rate, results, column) if choice else {}
    seeds = ours.keys() & theirs.keys()
    both = [scores[seed] for scores in (ours, theirs) for seed in seeds]
    if len(seeds) < 2 or not all(map(math.isfinite, both)):
        return None
    return intervals.of_difference(ours, theirs)


def curves(task, name, rate, results) -> np.ndarray:
    """The curves of the runs, (seeds, points)."""
    runs = _fresh(task, name, rate, results)
    return np.array([[float(x) for x in run["curve"].split()] for run in runs])
