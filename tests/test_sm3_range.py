"""SM3 with extreme numbers: tiny, huge, NaN, half precision; and its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from labels import named
from streams import normal, updates_of
from untyped import untyped

pytestmark = pytest.mark.few(2)


def test_three_thousand_bfloat16_steps_do_not_stall():
    """A sum in bfloat16 would at 256, and in float16 at 2048."""
    tx = untyped(memoptax.scale_by_sm3(0.9))
    params = jnp.zeros((4, 8), jnp.bfloat16)

    def step(state, _):
        updates, state = tx.update(jnp.ones_like(params), state)
        return state, updates[0, 0]

    state, updates = jax.jit(
        lambda state: jax.lax.scan(step, state, None, length=3000)
    )(tx.init(params))
    for accumulator in state.accumulators[0]:
        np.testing.assert_array_equal(accumulator, 3000)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(updates[-1]), 3000**-0.5, rtol=1e-2)


def test_small_gradients_keep_the_scale_of_their_step():
    for g in (1e-4, 1e-6, 1e-12):
        (u,) = updates_of(
            memoptax.scale_by_sm3(), jnp.zeros((2, 3)), [jnp.full((2, 3), g)]
        )
        np.testing.assert_allclose(u, 1.0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("eps", [1e-30, 0.0])
def test_zero_over_zero_is_zero(dtype, eps):
    zeros = jnp.zeros((3, 4), dtype)
    (u,) = updates_of(memoptax.scale_by_sm3(eps=eps), zeros, [zeros])
    np.testing.assert_array_equal(u, zeros)


def test_float16_gradients_above_300():
    g = jnp.full((2, 3), 6e4, jnp.float16)
    tx = untyped(memoptax.scale_by_sm3())
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, jnp.ones_like(g))
    np.testing.assert_allclose(state.accumulators[0][0], float(g[0, 0]) ** 2)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9], ids=named)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=named)
@pytest.mark.parametrize("variant", ["I", "II"])
def test_a_sum_that_overflows_is_seen_and_does_no_harm(shape, variant, momentum):
    momentum = jnp.asarray(momentum) if momentum == 0 else momentum  # keeps a state
    tx = untyped(memoptax.scale_by_sm3(momentum, variant=variant))
    large, small = jnp.full(shape, 1.5e19), jnp.ones(shape)
    _, before = tx.update(large, tx.init(large))
    state = before
    for _ in range(2):
        updates, state = tx.update(large, state)
        assert np.isnan(updates).all()
        np.testing.assert_array_equal(state.momentum, before.momentum)
    updates, state = tx.update(small, state)
    assert np.isfinite(updates).all()
    # A vector's sum stops at the largest number, and that of a matrix stays.
    most = 2.25e38 if len(shape) > 1 else float(jnp.finfo(jnp.float32).max)
    np.testing.assert_allclose(state.accumulators[0][0], most, rtol=1e-6)


def test_only_entries_whose_sum_overflows_are_not_finite():
    g = jnp.array([1.5e19, 1.0])
    *_, last = updates_of(memoptax.scale_by_sm3(), g, [g] * 3)
    np.testing.assert_allclose(last, [np.nan, 3**-0.5], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_the_sum_of_one_family_alone_does_not_overflow(shape):
    """SM3-I adds up each family by itself, so one may overflow where others do not."""
    tx, g = untyped(memoptax.scale_by_sm3(variant="I")), jnp.zeros(shape)
    state = tx.init(g)
    for at in [(0, 0), (1, 0), (0, 1)]:
        _, state = tx.update(g.at[at].set(1.5e19), state)
        assert all(np.isfinite(a).all() for a in state.accumulators[0])
    updates, _ = tx.update(jnp.ones(shape), state)
    assert np.isfinite(updates).all()


# Numbers that are not finite


@functools.cache
def shared(momentum_dtype, variant):
    """One transformation for all bad entries, so that jit compiles once per shape."""
    tx = memoptax.scale_by_sm3(0.9, variant=variant, momentum_dtype=momentum_dtype)
    return tx.init, jax.jit(tx.update)


def one_bad_step(shape, bad, momentum_dtype, variant):
    """The update of a gradient with a bad entry among other leaves, and three states:
    before it, after it, and had the gradient been good.
    """
    init, update = shared(momentum_dtype, variant)
    good = {"a": jnp.asarray(normal(0, shape), jnp.float32), "b": jnp.ones((2, 2))}
    _, before = update(good, init(good))
    updates, after = update(
        dict(good, a=good["a"].at[(0,) * len(shape)].set(bad)), before
    )
    assert np.isfinite(np.asarray(updates["b"])).all()
    # The healthy leaf has moved on.
    assert after.accumulators[1][0][0, 0] > before.accumulators[1][0][0, 0]
    return updates["a"], before, after, update(good, before)[1]


def momentum_of_a(state):
    return state.momentum["a"], state.scales and state.scales[0]


def each_way(*shapes):
    """Every shape with every storage, and each of them with both variants."""
    storages = (None, "bfloat16", "int8")
    cases = [
        (shape, "I" if (i + k) % 2 else "II", dtype)
        for i, shape in enumerate(shapes)
        for k, dtype in enumerate(storages)
    ]
    return pytest.mark.parametrize(("shape", "variant", "dtype"), cases, ids=named)


BAD = (np.nan, -np.inf, 1e25)  # the square of the last is not finite


@each_way((4, 3), (400, 128), (1030, 130))
def test_bad_gradients_leave_no_trace(shape, variant, dtype):
    for bad in BAD:
        update, before, after, _ = one_bad_step(shape, bad, dtype, variant)
        assert not np.isfinite(np.asarray(update)).all()
        for of in (lambda s: s.accumulators[0], momentum_of_a):
            jax.tree.map(np.testing.assert_array_equal, of(before), of(after))


@each_way((), (300,), (140_000,))
def test_adagrad_refuses_entry_by_entry(shape, variant, dtype):
    for bad in BAD:
        refuses_entry_by_entry(bad, shape, variant, dtype)


def refuses_entry_by_entry(bad, shape, variant, dtype):
    update, *states = one_bad_step(shape, bad, dtype, variant)
    assert not np.isfinite(np.asarray(update)).all()
    there = (0,) * len(shape)
    for of in (lambda s: s.accumulators[0][0], lambda s: s.momentum["a"]):
        before, after, healthy = (np.array(of(s)) for s in states)
        if before.dtype == np.int8:  # a row has one scale, so all of it stays
            np.testing.assert_array_equal(after, before)
            np.testing.assert_array_equal(states[1].scales[0], states[0].scales[0])
            continue
        assert not np.array_equal(before, healthy)
        healthy[there] = before[there]
        np.testing.assert_array_equal(after, healthy)


def test_apply_if_finite_sees_what_is_not_finite():
    tx = untyped(optax.apply_if_finite(memoptax.sm3(0.1, 0.9), 5))
    params = {"w": jnp.ones((3, 4))}
    state = tx.init(params)
    bad = {"w": jnp.ones((3, 4)).at[1, 2].set(jnp.nan)}
    updates, state = tx.update(bad, state, params)
    assert int(state.notfinite_count) == 1
    np.testing.assert_array_equal(updates["w"], 0.0)
    updates, state = tx.update({"w": jnp.ones((3, 4))}, state, params)
    np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-6)


@pytest.mark.parametrize(
    ("momentum", "momentum_dtype"),
    [(0.0, None), (0.9, None), (0.9, "bfloat16"), (0.9, "int8")],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=named)
def test_a_large_eps_leaves_finite_updates(shape, momentum, momentum_dtype):
    """Its sum with a large second moment would overflow."""
    tx = memoptax.scale_by_sm3(momentum, None, 3e38, momentum_dtype=momentum_dtype)
    g = jnp.full(shape, 1e19)
    state, update = tx.init(g), jax.jit(tx.update)
    for gradient in (g, g / 10):
        got, state = update(gradient, state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((got, state)))
    if not momentum:
        np.testing.assert_allclose(got, 1e18 / np.sqrt(3.402823e38), rtol=1e-5)


# Derivatives


def test_derivatives_are_finite_where_the_gradient_is_zero():
    tx = untyped(memoptax.scale_by_sm3(0.9))

    def after_two_steps(g):
        state = tx.init(g)
        _, state = tx.update(g, state)
        updates, _ = tx.update(2 * g, state)
        return jnp.sum(updates**2)

    g = jnp.array([[0.0, 1.0], [0.0, 0.0], [2.0, 3.0]])
    assert np.isfinite(jax.jit(jax.grad(after_two_steps))(g)).all()


@pytest.mark.parametrize("shape", [(3, 4), (1030, 130)], ids=named)
@pytest.mark.long
def test_derivatives_follow_finite_differences(shape):
    with jax.enable_x64(True):
        tx = untyped(memoptax.scale_by_sm3())
        weights = jnp.asarray(normal(3, shape))
        first, second = (jnp.asarray(normal(t, shape)) for t in (1, 2))

        @jax.jit
        def f(scale):
            _, state = tx.update(scale * first, tx.init(first))
            return jnp.sum(weights * tx.update(second, state)[0])

        h = 1e-6
        slope = (f(1 + h) - f(1 - h)) / (2 * h)
        np.testing.assert_allclose(jax.jit(jax.grad(f))(1.0), slope, rtol=1e-6)
