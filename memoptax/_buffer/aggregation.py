"""How an update and the mean of a buffer become one: ``sum``, ``mid``, ``mean``."""

import functools

import jax
import jax.numpy as jnp

from memoptax._tensors import dtypes, layout


def _sum(fill, kappa):
    """u = g + κ ΣB/|B|."""
    return fill, kappa, fill


def _mid(fill, kappa):
    """u = (g + κ ΣB/|B|) / 2."""
    return fill / 2, kappa / 2, fill


def _mean(fill, kappa):
    """u = (g + κ ΣB) / (|B| + 1)."""
    return 1, kappa, fill + 1


# Each gives the numerators of the weights of g and of ΣB, and their denominator.
WEIGHTS = {"sum": _sum, "mid": _mid, "mean": _mean}


def join(updates, totals, fill, kappa, sound, aggr):
    """Each of the ``updates`` joined with the sum of the values held.

    The results have the dtypes of the updates.

    ``fill`` (R,) is the number of values in that sum. If it or κ is 0, the updates pass
    through for any ``aggr``. If the step is not ``sound``, they are NaN.
    """
    if isinstance(aggr, str):
        return _weighted(updates, totals, fill, kappa, sound, aggr=aggr)
    fills = list(fill) * (len(updates) if len(fill) == 1 else 1)
    return [_called(aggr, *leaf, kappa, sound) for leaf in zip(updates, totals, fills)]


@functools.partial(jax.jit, static_argnames="aggr")
def _weighted(updates, totals, fill, kappa, sound, *, aggr):
    rows = list(zip(*weights(fill, kappa, sound, aggr)))
    rows *= len(updates) if len(rows) == 1 else 1
    return list(map(combine, updates, totals, rows))


def weights(fill, kappa, sound, aggr):
    """The weights of an update and of the sum of what is held, by a named ``aggr``."""
    k, untouched = _weight(fill, kappa, fill.dtype)
    if aggr == "sum":
        # At κ = 0 it is the update by itself, and so keeps its derivative.
        untouched = fill == 0
    weight, total_weight, of = WEIGHTS[aggr](jnp.maximum(fill, 1), k)
    # The choice is between scalars. Consumers recompute that at no cost, but not a
    # choice between tensors. The division comes last, because XLA's CPU backend repeats
    # the rest in the code of every leaf (adam_c: otherwise 130 instructions per leaf
    # instead of 106).
    weight = jnp.where(sound, jnp.where(untouched, of, weight), jnp.nan)
    return weight / of, jnp.where(untouched, 0, total_weight) / of


def combine(update, total, weights):
    """The update joined with the sum of the values held, in the update's dtype."""
    dtype = dtypes.widest(update.dtype, total.dtype)
    weight, total_weight = (x.astype(dtype) for x in weights)
    joined = weight * update.astype(dtype) + total_weight * total.astype(dtype)
    return joined.astype(update.dtype)


def _called(aggr, update, total, fill, kappa, sound):
    dtype = dtypes.widest(update.dtype, total.dtype)
    k, untouched = _weight(fill, kappa, dtype)
    x = update.astype(dtype)
    mean = total.astype(dtype) * (k / jnp.maximum(fill, 1).astype(dtype))
    joined = aggr(x, mean, fill)
    if getattr(joined, "shape", None) != x.shape or not dtypes.is_real(joined.dtype):
        raise ValueError(
            f"aggr must return a real array of shape {x.shape}, as its update has, but "
            f"returned {joined!r}."
        )
    joined = layout.where(untouched, x, jnp.asarray(joined, dtype))
    return layout.where(sound, joined, jnp.nan).astype(update.dtype)


def _weight(fill, kappa, dtype):
    k = jnp.asarray(kappa).astype(dtype)
    return k, (fill == 0) | (k == 0)
