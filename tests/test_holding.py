"""The sum of many slots, which a CPU adds up in a loop."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoptax._buffer import holding
from memoptax._tensors import storage

from untyped import untyped

COUNTS = (1, 2, 5, 6, 7, 10, 11, 13, 20)


def slots(topc, dtype, key=0):
    """A stack of C + 1 slots, where they are, and a zero of float32."""
    keys = jax.random.split(jax.random.key(key), 2)
    values = 9 * jax.random.normal(keys[0], (topc + 1, 3, 4))
    places = list(jax.random.permutation(keys[1], topc + 1))
    scale = jnp.full((topc + 1, 3, 1), 0.5) if dtype == "int8" else None
    return storage.Stored(values.astype(dtype), scale), places, jnp.zeros(())


def one_by_one(stack, places, zero):
    each = [storage.decode(storage.read(stack, k), zero.dtype) for k in places[:-1]]
    return functools.reduce(jnp.add, each)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("topc", COUNTS)
@pytest.mark.few(9)
def test_many_slots_are_added_in_the_order_of_the_entries(topc, dtype):
    operands = slots(topc, dtype)
    found = holding.total(*operands)
    chex.assert_trees_all_equal(found, one_by_one(*operands))
    chex.assert_trees_all_equal(found, jax.jit(holding.total)(*operands))


@pytest.mark.parametrize("topc", [5, 6, 11, 20])
@pytest.mark.few(2)
def test_members_of_an_ensemble_have_their_own_order(topc):
    members = [slots(topc, "int8", key) for key in range(3)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *members)
    expected = jnp.stack([one_by_one(*member) for member in members])
    # In another order, because the spare slot is masked and not left out.
    np.testing.assert_allclose(jax.vmap(holding.total)(*batch), expected, 1e-6, 1e-5)


@pytest.mark.parametrize("topc", [5, 6, 11, 20])
@pytest.mark.few(2)
def test_the_derivative_is_one_for_every_slot_but_the_spare_one(topc):
    stack, places, zero = slots(topc, "float32")

    def weighted(values):
        total = holding.total(storage.Stored(values, None), places, zero)
        return jnp.sum(total * jnp.arange(12).reshape(3, 4))

    gradient = jax.jit(jax.grad(weighted))(stack.values)
    expected = jnp.tile(jnp.arange(12.0).reshape(3, 4), (topc + 1, 1, 1))
    chex.assert_trees_all_equal(gradient, expected.at[places[-1]].set(0))


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
@pytest.mark.parametrize(("topc", "loops"), [(5, 0), (10, 0), (11, 1), (20, 1)])
def test_only_many_slots_are_added_in_a_loop(topc, loops):
    lowered = jax.jit(holding.total).lower(*slots(topc, "int8"))
    assert untyped(lowered.compile()).as_text().count(" while(") == loops
