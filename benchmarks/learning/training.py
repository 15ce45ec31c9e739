"""Many runs at once: seeds, rates and numbers are lanes of one jitted scan."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import memoptax
from benchmarks.learning import task as tasks

SMOOTH = 0.98  # decay of the running loss that stops a run


class AverageState(NamedTuple):
    """State of with_average."""

    count: jax.Array
    inner: Any
    average: Any  # like the params


def with_average(tx, decay) -> optax.GradientTransformation:
    """``tx`` with an average of the weights, at which the run is scored."""

    def init_fn(params):
        return AverageState(jnp.zeros((), jnp.int32), tx.init(params), params)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("with_average needs params, which are None.")
        updates, inner = tx.update(updates, state.inner, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        # While there are few steps it is their plain mean.
        weight = jnp.minimum(decay, (count - 1) / count)
        new = optax.apply_updates(params, updates)
        average = optax.tree.update_moment(new, state.average, weight, 1)
        return updates, AverageState(count, inner, average)

    return optax.GradientTransformation(init_fn, update_fn)


def train(task: tasks.Task, make: Callable, runs: list[dict], schedule=None, loss=None):
    """Train ``runs``, each a dict of ``rate``, ``seed`` and the numbers of ``make``.

    ``schedule`` replaces the task's, and ``loss`` makes another loss from the task's.
    Yields a list of records for each ``task.lanes`` of them.
    """
    task = task._replace(name="", schedule=schedule or task.schedule)
    if loss is not None:
        task = task._replace(loss=_other_loss(loss, task.loss))
    data, task = task.data, task._replace(data=None)
    begin, run, score = _begin(_common(task)), _run(task, make), _score(_common(task))
    for first in range(0, len(runs), task.lanes):
        part = runs[first : first + task.lanes]
        padded = part + part[-1:] * (task.lanes - len(part))
        numbers = {
            name: np.array([each[name] for each in padded], np.float32)
            for name in padded[0].keys() - {"seed"}
        }
        seeds = np.array([each["seed"] for each in padded], np.int32)
        params, draws = begin(data, seeds)
        params, losses, made = run(data, params, draws, numbers)
        records = score(data, params, losses, seeds) | made
        records = jax.device_get(records)
        yield [
            {name: _plain(records[name][lane]) for name in sorted(records)}
            for lane in range(len(part))
        ]


@functools.cache
def _other_loss(change, loss):
    return change(loss)


def _plain(value):
    if value.ndim:
        return " ".join(f"{number:.5g}" for number in value)
    return float(value)


def _common(task):
    """The functions that all optimizers of a task share, and that compile once."""
    return task._replace(schedule=None, watch=None, curve=None, until=None, loss=None)


def _compiled(function):
    """A function of data and lanes, jitted.

    Runs are short and programs are many. LLVM's lowest level compiles in a quarter of
    the time, and the code is as fast.
    """
    options = {"xla_backend_optimization_level": "1"}
    lanes = function.__code__.co_argcount - 1
    batched = jax.vmap(function, in_axes=(None, *(0,) * lanes))
    return jax.jit(batched, compiler_options=options)


def _keys(seed):
    """The keys of a run's parameters and of its batches."""
    return jax.random.split(jax.random.key(seed))


@functools.cache
def _begin(task):
    def begin(data, seed):
        init_key, run_key = _keys(seed)
        counts = jnp.arange(task.steps)
        draws = jax.vmap(lambda count: task.draw(data, run_key, count))(counts)
        return task.init(init_key), draws

    return _compiled(begin)


@functools.cache
def _score(task):
    def score(data, params, losses, seed):
        record = task.score(data, params, losses, _keys(seed)[1])
        return record | {"train": jnp.mean(losses[-max(1, task.steps // 20) :])}

    return _compiled(score)


@functools.cache
def _run(task, make):
    """Only the steps of every lane, because this compiles for each optimizer."""

    def run(data, params, draws, numbers):
        numbers = dict(numbers)
        rate, shape = numbers.pop("rate"), task.schedule(task.steps)
        tx = make(lambda count: rate * shape(count), task.steps, **numbers)

        def step(carry, drawn):
            params, state, running, count = carry
            batch = task.batch(data, drawn)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            if task.online and isinstance(state, AverageState):
                loss = task.loss(state.average, batch)
            updates, state = tx.update(grads, state, params)
            new = optax.apply_updates(params, updates)
            watched = _watched(task, state)
            if task.until is not None:
                going = running > task.until
                new = jax.tree.map(lambda n, p: jnp.where(going, n, p), new, params)
                # While there are few steps it is their plain mean.
                weight = jnp.minimum(SMOOTH, count / (count + 1))
                running = weight * running + (1 - weight) * loss
                watched["moving"] = going.astype(jnp.float32)
            return (new, state, running, count + 1), (loss, watched)

        def part(carry, draws):
            carry, made = jax.lax.scan(step, carry, draws)
            kept = task.curve(data, carry[0]) if task.curve else 0.0
            return carry, (made, kept)

        parts = jax.tree.map(lambda x: x.reshape(task.points, -1, *x.shape[1:]), draws)
        start = params, tx.init(params), jnp.float32(1e9), jnp.float32(0)
        (params, state, *_), (made, curve) = jax.lax.scan(part, start, parts)
        losses, watched = jax.tree.map(lambda x: x.reshape(task.steps), made)
        if isinstance(state, AverageState):
            params = state.average
        record = {}
        for name, value in watched.items():
            last = name == "acceptance"  # which is already a share of all offers
            record[name] = value[-1] if last else jnp.mean(value[task.steps // 10 :])
        if task.curve is not None:
            record["curve"] = curve
        return params, losses, record

    return _compiled(run)


def _watched(task, state):
    """The buffer's acceptance and mean age (or NaN), and what the task watches."""
    try:
        stats = memoptax.buffer_stats(state)
    except ValueError:
        stats = {"acceptance": jnp.nan, "age_mean": jnp.nan}
    # A value stored in this step is one step old when it is next read.
    watched = {"acceptance": stats["acceptance"], "age": stats["age_mean"] + 1}
    if task.watch is not None:
        watched |= task.watch(state)
    return jax.tree.map(jnp.asarray, watched)
