"""E11: does CM find flatter minima at equal training loss?

Every run stops once its running loss is down to the same value. Power iteration then
finds the largest eigenvalue of the Hessian, and Hutchinson's probes its trace. Both use
the same thousand training examples.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp

from benchmarks.learning import optimizers as o
from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import mnist
from benchmarks.learning.protocol import Size

STEPS, UNTIL, EXAMPLES = 2000, 0.7, 1000
ITERATIONS, PROBES = 40, 20


def sharpness(loss, params, key) -> dict:
    """The largest eigenvalue of a loss's Hessian, and an estimate of its trace."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def times(vector):
        return jax.jvp(jax.grad(lambda p: loss(unravel(p))), (flat,), (vector,))[1]

    def power(vector, _):
        image = times(vector)
        return image / jnp.linalg.norm(image), vector @ image

    def probe(carry, key):
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return carry, signs @ times(signs)

    keys = jax.random.split(key, PROBES)
    start = jax.random.normal(key, flat.shape)
    _, values = jax.lax.scan(power, start / jnp.linalg.norm(start), length=ITERATIONS)
    _, traces = jax.lax.scan(probe, 0, keys)
    return {"top": values[-1], "trace": jnp.mean(traces)}


def score(split, params, losses, key):
    some = jax.tree.map(lambda x: x[:EXAMPLES], split.train)
    found = sharpness(
        lambda p: mnist.loss(p, some), params, jax.random.fold_in(key, 2**31 - 1)
    )
    return (
        mnist.score(split, params, losses, key)
        | {"train_loss": mnist.loss(params, split.train)}
        | {name: jnp.log10(jnp.maximum(value, 1e-6)) for name, value in found.items()}
    )


def plan():
    task = mnist.task("MNIST-1D to equal loss", STEPS, schedule=tasks.warmup)
    settings = ((1, 0.9), (5, 0.7), (5, 0.99), (5, "FIFO"))
    rows = [
        *o.bases("adam", "sgd", "sm3"),
        *o.adam_cm(settings),
        *o.adam_c(((5, 0.7), (5, "FIFO"))),
    ]
    return [(task._replace(score=score, until=UNTIL), rows)]


EXPERIMENT = Experiment(
    name="e11",
    question="Do critical momenta find flatter minima at equal training loss?",
    bounds=(
        "MNIST-1D, the perceptron of E8, batch 100, a warm-up and a constant rate, "
        "until the running training loss is .7 (at most 2,000 steps); top eigenvalue "
        "and trace of the Hessian of 1,000 training examples; twenty fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=20),
    not_run=(
        "adaptive sharpness",
        "without a warm-up",
        "SAM",
        "the CNN",
        "C of 20, random keys, κ = 1e-6, AdEMAMix",
    ),
    quick=("adam", "adam_cm C=5 FIFO"),
)
