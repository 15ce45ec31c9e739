"""Which floating-point dtype holds the numbers of others, under any flag of JAX.

``jnp.promote_types`` refuses two dtypes under ``jax_numpy_dtype_promotion='strict'``.
"""

import jax
import jax.numpy as jnp


def widest(*dtypes) -> jnp.dtype:
    """The floating-point dtype that can represent every value of the others.

    It is float32 if none can, as with bfloat16 and float16. Without x64 it is never
    float64.
    """
    floating = [
        jax.dtypes.canonicalize_dtype(dtype)
        for dtype in dtypes
        if jnp.issubdtype(dtype, jnp.floating)
    ]
    every = (one for one in floating if all(holds(one, other) for other in floating))
    return next(every, jnp.dtype(jnp.float32))


def is_real(dtype) -> bool:
    """Whether numbers of this dtype are real. Booleans are not numbers."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def holds(dtype, other) -> bool:
    """Whether a dtype can represent every value of the other one."""
    wide, narrow = jnp.finfo(dtype), jnp.finfo(other)
    return wide.nmant >= narrow.nmant and wide.maxexp >= narrow.maxexp


def wide(x):
    """An array in float32 or better."""
    return x.astype(widest(x.dtype, jnp.float32))


def weights(decay, dtype):
    """The weights of the old and the new numbers in a moving average of this dtype.

    The difference from 1 is computed in the wider of the dtypes, or for a Python number
    in float64.
    """
    if not isinstance(decay, jax.Array):
        return decay, 1 - decay
    decay = decay.astype(widest(decay.dtype, dtype))
    return decay.astype(dtype), (1 - decay).astype(dtype)
