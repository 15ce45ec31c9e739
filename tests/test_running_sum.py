"""A running sum: the bound on its error, and when it is rebuilt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memoptax
from memoptax._buffer import running_sum
from memoptax._tensors import storage

from untyped import untyped

UNIT = 2.0**-24
SMALLEST = 2.0**-126


def bound(old, new, incoming, error=0.0, **fields):
    """The bound after a value of norm ``incoming`` replaced the first of ``old``."""
    tx = memoptax.critical_gradients(len(old), holding="sum")
    buffer = untyped(tx.init(jnp.zeros(()))).buffer._replace(
        **{"ages": jnp.ones((1, len(old)), jnp.int32), **fields},
        norms=jnp.asarray([old], jnp.float32),
        error=jnp.asarray([error], jnp.float32),
    )
    totals = [jnp.zeros(())]
    new, incoming = jnp.asarray([new]), jnp.asarray([incoming], jnp.float32)
    norms, error, inexact = running_sum.bound(buffer, totals, new, incoming)
    return np.asarray(norms, np.float64)[0], float(error[0]), bool(inexact)


@pytest.mark.parametrize(
    ("old", "incoming"),
    [
        ([3.0, 2.0, 1.0], 4.0),
        ([3e-28, 2e-28, 1e-28], 4e-28),  # what products may lose counts
        ([0.0, 0.0, 0.0, 0.0], 3e-28),
        ([3e-28, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_a_change_costs_a_unit_of_each_norm_and_what_the_products_lose(old, incoming):
    norms, error, inexact = bound(old, [True] + [False] * (len(old) - 1), incoming)
    wanted = np.asarray([incoming, *old[1:]], np.float32)
    np.testing.assert_array_equal(norms, wanted)
    lost = (len(old) + 2) * SMALLEST
    exact = UNIT * (incoming + old[0] + norms.sum()) + lost
    # A sum whose error would be too large is rebuilt, and has another bound.
    assert inexact == (exact > running_sum._TOLERANCE * UNIT * norms.sum())
    if not inexact:
        assert error == pytest.approx(exact, rel=1e-4, abs=0)


def test_a_buffer_that_stays_keeps_its_bound():
    norms, error, inexact = bound([2.0, 1.0], [False, False], 9.0, error=1e-7)
    np.testing.assert_array_equal(norms, [2, 1])
    assert (error, inexact) == (pytest.approx(1e-7, rel=1e-6), False)


@pytest.mark.parametrize("size", [2e-38, 1e-37, 1e-36])
def test_a_sum_of_the_smallest_numbers_is_rebuilt_at_every_change(size):
    assert bound([size, size], [True, False], size)[2]


@pytest.mark.parametrize("entries", [[2, 2, 0], [0, 1, 1], [0, 0, 0], [1, 2, 3]])
def test_a_sum_whose_entries_are_no_permutation_is_rebuilt(entries):
    spoilt = jnp.asarray([entries], jnp.int32)
    assert bound([2.0, 1.0], [False, False], 9.0, entries=spoilt)[2]
    empty = jnp.zeros((1, 2), jnp.int32)
    assert not bound([0.0, 0.0], [False, False], 9.0, entries=spoilt, ages=empty)[2]


@pytest.mark.cpu_only("XLA's own count of temporaries")
def test_a_large_sum_needs_little_beside_its_slots():
    topc, params = 1000, [jnp.zeros((4, 4))] * 2
    tx = untyped(memoptax.sgd_c(0.1, topc=topc, holding="sum", synced=False))
    update = jax.jit(tx.update, donate_argnums=1)
    compiled = untyped(update.lower(params, tx.init(params)).compile())
    # Some numbers for every entry and leaf, but none for every pair of entries.
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * topc * len(params)


def test_each_leaf_adds_up_the_slots_of_its_own_row():
    stack = storage.Stored(jnp.asarray([1.0, 2.0, 4.0]), None)
    held = jnp.asarray([[True, True, False], [False, True, False]])
    zeros = [jnp.zeros(())] * 2
    totals = running_sum.from_slots(zeros, [stack] * 2, held)
    assert [float(total) for total in totals] == [3.0, 2.0]
    totals = running_sum.from_slots(zeros, [stack] * 2, held[1:])
    assert [float(total) for total in totals] == [2.0, 2.0]


def test_a_tree_without_leaves_has_a_sum():
    tx = untyped(memoptax.critical_gradients(2, holding="sum"))
    updates, state = tx.update({}, tx.init({}))
    assert updates == {} and state.buffer.norms.shape == (1, 2)


def run(tx, stream):
    """The state after a stream of gradients, a tree of arrays (T, ...)."""

    def body(state, gradient):
        return tx.update(gradient, state)[1], None

    first = jax.tree.map(lambda g: g[0], stream)
    return jax.jit(lambda stream: jax.lax.scan(body, tx.init(first), stream)[0])(stream)


def test_a_sum_that_was_infinite_is_rebuilt_when_it_fits_again():
    """40 entries of 1e37 are infinite together, and 40 of 5e36 are not."""
    tx = memoptax.critical_gradients(40, holding="sum")
    stream = jnp.repeat(jnp.array([1e37, 5e36]), jnp.array([40, 80]))[:, None]
    total = untyped(run(tx, stream)).buffer.total
    np.testing.assert_allclose(total, 40 * 5e36, rtol=1e-5)


def test_a_sum_that_was_infinite_is_rebuilt_beside_a_wider_one(x64):
    tx = memoptax.critical_gradients(40, holding="sum")
    stream = jnp.repeat(jnp.array([1e37, 5e36]), jnp.array([40, 80]))[:, None]
    stream = {"a": stream.astype(jnp.float32), "b": jnp.zeros((120, 1))}
    total = untyped(run(tx, stream)).buffer.total["a"]
    np.testing.assert_allclose(total, 40 * 5e36, rtol=1e-5)


def test_a_sum_is_right_after_a_change_that_overflows():
    tx = memoptax.critical_gradients(1, holding="sum")
    total = untyped(run(tx, jnp.array([[-2e38], [2e38]]))).buffer.total
    np.testing.assert_allclose(total, 2e38, rtol=1e-6)


def test_a_leaf_that_is_refused_rebuilds_nothing():
    tx = untyped(memoptax.critical_gradients(2, holding="sum", synced=False))
    state = tx.init([jnp.zeros(()), jnp.zeros(())])
    for bad in (jnp.nan, jnp.inf, jnp.nan):
        _, state = tx.update([jnp.asarray(1.0), jnp.asarray(bad)], state)
    assert int(state.buffer.rebuilds) == 0


@pytest.mark.parametrize(
    ("topc", "roundings"), [(3, 4), (30, 31), (31, 7), (100, 16), (1400, 49)]
)
def test_a_rebuilt_sum_is_off_by_its_roundings_at_most(topc, roundings):
    """A value passes through ``roundings`` additions, each off by 2^-24 of its sum."""
    norms = jnp.ones((2, topc)).at[1].set(0)
    units = running_sum.units([jnp.zeros(3), jnp.zeros(3)], jnp.float32)
    np.testing.assert_array_equal(units, UNIT)
    bounds = running_sum.fresh_error(norms, units)
    np.testing.assert_allclose(bounds, [roundings * topc * UNIT, 0], rtol=1e-6)
    # One by one, ones would be lost beside a large number.
    values = np.ones((topc + 1, 3), np.float32)
    values[0] = 2.0**24
    held = jnp.arange(topc + 1)[None] < topc
    stacks = [storage.Stored(jnp.asarray(values), None)]
    (total,) = running_sum.from_slots([jnp.zeros(3)], stacks, held)
    exact = values[:topc].sum(0, dtype=float)
    assert np.all(np.abs(total - exact) <= roundings * exact * UNIT)


def test_a_row_may_have_more_entries_than_an_int32_counts():
    """As a tree that ``optax.flatten`` has made one vector. Nothing runs."""
    params = jax.ShapeDtypeStruct((2**31,), jnp.float32)
    tx = memoptax.adam_c(0.1, topc=3, holding="sum", buffer_dtype="int8")
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert updates.shape == params.shape


def test_a_sum_whose_products_vanish_is_taken_for_its_slots():
    """Some threads of a CPU have subnormal numbers, and others have zeros for them."""
    tx, params = memoptax.sgd_c(0.1, topc=1, holding="sum"), jnp.zeros(3)
    _, state = jax.jit(tx.update)(jnp.full(3, 5e-32), tx.init(params), params)
    buffer = untyped(state)[0].buffer
    lost = jnp.asarray([3 * jnp.finfo(jnp.float32).tiny])
    kept = (untyped(state)[0]._replace(buffer=buffer._replace(error=lost)), *state[1:])
    memoptax.check_state(tx, params, kept)
