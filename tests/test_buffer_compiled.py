"""The compiled step of a buffer: no slot is copied, whatever C is."""

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


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("leaves", PARAMS)
@pytest.mark.parametrize("topc", [1, 5, 40])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_no_step_copies_the_buffer(dtype, topc, leaves, name, mesh):
    if dtype and topc == 1:
        return  # shown by 5 and 40
    tx = optax.chain(critical_gradients(topc, buffer_dtype=dtype), optax.sgd(0.1))
    params = {k: jnp.zeros(shape) for k, shape in PARAMS[leaves].items()}
    assert_slots_stay_in_place(name, tx, params, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("topc", [5, 40])
@pytest.mark.parametrize(
    ("params_dtype", "buffer_dtype", "limit"),
    [
        ("float32", "float16", 0.1),
        ("bfloat16", "int8", 2.1),
    ],
)
def test_nor_do_slots_of_half_precision(params_dtype, buffer_dtype, limit, topc, mesh):
    """XLA's CPU backend stores gradients of 16 bits in float32, whatever C is.

    Slots in bfloat16 it converts as a whole; GPU and TPU do not.
    """
    tx = optax.chain(critical_gradients(topc, buffer_dtype=buffer_dtype), optax.sgd(1))
    params = {"w": jnp.zeros((768, 768), params_dtype)}
    assert_slots_stay_in_place("plain", tx, params, mesh, limit)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("topc", [1, 5, 40])
def test_no_step_of_adam_cm_copies_the_buffer(topc, name, mesh):
    params = {k: jnp.zeros(shape) for k, shape in PARAMS["one"].items()}
    tx = memoptax.adam_cm(0.1, topc=topc)
    assert_slots_stay_in_place(name, tx, params, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(memoptax.adamw_cm, amsgrad=True),
        memoptax.sgd_cm,
    ],
)
@pytest.mark.long
def test_no_variant_of_critical_momenta_copies_the_buffer(make, mesh):
    params = {k: jnp.zeros(shape) for k, shape in PARAMS["many"].items()}
    tx = make(0.1, topc=5)
    assert_slots_stay_in_place("plain", tx, params, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.long
def test_no_step_copies_what_is_in_int8(name, mesh):
    params = {k: jnp.zeros(shape) for k, shape in PARAMS["many"].items()}
    tx = memoptax.adam_cm(0.1, mu_dtype="int8", buffer_dtype="int8")
    assert_slots_stay_in_place(name, tx, params, mesh)


def test_a_copied_buffer_would_be_seen():
    """The form that everyone writes first, so that the checks above can fail."""
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
