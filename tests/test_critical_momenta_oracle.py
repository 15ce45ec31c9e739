"""Critical momenta on streams of ties, zeros and faults, against NumPy."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

import oracle
from streams import SHAPES, replay

pytestmark = pytest.mark.few(2)

nan, inf = float("nan"), float("inf")


RULES = {
    "adam": ("adam_cm", {"topc": 3}),
    "one slot": ("adam_cm", {"topc": 1, "amsgrad": True, "synced": False}),
    "released": ("adam_cm", {"topc": 2, "skip_first": True, "aggr": "mid"}),
    "decoupled": ("adamw_cm", {"topc": 2, "weight_decay": 0.1, "aggr": "mean"}),
    "bfloat16": ("adamw_cm", {"topc": 5, "buffer_dtype": "bfloat16"}),
    "sgd": ("sgd_cm", {"topc": 2}),
    "sgd unsynced": ("sgd_cm", {"topc": 3, "synced": False, "aggr": "mean"}),
    "fifo": ("sgd_cm", {"topc": 3, "fifo_probability": 1.0}),
    "int8": ("adam_cm", {"topc": 2, "mu_dtype": "int8", "buffer_dtype": "int8"}),
    "int8 slots": ("sgd_cm", {"topc": 3, "buffer_dtype": "int8", "synced": False}),
    "bfloat16 momentum": ("sgd_cm", {"topc": 2, "mu_dtype": "bfloat16"}),
}


# A number whose step is not finite does not change.
guard = optax.stateless(
    lambda updates, params: jax.tree.map(
        lambda u: jnp.where(jnp.isfinite(u), u, 0), updates
    )
)


@functools.cache
def ruled(rule):
    """A jitted run of one rule. Its numbers can still be chosen."""
    name, static = RULES[rule]

    @jax.jit
    def run(params, grads, numbers):
        if name != "sgd_cm":
            numbers = {**numbers, "eps": 1e-3}
        tx = getattr(memoptax, name)(**numbers, **static)
        return replay(optax.chain(tx, guard), params, grads)[0]

    return run


@st.composite
def hard_streams(draw, steps=14):
    """Gradients with many zeros and exact ties, and sometimes NaN or infinity."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    scales = draw(
        st.lists(
            st.sampled_from([0, 0.25, 0.5, 1, 1, 2]), min_size=steps, max_size=steps
        )
    )
    tied = draw(st.booleans())
    grads = {}
    for name, shape in SHAPES.items():
        values = random.normal(size=(steps, *shape))
        values = np.sign(values) if tied else values
        grads[name] = np.einsum("t,t...->t...", np.asarray(scales, float), values)
    for bad in draw(st.lists(st.integers(0, steps - 1), max_size=3)):
        leaf = draw(st.sampled_from(list(SHAPES)))
        grads[leaf][bad].flat[0] = draw(st.sampled_from([nan, inf, -inf]))
    return grads


@pytest.mark.parametrize("rule", RULES)
@hypothesis.settings(max_examples=20)
@hypothesis.given(
    grads=hard_streams(),
    decay=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    kappa=st.sampled_from([0.0, 0.5, 1.0, -1.0]),
    b1=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_agrees_with_the_oracle(rule, x64, grads, decay, kappa, b1):
    name, static = RULES[rule]
    # A traced κ of 0 emits m as stored, and the oracle's Adam stores none.
    hypothesis.assume(kappa != 0 or "mu_dtype" not in static)
    # Products with .9 are rounded, and m may be half-way between numbers of bfloat16.
    hypothesis.assume(b1 != 0.9 or static.get("mu_dtype") != "bfloat16")
    numbers = {"learning_rate": 0.1, "decay": decay, "kappa": kappa, "b1": b1}
    params = {k: np.ones(shape) for k, shape in SHAPES.items()}
    if kappa == 0:  # a κ of 0 is Adam, which has no rule for faults
        grads = {k: np.nan_to_num(g, posinf=1, neginf=-1) for k, g in grads.items()}
    got = ruled(rule)(params, grads, numbers)

    static = dict(static)
    fifo = [True] * len(grads["a"]) if static.pop("fifo_probability", 0) else None
    options: dict[str, Any] = {**numbers, **static}
    if name != "sgd_cm":
        options["eps"] = 1e-3
    with np.errstate(invalid="ignore"):
        want = oracle.run(name, params, grads, fifo=fifo, guarded=True, **options)
    for leaf in params:
        np.testing.assert_allclose(got[leaf], want[leaf], rtol=1e-11, atol=1e-11)
