"""optax's transformations for trees in which some updates are row-sparse."""

import jax
import optax

from memoptax._tensors import row_sparse


def on_values(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies an elementwise transformation to the values of row-sparse leaves.

    optax's own would scale the indices too. Updates keep the dtype they came in.
    """

    def update_fn(updates, state, params=None):
        values = _map(lambda u: u.data if row_sparse.is_row_sparse(u) else u, updates)
        values, state = inner.update(values, state, params)
        return _map(row_sparse.with_values, updates, values), state

    return optax.GradientTransformation(inner.init, update_fn)


def add_decayed_weights(weight_decay) -> optax.GradientTransformation:
    """Decoupled weight decay; row-sparse leaves, whose rows must rest, pass by."""

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                f"weight_decay={weight_decay!r} needs the parameters: "
                "call update(updates, state, params)."
            )

        def decayed(u, p):
            if row_sparse.is_row_sparse(u):
                return u
            return (u + weight_decay * p).astype(u.dtype)

        return _map(decayed, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _map(f, updates, *rest):
    return jax.tree.map(f, updates, *rest, is_leaf=row_sparse.is_row_sparse)
