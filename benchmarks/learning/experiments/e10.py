"""E10: online, each batch is tested before it is trained on. Does memory help?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.learning import data
from benchmarks.learning import optimizers as o
from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.models import cross_entropy, mlp
from benchmarks.learning.protocol import Size

BATCH, HIDDEN = 32, 32


def split(flights: data.Flights):
    """Batches in the order of time: categories, distance and labels."""
    steps = len(flights.late) // BATCH
    cut = steps * BATCH

    def batches(x):
        return jnp.asarray(x[:cut].reshape(steps, BATCH, *x.shape[1:]))

    parts = flights.categories, flights.distance, flights.late
    return tuple(map(batches, parts)), steps


def draw(batches, key, count):
    """Nothing is random: batches come in the order of time."""
    del batches, key
    return count


def batch(batches, count):
    return jax.tree.map(lambda x: x[count], batches)


@functools.cache
def model(sizes):
    """The initial parameters and the loss of a perceptron.

    Its inputs are one-hot categories and the distance.
    """
    net = mlp(sum(sizes) + 1, HIDDEN, 2)
    offsets = jnp.asarray(np.cumsum([0, *sizes[:-1]]))

    def loss(params, batch):
        categories, distance, late = batch
        hot = jax.nn.one_hot(categories + offsets, sum(sizes)).sum(axis=1)
        logits = net.apply(params, jnp.concatenate([hot, distance], axis=1))
        return cross_entropy(logits, late)

    return net.init, loss


def score(batches, params, losses, key):
    """The mean loss. The first third chooses the rate, the rest is the score."""
    del batches, params, key
    third = len(losses) // 3
    return {"validation": jnp.mean(losses[:third]), "test": jnp.mean(losses[third:])}


@functools.cache
def task():
    flights = data.flights()
    batches, steps = split(flights)
    init, loss = model(flights.sizes)
    return tasks.Task(
        name="flights",
        data=batches,
        init=init,
        draw=draw,
        batch=batch,
        loss=loss,
        score=score,
        steps=steps,
        schedule=tasks.constant,
        online=True,
        unit="mean loss of the last two thirds, nats",
        lanes=8,
    )


def plan():
    rows = [
        *o.bases("adam", "sgd", "ademamix", "adam, averaged"),
        *o.bases("adagrad", "adagrad from 0"),
        *o.bases("adafactor", "sm3", "sm3_cm"),
        *o.sm3_cm(),
        *o.adam_c(),
        *o.adam_cm((*o.ONE, *o.SHORT)),
    ]
    return [(task(), rows)]


EXPERIMENT = Experiment(
    name="e10",
    question="Do critical momenta help on data seen once, in the order of time?",
    bounds=(
        "327,346 flights in the order of their scheduled departure, late by more than "
        "15 minutes or not; a perceptron with 32 hidden units, batches of 32 (10,229 "
        "steps), a constant rate; each batch is tested before it is trained on; twenty "
        "fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=20),
    quick=("adam", "adam_cm C=5 FIFO"),
)
