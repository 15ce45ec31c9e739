"""Momenta in few bytes, in the slots and beside them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from slots import entries
from streams import SHAPES, at, lognormal, replay, zeros
from untyped import untyped

pytestmark = pytest.mark.few(2)


@pytest.mark.parametrize("topc", [1, 5])
@pytest.mark.long
def test_half_precision_slots_cost_their_rounding_and_no_more(topc, x64):
    # Only gradients decide which momenta are kept, so the same ones are averaged, each
    # off by at most 2**-8 of itself.
    grads = lognormal(40)
    params = zeros(grads)
    exact, rounded = (
        memoptax.critical_momenta(topc=topc, buffer_dtype=dtype)
        for dtype in (None, "bfloat16")
    )
    one, other = untyped(exact.init(params)), rounded.init(params)
    step_exact, step_rounded = jax.jit(exact.update), jax.jit(rounded.update)
    for t in range(40):
        gradient = at(grads, t)
        held = {k: entries(one.buffer, 0, i) for i, k in enumerate(sorted(SHAPES))}
        want, one = step_exact(gradient, one)
        got, other = step_rounded(gradient, other)
        for k, values in held.items():
            bound = np.abs(values).mean(0) * 2.0**-8 if len(values) else 0
            assert (np.abs(got[k] - want[k]) <= 1.001 * bound + 1e-12).all()


@pytest.mark.parametrize(
    ("dtype", "off"),
    [
        *((dtype, {}) for dtype in ("float32", "bfloat16", "float16", "int8")),
        ("bfloat16", {"kappa": 0.0}),
        ("int8", {"topc": 0}),
    ],
)
def test_a_stored_momentum_stays_close(dtype, off):
    grads = jax.tree.map(np.float32, lognormal(40))
    params = zeros(grads)
    exact, stored = (
        memoptax.critical_momenta(0.8, **off, mu_dtype=mu_dtype)
        for mu_dtype in (None, dtype)
    )
    one, other = exact.init(params), stored.init(params)
    step_exact, step_stored = jax.jit(exact.update), jax.jit(stored.update)
    # An average of ten roundings. In int8 they are relative to the largest of the row.
    eps = 1 / 127 if dtype == "int8" else float(jnp.finfo(dtype).eps)
    largest = max(np.abs(g).max() for g in grads.values())
    for t in range(40):
        gradient = at(grads, t)
        want, one = step_exact(gradient, one)
        got, other = step_stored(gradient, other)
        for k in want:
            assert np.abs(got[k] - want[k]).max() <= 10 * eps * largest
        if dtype == "float32" and not off:
            chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize(("dtype", "stated"), [("bfloat16", 0.04), ("float16", 0.005)])
def test_a_stored_momentum_stalls_as_close_as_stated(dtype, stated):
    """b1 = .9 stops where a tenth of the distance is half a unit in the last place."""
    tx = memoptax.critical_momenta(0.9, topc=1, mu_dtype=dtype)
    gradient = jnp.linspace(1, 2, 1000, endpoint=False)
    state = jax.lax.fori_loop(
        0, 300, lambda _, s: tx.update(gradient, s)[1], tx.init(gradient)
    )
    off = np.abs(np.float32(state.mu) / gradient - 1).max()
    assert 0.9 * stated <= off <= stated


@pytest.mark.parametrize(
    ("off", "dtype"), [({"topc": 0}, "bfloat16"), ({"kappa": 0.0}, "int8")]
)
def test_without_a_buffer_adams_momentum_is_stored_as_asked(off, dtype):
    grads = jax.tree.map(np.float32, lognormal(30))
    ours = memoptax.adam_cm(0.1, mu_dtype=dtype, **off)
    want, _ = replay(optax.adam(0.1), zeros(grads), grads)
    got, state = replay(ours, zeros(grads), grads)
    for k in got:
        np.testing.assert_allclose(got[k], want[k], atol=0.05)
    assert not np.array_equal(got["b"], want["b"])
    sizes = {x.dtype.itemsize for x in jax.tree.leaves(state[0].moment)}
    assert sizes == {jnp.dtype(dtype).itemsize}


def test_a_momentum_is_clipped_to_the_range_of_its_dtype():
    tx = untyped(memoptax.critical_momenta(0.0, topc=2, mu_dtype="float16"))
    update, state = tx.update(jnp.array([1e6, -3e5, 1.0]), tx.init(jnp.zeros(3)))
    np.testing.assert_array_equal(update, [65504, -65504, 1])
    assert np.isfinite(state.mu).all()


def test_an_empty_row_has_a_scale_in_int8():
    tx = memoptax.critical_momenta(mu_dtype="int8", topc=2)
    params = {"empty": jnp.zeros((3, 0)), "w": jnp.ones((4, 4)), "none": jnp.zeros(0)}
    before = tx.init(params)
    _, after = tx.update(params, before)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (3,)], ids=str)
def test_a_gradient_known_to_be_0_leaves_the_norms_of_a_sum_finite(shape):
    """Compiled, a constant norm of 0 must not become 0 times infinity."""
    zeros = jnp.zeros(shape)
    tx = memoptax.critical_gradients(2, holding="sum", buffer_dtype="int8")
    state, step = tx.init(zeros), jax.jit(lambda state: tx.update(zeros, state)[1])
    for _ in range(3):
        state = step(state)
    memoptax.check_state(tx, zeros, state)


def test_half_precision_gradients_are_widened_before_they_are_averaged():
    gradient = jnp.full(3, 1.2345, jnp.bfloat16)
    tx = untyped(memoptax.scale_by_adam_cm())
    update, state = tx.update(gradient, tx.init(gradient))
    assert update.dtype == jnp.bfloat16
    assert state.mu.dtype == state.nu.dtype == jnp.float32
    np.testing.assert_allclose(state.mu, 0.1 * gradient.astype(jnp.float32), rtol=1e-6)


@pytest.mark.parametrize("off", [{"kappa": 0.0}, {"topc": 0}], ids=str)
@pytest.mark.parametrize("make", [memoptax.adam_cm, memoptax.sgd_cm])
def test_switched_off_it_keeps_its_state_in_float32(make, off):
    tx, params = make(0.1, **off), jnp.ones(3, jnp.bfloat16)
    state = tx.init(params)
    updates, after = tx.update(jnp.ones(3, jnp.float32), state, params)
    assert updates.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    floats = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_slots_of_bfloat16_stay_finite_at_the_end_of_its_range():
    """A momentum may be a little larger than the gradients that came last."""
    tx = untyped(memoptax.critical_momenta(0.9, topc=5, buffer_dtype="bfloat16"))
    largest = float(np.finfo(np.float32).max)
    stream = jnp.asarray([largest] * 100 + [3.38e38], jnp.float32)[:, None]

    def body(state, gradient):
        return tx.update(gradient, state)[1], None

    state = jax.lax.scan(body, tx.init(jnp.zeros(1)), stream)[0]
    assert np.isfinite(np.float32(state.buffer.slots)).all()
    assert int(state.buffer.accepted[0]) > 0


def test_the_norms_of_a_running_sum_are_those_of_the_momenta():
    """The last gradient may be much smaller than the momentum that is offered."""
    tx = untyped(memoptax.critical_momenta(0.5, topc=2, holding="sum"))
    state = tx.init(jnp.zeros(2))
    for size in (4.0, 0.1):
        _, state = tx.update(jnp.array([size, 0.0]), state)
    np.testing.assert_allclose(state.buffer.norms, [[2.0, 1.05]], rtol=1e-6)


def test_a_momentum_beyond_float16_is_refused_after_a_small_gradient():
    tx = untyped(memoptax.critical_momenta(0.5, topc=2, buffer_dtype="float16"))
    state = tx.init(jnp.zeros(2))
    for size, accepted in ((1e4, 1), (3e5, 1), (100.0, 1), (0.0, 2)):
        _, state = tx.update(jnp.array([size, 0.0]), state)
        assert int(state.buffer.accepted[0]) == accepted
    assert np.isfinite(np.float32(state.buffer.slots)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: memoptax.critical_momenta(),
        lambda: memoptax.critical_momenta(topc=1),
        lambda: memoptax.critical_momenta(topc=2, holding="sum"),
        lambda: memoptax.critical_momenta(mu_dtype="float16"),
        lambda: memoptax.scale_by_adam_cm(topc=2, skip_first=True),
        lambda: memoptax.scale_by_adam_cm(topc=1, skip_first=True),
        lambda: memoptax.scale_by_sm3_cm(topc=2),
    ],
    ids=["read", "select", "sum", "mu", "skip_first", "skip_first, C = 1", "sm3_cm"],
)
def test_float16_momenta_of_a_large_norm_enter(make):
    """A mean of float16 gradients is in their range, and its norm need not be."""
    tx = make()
    ends = {}
    for dtype in ("float16", "float32"):
        gradient = jnp.full((512, 512), 1000, dtype)
        state, step = tx.init(gradient), jax.jit(tx.update)
        for _ in range(8):
            ends[dtype], state = step(gradient, state)
        assert state.buffer.offered == state.buffer.accepted == 8
        memoptax.check_state(tx, gradient, state)
    np.testing.assert_allclose(*ends.values(), rtol=2e-3)


@pytest.mark.parametrize("topc", [1, 2])
def test_a_momentum_beyond_float16_is_clipped_in_its_slot(topc):
    """The gradients were in float32, and then are in the parameters' float16."""
    tx, params = memoptax.scale_by_adam_cm(topc=topc, skip_first=True), jnp.ones(4)
    params = params.astype("float16")
    state = tx.init(params)
    for gradient in [jnp.full(4, 1e6)] * 3 + [params] * 3:
        _, state = tx.update(gradient, state)
    memoptax.check_state(tx, params, state)
    assert untyped(state).buffer.accepted == 3


@pytest.mark.parametrize(
    ("make", "topc"),
    [(memoptax.adam_c, 0), (memoptax.adam_cm, 0), (memoptax.adam_cm, 2)],
)
def test_a_wide_momentum_of_narrower_gradients_keeps_its_digits(make, topc, x64):
    tx, params = make(0.1, topc=topc, mu_dtype="float64"), jnp.ones(1)
    state, want = tx.init(params), 0.0
    for gradient in (np.float64(1e40), np.float32(1 / 3), np.float32(1 / 3)):
        _, state = tx.update(jnp.asarray(gradient)[None], state, params)
        want = 0.9 * want + 0.1 * float(gradient)
    (m,) = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(state)
        if {"mu", "moment"} & {getattr(key, "name", None) for key in path}
    ]
    np.testing.assert_allclose(m, [want], rtol=1e-12)
