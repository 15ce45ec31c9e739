"""The task that E12 and E13 share: the next character of Python's help."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.learning import data
from benchmarks.learning import task as tasks
from benchmarks.learning.models import Model, cross_entropy, transformer

CONTEXT, SCORED = 64, 256  # SCORED is the number of windows in a score
PYTHON = 3, 12  # the kept runs use its help as text


@functools.cache
def arrays():
    return jax.tree.map(jnp.asarray, data.text())


def windows(text, starts):
    """Inputs and the characters that follow them, each (len(starts), CONTEXT)."""
    rows = text[starts[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
    return rows[:, :-1], rows[:, 1:]


@functools.cache
def draw(size):
    """Where ``size`` windows of the text start."""

    def starts(text, key, count):
        key, limit = jax.random.fold_in(key, count), len(text.train) - CONTEXT - 1
        return jax.random.randint(key, (size,), 0, limit)

    return starts


def batch(text, starts):
    return windows(text.train, starts)


def of_width(width, layers=2, heads=2) -> Model:
    """The transformer: 2 layers of width 64 have 115,072 parameters."""
    return transformer(int(arrays().vocabulary), width, layers, heads, CONTEXT)


@functools.cache
def functions(model: Model):
    """The loss and the score of a model."""

    def loss(params, batch):
        text, following = batch
        return cross_entropy(model.apply(params, text), following)

    def held_out(params, part):
        starts = jnp.linspace(0, len(part) - CONTEXT - 2, SCORED).astype(jnp.int32)
        return loss(params, windows(part, starts))

    def score(text, params, losses, key):
        del losses, key
        return {
            "validation": held_out(params, text.validation),
            "test": held_out(params, text.test),
        }

    return loss, score


def task(name, steps, size, model: Model) -> tasks.Task:
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
        schedule=tasks.cosine,
        unit="test loss, nats per character",
        lanes=5,
        python=PYTHON,
    )
