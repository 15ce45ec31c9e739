"""The task that E8, E9 and E11 share: MNIST-1D and a small perceptron."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.learning import data
from benchmarks.learning import task as tasks
from benchmarks.learning.models import Model, accuracy, cross_entropy, mlp

MODEL = mlp(40, 100, 100, 10)


@functools.cache
def arrays():
    """The three parts as JAX arrays."""
    return jax.tree.map(jnp.asarray, data.mnist1d())


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


@functools.cache
def functions(model: Model):
    """The loss and the score of a model."""

    def loss(params, batch):
        x, y = batch
        return cross_entropy(model.apply(params, x), y)

    def score(split, params, losses, key):
        del losses, key

        def correct(part):
            return accuracy(model.apply(params, part[0]), part[1])

        return {
            "validation": correct(split.validation),
            "test": correct(split.test),
            "test_loss": loss(params, split.test),
        }

    return loss, score


loss, score = functions(MODEL)


def task(
    name, steps, size=100, schedule=tasks.cosine, model: Model = MODEL
) -> tasks.Task:
    loss, score = functions(model)
    return tasks.Task(
        name=name,
        data=arrays(),
        init=model.init,
        draw=draw(size),
        batch=batch,
        loss=loss,
        score=score,
        steps=steps,
        schedule=schedule,
        largest=True,
        unit="test accuracy, %",
    )
