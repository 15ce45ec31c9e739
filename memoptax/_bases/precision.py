"""Precision of a base: float32 inside, and one moment stored in fewer bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memoptax import _check, _parameters
from memoptax._bases import guards
from memoptax._tensors import dtypes, flax_metadata, layout, storage

# No extra argument of a user has this name, because of the space.
GIVEN = "given parameters"


def in_float32(inner: optax.GradientTransformation):
    """``inner`` in float32 for parameters and gradients of half precision.

    Updates keep their dtype and, in JAX's explicit mode, their sharding. The state
    keeps the dtypes that it had at first, for gradients of any dtype. Float32 passes
    through untouched. The extra argument :data:`GIVEN` has the parameters in the dtypes
    that they were given in.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        params = _parameters.whole_arrays(params)
        return inner.init(jax.tree.map(_widen, params))

    def update_fn(updates, state, params=None, **extra_args):
        updates = _parameters.whole_arrays(updates, "gradient")
        old: Any = _parameters.state_arrays(state)
        wide = jax.tree.map(_widen, updates)
        given = _parameters.real_arrays(_parameters.trained(updates, params))
        params = jax.tree.map(_widen, given)
        extra_args = {**extra_args, GIVEN: given}
        wide, new_state = inner.update(wide, old, params, **extra_args)
        # Leaf by leaf, because a restored state may have lists instead of tuples.
        leaves, treedef = jax.tree.flatten(new_state)
        before = jax.tree.leaves(old)
        leaves = [leaf.astype(like.dtype) for leaf, like in zip(leaves, before)]
        new_state = treedef.unflatten(leaves)
        cast = optax.tree.cast_like(wide, updates)
        return jax.tree.map(layout.like, cast, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class StoredMomentState(NamedTuple):
    """State of a base with one moment stored in another dtype (``mu_dtype``)."""

    inner: Any  # the base's own state without that moment
    moment: Any  # like the params, in the dtype of storage
    scales: Any  # int8: per leaf (*shape[:-1], 1), float32; else None


def stored_moment(inner: optax.GradientTransformation, field: str, dtype, check_rows):
    """``inner`` with the moment ``field`` of its state stored in ``dtype``.

    None stores it as it is. Updates have the dtype of the arithmetic. Unlike optax's
    own ``mu_dtype``, this takes int8 too, and never computes in the dtype of storage.
    ``check_rows`` sees the updates if their rows will have one scale each.
    """
    if dtype is None:
        return guards.checking(inner, _check_unstored)

    def init_fn(params):
        state: Any = inner.init(params)
        return StoredMomentState(
            inner=state._replace(**{field: None}),
            moment=jax.tree.map(lambda p: storage.zeros(p, None, dtype), params),
            scales=storage.zero_scales(params, None, dtype),
        )

    def update_fn(updates, state, params=None):
        _check_stored(updates, state, field, dtype)
        if state.scales is not None:
            check_rows(updates)
        leaves, treedef = jax.tree.flatten(updates)
        stored = storage.unpack(treedef, state.moment, state.scales)
        wide = [
            storage.decode(s, dtypes.widest(s.values.dtype, u.dtype))
            for s, u in zip(stored, leaves)
        ]
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

    update_fn = flax_metadata.on_arrays(update_fn)
    stored = optax.GradientTransformation(init_fn, update_fn)
    return guards.expecting(stored, StoredMomentState, mu_dtype=dtype.name)


def _check_stored(updates, state, field, dtype):
    """Refuse the state of another ``mu_dtype``, base or parameters."""
    if field not in getattr(state.inner, "_fields", ()):
        why = "it belongs to another optimizer"
        raise ValueError(
            f"state has {type(state.inner).__name__}, which has no {field}: "
            f"{_check.without_target(state.inner) or why}."
        )
    _check.moments("moment", state.moment, updates)
    found = {leaf.dtype for leaf in jax.tree.leaves(state.moment)}
    _check.same_dtype("mu_dtype", dtype, found, [dtype])
    storage.check_scales("scales", state.moment, state.scales)


def _check_unstored(state, updates):
    del updates
    if isinstance(state, StoredMomentState):
        found = {leaf.dtype for leaf in jax.tree.leaves(state.moment)}
        _check.same_dtype("mu_dtype", None, found, ())


def _widen(leaf):
    """``leaf`` in float32 or better and not weakly typed, as a state needs it."""
    dtype = dtypes.widest(leaf.dtype, jnp.float32)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(dtype=dtype, weak_type=False)
    weak = getattr(leaf, "weak_type", False)
    return leaf.astype(dtype) if weak or leaf.dtype != dtype else leaf
