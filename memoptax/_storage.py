"""How one slot of a buffer is kept: its dtype, and how it is written and read in place.

A stack holds ``copies`` values of one parameter, slot axis first. Only this module
knows what a stored value looks like, so a format with scales is added here alone.
"""

import jax
import jax.numpy as jnp

DTYPES = ("float64", "float32", "bfloat16", "float16")

# bfloat16 is stored as its bits: XLA's CPU backend computes in float32 whatever is
# bfloat16, and so would convert all slots to write one (at C = 40 and 1 M floats 18 ms
# instead of 1.5). No derivative flows through bits.
_BITS = jnp.uint16


def zeros(leaf, copies: int, dtype=None):
    """An empty stack ``(copies, *leaf.shape)``; it follows the leaf's sharding.

    ``broadcast_to`` of the leaf's own zeros, because ``jnp.zeros`` would replicate the
    stack on every device of a mesh.
    """
    dtype = jnp.dtype(leaf.dtype if dtype is None else dtype)
    one = jnp.zeros_like(leaf, dtype=_BITS if dtype == jnp.bfloat16 else dtype)
    return jnp.broadcast_to(one[None], (copies, *leaf.shape))


def zero_sum(leaf):
    """Zeros like the leaf, in the dtype that its values are added up in."""
    return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))


def copies(stack) -> int:
    """How many slots a stack has."""
    return jax.tree.leaves(stack)[0].shape[0]


def encode(stack, value):
    """``value`` as ``stack`` stores it."""
    if stack.dtype == _BITS:
        return jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16), _BITS)
    return value.astype(stack.dtype)


def decode(stored, dtype):
    """The number that a stored value stands for, in ``dtype``."""
    if stored.dtype == _BITS:
        stored = jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored.astype(dtype)


def keep(wanted, stored):
    """The stored value, or that of zero."""
    return jnp.where(wanted, stored, jnp.zeros_like(stored))


def read(stack, slot):
    """The stored value in ``slot``, on the device whatever memory the stack is in."""
    stored = jax.lax.dynamic_index_in_dim(stack, slot, 0, keepdims=False)
    return _moved(stored, jax.memory.Space.Device)


def write(stack, stored, slot):
    """The stack with ``stored`` in ``slot``, in the memory that the stack is in."""
    stored = _moved(stored, jax.typeof(stack).memory_space)
    return jax.lax.dynamic_update_index_in_dim(stack, stored, slot, 0)


def _moved(x, space):
    """A stack may stand in the host's memory, from where one slot is fetched."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def select(stack, slots, copies: int):
    """A stack of ``copies`` that begins with ``slots`` of this one, and is else 0."""
    chosen = jnp.take(_moved(stack, jax.memory.Space.Device), slots, axis=0)
    more = [(0, copies - chosen.shape[0])] + [(0, 0)] * (chosen.ndim - 1)
    return _moved(jnp.pad(chosen, more), jax.typeof(stack).memory_space)


def emptied(array):
    """Zeros like a stack, or any array of a state, in the same memory."""
    zeros = jnp.zeros_like(_moved(array, jax.memory.Space.Device))
    return _moved(zeros, jax.typeof(array).memory_space)
