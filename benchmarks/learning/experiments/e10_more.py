"""E10, more: tasks that follow one another, and a rule that changes.

Each batch is tested before it is trained on. Memory from before a change is stale.
``with_resets`` empties the buffer at every change. A user may not know when that is.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import memoptax
from benchmarks.learning import optimizers as o
from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import e10, mnist
from benchmarks.learning.models import cross_entropy, mlp
from benchmarks.learning.protocol import Size

BATCH, EACH, TASKS = 20, 200, 20  # EACH is the number of steps until a change
FEATURES, NOISE = 20, 0.05
RULE = mlp(FEATURES, 32, 2)


class ResetState(NamedTuple):
    count: jax.Array
    inner: Any


@functools.cache
def with_resets(make):
    """``make`` with a buffer that is emptied at every change."""

    def resetting(rate, steps, **numbers):
        inner = make(rate, steps, **numbers)

        def init_fn(params):
            return ResetState(jnp.zeros((), jnp.int32), inner.init(params))

        def update_fn(updates, state, params=None):
            changed = (state.count % EACH == 0) & (state.count > 0)
            empty = memoptax.reset_buffer(state.inner)
            kept = jax.tree.map(
                lambda e, k: jnp.where(changed, e, k), empty, state.inner
            )
            updates, kept = inner.update(updates, kept, params)
            return updates, ResetState(state.count + 1, kept)

        return optax.GradientTransformation(init_fn, update_fn)

    return resetting


def permuted(split, key, count):
    """Rows of MNIST-1D, and the order of the inputs in the current task."""
    own = jax.random.fold_in(jax.random.fold_in(key, 2**30), count // EACH)
    order = jax.random.permutation(own, split.train[0].shape[1])
    return mnist.draw(BATCH)(split, key, count), order


def permuted_batch(split, drawn):
    rows, order = drawn
    x, y = mnist.batch(split, rows)
    return x[:, order], y


def ruled(nothing, key, count):
    """Points, and their labels by a half-space that jumps at every change."""
    del nothing
    own = jax.random.fold_in(jax.random.fold_in(key, 2**30), count // EACH)
    rule = jax.random.normal(own, (FEATURES,))
    points, wrong = jax.random.split(jax.random.fold_in(key, count))
    x = jax.random.normal(points, (BATCH, FEATURES))
    y = (x @ rule > 0) ^ (jax.random.uniform(wrong, (BATCH,)) < NOISE)
    return x, y.astype(jnp.int32)


def ruled_batch(nothing, drawn):
    del nothing
    return drawn


def ruled_loss(params, batch):
    x, y = batch
    return cross_entropy(RULE.apply(params, x), y)


def plan():
    emptied = ((5, 0.7), (5, 0.99), (5, "FIFO"))
    reset = [
        row._replace(name=f"{row.name}, reset", make=with_resets(row.make), fifo="")
        for row in [*o.adam_c(emptied), *o.adam_cm(emptied)]
    ]
    rows = [
        *o.bases("adam", "sgd", "ademamix", "adam, averaged", "adagrad", "sm3"),
        *o.bases("adafactor", "sm3_cm, C=0", "sm3_cm, C=0, int8"),
        *o.adam_c(),
        *o.adam_cm(),
        *reset,
    ]
    steps, unit = EACH * TASKS, "mean loss of the last two thirds, nats"
    sequence = mnist.task("permuted MNIST-1D", steps, schedule=tasks.constant)
    return [
        (
            sequence._replace(
                draw=permuted,
                batch=permuted_batch,
                score=e10.score,
                largest=False,
                unit=unit,
                online=True,
            ),
            rows,
        ),
        (
            tasks.Task(
                name="a rule that jumps",
                data=jnp.zeros(()),
                init=RULE.init,
                draw=ruled,
                batch=ruled_batch,
                loss=ruled_loss,
                score=e10.score,
                steps=steps,
                schedule=tasks.constant,
                unit=unit,
                online=True,
            ),
            rows,
        ),
    ]


EXPERIMENT = Experiment(
    name="e10_more",
    question="Does memory help when the task changes, and does it help to empty it?",
    bounds=(
        "twenty tasks of 200 batches of 20, each batch seen once; a task is MNIST-1D "
        "with its inputs in another order, or a half-space of 20 dimensions with 5 % "
        "wrong labels; ten fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=10),
    not_run=("a rule that changes slowly",),
    quick=(),
)
