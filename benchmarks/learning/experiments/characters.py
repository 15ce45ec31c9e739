"""The task that E12 and E13 share: the next character of Python's help."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.learning import data
from benchmarks.learning import task as tasks
from benchmarks.learning.models import cross_entropy, transformer

CONTEXT, SCORED = 32, 256  # SCORED is the number of windows in a score


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


@functools.cache
def functions(vocabulary, width, layers, heads):
    """The initial parameters, the loss and the score of a transformer."""
    model = transformer(vocabulary, width, layers, heads, CONTEXT)

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

    return model.init, loss, score


def task(name, steps, size, width, layers=1, heads=2) -> tasks.Task:
    text = arrays()
    init, loss, score = functions(int(text.vocabulary), width, layers, heads)
    return tasks.Task(
        name=name,
        data=text,
        init=init,
        draw=draw(size),
        batch=batch,
        loss=loss,
        score=score,
        steps=steps,
        schedule=tasks.cosine,
        unit="test loss, nats per character",
        lanes=5,
    )
