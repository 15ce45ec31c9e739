"""The learning-rate schedule that SM3's authors train with."""

import jax.numpy as jnp
import optax

from memoptax import _check


def sm3_schedule(
    peak: float,
    warmup_steps: int,
    total_steps: int,
    power: float = 2,
    cooldown_fraction: float = 0.1,
) -> optax.Schedule:
    r"""Polynomial warm-up, constant learning rate, linear cool-down to zero.

    .. math::

      \eta_t = \eta \cdot \min\Big( \big(\tfrac{t}{T_w}\big)^{p},\; 1,\;
        \tfrac{T - t}{c\,T} \Big)

    with the step t, counted from zero, the peak :math:`\eta`, the warm-up of
    :math:`T_w` steps, the length of the run T, the power p and the fraction c of the
    run that cools down. The authors warm up with p = 2, since the accumulators of an
    adaptive method say little in the first steps.

    They also evaluate the average of the parameters. With optax's own parts::

      average = optax.ema(0.999)                          # of the parameters
      state = average.init(params)
      smooth, state = average.update(params, state)       # after every step

    Args:
      peak: the largest learning rate.
      warmup_steps: how many steps the warm-up takes; 0 for none.
      total_steps: the length of the run. The rate is zero from there on.
      power: the power of the warm-up.
      cooldown_fraction: the part of the run, from 0 to 1, that the cool-down takes.

    Returns:
      A schedule: a function from the step to a float32 scalar.

    Raises:
      ValueError: if an argument is out of its range, or another than the peak traced.

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
    total_steps = _check.known("total_steps", total_steps, 0, above=True)
    warmup_steps = _check.known("warmup_steps", warmup_steps, 0, total_steps)
    power = _check.known("power", power, 0)
    cooldown_fraction = _check.known("cooldown_fraction", cooldown_fraction, 0, 1)

    def schedule(count):
        t = jnp.asarray(count, jnp.float32)
        left = jnp.maximum(total_steps - t, 0)
        rise = (t / warmup_steps) ** power if warmup_steps else 1.0
        # A cool-down of less than a step is a drop at the end.
        fall = left / max(cooldown_fraction * total_steps, 1e-6)
        return peak * jnp.minimum(jnp.minimum(rise, 1.0), fall)

    return schedule
