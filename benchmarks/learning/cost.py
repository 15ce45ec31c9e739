"""What a step costs: the bytes of the state, and the time of one run's whole step.

Optimizers take turns, so that a busy machine slows all of them, and the median of the
turns is kept. Rows that share a program share a time: a buffer's decay or rule only
changes how often it stores a value.
"""

import csv
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import optax
from tqdm import tqdm

import memoptax
from benchmarks.learning.experiment import Experiment

ROUNDS, STEPS = 15, 10
COLUMNS = ("task", "optimizer", "ms", "ratio")


def bytes_per_parameter(task, row) -> float:
    """The bytes of the optimizer's state per parameter."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    tx = row.make(row.start, task.steps, **row.numbers)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return memoptax.state_bytes(tx, params) / parameters


def measure(experiment: Experiment, path: Path, quick=False) -> None:
    """Write the time of a step of all rows, and its ratio to the first row's."""
    lines = []
    for task, rows in experiment.quick_plan() if quick else experiment.plan():
        times = _time(task, rows, 2 if quick else ROUNDS)
        first = times[rows[0].make]
        for row in rows:
            spent = times[row.make]
            line = (task.name, row.name, f"{1e3 * spent:.4g}", f"{spent / first:.4g}")
            lines.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *lines])


def read(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The times in a file by task and optimizer, or none if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (line["task"], line["optimizer"]): {
                name: float(line[name]) for name in COLUMNS[2:]
            }
            for line in csv.DictReader(file)
        }


def _time(task, rows, rounds):
    """Median seconds of a donated step, by program."""
    first_of = {row.make: row for row in reversed(rows)}
    states, steps, times = {}, {}, {make: [] for make in first_of}
    for make, row in tqdm(first_of.items(), unit="program", desc="compiling"):
        tx = make(row.start, task.steps, **row.numbers)
        params = jax.jit(task.init)(jax.random.key(0))

        def step(carry, count, tx=tx):
            params, state = carry
            drawn = task.draw(task.data, jax.random.key(1), count)
            batch = task.batch(task.data, drawn)
            grads = jax.grad(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        states[make] = jax.tree.map(np.array, (params, tx.init(params)))
        steps[make] = jax.jit(step, donate_argnums=0)
        states[make] = jax.block_until_ready(steps[make](states[make], 0))
    for _ in tqdm(range(rounds), unit="round", desc="timing"):
        for make, step in steps.items():
            begin = time.perf_counter()
            for count in range(STEPS):
                states[make] = step(states[make], count)
            jax.block_until_ready(states[make])
            times[make].append((time.perf_counter() - begin) / STEPS)
    return {make: statistics.median(spent) for make, spent in times.items()}
