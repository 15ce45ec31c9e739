"""The compiled step of a buffer: no stack of slots is copied, for any C."""

import functools

import jax.numpy as jnp
import optax
import pytest

import memoptax
from memoptax import critical_gradients

from compiled import (
    CONTEXTS,
    PARAMS,
    assert_slots_stay_in_place,
    compile_step,
    temporaries,
    whole_buffer_operations,
)

pytestmark = [
    pytest.mark.cpu_only("it reads what XLA makes for a CPU"),
    pytest.mark.few(3),
]


# Every capacity in every context; one leaf and many take turns.
GRADIENTS = [
    ("float32", topc, leaves, name)
    for topc, turn in ((1, 0), (5, 1), (40, 0))
    for name, leaves in zip(CONTEXTS, [*PARAMS, *PARAMS, *PARAMS][turn:])
]
GRADIENTS += [
    ("int8", topc, leaves, name)
    for name, topc, leaves in zip(
        CONTEXTS, (5, 40, 5, 40, 5), ("many", "one", "one", "many", "many")
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "topc", "leaves", "name"), GRADIENTS)
def test_no_step_copies_the_buffer(dtype, topc, leaves, name, mesh):
    tx = optax.chain(critical_gradients(topc, buffer_dtype=dtype), optax.sgd(0.1))
    params = {k: jnp.zeros(shape) for k, shape in PARAMS[leaves].items()}
    assert_slots_stay_in_place(name, tx, params, mesh)


MOMENTA = {
    "one slot": functools.partial(memoptax.adam_cm, topc=1),
    "five": memoptax.adam_cm,
    "forty": functools.partial(memoptax.adam_cm, topc=40),
    "amsgrad": functools.partial(memoptax.adamw_cm, amsgrad=True),
    "sgd": memoptax.sgd_cm,
    "int8": functools.partial(memoptax.adam_cm, mu_dtype="int8", buffer_dtype="int8"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "leaves", "name"),
    [
        ("one slot", "many", "scan"),
        ("five", "one", "plain"),
        ("five", "one", "vmap"),
        ("five", "many", "mesh"),
        ("forty", "one", "apply_if_finite"),
        ("forty", "one", "scan"),
        ("amsgrad", "many", "plain"),
        ("sgd", "many", "plain"),
        *(("int8", "many", name) for name in CONTEXTS),
    ],
)
@pytest.mark.few(2)
def test_no_step_of_critical_momenta_copies_the_buffer(make, leaves, name, mesh):
    params = {k: jnp.zeros(shape) for k, shape in PARAMS[leaves].items()}
    assert_slots_stay_in_place(name, MOMENTA[make](0.1), params, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params_dtype", "buffer_dtype", "topc", "limit"),
    [
        ("float32", "float16", 5, 0.1),
        ("float32", "float16", 40, 0.1),
        ("bfloat16", "int8", 5, 2.1),
        ("bfloat16", "int8", 40, 3.1),  # a running sum rounds them too
    ],
)
def test_no_step_copies_slots_of_half_precision(
    params_dtype, buffer_dtype, topc, limit, mesh
):
    """XLA's CPU backend stores 16-bit gradients in float32, for any C.

    It converts whole stacks of bfloat16 slots. GPU and TPU do not.
    """
    tx = optax.chain(critical_gradients(topc, buffer_dtype=buffer_dtype), optax.sgd(1))
    params = {"w": jnp.zeros((768, 768), params_dtype)}
    assert_slots_stay_in_place("plain", tx, params, mesh, limit)


def test_a_copied_buffer_would_be_seen():
    """The obvious but wrong form. It shows that the checks above can fail."""
    params = jnp.zeros((256, 256))
    slots = jnp.zeros((6, 256, 256))

    def naive(params, slots, gradient):
        mean = slots.sum(0) / 5
        norms = jnp.sqrt(jnp.sum(slots**2, (1, 2)))
        slots = slots.at[jnp.argmin(norms)].set(gradient)
        return params - gradient - mean, jnp.where(norms.min() > 1, slots, slots + 1)

    compiled = compile_step(naive, params, slots, params)
    assert temporaries(compiled, params) > 0.9 or whole_buffer_operations(
        compiled, {slots.size}
    )
