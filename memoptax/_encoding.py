"""How an array is stored in few bytes: as it is, rounded, or as int8 with scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Stored(NamedTuple):
    """An array in storage."""

    values: jax.Array  # shape of the array; float32, float64, bfloat16, float16, int8
    scale: jax.Array | None  # int8 only: (..., 1), () at rank 0; float32


def row(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The box that shares an int8 scale: a row of the last axis."""
    return (1,) * (len(shape) - 1) + shape[-1:]


def scale(largest: jax.Array) -> jax.Array:
    """The scale of int8 rows whose largest magnitudes are given."""
    return (largest * (1 / 127)).astype(jnp.float32)


def encode(x: jax.Array, dtype, scale: jax.Array | None = None) -> Stored:
    """Stores `x`, rounded to nearest; int8 with the given scales."""
    if scale is None:
        return Stored(x.astype(dtype), None)
    tiny = jnp.finfo(scale.dtype).tiny
    inverse = 1 / jnp.where(scale > tiny, scale, 1)
    return Stored(jnp.round(x * inverse).astype(dtype), scale)


def decode(stored: Stored, dtype=jnp.float32) -> jax.Array:
    """What was stored."""
    values = stored.values.astype(dtype)
    return values if stored.scale is None else values * stored.scale.astype(dtype)
