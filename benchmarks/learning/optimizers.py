"""Optimizers as rows: a name, a function that makes one, its numbers, and its base.

Rows that share the function share a compiled program. So the numbers (decay, κ, whether
the oldest entry is evicted, whether keys are random) are traced, and a control needs no
compilation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import memoptax
from benchmarks.learning import task as tasks
from benchmarks.learning.training import with_average


class Row(NamedTuple):
    name: str
    make: Callable  # schedule, steps, **numbers -> transformation
    start: float  # the middle of its first grid of rates
    base: str = ""  # the row that it is compared with; empty for a base
    fifo: str = ""  # the row with the same buffer that forgets the oldest
    numbers: dict[str, float] = {}
    schedule: Callable | None = None  # instead of the task's
    loss: Callable | None = None  # task's loss -> the loss that it trains on


def _alone(optimizer, **static):
    """``make`` of an optimizer without a buffer."""

    def make(rate, steps):
        return optimizer(rate, **static)

    return make


def ademamix(rate, steps):
    """AdEMAMix with both warm-ups. The slow half-life is a tenth of the run."""
    first, last = jnp.log(0.5) / jnp.log(0.9), steps / 10

    def b3(count):
        return 0.5 ** (1 / (first + (last - first) * jnp.minimum(count / steps, 1)))

    def alpha(count):
        return 5.0 * jnp.minimum(count / steps, 1)

    return optax.contrib.ademamix(rate, b3=b3, alpha=alpha)


def averaged_adam(rate, steps):
    """Adam, scored at an average of the weights over about the last tenth."""
    return with_average(optax.adam(rate), 1 - 20 / steps)


def averaged_sgd(rate, steps):
    return with_average(optax.sgd(rate, momentum=0.9), 1 - 20 / steps)


def averaged_plain_sgd(rate, steps):
    return with_average(optax.sgd(rate), 1 - 20 / steps)


def sharpness_aware(loss, radius=0.05):
    """The loss at the worst nearby parameters, at the cost of two gradients (SAM)."""

    def worst(params, batch):
        slope = jax.grad(loss)(params, batch)
        scale = radius / jnp.maximum(optax.tree.norm(slope), 1e-12)
        move = jax.lax.stop_gradient(jax.tree.map(lambda g: scale * g, slope))
        return loss(jax.tree.map(jnp.add, params, move), batch)

    return worst


@functools.cache
def buffered(optimizer, topc, **static):
    """``make`` of an optimizer with a buffer of ``topc``."""

    def make(rate, steps, decay, kappa, fifo, random):
        def priority(gradients):
            norms = jax.tree.map(lambda g: jnp.sqrt(jnp.sum(g**2)), gradients)
            norm = optax.tree.sum(norms)
            return jnp.where(random > 0, _hash(norm), norm)

        return optimizer(
            rate,
            topc=topc,
            decay=decay,
            kappa=kappa,
            fifo_probability=fifo,
            priority_fn=priority,
            **static,
        )

    return make


def _hash(norm):
    """A number in [0, 1) that does not depend on the size of ``norm``."""
    bits = jax.lax.bitcast_convert_type(norm.astype(jnp.float32), jnp.uint32)
    return jax.random.uniform(jax.random.key(bits))


def buffered_rows(name, base, start, optimizer, settings, **static) -> list[Row]:
    """Rows of one optimizer with a buffer.

    ``settings`` are pairs of C and decay. Instead of a decay, the second may be
    ``"FIFO"``, ``"random"`` (keys from a hash, decay .99) or ``"κ=1e-6"`` (decay .7).
    """
    known = {
        "FIFO": {"decay": 0.7, "fifo": 1.0},
        "random": {"decay": 0.99, "random": 1.0},
        "κ=1e-6": {"decay": 0.7, "kappa": 1e-6},
    }
    default = {"decay": 0.7, "kappa": 1.0, "fifo": 0.0, "random": 0.0}
    rows = []
    for topc, setting in settings:
        numbers = known.get(setting) or {"decay": setting}
        label = setting if setting in known else f"{setting:g}".removeprefix("0")
        fifo = f"{name} C={topc} FIFO" if (topc, "FIFO") in settings else ""
        make = buffered(optimizer, topc, **static)
        title = f"{name} C={topc} {label}"
        fifo = "" if fifo == title else fifo
        rows.append(Row(title, make, start, base, fifo, default | numbers))
    return rows


ADAM, SGD, SM3 = 4e-3, 0.064, 0.128
_adam, _sgd = _alone(optax.adam), _alone(optax.sgd, momentum=0.9)
BASES = {
    "adam": Row("adam", _adam, ADAM),
    "sgd": Row("sgd", _sgd, SGD),
    "plain sgd": Row("plain sgd", _alone(optax.sgd), 4 * SGD),
    "ademamix": Row("ademamix", ademamix, ADAM / 4, "adam"),
    "adam, averaged": Row("adam, averaged", averaged_adam, ADAM, "adam"),
    "sgd, averaged": Row("sgd, averaged", averaged_sgd, SGD, "sgd"),
    "nadamw": Row("nadamw", _alone(optax.nadamw, weight_decay=0.0), ADAM, "adam"),
    "lion": Row("lion", _alone(optax.lion), ADAM / 16, "adam"),
    "adafactor": Row(
        "adafactor", _alone(optax.adafactor, min_dim_size_to_factor=16), 0.032, "adam"
    ),
    "adagrad": Row("adagrad", _alone(optax.adagrad), 0.032, "adam"),
    "muon": Row("muon", _alone(optax.contrib.muon), 0.016, "adam"),
    "sm3": Row("sm3", _alone(memoptax.sm3), SM3, "adam"),
    "sm3, own schedule": Row(
        "sm3, own schedule",
        _alone(memoptax.sm3),
        SM3,
        "adam, SM3's schedule",
        schedule=tasks.cooldown,
    ),
    "adam, own schedule": Row(
        "adam, SM3's schedule",
        _alone(optax.adam),
        ADAM,
        "adam",
        schedule=tasks.cooldown,
    ),
    "sgd, own schedule": Row(
        "sgd, SM3's schedule",
        _alone(optax.sgd, momentum=0.9),
        SGD,
        "sgd",
        schedule=tasks.cooldown,
    ),
    "adagrad, own schedule": Row(
        "adagrad, SM3's schedule",
        _alone(optax.adagrad),
        SM3,
        "adam, SM3's schedule",
        schedule=tasks.cooldown,
    ),
    "sm3 momentum": Row(
        "sm3 momentum", _alone(memoptax.sm3, momentum=0.9), SM3, "adam"
    ),
    "sm3 momentum, int8": Row(
        "sm3 momentum, int8",
        _alone(memoptax.sm3, momentum=0.9, momentum_dtype="int8"),
        SM3,
        "adam",
    ),
}
_SM3_CM = {"topc": 1, "decay": 0.9, "buffer_dtype": "int8", "mu_dtype": "int8"}
BASES |= {
    "sm3_cm": Row(
        "sm3_cm", _alone(memoptax.sm3_cm), SM3 / 16, "adam", "sm3_cm C=5 FIFO"
    ),
    "sm3_cm, C=1, int8": Row(
        "sm3_cm, C=1, int8",
        _alone(memoptax.sm3_cm, **_SM3_CM),
        SM3 / 16,
        "adam",
        "sm3_cm, C=1, int8, FIFO",
    ),
    "sm3_cm, C=1, int8, FIFO": Row(
        "sm3_cm, C=1, int8, FIFO",
        _alone(memoptax.sm3_cm, fifo_probability=1.0, **_SM3_CM),
        SM3 / 16,
        "adam",
    ),
    "sm3_cm, C=0": Row(
        "sm3_cm, C=0", _alone(memoptax.sm3_cm, topc=0), SM3 / 16, "adam"
    ),
    "sm3_cm, C=0, int8": Row(
        "sm3_cm, C=0, int8",
        _alone(memoptax.sm3_cm, topc=0, mu_dtype="int8"),
        SM3 / 16,
        "adam",
    ),
    "adagrad from 0": Row(
        "adagrad from 0",
        _alone(optax.adagrad, initial_accumulator_value=0.0),
        0.032,
        "adam",
    ),
    "plain sgd, averaged": Row(
        "plain sgd, averaged", averaged_plain_sgd, 4 * SGD, "plain sgd"
    ),
    "adam, SAM": Row("adam, SAM", _adam, ADAM, "adam", loss=sharpness_aware),
    "sgd, SAM": Row("sgd, SAM", _sgd, SGD, "sgd", loss=sharpness_aware),
}
BASES |= {
    f"{name}, own schedule": BASES[name]._replace(
        name=f"{name}, SM3's schedule",
        base="adam, SM3's schedule",
        fifo="",
        schedule=tasks.cooldown,
    )
    for name in ("sm3_cm", "sm3 momentum", "ademamix", "adafactor")
}

ONE = ((1, 0.9), (1, "FIFO"))
FULL = (
    *ONE,
    (5, 0.7),
    (5, 0.9),
    (5, 0.99),
    (5, "FIFO"),
    (5, "random"),
    (5, "κ=1e-6"),
    (20, 0.99),
    (20, "FIFO"),
)
SHORT = ((5, 0.7), (5, 0.99), (5, "FIFO"), (5, "random"), (5, "κ=1e-6"))


def bases(*names) -> list[Row]:
    return [BASES[name] for name in names]


def sgd_c(settings=SHORT, momentum: float | None = 0.9) -> list[Row]:
    if momentum is None:
        return buffered_rows("sgd_c", "plain sgd", 2 * SGD, memoptax.sgd_c, settings)
    return buffered_rows(
        "sgd_c", "sgd", SGD / 2, memoptax.sgd_c, settings, momentum=momentum
    )


def adam_c(settings=SHORT) -> list[Row]:
    return buffered_rows("adam_c", "adam", ADAM / 2, memoptax.adam_c, settings)


def adam_cm(settings=SHORT) -> list[Row]:
    return buffered_rows("adam_cm", "adam", ADAM / 4, memoptax.adam_cm, settings)


def sm3_cm(settings=SHORT[1:]) -> list[Row]:
    """Controls of ``sm3_cm``, which is itself among the bases. Two have no buffer."""
    rows = buffered_rows("sm3_cm", "adam", SM3 / 16, memoptax.sm3_cm, settings)
    return rows + bases("sm3_cm, C=0", "sm3_cm, C=0, int8")


def _relative(rate, **options):
    """``adam_c`` of gradients divided by the running mean of their norms. The buffer
    keeps those that are large for their time. Adam by itself ignores the scale.
    """

    def init_fn(params):
        del params
        return jnp.zeros(()), jnp.zeros(())

    def update_fn(updates, state, params=None):
        del params
        norm, (mean, weight) = optax.tree.norm(updates), state
        mean, weight = 0.99 * mean + 0.01 * norm, 0.99 * weight + 0.01
        scale = weight / jnp.maximum(mean, 1e-30)
        return jax.tree.map(lambda u: u * scale, updates), (mean, weight)

    scaled = optax.GradientTransformation(init_fn, update_fn)
    return optax.chain(scaled, memoptax.adam_c(rate, **options))


class _Offer(NamedTuple):
    """What the buffer of ``_aligned`` stores: a gradient with its score."""

    gradient: Any
    score: jax.Array


def _aligned(rate, priority_fn=None, **options):
    """``adam_c`` that keeps the gradients most aligned with the momentum.

    The key of a gradient is 1 plus the cosine of its angle to an average of the earlier
    gradients. The score travels with the gradient as one more leaf.
    """
    inner = memoptax.adam_c(rate, priority_fn=lambda offer: offer.score, **options)

    def init_fn(params):
        return inner.init(_Offer(params, jnp.zeros(()))), optax.tree.zeros_like(params)

    def update_fn(updates, state, params=None):
        state, mean = state
        lengths = optax.tree.norm(updates) * optax.tree.norm(mean)
        cosine = optax.tree.vdot(updates, mean) / jnp.maximum(lengths, 1e-30)
        offer = _Offer(updates, 1 + cosine)
        made, state = inner.update(offer, state, _Offer(params, jnp.zeros(())))
        mean = optax.tree.update_moment(updates, mean, 0.9, 1)
        return made.gradient, (state, mean)

    return optax.GradientTransformation(init_fn, update_fn)


def _warming(rate, steps, decay, kappa, fifo, random):
    """``adam_c`` with κ from 0 to 1 over the first half of the run."""
    del kappa, random
    return optax.inject_hyperparams(memoptax.adam_c, static_args=("topc",))(
        rate,
        topc=5,
        decay=decay,
        kappa=lambda count: jnp.minimum(2 * count / steps, 1),
        fifo_probability=fifo,
    )


def variants() -> list[Row]:
    """Variants that might be better: other priorities, κ that rises from 0."""
    start, of_one = ADAM / 2, ((5, 0.99),)
    apart = buffered_rows(
        "adam_c by leaf", "adam", start, memoptax.adam_c, of_one, synced=False
    )
    relative = buffered_rows("adam_c relative", "adam", start, _relative, of_one)
    aligned = buffered_rows("adam_c aligned", "adam", start, _aligned, of_one)
    rows = [
        row._replace(fifo="adam_c C=5 FIFO") for row in (*apart, *relative, *aligned)
    ]
    settings = ((5, 0.7), (5, "FIFO"))
    critical, fifo = buffered_rows("adam_c", "adam", start, memoptax.adam_c, settings)
    end = ", κ from 0"
    rows.append(
        critical._replace(name=critical.name + end, make=_warming, fifo=fifo.name + end)
    )
    rows.append(fifo._replace(name=fifo.name + end, make=_warming))
    return rows


def int8_adam_cm(settings=ONE) -> list[Row]:
    """CM with slots and momentum in int8."""
    return buffered_rows(
        "int8 adam_cm",
        "adam",
        ADAM / 4,
        memoptax.adam_cm,
        settings,
        buffer_dtype="int8",
        mu_dtype="int8",
    )


def int8_adam_c(settings) -> list[Row]:
    """CG with slots in int8."""
    return buffered_rows(
        "int8 adam_c", "adam", ADAM / 2, memoptax.adam_c, settings, buffer_dtype="int8"
    )
