"""Critical gradients: which gradients the buffer keeps, and the updates."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest

from memoptax import critical_gradients, sgd_c

import oracle
from slots import entries
from streams import PARAMS, at, close, emit, equal, gradients, trajectory
from untyped import untyped

pytestmark = pytest.mark.few(2)

nan, inf = float("nan"), float("inf")


def test_leaf_order_does_not_matter():
    def reverse(tree):
        return {chr(ord("z") - ord(name)): leaf for name, leaf in tree.items()}

    tx = sgd_c(0.05, topc=2)
    got = trajectory(tx, reverse(PARAMS), reverse(gradients()))
    close(got, reverse(trajectory(tx)))


def test_syncing_changes_nothing_for_one_leaf():
    stream = gradients()["b"]
    apart, _ = emit(critical_gradients(3, synced=False), stream)
    equal(emit(critical_gradients(3, synced=True), stream)[0], apart)
    # Over many they must differ, or the test shows nothing.
    apart, _ = emit(critical_gradients(3, synced=False), gradients())
    assert not np.allclose(emit(critical_gradients(3), gradients())[0]["b"], apart["b"])


def test_mid_is_half_of_sum():
    stream = gradients()
    total, half = (
        emit(critical_gradients(3, aggr=aggr, kappa=0.8), stream)[0]
        for aggr in ("sum", "mid")
    )
    # The first finds an empty buffer.
    close(at(half, slice(1, None)), jax.tree.map(lambda u: u[1:] / 2, total))


def drops_gradient(update, buffer_mean, fill):
    del update, fill
    return buffer_mean


AGGREGATIONS = ["sum", "mid", "mean", drops_gradient]


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_without_kappa_or_memory_updates_pass_through(aggr):
    stream = gradients()
    updates = jax.jit(
        lambda kappa: emit(critical_gradients(2, aggr=aggr, kappa=kappa), stream)[0]
    )
    equal(updates(0.0), stream)
    equal(at(updates(1.0), 0), at(stream, 0))
    assert not np.allclose(updates(1.0)["b"][1], stream["b"][1])


def test_one_slot_by_hand(x64):
    table = [
        # g    B before  key after   sum: g + B/2   mid, mean: half   g - B
        (4.0, None, 2.0, 4.0, 4.0, 4.0),  # nothing to join yet
        (1.0, 4.0, 1.0, 3.0, 1.5, -3.0),  # 1 < 2: refused
        (-3.0, 4.0, 1.5, -1.0, -0.5, -7.0),  # 3 > 1
        (1.5, -3.0, 0.75, 0.0, 0.0, 4.5),  # 1.5 = 1.5: refused
        (0.0, -3.0, 0.375, -1.5, -0.75, 3.0),  # 0 < .75: refused
        (2.0, -3.0, 1.0, 0.5, 0.25, 5.0),  # 2 > .375
        (0.5, 2.0, 0.5, 1.5, 0.75, -1.5),  # .5 < 1: refused
    ]
    grads, _, keys, total, half, difference = zip(*table)

    def subtract(update, buffer_mean, fill):
        return update - 2 * fill * buffer_mean

    wanted = {"sum": total, "mid": half, "mean": half, subtract: difference}
    for aggr, updates in wanted.items():
        tx = untyped(critical_gradients(1, decay=0.5, kappa=0.5, aggr=aggr))
        state = tx.init(jnp.zeros(()))
        assert state.buffer.slots.dtype == jnp.float64
        for t, gradient in enumerate(grads):
            update, state = jax.jit(tx.update)(jnp.asarray(gradient), state)
            assert float(update) == updates[t]
            assert state.buffer.keys.tolist() == [[keys[t]]]


def test_the_global_norm_decides_differently_from_the_sum_of_norms():
    # After (1, 1) a step of (1.9, 0): 1.9 < .99 * 2, but 1.9 > .99 * sqrt(2).
    stream = {
        "a": np.array([1, 1.9, 0], np.float32),
        "b": np.array([1, 0, 0], np.float32),
    }
    for priority_fn, kept in [(None, (1, 1)), (optax.tree.norm, (np.float32(1.9), 0))]:
        tx = critical_gradients(1, 0.99, priority_fn=priority_fn)
        updates, _ = emit(tx, stream)
        assert (updates["a"][-1], updates["b"][-1]) == kept


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("size", [1e-5, 10.0])
def test_a_custom_priority_sees_float32(dtype, synced, size):
    """In float16 the square of 300 is infinite, and that of 1e-5 is 0."""
    tx = untyped(critical_gradients(2, 0.7, synced=synced, priority_fn=optax.tree.norm))
    state = tx.init(jnp.zeros((10, 100), dtype))
    for k in range(1, 5):
        gradient = jnp.full((10, 100), k * size, dtype)
        _, state = tx.update(gradient, state)
        norm = np.linalg.norm(np.asarray(gradient, np.float64))
        np.testing.assert_allclose(np.max(state.buffer.keys), 0.7 * norm, rtol=1e-5)
    assert state.buffer.accepted[0] == 4


def test_a_custom_priority_sees_one_leaf_without_syncing():
    # The smallest sums are critical. Apart, a keeps -2 and b its 0. Together, 1 < 2.
    stream = {
        "a": np.array([1, -2, 0], np.float32),
        "b": np.array([0, 4, 0], np.float32),
    }
    for synced, kept in [(True, (1, 0)), (False, (-2, 0))]:
        tx = critical_gradients(
            1,
            decay=1.0,
            synced=synced,
            priority_fn=lambda tree: 9 - sum(jax.tree.leaves(tree)),
        )
        updates, _ = emit(tx, stream)
        assert (updates["a"][-1], updates["b"][-1]) == kept


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_priority_that_is_not_finite_refuses_the_step(bad):
    def priority(gradient):
        return jnp.where(gradient == 7, bad, jnp.abs(gradient))

    tx = critical_gradients(2, priority_fn=priority)
    updates, state = emit(tx, np.array([3, 7, 2, 7, 1], np.float32))
    close(updates[jnp.array([0, 2, 4])], [3, 2 + 3, 1 + 2.5])
    equal(state, emit(tx, np.array([3, 2, 1], np.float32))[1])


@pytest.mark.parametrize(
    "bad, options",
    [
        (7e4, {"buffer_dtype": "float16"}),
        (nan, {"priority_fn": lambda gradient: 1.0}),
        (nan, {"priority_fn": lambda gradient: 1.0, "buffer_dtype": "int8"}),
        (-inf, {"priority_fn": lambda gradient: 1.0, "buffer_dtype": "int8"}),
    ],
    ids=["float16 slot", "priority", "nan in int8", "inf in int8"],
)
def test_what_cannot_be_stored_is_refused(bad, options):
    tx = critical_gradients(2, **options)
    updates, state = emit(tx, np.array([3, bad, 2, bad, 1], np.float32))
    assert not np.isfinite(updates[1]) or updates[1] == np.float32(bad + 3)
    equal(state, emit(tx, np.array([3, 2, 1], np.float32))[1])


# First in, first out


def falling(steps):
    """Ever smaller gradients, which no priority would accept."""
    return np.array(1000 - np.arange(steps), np.float32)


def test_fifo_with_probability_one_keeps_the_last_entries():
    stream = falling(12)
    _, state = emit(critical_gradients(3, 1.0, fifo_probability=1.0), stream)
    assert sorted(entries(state.buffer).tolist()) == sorted(stream[9:].tolist())
    assert sorted(state.buffer.ages[0].tolist()) == [1, 2, 3]


def draws(topc, steps, **options):
    """Which steps were FIFO, seen on a stream that nothing else lets in."""
    tx = untyped(critical_gradients(topc, 1.0, **options))

    def body(state, gradient):
        after = tx.update(gradient, state)[1]
        return after, (after.buffer.accepted - state.buffer.accepted)[0] > 0

    stream = falling(steps)
    taken = jax.jit(lambda g: jax.lax.scan(body, tx.init(g[0]), g)[1])(stream)
    return np.asarray(taken)


def test_first_in_first_out_with_a_probability_follows_its_draws(x64):
    options = {"fifo_probability": 0.4, "seed": 7}
    taken = draws(2, 400, **options)
    assert 0.3 < taken[2:].mean() < 0.5  # 2 sd: .05
    assert (draws(2, 400, **{**options, "seed": 8}) != taken).any()
    stream = jax.tree.map(np.float64, gradients(400))
    updates, _ = emit(critical_gradients(2, **options), stream)
    steps = [at(stream, t) for t in range(400)]
    wanted = oracle.critical_gradients(steps, fifo=taken, topc=2)
    for t, want in enumerate(wanted):
        close(at(updates, t), want, 1e-12, 1e-12)


# Derivatives


def test_derivatives_are_those_of_finite_differences(x64):
    stream = jax.tree.map(np.float64, gradients(6, {"a": (), "b": (2,)}))

    @jax.jit
    def travelled(stream, kappa):
        updates, _ = emit(critical_gradients(2, kappa=kappa, aggr="mean"), stream)
        return sum(jnp.sum(jnp.sin(u)) for u in jax.tree.leaves(updates))

    jax.test_util.check_grads(travelled, (stream, 0.7), order=1, modes=("rev",))


@pytest.mark.parametrize("synced", [True, False])
def test_derivatives_at_zero_gradients_are_finite(synced):
    def total(stream):
        updates, _ = emit(critical_gradients(2, synced=synced), stream)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    zeros = jax.tree.map(jnp.zeros_like, gradients(4))
    slopes = jax.jit(jax.grad(total))(zeros)
    # The first two stay for good. Each adds itself. The first also adds all of itself
    # to the second mean, and both add one half to the third and fourth.
    for slope in jax.tree.leaves(slopes):
        per_step = slope.reshape(4, -1)
        np.testing.assert_allclose(per_step[:, 0], [3.0, 2.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_rounded_slot_has_the_derivative_of_its_gradient(dtype):
    """This includes subnormal numbers of float16."""
    tx = critical_gradients(topc=2, buffer_dtype=dtype)
    gradient, zeros = jnp.array([1e-5, 2e-5, 3e-3]), jnp.zeros(3)

    def later(scale):
        _, state = tx.update(scale * gradient, tx.init(zeros), zeros)
        return tx.update(zeros, state, zeros)[0]

    np.testing.assert_allclose(jax.jacobian(later)(1.0), gradient, rtol=1e-2)


def test_a_kappa_of_0_has_its_derivative():
    """A kappa that is learned may start at 0, which is the base optimizer."""
    params = jnp.zeros(2)

    def total(kappa):
        tx = critical_gradients(2, kappa=kappa)
        state, found = tx.init(params), params
        for k in range(3):
            found, state = tx.update(jnp.array([1.0, 2.0]) * (k + 1), state)
        return jnp.sum(untyped(found))

    assert jax.grad(total)(0.0) == pytest.approx(4.5)  # the mean of 3 and 6
