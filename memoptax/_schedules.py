"""The learning-rate schedule that SM3's authors train with."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from memoptax import _check
from memoptax._tensors import dtypes


def sm3_schedule(
    peak: ArrayLike,
    warmup_steps: int,
    total_steps: int,
    power: float = 2,
    cooldown_fraction: float = 0.1,
) -> optax.Schedule:
    r"""Polynomial warm-up, constant learning rate, linear cool-down to zero.

    .. math::

      \eta_t = \eta \cdot \min\Big( \big(\tfrac{t}{T_w}\big)^{p},\; 1,\;
        \tfrac{T - t}{c\,T} \Big)

    with the step t, counted from 0, the peak :math:`\eta`, a warm-up of :math:`T_w`
    steps, a run of T steps, the power p, and a cool-down over the fraction c of the
    run. The authors warm up with p = 2, because the accumulators of an adaptive method
    say little in the first steps.

    The authors also evaluate the average of the parameters. optax has the parts::

      average = optax.ema(0.999)                          # of the parameters
      state = average.init(params)
      smooth, state = average.update(params, state)       # after every step

    Args:
      peak: the largest learning rate.
      warmup_steps: the number of steps of the warm-up, 0 for none.
      total_steps: the length of the run. The rate is 0 after it.
      power: the power of the warm-up.
      cooldown_fraction: the part of the run, from 0 to 1, that the cool-down takes.

    Returns:
      A schedule: a function from the step to a scalar in float32, or in float64 if
        ``peak`` is an array of JAX in float64.

    Raises:
      ValueError: if an argument is out of its range, or if one other than ``peak`` is
        traced.

    Examples:
      >>> import memoptax
      >>> schedule = memoptax.sm3_schedule(1.0, warmup_steps=10, total_steps=100)
      >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 50, 95, 100)]
      [0.0, 0.25, 1.0, 1.0, 0.5, 0.0]

    References:
      Anil et al, `Memory-Efficient Adaptive Optimization
      <https://arxiv.org/abs/1901.11150>`_, 2019
    """
    peak = _check.number("peak", peak, 0)
    if isinstance(peak, jax.Array):
        peak = dtypes.wide(peak)
    total_steps = _check.known("total_steps", total_steps, 0, above=True)
    warmup_steps = _check.known("warmup_steps", warmup_steps, 0, total_steps)
    power = _check.known("power", power, 0)
    cooldown_fraction = _check.known("cooldown_fraction", cooldown_fraction, 0, 1)

    def schedule(count):
        t = jnp.asarray(count, jnp.float32)
        left = jnp.maximum(total_steps - t, 0)
        # A warm-up or cool-down that is shorter than a step is a jump. In float32 its
        # length could be 0.
        rise = (t / max(warmup_steps, 1e-6)) ** power if warmup_steps else 1.0
        fall = left / max(cooldown_fraction * total_steps, 1e-6)
        return peak * jnp.minimum(jnp.minimum(rise, 1.0), fall)

    return schedule
