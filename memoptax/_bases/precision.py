"""State and arithmetic in float32 under parameters or gradients of half precision.

And the reverse: one moment of a state in fewer bits than the arithmetic.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memoptax import _flax_metadata, _parameters
from memoptax._tensors import layout, storage


def in_float32(inner: optax.GradientTransformation):
    """``inner`` with whatever is below float32 widened on the way in.

    Updates return in the dtype and, in JAX's explicit mode, with the sharding in which
    they came, and the state keeps the dtypes it was born with, whatever dtype the
    gradients have. Float32 passes through untouched.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return inner.init(_wide(params))

    def update_fn(updates, state, params=None, **extra_args):
        updates = _parameters.real_arrays(updates, "gradient")
        wide = jax.tree.map(_widen, updates)
        params = _wide(params)
        wide, new_state = inner.update(wide, state, params, **extra_args)
        # By leaves: a restored state may have lists where a new one has tuples.
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
        leaves, treedef = jax.tree.flatten(new_state)
        leaves = [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes)]
        new_state = treedef.unflatten(leaves)
        cast = optax.tree.cast_like(wide, updates)
        return jax.tree.map(layout.like, cast, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class StoredMomentState(NamedTuple):
    """State of a base of which one moment is stored in another dtype (``mu_dtype``)."""

    inner: Any  # without that moment
    moment: Any  # like the params, in the dtype of storage
    scales: Any  # int8: per leaf (*shape[:-1], 1), float32; else None


def stored_moment(inner: optax.GradientTransformation, field: str, dtype):
    """``inner`` with the moment ``field`` of its state kept in ``dtype`` if not None.

    Updates have the dtype of the arithmetic. Unlike optax's own ``mu_dtype`` this
    stores int8 too, and never computes in the dtype of storage.
    """
    if dtype is None:
        return inner

    def init_fn(params):
        state: Any = inner.init(params)
        return StoredMomentState(
            inner=state._replace(**{field: None}),
            moment=jax.tree.map(lambda p: storage.zeros(p, None, dtype), params),
            scales=storage.zero_scales(params, None, dtype),
        )

    def update_fn(updates, state, params=None):
        leaves, treedef = jax.tree.flatten(updates)
        stored = storage.unpack(treedef, state.moment, state.scales)
        wide = [storage.decode(s, u.dtype) for s, u in zip(stored, leaves)]
        old = state.inner._replace(**{field: treedef.unflatten(wide)})
        new: Any
        updates, new = inner.update(updates, old, params)
        moment = treedef.flatten_up_to(getattr(new, field))
        stored = [
            storage.encode(storage.saturate(m, s), s) for m, s in zip(moment, stored)
        ]
        return updates, StoredMomentState(
            new._replace(**{field: None}),
            *storage.pack(treedef, stored, state.scales),
        )

    return optax.GradientTransformation(init_fn, _flax_metadata.on_arrays(update_fn))


def _wide(params):
    return jax.tree.map(_widen, _parameters.real_arrays(params))


def _widen(leaf):
    """``leaf`` in float32 or better and not weakly typed: a state stays as born."""
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(dtype=dtype, weak_type=False)
    weak = getattr(leaf, "weak_type", False)
    return leaf.astype(dtype) if weak or leaf.dtype != dtype else leaf
