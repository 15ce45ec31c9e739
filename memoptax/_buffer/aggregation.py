"""How an update and the mean of a buffer become one: ``sum``, ``mid``, ``mean``."""

import functools

import jax
import jax.numpy as jnp

from memoptax._tensors import dtypes


def _sum(fill, kappa):
    """u = g + κ ΣB/|B|: the weights of g and of ΣB."""
    return 1.0, kappa / fill


def _mid(fill, kappa):
    """u = (g + κ ΣB/|B|) / 2."""
    return 0.5, 0.5 * kappa / fill


def _mean(fill, kappa):
    """u = (g + κ ΣB) / (|B| + 1)."""
    return 1 / (fill + 1), kappa / (fill + 1)


WEIGHTS = {"sum": _sum, "mid": _mid, "mean": _mean}


def join(updates, totals, fill, kappa, sound, aggr):
    """Each of the ``updates`` joined with the sum of the values held.

    The results have the dtypes of the updates.

    ``fill`` (R,) is the number of values in that sum. If it or κ is 0, the updates pass
    through for any ``aggr``. If the step is not ``sound``, they are NaN.
    """
    fills = list(fill) * (len(updates) if len(fill) == 1 else 1)
    if isinstance(aggr, str):
        return _weighted(updates, totals, fills, kappa, sound, aggr=aggr)
    return [_called(aggr, *leaf, kappa, sound) for leaf in zip(updates, totals, fills)]


@functools.partial(jax.jit, static_argnames="aggr")
def _weighted(updates, totals, fills, kappa, sound, *, aggr):
    return [
        _leaf(*each, kappa, sound, WEIGHTS[aggr])
        for each in zip(updates, totals, fills)
    ]


def _leaf(update, total, fill, kappa, sound, rule):
    dtype = dtypes.widest(update.dtype, total.dtype)
    return combine(update, total, _weights(fill, kappa, sound, rule, dtype))


def weights(fill, kappa, sound, aggr, dtype):
    """The weights of an update and of the sum of what is held, by a named ``aggr``."""
    return _weights(fill, kappa, sound, WEIGHTS[aggr], dtype)


def _weights(fill, kappa, sound, rule, dtype):
    k, untouched = _weight(fill, kappa, dtype)
    # The choice is between scalars. Consumers recompute that at no cost, but not a
    # choice between tensors.
    weight, total_weight = rule(jnp.maximum(fill, 1).astype(dtype), k)
    weight = jnp.where(sound, jnp.where(untouched, 1, weight), jnp.nan).astype(dtype)
    return weight, jnp.where(untouched, 0, total_weight).astype(dtype)


def combine(update, total, weights):
    """The update joined with the sum of the values held, in the update's dtype."""
    weight, total_weight = weights
    joined = weight * update.astype(weight.dtype)
    return (joined + total_weight * total.astype(weight.dtype)).astype(update.dtype)


def _called(aggr, update, total, fill, kappa, sound):
    dtype = dtypes.widest(update.dtype, total.dtype)
    k, untouched = _weight(fill, kappa, dtype)
    x = update.astype(dtype)
    mean = total.astype(dtype) * (k / jnp.maximum(fill, 1).astype(dtype))
    joined = aggr(x, mean, fill)
    if getattr(joined, "shape", None) != x.shape or not dtypes.is_real(joined.dtype):
        raise ValueError(
            f"aggr must return an array of the shape {x.shape} of its update, of real "
            f"numbers, but returned {joined!r}."
        )
    joined = jnp.where(untouched, x, jnp.asarray(joined, dtype))
    return jnp.where(sound, joined, jnp.nan).astype(update.dtype)


def _weight(fill, kappa, dtype):
    k = jnp.asarray(kappa).astype(dtype)
    return k, (fill == 0) | (k == 0)
