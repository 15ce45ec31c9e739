"""How one slot of a buffer is kept: its dtype, and how it is written and read in place.

A stack holds ``copies`` values of one parameter, slot axis first. Only this module
knows what a stored value looks like, so a format with scales is added here alone.
"""

import jax
import jax.numpy as jnp

DTYPES = ("float64", "float32", "bfloat16", "float16")


def zeros(leaf, copies: int, dtype=None):
    """An empty stack ``(copies, *leaf.shape)``; it follows the leaf's sharding.

    ``broadcast_to`` of the leaf's own zeros, because ``jnp.zeros`` would replicate the
    stack on every device of a mesh.
    """
    one = jnp.zeros_like(leaf, dtype=leaf.dtype if dtype is None else dtype)
    return jnp.broadcast_to(one[None], (copies, *leaf.shape))


def zero_sum(leaf):
    """Zeros like the leaf, in the dtype that its values are added up in."""
    return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))


def encode(stack, value):
    """``value`` as ``stack`` stores it."""
    return value.astype(stack.dtype)


def decode(stored, dtype):
    """The number that a stored value stands for, in ``dtype``."""
    return stored.astype(dtype)


def keep(wanted, stored):
    """The stored value, or that of zero."""
    return jnp.where(wanted, stored, jnp.zeros_like(stored))


def read(stack, slot):
    """The stored value in ``slot``."""
    return jax.lax.dynamic_index_in_dim(stack, slot, 0, keepdims=False)


def write(stack, stored, slot):
    """The stack with ``stored`` in ``slot``."""
    return jax.lax.dynamic_update_index_in_dim(stack, stored, slot, 0)


def select(stack, slots, copies: int):
    """A stack of ``copies`` that begins with ``slots`` of this one, and is else 0."""
    chosen = jnp.take(stack, slots, axis=0)
    more = [(0, copies - chosen.shape[0])] + [(0, 0)] * (chosen.ndim - 1)
    return jnp.pad(chosen, more)
