"""Arrays laid out on a mesh as others are, where JAX makes that part of their type."""

import jax
from jax.sharding import PartitionSpec


def like(x, other, leading: int = 0):
    """``x``, sharded like ``other`` without its first ``leading`` axes.

    Only in JAX's explicit mode a type says how an array is sharded, and only there
    two arrays that are sharded otherwise do not go together. Elsewhere ``x`` is
    returned as it is.
    """
    have, want = jax.typeof(x).sharding, jax.typeof(other).sharding
    spec = _whole(want.spec[leading:], x.ndim)
    if have.mesh.empty or want.mesh.empty or _whole(have.spec, x.ndim) == spec:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*spec))


def _whole(spec, rank):
    """The spec with an entry for every axis."""
    return tuple(spec) + (None,) * (rank - len(spec))
