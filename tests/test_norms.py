"""Norms of leaves over the whole range of their dtype, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoptax._tensors import norms

SHAPES = [(), (7,), (64, 64), (3, 1500), (0, 3)]
CASES = [("float32", e) for e in (-36, -20, -10, 0, 10, 20, 35)]
CASES += [("float64", e) for e in (-300, -160, 0, 160, 300)]
CASES += [("bfloat16", -30), ("bfloat16", 30), ("float16", -3), ("float16", 3)]


def in_shards(squares):
    """As if each of two devices had half of every square."""
    return [x / 2 + x / 2 for x in squares]


@pytest.mark.few(8)
@pytest.mark.parametrize("across", [None, in_shards])
@pytest.mark.parametrize(("dtype", "exponent"), CASES)
def test_a_norm_is_right_even_if_its_square_is_out_of_range(dtype, exponent, across):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        leaves = [
            jnp.asarray(rng.uniform(1, 9, shape) * 10.0**exponent, dtype)
            for shape in SHAPES
        ]
        wide = jnp.promote_types(dtype, jnp.float32)
        found = jax.jit(lambda x: norms.of(x, wide, across))(leaves)
    assert found.dtype == wide
    unit = np.float64(10.0) ** exponent
    for one, leaf in zip(found, leaves):
        expected = np.linalg.norm(np.asarray(leaf, np.float64).ravel() / unit)
        rtol = 4 * float(jnp.finfo(wide).eps)
        np.testing.assert_allclose(np.float64(one) / unit, expected, rtol=rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_pass_of_an_accelerator_has_the_same_range(dtype):
    """On a CPU other code runs. The sizes straddle the bounds where scaling begins."""
    entries = np.random.default_rng(0).uniform(1, 9, (64,))
    with jax.enable_x64(dtype == "float64"):
        top = jnp.finfo(dtype).maxexp
        sizes = 2.0 ** np.linspace(12 - top, top - 12, 41)
        mixed = np.concatenate([entries * 2.0 ** (top / 3), entries])
        leaves = [entries * size for size in sizes] + [mixed, mixed / 2.0 ** (top / 3)]
        edge = 2.0 ** (top * 5 // 16)
        straddling = 2.0 ** np.linspace(-2, 2, 64)
        leaves += [straddling * edge, straddling / edge, straddling[:3] / edge / 9]
        squares = [norms._squares_by_size(jnp.asarray(x, dtype)) for x in leaves]
        found = np.asarray(norms._roots(jnp.stack(squares)))
    rtol = 4 * float(jnp.finfo(dtype).eps)
    for one, leaf in zip(found, leaves):
        unit = leaf.max()
        want = np.linalg.norm(leaf / unit)
        np.testing.assert_allclose(np.float64(one) / unit, want, rtol=rtol)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_bad_number_is_seen_in_its_leaf_alone(dtype, bad):
    with jax.enable_x64(dtype == "float64"):
        good = jnp.ones((64, 64), dtype)
        found = norms.of([good, good.at[3, 4].set(bad)], jnp.float32)
    assert found[0] == 64
    assert not np.isfinite(found[1])


def test_no_derivative_flows():
    def f(x):
        return norms.of([x * x], jnp.float32)[0] * jnp.sum(x)

    x = jnp.arange(1.0, 4)
    norm = np.sqrt(1 + 16 + 81)
    np.testing.assert_allclose(jax.grad(f)(x), np.full(3, norm), rtol=1e-6)
