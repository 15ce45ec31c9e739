"""E7: does CG converge faster, with true labels and with random labels?

The authors' script for covtype and rcv1 drew features and labels by two independent
random index sets, so that its labels did not depend on its features. Both kinds of
labels are tried.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from benchmarks.learning import data
from benchmarks.learning import optimizers as o
from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.models import mlp
from benchmarks.learning.protocol import Size

PENALTY, BATCH, STEPS = 0.01, 25, 4000
MODEL = mlp(9, 1)  # of shuttle


def loss(params, batch):
    """Logistic loss and PENALTY / 2 times the squared weights, the bias's too."""
    x, y = batch
    margins = (x @ params[0]["w"] + params[0]["b"])[:, 0] * (2 * y - 1)
    squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return jnp.mean(jax.nn.softplus(-margins)) + PENALTY / 2 * squares


def draw(parts, key, count):
    key, examples = jax.random.fold_in(key, count), len(parts[1])
    return jax.random.randint(key, (BATCH,), 0, examples)


def batch(parts, rows):
    x, y, _ = parts
    return x[rows], y[rows]


def gap(parts, params):
    """log10(F − F*), not below the precision of float32."""
    x, y, optimum = parts
    return jnp.log10(jnp.maximum(loss(params, (x, y)) - optimum, 1e-7))


def score(parts, params, losses, key):
    del losses, key
    return {"validation": gap(parts, params), "test": gap(parts, params)}


def optimum(x, y) -> float:
    """F*, by Newton's method in float64."""
    inputs = np.column_stack([x, np.ones(len(x))]).astype(float)
    signs = 2.0 * y - 1

    def value(w):
        return np.logaddexp(0, -signs * (inputs @ w)).mean() + PENALTY / 2 * w @ w

    def slope(w):
        pulls = -signs / (1 + np.exp(signs * (inputs @ w)))
        return inputs.T @ pulls / len(y) + PENALTY * w

    def curvature(w):
        p = 1 / (1 + np.exp(-(inputs @ w)))
        weighed = inputs * (p * (1 - p))[:, None]
        return inputs.T @ weighed / len(y) + PENALTY * np.eye(len(w))

    start = np.zeros(inputs.shape[1])
    found = scipy.optimize.minimize(
        value, start, jac=slope, hess=curvature, method="trust-exact", tol=1e-12
    )
    return float(found.fun)


@functools.cache
def parts(name: str):
    """Inputs, labels and the optimum of a task."""
    if name.startswith("segment"):
        x, classes = data.segment()
        y = (classes == 0).astype(np.int32)
    else:
        x, y = data.shuttle()
    if name.endswith("independent labels"):
        y = np.random.default_rng(0).permutation(y)
    return jnp.asarray(x), jnp.asarray(y), jnp.float32(optimum(x, y))


def task(name):
    made = parts(name)
    return tasks.Task(
        name=name,
        data=made,
        init=mlp(made[0].shape[1], 1).init,
        draw=draw,
        batch=batch,
        loss=loss,
        score=score,
        steps=STEPS,
        schedule=tasks.constant,
        unit="log10(F − F*) at the end",
        curve=gap,
        points=20,
        lanes=16,
    )


def plan():
    rows = [
        *o.bases("plain sgd", "adam", "ademamix", "adam, averaged"),
        *o.bases("plain sgd, averaged"),
        *o.sgd_c(momentum=None),
        *o.adam_c(),
        *o.adam_cm(),
    ]
    names = ("shuttle, true labels", "shuttle, independent labels")
    return [(task(name), rows) for name in (*names, "segment, one class of seven")]


EXPERIMENT = Experiment(
    name="e7",
    question="Does a buffer of gradients converge faster on a convex problem?",
    bounds=(
        "logistic regression on shuttle (49,097 × 9) and on segment (2,310 × 18), "
        "L2 .01, batch 25, 4,000 steps at a constant rate; the chosen rate has the "
        "least F − F* at the end; fifty fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=50),
    not_run=("covtype and rcv1 (they must be downloaded)",),
    quick=("plain sgd", "sgd_c C=5 FIFO"),
)
