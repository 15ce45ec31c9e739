"""The task that E8, E9 and E11 share: MNIST-1D and a small perceptron."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.learning import data
from benchmarks.learning import task as tasks
from benchmarks.learning.models import accuracy, cross_entropy, mlp

MODEL = mlp(40, 100, 100, 10)


@functools.cache
def arrays():
    """The three parts as JAX arrays."""
    return jax.tree.map(jnp.asarray, data.mnist1d())


def loss(params, batch):
    x, y = batch
    return cross_entropy(MODEL.apply(params, x), y)


@functools.cache
def draw(size):
    """Rows of ``size`` examples, drawn with replacement."""

    def rows(split, key, count):
        key, examples = jax.random.fold_in(key, count), len(split.train[1])
        return jax.random.randint(key, (size,), 0, examples)

    return rows


def batch(split, rows):
    x, y = split.train
    return x[rows], y[rows]


def score(split, params, losses, key):
    del losses, key
    return {
        "validation": accuracy(
            MODEL.apply(params, split.validation[0]), split.validation[1]
        ),
        "test": accuracy(MODEL.apply(params, split.test[0]), split.test[1]),
        "test_loss": loss(params, split.test),
    }


def task(name, steps, size=100, schedule=tasks.cosine) -> tasks.Task:
    return tasks.Task(
        name=name,
        data=arrays(),
        init=MODEL.init,
        draw=draw(size),
        batch=batch,
        loss=loss,
        score=score,
        steps=steps,
        schedule=schedule,
        largest=True,
        unit="test accuracy, %",
    )
