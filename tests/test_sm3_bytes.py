"""Bytes of SM3: a momentum in few bytes, the state, and the temporaries of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from compiled import compile_step, step_of
from labels import named
from streams import normal, updates_of
from untyped import untyped

pytestmark = pytest.mark.few(2)


# A momentum in few bytes


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.03)]
)
def test_stored_momentum_stays_close(dtype, tolerance):
    params = jnp.zeros((6, 40))
    gradients = [jnp.asarray(normal(t, (6, 40)), jnp.float32) for t in range(100)]
    exact = updates_of(memoptax.scale_by_sm3(0.9), params, gradients)
    stored = updates_of(
        memoptax.scale_by_sm3(0.9, momentum_dtype=dtype), params, gradients
    )
    for u, v in zip(exact, stored):
        largest = np.abs(np.asarray(u)).max(1, keepdims=True)
        assert (np.abs(np.asarray(u - v)) <= tolerance * largest).all()


def test_int8_scales_keep_small_rows_apart_from_large_ones():
    tx = untyped(
        memoptax.scale_by_sm3(0.9, cover=memoptax.covers.whole, momentum_dtype="int8")
    )
    state = tx.init(jnp.zeros((2, 8)))
    _, state = tx.update(jnp.zeros((2, 8)).at[0, 0].set(1.0), state)
    _, state = tx.update(jnp.zeros((2, 8)).at[1].set(1e-6), state)
    assert state.momentum.dtype == jnp.int8 and state.scales[0].shape == (2, 1)
    stored = state.momentum * state.scales[0]
    np.testing.assert_allclose(stored[0, 0], 0.9 * 0.1, rtol=1e-2)
    np.testing.assert_allclose(stored[1], 0.1e-6, rtol=1e-2)


# The state


def state_bytes(tx, params):
    return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, 8192),
        ({"momentum": 0}, 8192),
        ({"momentum": 0.9}, 8192 + 4 * 1024**2),
        ({"momentum": 0.9, "momentum_dtype": "bfloat16"}, 8192 + 2 * 1024**2),
        ({"momentum": 0.9, "momentum_dtype": "int8"}, 8192 + 1024**2 + 4096),
        ({"cover": memoptax.covers.rows}, 4096),
        ({"cover": memoptax.covers.whole}, 4),
        ({"cover": memoptax.covers.full}, 4 * 1024**2),
        ({"cover": memoptax.covers.blocks(None, 128)}, 32),
    ],
    ids=named,
)
def test_state_bytes_of_a_1024_matrix(options, size):
    params = {"w": jnp.zeros((1024, 1024))}
    assert state_bytes(memoptax.sm3(1e-3, **options), params) == size + 4
    half = {"w": jnp.zeros((1024, 1024), jnp.bfloat16)}
    assert state_bytes(memoptax.sm3(1e-3, **options), half) == size + 4


def test_state_bytes_of_a_tree():
    params = {"a": jnp.zeros(()), "b": jnp.zeros(7), "c": jnp.zeros((3, 3, 5, 6))}
    assert state_bytes(memoptax.sm3(1e-3), params) == 4 * (1 + 7 + 17) + 4
    with jax.enable_x64(True):
        double = {"w": jnp.zeros((3, 4), jnp.float64)}
        assert state_bytes(memoptax.sm3(1e-3), double) == 8 * 7 + 4


# A step


SHAPES = {
    "square": [(1024, 1024)] * 4,
    "convolution": [(3, 3, 256, 256)] * 4,
    "vector": [(2**20,)] * 4,
    "tall": [(100_000, 64)],
    "wide": [(64, 100_000)],
    "small": [(256, 256)] * 16,
}


OPTIONS = {
    "plain": {},
    "first": {"variant": "I", "beta": 0.9},
    "momentum": {"momentum": 0.9},
    "int8": {"momentum": 0.9, "momentum_dtype": "int8"},
}


def temporaries(tx, shapes, dtype):
    """Temporaries of a donated step, in float32 copies of the parameters."""

    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    compiled = compile_step(step_of(tx), params, state, params)
    size = sum(4 * p.size for p in params)
    return compiled.memory_analysis().temp_size_in_bytes / size


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, name) for kind in SHAPES for name in ("plain", "int8")]
    + [("convolution", "first"), ("tall", "first")]
    + [("wide", "momentum"), ("small", "momentum"), ("vector", "momentum")],
)
def test_no_temporary_of_the_size_of_the_parameters(kind, options):
    """The temporaries are maxima over a few rows, eight or ten if an axis is short."""
    options = OPTIONS[options]
    tx = memoptax.sm3(1e-3, **options)
    least = 0.1 if kind in ("square", "vector", "small") else 0.25
    more = 0.13 if "momentum_dtype" in options else 0
    assert temporaries(tx, SHAPES[kind], jnp.float32) <= least + more


ODD = {
    "two sections": [(5025, 1100)],
    "long rows": [(777, 3001)],
    "few rows": [(20, 30011)],
    "short rows": [(100_003, 20)],
    "channels first": [(300, 301, 3, 3)],
}


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
@pytest.mark.parametrize("kind", [*SHAPES, *ODD])
def test_no_float32_copy_of_half_precision(kind):
    """bfloat16 is widened entry by entry when it is read."""
    shapes = {**SHAPES, **ODD}[kind]
    assert temporaries(memoptax.sm3(1e-3), shapes, jnp.bfloat16) <= 0.25


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_no_temporary_behind_another_transformation():
    """Each reader computes again what can be computed entry by entry."""
    tx = optax.chain(optax.scale(0.5), memoptax.sm3(1e-3))
    assert temporaries(tx, SHAPES["square"], jnp.float32) <= 0.1
