"""State and arithmetic in float32 under parameters or gradients of half precision."""

import jax
import jax.numpy as jnp
import optax


def in_float32(inner: optax.GradientTransformation):
    """``inner`` with whatever is below float32 widened on the way in.

    Updates return in the dtype in which they came, and the state keeps the dtypes it
    was born with, whatever dtype the gradients have. Float32 passes through untouched.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return inner.init(jax.tree.map(_widen, params))

    def update_fn(updates, state, params=None, **extra_args):
        wide = jax.tree.map(_widen, updates)
        params = jax.tree.map(_widen, params)
        wide, new_state = inner.update(wide, state, params, **extra_args)
        return (
            optax.tree.cast_like(wide, updates),
            optax.tree.cast_like(new_state, state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _widen(leaf):
    """``leaf`` in float32 or better and not weakly typed: a state stays as born."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(dtype=dtype, weak_type=False)
    weak = getattr(leaf, "weak_type", False)
    return leaf.astype(dtype) if weak or leaf.dtype != dtype else leaf
