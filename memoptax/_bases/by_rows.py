"""optax's transformations for trees in which some updates are row-sparse."""

from typing import Any

import jax
import optax

from memoptax import _check, _parameters
from memoptax._bases import guards, pytorch
from memoptax._tensors import layout, row_sparse


def on_values(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply an elementwise transformation to the values of row-sparse leaves.

    optax's own would scale the indices too. Updates keep their dtype.
    """

    def update_fn(updates, state, params=None):
        values = row_sparse.tree_map(row_sparse.values, updates)
        state = _parameters.state_arrays(state)
        values, state = inner.update(values, state, params)
        return row_sparse.tree_map(row_sparse.with_values, updates, values), state

    return optax.GradientTransformation(inner.init, update_fn)


def weight_decay(rate, mask=None) -> optax.GradientTransformation:
    """Decoupled weight decay of dense leaves. Row-sparse ones are not decayed."""
    decay = _decay_of_dense(rate)
    _check.mask("mask", mask)
    if mask is None:
        return decay
    decay = pytorch.masked(decay, mask)
    return guards.expecting(decay, optax.MaskedState, mask=mask)


def _decay_of_dense(rate):
    dense = pytorch.weight_decay(rate, as_it_is=True)
    if _check.is_zero(rate):
        return dense

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                f"weight_decay={rate!r} needs the parameters: "
                "call update(updates, state, params)."
            )

        # A row-sparse leaf becomes None, which is not a leaf.
        def dense_part(u, x):
            return None if row_sparse.is_row_sparse(u) else x

        kept, decayed = (
            row_sparse.tree_map(dense_part, updates, tree) for tree in (updates, params)
        )
        state = _parameters.state_arrays(state)
        decayed = jax.tree.map(layout.as_placed, decayed)
        # In a tuple, because None by itself would mean that there are no parameters.
        found: Any
        found, state = dense.update((kept,), state, (decayed,))
        return row_sparse.tree_map(
            lambda u, d: u if d is None else d.astype(u.dtype), updates, found[0]
        ), state

    return optax.GradientTransformation(dense.init, update_fn)
