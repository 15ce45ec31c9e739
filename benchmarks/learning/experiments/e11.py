"""E11: does CM find flatter minima at equal training loss?

Every run stops once its running loss is down to the same value. Power iteration then
finds the largest eigenvalue of the Hessian, and Hutchinson's probes its trace. Both use
the same thousand training examples.
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp

from benchmarks.learning import optimizers as o
from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import mnist
from benchmarks.learning.models import Model
from benchmarks.learning.protocol import Size

STEPS, UNTIL, EXAMPLES = 2000, 0.7, 1000
ITERATIONS, PROBES = 40, 20


def sharpness(loss, params, key) -> dict:
    """The largest eigenvalue of a loss's Hessian H, and an estimate of its trace.

    ``adaptive`` is the largest eigenvalue of |w| H |w|. It does not change if the
    weights of one layer grow and those of the next shrink.
    """
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def times(vector):
        return jax.jvp(jax.grad(lambda p: loss(unravel(p))), (flat,), (vector,))[1]

    def probe(carry, key):
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return carry, signs @ times(signs)

    def top(scale):
        start = jax.random.normal(key, flat.shape)

        def power(vector, _):
            image = scale * times(scale * vector)
            return image / jnp.linalg.norm(image), vector @ image

        start = start / jnp.linalg.norm(start)
        return jax.lax.scan(power, start, length=ITERATIONS)[1][-1]

    keys = jax.random.split(key, PROBES)
    _, traces = jax.lax.scan(probe, 0, keys)
    return {
        "top": top(jnp.ones_like(flat)),
        "adaptive": top(jnp.abs(flat)),
        "trace": jnp.mean(traces),
    }


@functools.cache
def scored(model: Model):
    """The score of a model, with the sharpness of its training loss."""
    loss, plain = mnist.functions(model)

    def score(split, params, losses, key):
        some = jax.tree.map(lambda x: x[:EXAMPLES], split.train)
        found = sharpness(
            lambda p: loss(p, some), params, jax.random.fold_in(key, 2**31 - 1)
        )
        found = {name: jnp.log10(jnp.maximum(x, 1e-6)) for name, x in found.items()}
        train = {"train_loss": loss(params, split.train)}
        return plain(split, params, losses, key) | train | found

    return score


def rows():
    settings = (*o.ONE, *o.SHORT, (20, 0.99), (20, "FIFO"))
    return [
        *o.bases("adam", "sgd", "adam, SAM", "sgd, SAM"),
        *o.bases("ademamix", "adam, averaged", "adagrad", "sm3", "sm3_cm"),
        *o.bases("adafactor"),
        *o.sm3_cm(),
        *o.adam_cm(settings),
        *o.adam_c(),
    ]


def task(name, schedule, model=mnist.MODEL):
    made = mnist.task(name, STEPS, schedule=schedule, model=model)
    return made._replace(score=scored(model), until=UNTIL)


def plan():
    return [(task("MNIST-1D to equal loss", tasks.warmup), rows())]


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
    quick=("adam",),
)
