"""SM3's two rules against NumPy, Adagrad and optax's SM3."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

import oracle_sm3
from labels import named
from streams import normal, updates_of
from untyped import untyped

pytestmark = pytest.mark.few(2)


@st.composite
def problems(draw, max_rank=4):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=max_rank)))
    box = st.tuples(*(st.integers(1, n + 1) for n in shape))
    boxes = draw(st.lists(box, min_size=1, max_size=3))
    if draw(st.booleans()):
        boxes += memoptax.covers.axes((), jax.ShapeDtypeStruct(shape, "float32"))
    seed = draw(st.integers(0, 2**31))
    scales = draw(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 30.0]), min_size=4))
    return shape, boxes, [normal(seed + t, shape, s) for t, s in enumerate(scales[:8])]


@pytest.mark.parametrize("variant", ["II", "I"])
@hypothesis.settings(max_examples=6)
@hypothesis.given(
    problems(), st.sampled_from([None, 0.9]), st.sampled_from([None, 0.5, 0.95])
)
@pytest.mark.few(1)
def test_oracle(variant, problem, momentum, beta):
    shape, boxes, gradients = problem
    oracle = oracle_sm3.SM3(shape, boxes, variant, momentum, beta)
    with jax.enable_x64(True):
        tx = memoptax.scale_by_sm3(momentum, beta, variant=variant, cover=boxes)
        updates = updates_of(tx, jnp.zeros(shape), map(jnp.asarray, gradients))
        for g, u in zip(gradients, updates):
            np.testing.assert_allclose(u, oracle.step(g), rtol=1e-12, atol=1e-14)


LARGE = [(520, 264), (264, 521), (3, 3, 128, 120), (64, 4096), (16, 12289)]


@pytest.mark.parametrize(
    ("variant", "shape"),
    [*(("II", s) for s in LARGE), ("I", LARGE[1]), ("I", LARGE[2])],
)
def test_large_tensors_give_the_same_numbers_in_another_way(shape, variant):
    """Above some size, the maxima are taken over recomputed slices."""
    axes = memoptax.covers.axes((), jax.ShapeDtypeStruct(shape, "float32"))
    tx = memoptax.scale_by_sm3(variant=variant)
    state, update = untyped(tx.init(jnp.zeros(shape))), jax.jit(tx.update)
    least, numbers = np.zeros(shape), [0.0] * len(axes)
    for t in range(3):
        g = normal(t, shape).astype(np.float32)
        u, state = update(jnp.asarray(g), state)
        axis = lambda box: tuple(i for i, b in enumerate(box) if b > 1)  # noqa: E731
        square = np.square(g, dtype=np.float64)
        if variant == "II":
            nu = least + square
            numbers = [nu.max(axis(box), keepdims=True) for box in axes]
        else:
            tops = [square.max(axis(box), keepdims=True) for box in axes]
            numbers = [a + b for a, b in zip(numbers, tops)]
            nu = functools.reduce(np.minimum, numbers)
        least = functools.reduce(np.minimum, numbers)
        np.testing.assert_allclose(u, g / np.sqrt(nu), rtol=1e-5)
    for ours, theirs in zip(state.accumulators[0], numbers):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_large_tensors_with_blocks_and_slices():
    shape = (1100, 130)
    cover = lambda path, leaf: [  # noqa: E731
        *memoptax.covers.axes(path, leaf),
        (7, 130),
        (32, 16),
    ]
    tx = memoptax.scale_by_sm3(cover=cover)
    oracle = oracle_sm3.SM3(shape, [(1, 130), (1100, 1), (7, 130), (32, 16)])
    gradients = [normal(t, shape).astype(np.float32) for t in range(3)]
    for g, u in zip(gradients, updates_of(tx, jnp.zeros(shape), gradients)):
        np.testing.assert_allclose(u, oracle.step(g), rtol=1e-5)


@pytest.mark.long
def test_large_tensors_in_a_batch_are_as_one_by_one():
    tx = memoptax.scale_by_sm3(0.9)
    g = jnp.asarray(normal(0, (3, 1030, 130)), jnp.float32)
    states = jax.vmap(tx.init)(g)
    together = jax.jit(jax.vmap(tx.update))(g, jax.vmap(tx.update)(g, states)[1])
    for i in range(3):
        alone = tx.update(g[i], tx.update(g[i], tx.init(g[i]))[1])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


# Related optimizers


def adagrad(gradients):
    total = 0.0
    for g in gradients:
        total = total + g * g
        yield g / jnp.sqrt(total + 1e-30)


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize(
    "shape, cover",
    [((4, 3, 2), memoptax.covers.full), ((7,), None), ((), None)],
    ids=named,
)
def test_singleton_boxes_and_low_ranks_are_adagrad(shape, cover, variant):
    gradients = [jnp.asarray(normal(t, shape), jnp.float32) for t in range(5)]
    tx = memoptax.scale_by_sm3(variant=variant, cover=cover)
    with jax.disable_jit():  # without fused multiply-add the bits are the same
        state = tx.init(jnp.zeros(shape))
        for g, reference in zip(gradients, adagrad(gradients)):
            u, state = tx.update(g, state)
            np.testing.assert_array_equal(u, reference)


@pytest.mark.parametrize(
    ("shape", "momentum"),
    [((5,), 0.9), ((4, 3), None), ((2, 3, 4), 0.9), ((2, 2, 3, 2), None)],
    ids=named,
)
def test_equals_optax_with_the_same_eps(shape, momentum):
    gradients = [jnp.asarray(normal(t, shape), jnp.float32) for t in range(20)]
    theirs = optax.scale_by_sm3(b1=momentum or 0.0, eps=1e-30)
    params = jnp.zeros(shape)
    ours = updates_of(memoptax.scale_by_sm3(momentum), params, gradients)
    for u, v in zip(ours, updates_of(theirs, params, gradients)):
        np.testing.assert_allclose(u, v, rtol=2e-6, atol=1e-7)


@hypothesis.settings(max_examples=5)
@hypothesis.given(st.permutations(range(4)), st.sampled_from(["I", "II"]))
@pytest.mark.long
def test_permuting_axes_permutes_the_update(order, variant):
    gradients = [normal(t, (2, 3, 4, 5)).astype(np.float32) for t in range(2)]
    turned = [g.transpose(order) for g in gradients]
    tx = memoptax.scale_by_sm3(variant=variant)
    straight = updates_of(tx, jnp.zeros((2, 3, 4, 5)), gradients)
    for u, v in zip(straight, updates_of(tx, jnp.zeros(turned[0].shape), turned)):
        np.testing.assert_allclose(u.transpose(order), v, rtol=1e-6)


@hypothesis.settings(max_examples=12)
@hypothesis.given(problems(max_rank=3))
@pytest.mark.long
def test_second_moments_are_ordered(problem):
    """Adagrad's sum <= nu of SM3-II <= nu of SM3-I, for any boxes."""
    shape, boxes, gradients = problem
    total = np.zeros(shape)
    with jax.enable_x64(True):
        params = jnp.zeros(shape)
        arrays = [jnp.asarray(g) for g in gradients]
        roads = [
            updates_of(memoptax.scale_by_sm3(variant=v, cover=boxes), params, arrays)
            for v in ("II", "I")
        ]
        for g, second, first in zip(gradients, *roads):
            total += g**2
            there = g != 0  # there |u| = |g| / sqrt(nu) shows nu
            u_ii, u_i = np.asarray(second)[there], np.asarray(first)[there]
            slack = 1 + 1e-12
            assert (total[there] * u_ii**2 <= g[there] ** 2 * slack).all()
            assert (np.abs(u_i) <= np.abs(u_ii) * slack).all()


def test_second_moments_differ_somewhere():
    """The property above would also hold for three equal numbers."""
    gradients = [normal(t, (4, 4)) for t in range(3)]
    roads = [
        list(updates_of(memoptax.scale_by_sm3(variant=v), jnp.zeros((4, 4)), gradients))
        for v in ("II", "I")
    ]
    adagrads = list(adagrad(gradients))
    assert (np.abs(roads[0][-1]) < np.abs(adagrads[-1]) * 0.99).any()
    assert (np.abs(roads[1][-1]) < np.abs(roads[0][-1]) * 0.99).any()


def test_beta_is_an_average_that_decreases():
    tx = memoptax.scale_by_sm3(beta=0.9)
    gradients = [jnp.full((3, 4), 10.0)] + [jnp.full((3, 4), 0.1)] * 200
    *_, last = updates_of(tx, jnp.zeros((3, 4)), gradients)
    np.testing.assert_allclose(last, 1.0, rtol=1e-3)
