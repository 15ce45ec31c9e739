"""How one array is stored, and the limits of its rounding."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from memoptax._tensors import storage

from untyped import untyped

SHAPES = [(), (1,), (7,), (5, 3), (2, 3, 4), (0,), (3, 0), (0, 3)]
LARGEST = float(np.finfo(np.float32).max)


def like(x, dtype):
    """Zeros in the storage of ``x``."""
    (scale,) = storage.zero_scales([x], None, dtype) or (None,)
    return storage.Stored(storage.zeros(x, None, dtype), scale)


@functools.partial(jax.jit, static_argnames="dtype")
def round_trip(x, dtype):
    return storage.decode(storage.encode(x, like(x, dtype)), jnp.float32)


def normal(shape, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("dtype", storage.DTYPES[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.few(8)
def test_what_is_stored_has_its_shape_and_dtype(shape, dtype):
    x = jnp.asarray(normal(shape))
    stored, empty = storage.encode(x, like(x, dtype)), like(x, dtype)
    assert stored.values.dtype == empty.values.dtype
    assert stored.values.dtype.itemsize == jnp.dtype(dtype).itemsize
    assert stored.values.shape == empty.values.shape == shape
    if dtype == "int8":
        assert stored.scale.shape == empty.scale.shape == (*shape[:-1], 1)[: len(shape)]
        assert stored.scale.dtype == empty.scale.dtype == jnp.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_off_by_half_a_step_of_its_row_at_most(shape):
    x = normal(shape) * np.float32(10.0) ** normal(shape[:-1] + (1,) * bool(shape), 1)
    got = np.asarray(round_trip(x, "int8"))
    if x.size:
        largest = np.abs(x).max(axis=-1, keepdims=True) if x.ndim else np.abs(x)
        assert (np.abs(got - x) <= 1.0001 / 254 * largest).all()
        np.testing.assert_allclose(
            np.abs(got).max(axis=-1) if x.ndim else abs(got),
            largest.reshape(x.shape[:-1]),
            rtol=3e-5,
        )


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -0.0, 0.0],
        [1e-40, -1e-45, 0.0],
        [1.4e-36, 1e-38, -2e-37],
        [LARGEST, -LARGEST, 1.0],
        [0.999999 * LARGEST, -1e38, 0.0],
    ],
    ids=str,
)
def test_int8_stays_finite_at_the_ends_of_float32(row):
    x = jnp.asarray([row, [1.0, 2.0, 3.0]], jnp.float32)
    got = np.asarray(round_trip(x, "int8"))
    assert np.isfinite(got).all()
    assert np.abs(got[0] - x[0]).max() <= np.abs(x[0]).max() / 253 + 2e-36
    np.testing.assert_allclose(got[1], [1, 2, 3], rtol=1e-2)


def test_small_rows_of_half_precision_are_not_lost():
    x = jnp.asarray([[2e-7, 1e-7], [3e4, 6e4]], jnp.float16)
    np.testing.assert_allclose(round_trip(x, "int8"), np.float32(x), rtol=0.01)


def test_float16_is_the_nearest_one_with_subnormal_numbers():
    x = normal(400) * np.float32(10.0) ** np.linspace(-9, 4, 400, dtype=np.float32)
    want = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(round_trip(jnp.asarray(x), "float16"), want)


@pytest.mark.parametrize("of", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bits_are_those_of_the_nearest_bfloat16(of):
    tails = [0, 1e-40, 1e-38, -3e38, LARGEST, np.inf, -np.inf, 1.00390625]
    tails = np.array(tails, np.float32)
    x = np.concatenate([normal(4000) * np.float32(10.0) ** normal(4000, 1), tails])
    with np.errstate(over="ignore"):
        x = np.asarray(x.astype(of))
    want = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    stored = storage.encode(jnp.asarray(x), like(x, "bfloat16")).values
    got = np.asarray(stored).view(np.uint16)
    # XLA's CPU backend may take subnormal numbers for 0.
    subnormal = np.abs(x.astype(np.float32)) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(got[~subnormal], want[~subnormal])
    assert np.isnan(round_trip(jnp.float32(np.nan), "bfloat16"))


@pytest.mark.parametrize("dtype", storage.DTYPES[1:])
@pytest.mark.parametrize("scale", [1e-9, 3e-8, 1e-6, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(), (300,), (5, 40)], ids=str)
@pytest.mark.few(8)
def test_no_stored_value_is_longer_than_its_bound(shape, scale, dtype):
    x = jnp.asarray(normal(shape) * np.float32(scale))
    x = x * (jnp.abs(x) > scale / 2) if shape else x  # rounding must not cancel out
    stored = storage.encode(x, like(x, dtype))
    norms = jnp.sqrt(jnp.sum(x * x))[None]
    bound = float(storage.norm_bounds(norms, [x], [stored])[0])
    values = np.asarray(storage.decode(stored, jnp.float32), np.float64)
    assert np.linalg.norm(values) <= bound * (1 + 1e-6)
    assert bound <= 1.1 * np.linalg.norm(x) + 3e-8 * np.sqrt(x.size)


def test_float16_is_bounded_where_bfloat16_rounds_it_up():
    x = jnp.full(1, 1.005859375, jnp.float16)
    stored = storage.encode(x, like(x, "bfloat16"))
    bound = storage.norm_bounds(x.astype(jnp.float32), [x], [stored])
    assert float(stored.values[0]) <= float(bound[0])


def test_the_largest_entry_of_a_row_becomes_127():
    stored = storage.encode(
        jnp.asarray(normal((50, 6))), like(np.zeros((50, 6)), "int8")
    )
    np.testing.assert_array_equal(np.abs(np.asarray(stored.values)).max(axis=1), 127)


def test_rows_of_zeros_are_stored_without_a_division():
    """A CPU turns NaN into 0 in int8. Other devices need not."""
    stored = storage._quantized(jnp.zeros((2, 3)), jnp.zeros((2, 1)))
    np.testing.assert_array_equal(stored.values, 0.0)
    np.testing.assert_array_equal(stored.scale, 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e37])
@pytest.mark.parametrize("shape", [(200,), (5, 40), (2, 3, 40)], ids=str)
def test_the_bound_of_int8_covers_the_range_of_its_scales(shape, scale):
    """The squares of the scales overflow or vanish. A step is about σ / 50 here."""
    x = jnp.asarray(normal(shape) * np.float32(scale))
    stored = storage.encode(x, like(x, "int8"))
    norm = np.linalg.norm(np.float64(np.asarray(x)) / scale) * scale
    (bound,) = storage.norm_bounds(jnp.float32([norm]), [x], [stored])
    assert 1.005 * norm < bound < 1.015 * norm


@pytest.mark.parametrize("dtype", storage.DTYPES[1:])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
@pytest.mark.parametrize("at", [0, 3, 63])
def test_what_does_not_fit_is_known(at, bad, dtype):
    x = jnp.ones((2, 64)).at[1, at].set(bad)
    norms = jnp.sqrt(jnp.sum(x * x))[None]
    (fits,) = storage.fits(norms, [x], [like(x, dtype)]) & jnp.isfinite(norms)
    assert bool(fits) == (bad == 1e6 and dtype != "float16")


@pytest.mark.parametrize("size", [65504.0, 65505.0])
def test_the_largest_number_fits(size):
    x = jnp.full((1,), size)
    (fits,) = storage.fits(jnp.float32([size]), [x], [like(x, "float16")])
    assert bool(fits) == (size == 65504)


@pytest.mark.parametrize("size", [3.38e38, 3.39e38, 3.4e38])
def test_what_rounds_to_infinity_does_not_fit(size):
    x = jnp.full((1,), size)
    stored = storage.encode(x, like(x, "bfloat16"))
    (fits,) = storage.fits(jnp.float32([size]), [x], [stored])
    finite = np.isfinite(np.float32(storage.decode(stored, jnp.float32)))
    assert bool(fits) == (size < 3.3895e38)
    assert finite or not fits
    bound = storage.norm_bounds(jnp.float32([size]), [x], [stored])
    assert np.isfinite(bound) or not fits


def test_saturated_values_are_stored_as_finite_ones(x64):
    x = jnp.asarray([1e300, -1e39, 7e4, 1.0])
    for dtype in storage.DTYPES[1:]:
        to = like(x, dtype)
        stored = storage.encode(storage.saturate(x, to), to)
        values = np.asarray(storage.decode(stored, jnp.float64))
        assert np.isfinite(values).all() and values[0] > 6e4


@pytest.mark.parametrize(("dtype", "slope"), [("bfloat16", 1), ("int8", 0)])
def test_derivatives_flow_through_bfloat16_and_not_through_int8(dtype, slope):
    found = jax.grad(lambda x: jnp.sum(round_trip(x, dtype)))(jnp.arange(6.0))
    np.testing.assert_array_equal(found, slope)


@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.parametrize("explicit", [False, True])
def test_scales_are_sharded_like_the_rows(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    x = jax.device_put(jnp.ones((8, 6)), sharding)
    with jax.set_mesh(mesh):
        values = storage.zeros(x, 3, "int8")
        (scale,) = untyped(storage.zero_scales([x], 3, "int8"))
    assert values.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, jax.P(None, "data", "model")), 3
    )
    assert scale.shape == (3, 8, 1)
    assert scale.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, jax.P(None, "data", None)), 3
    )
