"""The protocol: rates are chosen on validation, scores come from fresh paired seeds.

Every optimizer starts with the same number of rates, a factor of 2 apart. Where the
best of them is at an edge of the grid, the grid grows there. A rate is chosen by the
mean validation score of three seeds, and the optimizer then runs at it on fresh seeds.
These are the same for all optimizers, and so are the initial parameters and the
batches. Bases are also trained at ½, 2 and 4 times their rate. Scores are those of the
end of a run.
"""

import math
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.learning.optimizers import Row
from benchmarks.learning.results import Results
from benchmarks.learning.task import Task
from benchmarks.learning.training import train

FRESH = 100  # the first fresh seed
MULTIPLES = (0.5, 2, 4)  # of a base's rate


class Size(NamedTuple):
    rates: int = 5  # of the first grid
    tuning_seeds: int = 3
    seeds: int = 10
    growth: int = 6  # rates by which a grid may grow


QUICK = Size(rates=2, tuning_seeds=1, seeds=2, growth=0)


class Choice(NamedTuple):
    rate: float
    rates: tuple[float, ...]  # all that were tried
    at_edge: bool


def measure(task: Task, rows: list[Row], size: Size, results: Results) -> None:
    """Make all runs of ``rows`` on ``task`` that ``results`` do not hold yet."""
    tuning, fresh = range(size.tuning_seeds), range(FRESH, FRESH + size.seeds)
    while True:
        wanted = []
        for row in rows:
            wanted += [(row, rate, seed) for rate in grid(row, size) for seed in tuning]
            choice = choose(task, row, results)
            if choice and choice.at_edge and len(choice.rates) < _most(size):
                rate = beyond(choice)
                wanted += [(row, rate, seed) for seed in tuning]
        if not _make(task, wanted, results, "choosing rates"):
            break
    wanted = []
    for row in rows:
        rate = chosen(task, row, results).rate
        factors = (1,) if row.base else (1, *MULTIPLES)
        wanted += [(row, rate * factor, seed) for factor in factors for seed in fresh]
    _make(task, wanted, results, "fresh seeds")


def _most(size):
    return size.rates + size.growth


def grid(row: Row, size: Size) -> list[float]:
    """The rates that are tried first."""
    return [row.start * 2.0 ** (k - size.rates // 2) for k in range(size.rates)]


def choose(task: Task, row: Row, results: Results) -> Choice | None:
    """The best rate on validation so far, or None before any run."""
    scores: dict[float, list[float]] = {}
    for run in results.select(task=task.name, optimizer=row.name, steps=task.steps):
        if run["seed"] < FRESH:
            scores.setdefault(run["rate"], []).append(run["validation"])
    if not scores:
        return None
    rates = sorted(scores)
    sign = 1 if task.largest else -1

    def quality(rate):
        mean = sign * np.mean(scores[rate])
        return mean if math.isfinite(mean) else -math.inf

    best = max(rates, key=quality)
    return Choice(best, tuple(rates), best in (rates[0], rates[-1]))


def chosen(task: Task, row: Row, results: Results) -> Choice:
    choice = choose(task, row, results)
    if choice is None:
        raise ValueError(f"results hold no run of {row.name} on {task.name}.")
    return choice


def beyond(choice: Choice) -> float:
    """The next rate at the edge that is best."""
    up = choice.rate == choice.rates[-1]
    return choice.rate * (2 if up else 0.5)


def _make(task, wanted, results, title):
    """Make the runs that are missing, and return their number."""
    missing = [
        (row, rate, seed)
        for row, rate, seed in wanted
        if (task.name, row.name, rate, seed, task.steps) not in results
    ]
    programs: dict = {}
    for row, rate, seed in missing:
        program = row.make, row.schedule, row.loss
        programs.setdefault(program, []).append((row, rate, seed))
    with tqdm(total=len(missing), unit="run", disable=not missing) as bar:
        for program, runs in programs.items():
            bar.set_description(f"{task.name}, {title}, {runs[0][0].name}")
            lanes = [
                {"rate": rate, "seed": seed, **row.numbers} for row, rate, seed in runs
            ]
            done = 0
            for records in train(task, program[0], lanes, *program[1:]):
                part = runs[done : done + len(records)]
                results.append(
                    [
                        {
                            "task": task.name,
                            "optimizer": row.name,
                            "rate": rate,
                            "seed": seed,
                            "steps": task.steps,
                            **record,
                        }
                        for (row, rate, seed), record in zip(part, records)
                    ]
                )
                done += len(records)
                bar.update(len(records))
    return len(missing)
