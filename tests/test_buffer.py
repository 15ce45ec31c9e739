"""One buffer: which entries stay, and what it returns."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from offers import empty, offer

from memoptax._buffer import (
    eviction,
    holding,
    resizing,
)
from memoptax._critical_gradients import critical_gradients

import oracle
from slots import entries, exact_sums
from untyped import untyped

WAYS = [("select", 1), ("read", 1), ("read", 3), ("sum", 1), ("sum", 3)]
each_way = pytest.mark.parametrize(("way", "topc"), WAYS)
more_than_one = pytest.mark.parametrize("way", ["read", "sum"])


@more_than_one
def test_fills_in_order_then_replaces_the_least_strictly(way):
    buffer = empty(jnp.float32(0), 3, holding=way)
    for value in (3.0, 1.0, 2.0):
        _, buffer = offer(buffer, value)
    np.testing.assert_array_equal(entries(buffer), [3, 1, 2])
    _, buffer = offer(buffer, 1.0)  # a tie with the smallest: rejected
    np.testing.assert_array_equal(entries(buffer), [3, 1, 2])
    _, buffer = offer(buffer, 1.5)
    np.testing.assert_array_equal(entries(buffer), [3, 1.5, 2])
    assert int(buffer.offered[0]) == 5
    assert int(buffer.accepted[0]) == 4


@more_than_one
def test_among_equal_keys_the_lowest_entry_leaves(way):
    buffer = empty(jnp.float32(0), 3, holding=way)
    for value in (1.0, -1.0, 1.0, 2.0, 3.0):
        _, buffer = offer(buffer, value)
    # 2 took the place of the first entry and 3 of the second, though both are in
    # slots that were spare before.
    np.testing.assert_array_equal(entries(buffer), [2, 3, 1])


@pytest.mark.parametrize(
    ("topc", "decay", "size"),
    [(300, 0.7, 1.0), (20, 0.001, 1.0), (20, 0.7, 1e-36), (3, 0.0, 1.0)],
    ids=str,
)
def test_among_keys_that_decayed_to_0_the_oldest_leaves(topc, decay, size):
    """Keys of 1.2e-38 and less are 0 on a CPU. Norms are equal, so all are accepted."""
    buffer = empty(jnp.float32(0), topc, holding="read")

    @jax.jit
    def run(buffer):
        def body(buffer, step):
            return offer(buffer, size * (1 + step / 1e4), decay=decay)[1], None

        return jax.lax.scan(body, buffer, jnp.arange(4 * topc))[0]

    buffer = run(buffer)
    np.testing.assert_array_equal(np.sort(buffer.ages[0]), np.arange(topc) + 1)
    youngest = resizing.resize(buffer, 2, "read")
    assert set(youngest.ages[0].tolist()) == {1, 2}


def test_a_subnormal_key_counts_as_0():
    """A device that keeps them would never make 0 of the smallest."""
    buffer = empty(jnp.float32(0), 2, holding="read")
    for value in (1.0, 2.0):
        _, buffer = offer(buffer, value)
    keys = jnp.asarray(np.array([[1e-40, 1e-45]], np.float32))
    _, buffer = offer(buffer._replace(keys=keys), 3.0)
    np.testing.assert_array_equal(entries(buffer), [3, 2])


def test_keys_decay_after_insertion_the_new_one_too():
    buffer = empty(jnp.float32(0), 2)
    for value in (4.0, 1.0):
        _, buffer = offer(buffer, value, decay=0.5)
    np.testing.assert_array_equal(buffer.keys, [[1.0, 0.5]])
    np.testing.assert_array_equal(buffer.ages, [[2, 1]])


def test_decay_zero_keeps_empty_slots_empty():
    buffer = empty(jnp.float32(0), 3)
    _, buffer = offer(buffer, 4.0, decay=0.0)
    np.testing.assert_array_equal(buffer.keys, [[0, 0, 0]])
    np.testing.assert_array_equal(eviction.held(buffer), [[True, False, False]])


@pytest.mark.parametrize(
    ("decay", "used"), [(-1.0, 0.0), (1e10, 1.0), (np.inf, 1.0), (np.nan, 1.0)]
)
def test_a_traced_decay_out_of_range_is_clamped(decay, used):
    run = jax.jit(lambda buffer, decay: offer(buffer, 4.0, decay=decay)[1])
    buffer = empty(jnp.float32(0), 3)
    np.testing.assert_array_equal(run(buffer, decay).keys, [[4.0 * used, 0, 0]])


@each_way
def test_recalls_the_sum_before_the_offer(way, topc):
    buffer, naive = empty(jnp.float32(0), topc, holding=way), oracle.Buffer(topc, 1.0)
    for value in (1.0, 2.0, 4.0, 0.5, 8.0, 3.0):
        held = sum(float(entry["x"]) for entry in naive.values)
        total, buffer = offer(buffer, value)
        assert float(total) == pytest.approx(held if naive.values else value)
        naive.offer(value, {"x": np.float64(value)})


@each_way
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_offer_changes_nothing(bad, way, topc):
    buffer = empty({"a": jnp.zeros(2), "b": jnp.zeros(())}, topc, holding=way)
    good = {"a": jnp.array([1.0, 2.0]), "b": jnp.float32(1)}
    _, buffer = offer(buffer, good, decay=0.5)

    def assert_the_same(after):
        # The spare slot may hold anything finite. All else must stay.
        chex.assert_trees_all_equal(
            after._replace(slots=None), buffer._replace(slots=None)
        )
        chex.assert_tree_all_finite(after)
        for leaf in range(2):
            np.testing.assert_array_equal(
                entries(after, leaf=leaf), entries(buffer, leaf=leaf)
            )

    worse = {**good, "a": jnp.array([bad, 0.0])}
    assert_the_same(offer(buffer, worse, decay=0.5)[1])
    assert_the_same(offer(buffer, good, key=bad, decay=0.5)[1])
    assert_the_same(offer(buffer, worse, key=1e9)[1])


@each_way
def test_a_negative_priority_is_not_offered(way, topc):
    buffer = empty(jnp.float32(0), topc, holding=way)
    _, buffer = offer(buffer, 1.0, key=-1.0)
    assert int(buffer.offered[0]) == 0 and int(eviction.fill(buffer)[0]) == 0


@pytest.mark.parametrize("way", ["select", "read", "sum"])
def test_unsynced_leaves_decide_for_themselves(way):
    like = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    buffer = empty(like, 1, synced=False, holding=way)
    for a, b in ((1.0, 5.0), (2.0, 4.0), (np.nan, 6.0)):
        _, buffer = offer(buffer, {"a": a, "b": b})
    np.testing.assert_array_equal(entries(buffer, row=0, leaf=0), [2])
    np.testing.assert_array_equal(entries(buffer, row=1, leaf=1), [6])
    np.testing.assert_array_equal(buffer.offered, [2, 3])
    np.testing.assert_array_equal(buffer.accepted, [2, 2])


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize(("way", "topc"), [*WAYS, ("read", 20), ("sum", 20)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.few(6)
def test_agrees_with_the_oracle_on_streams_full_of_ties(way, topc, decay, synced, x64):
    random = np.random.default_rng(topc)
    shapes = {"a": (), "b": (3,), "c": (2, 2)}
    buffer = empty(
        {k: jnp.zeros(s) for k, s in shapes.items()}, topc, synced=synced, holding=way
    )
    step = jax.jit(functools.partial(offer, decay=decay))
    names = [("a", "b", "c")] if synced else [("a",), ("b",), ("c",)]
    naive = [oracle.Buffer(topc, decay) for _ in names]
    for _ in range(60):
        # Powers of two, signs and zeros: norms tie exactly, even after a decay.
        scale = random.choice([0.0, 0.25, 0.5, 1.0, 1.0, 2.0])
        values = {
            k: scale * random.choice([-1.0, 1.0], size=s) for k, s in shapes.items()
        }
        _, buffer = step(buffer, values)
        for group, one in zip(names, naive):
            part = {k: values[k] for k in group}
            one.offer(oracle.sum_of_norms(part), part)
    for row, one in enumerate(naive):
        fill = len(one.keys)
        np.testing.assert_allclose(buffer.keys[row][:fill], one.keys, rtol=1e-14)
        np.testing.assert_array_equal(buffer.ages[row][:fill], np.add(one.ages, 1))
        assert (int(buffer.offered[row]), int(buffer.accepted[row])) == (
            one.offered,
            one.accepted,
        )
        for name in names[row]:
            leaf = sorted(shapes).index(name)
            expected = np.stack([entry[name] for entry in one.values])
            np.testing.assert_array_equal(entries(buffer, row, leaf), expected)


# Tools that change a whole state


@each_way
def test_zeros_are_an_empty_buffer(way, topc):
    like = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}
    buffer = empty(like, topc, holding=way)
    zeros = jax.tree.map(jnp.zeros_like, buffer)
    for t in range(12):
        values = {"a": jnp.full((2, 3), jnp.sin(3.0 * t)), "b": jnp.cos(5.0 * t)}
        total, buffer = offer(buffer, values, decay=0.8)
        same, zeros = offer(zeros, values, decay=0.8)
        chex.assert_trees_all_equal(total, same)
    chex.assert_trees_all_equal(buffer._replace(entries=0), zeros._replace(entries=0))


@each_way
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.5, 2.0, -1.0])
@pytest.mark.few(5)
def test_a_buffer_that_was_scaled_goes_on(way, topc, factor):
    """Such tools cast every number back to its dtype."""
    buffer = empty(jnp.zeros(3), topc, holding=way)
    random = np.random.default_rng(0)
    for _ in range(7):
        _, buffer = offer(buffer, random.normal(size=3).astype(np.float32), decay=0.7)
    buffer = jax.tree.map(lambda x: (factor * x).astype(x.dtype), buffer)
    for _ in range(3 * topc + 3):
        total, buffer = offer(
            buffer, random.normal(size=3).astype(np.float32), key=1.0, decay=0.5
        )
    assert int(eviction.fill(buffer)[0]) == topc
    order = np.sort(holding.slots_of(buffer.entries)) if topc > 1 else [[0, 1]]
    np.testing.assert_array_equal(order[0], np.arange(topc + 1 if topc > 1 else 2))
    total, _ = offer(buffer, np.ones(3, np.float32))
    np.testing.assert_allclose(total, exact_sums(buffer)[0], rtol=1e-5)


@each_way
def test_a_mean_of_buffers_recalls_the_sum_of_its_slots(way, topc):
    """Its entries are not a permutation, and some are held in only one of the two."""
    buffers = [empty(jnp.zeros(3), topc, holding=way) for _ in range(2)]
    random = np.random.default_rng(0)
    for t in range(9):
        value = random.normal(size=3).astype(np.float32)
        _, buffers[0] = offer(buffers[0], value, decay=0.7)
        if t > 6:
            _, buffers[1] = offer(buffers[1], value, decay=0.7)
    mean = jax.tree.map(lambda a, b: ((a + b) / 2).astype(a.dtype), *buffers)
    for _ in range(3):
        _, mean = offer(mean, np.ones(3, np.float32))
        total, _ = offer(mean, np.ones(3, np.float32))
        np.testing.assert_allclose(total, exact_sums(mean)[0], rtol=1e-5)
    assert resizing.problem(mean) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_key_that_is_not_finite_leaves_first(bad):
    """A tool may have made it. An infinite key would never leave."""
    buffer = empty(jnp.float32(0), 3)
    for value in (3.0, 1.0, 2.0):
        _, buffer = offer(buffer, value)
    buffer = buffer._replace(keys=buffer.keys.at[0, 0].set(bad))
    _, buffer = offer(buffer, 0.5)
    np.testing.assert_array_equal(entries(buffer), [0.5, 1, 2])


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-19, 1.0, 1e19, 1e30, 1e37])
@each_way
def test_the_whole_range_is_chosen_and_held(way, topc, size):
    """Keys are norms, even where squares of the values overflow."""
    buffer = empty(jnp.zeros(4), topc, holding=way)
    shape = np.array([1.0, -0.5, 0.25, 0.0], np.float32)
    for scale in (0.5, 1.0, 0.75, 0.25, 0.9):
        _, buffer = offer(buffer, np.float32(scale * size) * shape)
    kept = sorted([0.5, 1.0, 0.75, 0.9, 0.25])[-topc:]
    found = np.sort(np.abs(entries(buffer))[:, 0])
    np.testing.assert_allclose(found, np.multiply(kept, size), rtol=1e-6)
    keys = np.sort(np.asarray(buffer.keys, np.float64)[0])
    np.testing.assert_allclose(
        keys, np.multiply(kept, size) * np.linalg.norm(shape), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@each_way
def test_a_refused_value_of_a_narrower_dtype_changes_nothing(way, topc, dtype, x64):
    """A gradient may have another dtype than those before."""
    tx = critical_gradients(topc, 1.0, holding=way)
    before = state = untyped(tx.init(jnp.zeros(2)))
    for value in [jnp.array([1e6, 1 / 3])] * topc + [jnp.ones(2, dtype)]:
        before, state = state, untyped(tx.update(value, state)[1])
    assert state.buffer.offered == topc + 1 and state.buffer.accepted == topc
    held = [
        holding.value(buffer, 0, i, jnp.float64)
        for buffer in (before.buffer, state.buffer)
        for i in range(topc)
    ]
    chex.assert_trees_all_equal(held, [jnp.array([1e6, 1 / 3])] * (2 * topc))
    update, _ = untyped(tx.update(jnp.zeros(2), state))
    np.testing.assert_allclose(update, [1e6, 1 / 3], rtol=1e-12)  # their mean
