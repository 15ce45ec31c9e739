"""How an update and the mean of a buffer become one: ``sum``, ``mid``, ``mean``."""

import jax
import jax.numpy as jnp


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


def aggregate(updates, recall, kappa, aggr):
    """``updates`` joined with what a buffer recalls, in their own dtypes.

    Where the buffer is empty or κ is 0 they pass through, whatever ``aggr`` is.
    """

    def leaf(update, total, fill):
        dtype = jnp.promote_types(update.dtype, total.dtype)
        x, total, k = update.astype(dtype), total.astype(dtype), _cast(kappa, dtype)
        untouched = (fill == 0) | (k == 0)
        at_least_one = jnp.maximum(fill, 1).astype(dtype)
        if not isinstance(aggr, str):
            joined = aggr(x, total * (k / at_least_one), fill)
            return jnp.where(untouched, x, joined).astype(update.dtype)
        # Scalars are chosen, not tensors: whatever follows recomputes this for nothing.
        weight, memory_weight = WEIGHTS[aggr](at_least_one, k)
        weight = jnp.where(untouched, 1, weight).astype(dtype)
        memory_weight = jnp.where(untouched, 0, memory_weight).astype(dtype)
        return (weight * x + memory_weight * total).astype(update.dtype)

    return jax.tree.map(leaf, updates, recall.total, recall.fill)


def _cast(number, dtype):
    return jnp.asarray(number).astype(dtype)
