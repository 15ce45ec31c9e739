"""A running sum: the bound on its error, and when it is rebuilt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from offers import empty, offer

import memoptax
from memoptax._buffer import resizing, running_sum
from memoptax._tensors import storage

from slots import exact_sums
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


# In a buffer that is used


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("holding", ["sum", "read"])
def test_a_gradient_has_no_more_bits_than_its_dtype(dtype, holding):
    """XLA may skip a conversion to 16 bits that ends the computation of a gradient.

    Here it is that of the sum of the two parts of the loss.
    """
    tx = memoptax.adam_c(1e-2, topc=5, holding=holding)
    params = jnp.ones((64, 64), dtype)

    def loss(params, x):
        return jnp.mean(jnp.square(x @ params - x)) + 1e-3 * jnp.sum(params**2)

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return params + updates, state

    state = tx.init(params)
    for seed in range(7):
        x = jax.random.normal(jax.random.key(seed), (32, 64), dtype)
        params, state = step(params, state, x)
        memoptax.check_state(tx, params, state)


def outliers(random, steps, scale=1e4):
    """Gradients of 1e-4 and a few huge ones, in leaves of all sizes."""
    shapes = {"large": (64, 32), "small": (3,), "scalar": ()}
    for t in range(steps):
        grads = {k: 1e-4 * random.normal(size=s) for k, s in shapes.items()}
        if t % 37 == 1:
            grads["small"] = scale * random.normal(size=3)
        if t % 53 == 7:
            grads = jax.tree.map(lambda g: scale * g, grads)
        grads["large"] += 1.0  # steady, and it hides the small leaves in a joint norm
        yield jax.tree.map(lambda g: np.asarray(g, np.float32), grads)


@pytest.mark.parametrize(
    ("topc", "synced", "dtype"),
    [
        (1, True, None),
        (2, False, None),
        (5, True, None),
        (5, True, "bfloat16"),
        (20, False, "float16"),
        (5, False, "int8"),
        (40, True, "int8"),
        (40, True, None),
    ],
)
@pytest.mark.few(1)
def test_the_sum_stays_within_its_bound(topc, synced, dtype):
    stream = list(outliers(np.random.default_rng(0), 400))
    own = dict(synced=synced, buffer_dtype=dtype, holding="sum")
    buffer = empty(jax.tree.map(jnp.zeros_like, stream[0]), topc, **own)
    step = jax.jit(functools.partial(offer, decay=0.7, **own))
    for grads in stream:
        _, buffer = step(buffer, grads)
        sums = zip(jax.tree.leaves(buffer.total), exact_sums(buffer))
        for leaf, (total, exact) in enumerate(sums):
            error = np.linalg.norm(np.asarray(total, np.float64) - exact)
            norms = np.asarray(buffer.norms[leaf], np.float64)
            assert error <= buffer.error[leaf]  # the bound holds,
            assert buffer.error[leaf] <= 1e-5 * norms.sum()  # and stays small
    assert int(buffer.rebuilds) > 0


def test_the_mean_used_is_exact_to_the_bound_and_the_arriving_outlier():
    stream = list(outliers(np.random.default_rng(1), 300))
    eps = float(jnp.finfo(jnp.float32).eps)
    buffer = empty(jax.tree.map(jnp.zeros_like, stream[0]), 5, holding="sum")
    step = jax.jit(functools.partial(offer, decay=0.7))
    _, buffer = step(buffer, stream[0])  # the first sum is that of an empty buffer
    for grads in stream:
        exact, norms = exact_sums(buffer), np.asarray(buffer.norms, np.float64)
        total, buffer = step(buffer, grads)
        leaves = zip(jax.tree.leaves(total), jax.tree.leaves(grads))
        for leaf, (used, offered) in enumerate(leaves):
            error = np.linalg.norm(np.asarray(used, np.float64) - exact[leaf])
            arriving = 2 * eps * np.linalg.norm(offered)
            assert error <= 1.2e-5 * norms[leaf].sum() + arriving


@pytest.mark.parametrize(
    "topc", [5, 100, 169, 334, pytest.param(1400, marks=pytest.mark.minutes)]
)
@pytest.mark.few(1)
def test_without_outliers_rebuilds_are_rare(topc):
    random = np.random.default_rng(0)
    stream = np.float32(random.normal(size=(1500, 50)))
    buffer = empty(jnp.zeros(50), topc, holding="sum")

    @jax.jit
    def run(buffer, stream):
        def body(buffer, x):
            # Every offer is taken: its key is above all others.
            return offer(buffer, x, key=1.0, decay=0.5)[1], None

        return jax.lax.scan(body, buffer, stream)[0]

    buffer = run(buffer, stream)
    assert int(buffer.accepted[0]) == 1500
    assert 1 <= int(buffer.rebuilds) <= 1500 / 100


@pytest.mark.parametrize("size", [1e-35, 1e-31, 1e37])
def test_the_bound_holds_over_the_range_of_float32(size):
    """The least norms times a unit roundoff are 0. The largest add up to infinity."""
    stream = np.float32(size * np.random.default_rng(0).normal(size=(3000, 8)))
    buffer = run_of_sums(empty(jnp.zeros(8), 20, holding="sum"), stream)
    (exact,), norms = exact_sums(buffer), np.asarray(buffer.norms, np.float64)
    error = np.linalg.norm(np.asarray(buffer.total, np.float64) - exact)
    assert error <= 1e-5 * norms.sum()
    assert buffer.error[0] <= 1e-5 * norms.sum()
    assert resizing.problem(buffer) is None
    assert int(buffer.rebuilds) > 0


@jax.jit
def run_of_sums(buffer, stream):
    step = functools.partial(offer, decay=0.3, holding="sum")
    return jax.lax.scan(lambda b, x: (step(b, x)[1], None), buffer, stream)[0]


def test_an_outlier_that_leaves_is_rebuilt_at_once():
    buffer = empty(jnp.zeros(3), 2, holding="sum")
    for value in (1e4, 1e-4, 1e-4):
        _, buffer = offer(buffer, jnp.full(3, value), key=1.0, decay=0.5)
    assert int(buffer.rebuilds) == 1
    np.testing.assert_allclose(buffer.total, 2e-4, rtol=1e-6)


@pytest.mark.parametrize("name", ["error", "norms"])
def test_a_bound_that_is_nan_is_made_again(name):
    """A tool may have made it. No error would exceed it, so no sum would be rebuilt."""
    buffer = empty(jnp.zeros(3), 2, holding="sum")
    for value in (1.0, 2.0):
        _, buffer = offer(buffer, jnp.full(3, value))
    spoilt = jnp.full_like(getattr(buffer, name), jnp.nan)
    buffer = buffer._replace(**{name: spoilt, "total": buffer.total + 1})
    for value in (3.0, 4.0, 5.0):
        _, buffer = offer(buffer, jnp.full(3, value))
    np.testing.assert_allclose(buffer.total, 9.0, rtol=1e-6)
    assert resizing.problem(buffer) is None


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_the_rebuild_stays_a_loop_of_its_own_under_vmap_and_in_apply_if_finite():
    stream = jnp.stack([jnp.full(3, x) for x in (1e4, 1e-4, 1e-4, 1e-4)])
    tx = untyped(
        optax.apply_if_finite(memoptax.critical_gradients(2, 0.0, holding="sum"), 3)
    )

    def run(scale, stream):
        def body(state, x):
            return tx.update(scale * x, state)[1], None

        state = tx.init(stream[0])
        return jax.lax.scan(body, state, stream)[0].inner_state.buffer

    batched = jax.jit(jax.vmap(run, (0, None)))
    buffers = batched(jnp.array([1.0, 0.0, 2.0]), stream)
    # Zeros never enter a full buffer and never need a rebuild. The rebuilds of other
    # members must not change them.
    np.testing.assert_array_equal(buffers.rebuilds, [1, 0, 1])
    np.testing.assert_allclose(buffers.total[:, 0], [2e-4, 0, 4e-4], rtol=1e-6)
    compiled = untyped(batched.lower(jnp.ones(3), stream).compile())
    assert compiled.as_text().count(" while(") >= 2


@pytest.mark.parametrize("topc", [1, 2, 4])
@pytest.mark.few(1)
def test_a_resized_sum_has_the_derivative_of_what_was_kept(topc, x64):
    def total(stream):
        buffer = empty(stream[0], 3, holding="sum")
        for x in stream:
            _, buffer = offer(buffer, x, key=jnp.linalg.norm(x))
        return jnp.sum(
            resizing.resize(buffer, topc, "sum").total * jnp.array([1.0, 2.0])
        )

    stream = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    kept = jnp.arange(3)[:, None] >= 3 - topc
    np.testing.assert_array_equal(
        jax.grad(total)(stream), jnp.where(kept, jnp.array([1.0, 2.0]), 0)
    )
