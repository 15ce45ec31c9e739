"""E9: what does a buffer remember where labels are wrong or classes are rare?

An extra parameter, ``tag``, shows what the slots hold. The loss is linear in it. Its
gradient is the share of tagged examples (wrong label or rare class) in the batch,
scaled down so that it hardly changes the norm. So the norm of the mean of the slots at
``tag`` is the share of tagged examples in the slots.
"""

import functools

import jax
import jax.numpy as jnp

import memoptax as mo
from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import mnist
from benchmarks.learning.models import cross_entropy
from benchmarks.learning.protocol import Size

BATCH, STEPS, FLIPS, TINY = 16, 1500, 0.2, 1e-6  # of the core
RARE = 5  # classes from here on: the five rarest of ten


def init(key):
    return {"net": mnist.MODEL.init(key), "tag": jnp.zeros(1)}


def loss(params, batch):
    x, y, tagged = batch
    told = TINY * jnp.mean(tagged) * params["tag"][0]
    return cross_entropy(mnist.MODEL.apply(params["net"], x), y) + told


@functools.cache
def flipped(size, share):
    """A ``share`` of the examples have a wrong label, the same throughout a run."""

    def draw(split, key, count):
        rows = mnist.draw(size)(split, key, count)

        def of_example(row):
            own = jax.random.fold_in(jax.random.fold_in(key, 2**30), row)
            other = jax.random.randint(jax.random.fold_in(own, 1), (), 1, 10)
            return jnp.where(jax.random.uniform(own) < share, other, 0)

        return rows, jax.vmap(of_example)(rows)

    return draw


def flipped_batch(split, drawn):
    rows, shifts = drawn
    x, y = mnist.batch(split, rows)
    return x, (y + shifts) % 10, shifts > 0


def rare(split, key, count):
    """Classes drawn in proportion to 1, 1/2, ... 1/10."""
    cumulated = jnp.cumsum(_weights(split.train[1]))
    draws = jax.random.uniform(jax.random.fold_in(key, count), (BATCH,))
    return jnp.searchsorted(cumulated, draws * cumulated[-1])


def rare_batch(split, rows):
    x, y = mnist.batch(split, rows)
    return x, y, y >= RARE


def _weights(labels):
    counts = jnp.bincount(labels, length=10)
    return (1 / (labels + 1.0)) / counts[labels]


def remembered(state):
    """The share of tagged examples in the slots, or NaN without a buffer."""

    def is_buffer(node):
        return isinstance(node, mo.Buffer)

    for buffer in filter(is_buffer, jax.tree.leaves(state, is_leaf=is_buffer)):
        tags = buffer._replace(slots=buffer.slots["tag"])
        return {"share": mo.buffer_stats(tags)["mean_norm"] / TINY}
    return {"share": jnp.nan}


def score_flips(split, params, losses, key):
    return mnist.score(split, params["net"], losses, key) | {"rare": jnp.nan}


def score_rare(split, params, losses, key):
    """Every class counts the same. ``rare`` is the accuracy on the five rarest."""
    del losses, key

    def correct(part, wanted):
        x, y = part
        hits = mnist.MODEL.apply(params["net"], x).argmax(-1) == y
        weights = wanted(y) / jnp.bincount(y, length=10)[y]
        return 100 * jnp.sum(hits * weights) / jnp.sum(weights)

    return {
        "validation": correct(split.validation, jnp.ones_like),
        "test": correct(split.test, jnp.ones_like),
        "test_loss": jnp.nan,
        "rare": correct(split.test, lambda y: y >= RARE),
    }


@functools.cache
def make(name, draw, batch, score, steps=STEPS):
    return mnist.task(name, steps)._replace(
        init=init,
        draw=draw,
        batch=batch,
        loss=loss,
        score=score,
        watch=remembered,
        unit="test accuracy, %",
    )


def flips(name, size, share, steps=STEPS):
    return make(name, flipped(size, share), flipped_batch, score_flips, steps)


def plan():
    rows = [
        *o.bases("adam", "sgd", "ademamix", "adam, averaged", "adagrad", "sm3"),
        *o.bases("adafactor", "sm3_cm, C=0", "sm3_cm, C=0, int8"),
        *o.adam_c(),
        *o.adam_cm((*o.ONE, *o.SHORT)),
        *o.sgd_c(),
    ]
    return [
        (flips("flips of one in five", BATCH, FLIPS), rows),
        (make("classes in proportion to 1/k", rare, rare_batch, score_rare), rows),
    ]


EXPERIMENT = Experiment(
    name="e9",
    question="Does a buffer remember what is rare, or what is wrong?",
    bounds=(
        "MNIST-1D, the perceptron of E8, batch 16, 1,500 steps, warm-up and cosine; "
        "one label in five replaced, or classes drawn in proportion to 1/k; twenty "
        "fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=20),
)
