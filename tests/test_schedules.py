"""The schedule of SM3's authors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from untyped import untyped


def reference(t, peak, warmup, total, power, fraction):
    rise = min(1.0, (t / warmup) ** power) if warmup else 1.0
    fall = (
        min(1.0, max(total - t, 0) / (fraction * total))
        if fraction
        else float(t < total)
    )
    return peak * min(rise, fall)


@pytest.mark.parametrize("power", [1, 2, 3.5])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1e-50, 10, 50])
def test_every_step_follows_the_formula(power, fraction, warmup):
    schedule = memoptax.sm3_schedule(0.3, warmup, 50, power, fraction)
    steps = jnp.arange(60)
    expected = [reference(t, 0.3, warmup, 50, power, fraction) for t in range(60)]
    np.testing.assert_allclose(
        jax.vmap(schedule)(steps), expected, rtol=1e-5, atol=1e-9
    )


def test_dtype_and_use_in_an_optimizer():
    schedule = memoptax.sm3_schedule(1.0, 4, 100)
    assert jax.jit(schedule)(jnp.int32(3)).dtype == jnp.float32
    tx = untyped(memoptax.sm3(schedule))
    g = jnp.ones((2, 2))
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, 0.0)
    updates, state = tx.update(g, state)
    np.testing.assert_allclose(updates, -(1 / 16) / 2**0.5, rtol=1e-6)


def test_polyak_averaging_with_optax():
    average = untyped(optax.ema(0.5))
    params = jnp.array([1.0])
    smooth, state = average.update(params, average.init(params))
    np.testing.assert_allclose(smooth, params)
    smooth, state = average.update(params + 3.0, state)
    np.testing.assert_allclose(smooth, 3.0)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((1.0, 10, 0), r"total_steps must be in \(0, inf\), but is 0"),
        ((1.0, -1, 10), r"warmup_steps must be in \[0, 10\], but is -1"),
        ((1.0, 11, 10), "warmup_steps .* but is 11"),
        ((-1.0, 1, 10), "peak .* but is -1.0"),
        ((np.float32("nan"), 1, 10), r"peak .* but is np.float32\(nan\)"),
        ((jnp.array(-1.0), 1, 10), r"peak .* but is Array\(-1"),
        ((1.0, 1, float("inf")), "total_steps .* but is inf"),
        ((1.0, "x", 10), "warmup_steps must be a number, but is 'x'"),
        ((1.0, 1, 10, -2), "power .* but is -2"),
        ((1.0, 1, 10, 2, 1.5), "cooldown_fraction .* but is 1.5"),
    ],
)
def test_errors_are_sentences(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        memoptax.sm3_schedule(*arguments)


@pytest.mark.parametrize("peak", [jnp.bfloat16(0.5), jnp.int32(1), jnp.float16(0.5)])
def test_the_peak_may_have_any_dtype_under_strict_promotion(peak):
    with jax.numpy_dtype_promotion("strict"):
        rate = untyped(memoptax.sm3_schedule(peak, 2, 10))(jnp.int32(5))
    assert rate.dtype == jnp.float32
    assert rate == peak
