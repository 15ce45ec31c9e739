"""The sharding of one array for another one, in JAX's explicit mode."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec


def like(x, other, leading: int = 0):
    """``x``, sharded like ``other`` without its first ``leading`` axes.

    In JAX's explicit mode the sharding is part of a type, and two arrays of different
    shardings cannot be combined. In other modes ``x`` is returned as it is.
    """
    have, want = jax.typeof(x).sharding, jax.typeof(other).sharding
    spec = _whole(want.spec[leading:], x.ndim)
    if have.mesh.empty or want.mesh.empty or _whole(have.spec, x.ndim) == spec:
        return x
    return _placed(x, want.mesh, spec)


def in_runs(x, axis: int, size: int):
    """``x`` with an axis that can be split into runs of this size. The last may be
    shorter.

    In JAX's explicit mode the axis is gathered if devices divide it in another way.
    """
    sharding = jax.typeof(x).sharding
    spec = list(_whole(sharding.spec, x.ndim))
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    if sharding.mesh.empty or names == (None,):
        return x
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    if x.shape[axis] % (parts * size) == 0:
        return x
    spec[axis] = None
    return _placed(x, sharding.mesh, spec)


def _placed(x, mesh, spec):
    """``x`` with this spec. It names the mesh, because ``jax.set_mesh`` is optional."""
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _whole(spec, rank):
    """The spec with an entry for every axis."""
    return tuple(spec) + (None,) * (rank - len(spec))
