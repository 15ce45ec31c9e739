"""Maxima over boxes of a computed tensor, taken slice by slice, against NumPy's."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoptax._tensors import tiles

pytestmark = pytest.mark.few(2)

# Sizes near those at which sections, repeats and slices change.
LENGTHS = st.one_of(st.integers(1, 9), st.sampled_from([15, 33, 63, 64, 65, 130, 513]))


@st.composite
def problems(draw):
    """Shapes, the axes that a box spans, and a seed."""
    shape = draw(st.lists(LENGTHS, min_size=1, max_size=4))
    hypothesis.assume(np.prod(shape) < 2**19)
    spanned = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    return tuple(shape), spanned, draw(st.integers(0, 99))


@pytest.fixture(autouse=True, params=[tiles._ACROSS, tiles._ACROSS_ON_GPU])
def folded(request, monkeypatch):
    """Small tensors are folded too, also in the groups of a GPU. A test that folds none
    fails.
    """
    monkeypatch.setattr(tiles, "_SMALL", 1)
    monkeypatch.setattr(tiles, "_ACROSS", request.param)
    folds = []
    fold = tiles._fold
    monkeypatch.setattr(tiles, "_fold", lambda *a: folds.append(a) or fold(*a))
    yield
    assert folds


def least_plus_square(g, *floors):
    return functools.reduce(jnp.minimum, floors) + g * g


def computed(shape, spanned, numbers):
    """The maxima of min(rows, columns) + g². The operands broadcast."""
    box = tuple(n if i in spanned else 1 for i, n in enumerate(shape))
    return tiles.maxima(least_plus_square, lambda *x: x, numbers, box)


def operands(shape, seed):
    rng = np.random.default_rng(seed)
    g = rng.standard_normal(shape)
    first = rng.random((shape[0],) + (1,) * (len(shape) - 1))
    rest = rng.random((1,) + shape[1:])
    return g, first, rest


@hypothesis.settings(max_examples=12)
@hypothesis.given(problems())
def test_maxima_are_those_of_the_whole(problem):
    shape, spanned, seed = problem
    g, first, rest = operands(shape, seed)
    with jax.enable_x64(True):
        numbers = tuple(map(jnp.asarray, (g, first, rest)))
        top = jax.jit(functools.partial(computed, shape, spanned))(numbers)
    expected = (np.minimum(first, rest) + g * g).max(tuple(spanned), keepdims=True)
    np.testing.assert_allclose(top, expected, rtol=1e-15)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("shape", [(65, 130), (7, 5, 513), (3000, 3)])
def test_a_bad_number_is_found_in_every_place(shape, bad):
    """Tried at about 97 places, spread over slices, repeats and sections."""
    fold = jax.jit(functools.partial(computed, shape, range(1, len(shape))))
    column = jax.jit(functools.partial(computed, shape, {0}))
    g, first, rest = (jnp.asarray(x, jnp.float32) for x in operands(shape, 0))
    for place in range(0, g.size, g.size // 97 or 1):
        spot = np.unravel_index(place, shape)
        spoiled = (g.at[spot].set(bad), first, rest)
        rows = np.isfinite(fold(spoiled)).reshape(-1)
        assert list(np.flatnonzero(~rows)) == [spot[0]]
        columns = np.isfinite(column(spoiled))[0]
        assert list(zip(*np.nonzero(~columns))) == [tuple(spot[1:])]


@pytest.mark.parametrize("spanned", [{0}, {1}, {0, 1}])
def test_the_derivative_is_that_of_the_largest(spanned):
    """Bits have no derivative, so a maximum over bits gets that of ``jnp.max``."""
    shape = (65, 130)
    with jax.enable_x64(True):
        g, first, rest = map(jnp.asarray, operands(shape, 1))
        # Its square is exact, so every program finds the same place of the maximum.
        g = g.astype(jnp.float16).astype(g.dtype)
        weights = jnp.cos(jnp.arange(65 * 130.0).reshape(shape))

        def weighed(maximum, g):
            top = maximum(g)
            return jnp.sum(top * weights[: top.shape[0], : top.shape[1]])

        def plain(g):
            axes = tuple(spanned)
            return jnp.max(least_plus_square(g, first, rest), axes, keepdims=True)

        def folded(g):
            return computed(shape, spanned, (g, first, rest))

        ours = jax.jit(jax.grad(functools.partial(weighed, folded)))(g)
        theirs = jax.jit(jax.grad(functools.partial(weighed, plain)))(g)
    assert np.count_nonzero(theirs) >= 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)


@pytest.mark.parametrize("spanned", [{0}, {1}])
def test_a_batch_of_maxima(spanned):
    shape = (65, 130)
    stacks = [jnp.stack([jnp.asarray(x)] * 3) for x in operands(shape, 2)]
    stacks[0] = stacks[0] * jnp.arange(1.0, 4)[:, None, None]
    maximum = jax.jit(functools.partial(computed, shape, spanned))
    batch = jax.jit(jax.vmap(functools.partial(computed, shape, spanned)))(stacks)
    for k in range(3):
        np.testing.assert_array_equal(batch[k], maximum([x[k] for x in stacks]))
