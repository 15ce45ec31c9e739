"""What JAX's types say about devices: in explicit mode how they divide an array, and in
``shard_map`` the mesh axes over which its values vary.
"""

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding


def like(x, other, leading: int = 0):
    """``x``, sharded like ``other`` without its first ``leading`` axes.

    In JAX's explicit mode the sharding is part of a type, and two arrays of different
    shardings cannot be combined. Axes whose size is not that of ``other`` are left
    whole. An array on no mesh, such as one of NumPy, is put on that of ``other``. In
    other modes ``x`` is returned as it is.
    """
    x, other = as_placed(x), as_placed(other)
    have, want = jax.typeof(x).sharding, jax.typeof(other).sharding
    if want.mesh.empty:
        return x
    spec = _whole(want.spec[leading:], x.ndim)
    sizes = zip(x.shape, other.shape[leading:], strict=True)
    spec = tuple(s if a == b else None for s, (a, b) in zip(spec, sizes))
    if have.mesh.empty:
        return _onto_mesh(x, other, spec, leading)
    return _with_spec(x, want.mesh, spec)


def where(condition, new, old):
    """``new`` where the condition holds and ``old`` elsewhere, sharded like ``old``.

    In JAX's explicit mode every member of a batch can have a condition of its own only
    if both are on one mesh. So an ``old`` on no mesh is put on that of ``new``. So is
    the condition, unless it is a scalar. ``old`` may be a number.
    """
    if isinstance(old, (int, float)):
        return _where_number(condition, new, old)
    new = like(new, old)
    if jnp.ndim(condition):
        condition = like(condition, new)
    return jnp.where(condition, new, like(old, new))


@jax.jit  # so that no eager step makes an array of NaN, which jax.debug_nans refuses
def _where_number(condition, new, number):
    """The number as an array like ``new``.

    Outside of ``jax.set_mesh``, jax 0.12 divides no number that a member of a batch may
    choose.
    """
    return jnp.where(condition, new, jnp.where(False, new, number))


def on_mesh_of(stack, one):
    """A stack that is on no mesh, on that of one of its values, in JAX's explicit mode.

    The axis of slots is whole. A state is on no mesh if it was made outside of one, or
    restored as arrays of NumPy.
    """
    have, want = jax.typeof(stack).sharding, jax.typeof(one).sharding
    if want.mesh.empty or not have.mesh.empty:
        return stack
    return _onto_mesh(stack, one, (None, *_whole(want.spec, one.ndim)))


def _onto_mesh(x, other, spec, leading=0):
    """``x``, which is on no mesh, with this spec on the mesh of ``other``."""
    traced = isinstance(other, Tracer)
    if (traced or isinstance(x, Tracer)) and _are_alike(x, other, leading):
        # What is chosen from two arrays is on the mesh of either. A vmap hides the
        # devices of an array and the axes of the batch.
        other = other[0] if leading else other
        return jax.lax.select(jnp.asarray(True), jnp.asarray(x), other.astype(x.dtype))
    if traced:
        mesh = jax.typeof(other).sharding.mesh
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
    if isinstance(x, Tracer):
        return x  # it may be batched, and the spec would not fit it
    # The mesh of a type does not know its devices, but that of an array does.
    mesh = other.sharding.mesh
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _are_alike(x, other, leading):
    """Whether JAX can choose between ``x`` and a part of ``other``."""
    spaces = {jax.typeof(x).memory_space, jax.typeof(other).memory_space}
    return x.shape == other.shape[leading:] and len(spaces) == 1


def as_placed(x):
    """``x``, on no mesh if it is an array that was moved from a mesh to one device.

    ``jax.device_put`` leaves the mesh in the type of such an array. In explicit mode
    JAX then asks for all devices of the mesh. Outside of ``jax.jit``, and beside a mesh
    of one device, JAX may return such arrays from others. No number is copied.
    """
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return x
    stale = not jax.typeof(x).sharding.mesh.empty
    one = isinstance(x.sharding, SingleDeviceSharding)
    return x.addressable_data(0) if stale and one else x


def agreeing(arrays, other):
    """The arrays, so that they can be broadcast against each other and ``other``.

    In JAX's explicit mode a mesh axis can divide one axis of the result only. An array
    that it divides along another one is gathered along that one.
    """
    arrays = tuple(map(as_placed, arrays))
    meshes = [jax.typeof(x).sharding.mesh for x in (other, *arrays)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None:
        return arrays
    settled, placed = list(_whole(jax.typeof(other).sharding.spec, other.ndim)), []
    for x in arrays:
        spec = list(_whole(jax.typeof(x).sharding.spec, x.ndim))
        for axis, names in enumerate(spec):
            taken = {n for part in settled for n in mesh_axes(part)}
            if settled[axis] is None and taken.isdisjoint(mesh_axes(names)):
                settled[axis] = names
            spec[axis] = names if settled[axis] == names else None
        placed.append(_with_spec(x, mesh, tuple(spec)))
    return tuple(placed)


def in_runs(x, axis: int, size: int):
    """``x`` with an axis that can be split into runs of this size. The last may be
    shorter.

    In JAX's explicit mode the axis is gathered if devices divide it in another way.
    """
    sharding = jax.typeof(x).sharding
    spec = list(_whole(sharding.spec, x.ndim))
    if sharding.mesh.empty or spec[axis] is None:
        return x
    parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(spec[axis]))
    if x.shape[axis] % (parts * size) == 0:
        return x
    spec[axis] = None
    return _with_spec(x, sharding.mesh, tuple(spec))


def mesh_axes(entry) -> tuple:
    """The names of the mesh axes in a spec, or in one entry of it."""
    if entry is None:
        return ()
    if isinstance(entry, tuple | PartitionSpec):
        return tuple(name for part in entry for name in mesh_axes(part))
    return (entry,)


def divided(x, axes) -> tuple:
    """The mesh axes that divide an array along ``axes``, in JAX's explicit mode."""
    if not isinstance(x, jax.Array):
        return ()
    spec = _whole(jax.typeof(x).sharding.spec, x.ndim)
    return tuple(name for axis in axes for name in mesh_axes(spec[axis]))


def conflict(named) -> str | None:
    """Which of these pairs of a name and an array are bound to different devices."""
    bound = [(name, x.sharding.device_set) for name, x in named if _is_bound(x)]
    for name, devices in bound[1:]:
        first, others = bound[0]
        if devices != others:
            return (
                f"{first} is bound to {_called(others)}, but {name} to "
                f"{_called(devices)}: place the state where the parameters are, on a "
                "mesh with memoptax.state_shardings."
            )
    return None


def _is_bound(x) -> bool:
    """Whether this is an array that JAX may not move to another device."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed


def _called(devices) -> str:
    """The devices, in a sentence."""
    ids = sorted(device.id for device in devices)
    if len(ids) == 1:
        return f"device {ids[0]}"
    if len(ids) > 2 and ids == list(range(ids[0], ids[0] + len(ids))):
        return f"devices {ids[0]} to {ids[-1]}"
    return f"devices {', '.join(map(str, ids))}"


def varying(x) -> frozenset:
    """The mesh axes over which JAX knows that a value varies, in ``shard_map``."""
    kind = jax.typeof(x)
    vma = getattr(kind, "vma", None)  # until jax 0.9
    return kind.mat.varying if vma is None else vma


def vary_together(tree, others):
    """The ``tree``, every array of which varies over the axes of any of the ``others``.

    It changes types and no numbers. Zeros that are made in ``shard_map`` vary over no
    axis. What an update makes of them does, and ``jax.lax.scan`` needs a carry whose
    type does not change.
    """
    arrays = [x for x in jax.tree.leaves(others) if isinstance(x, jax.Array)]
    axes = frozenset().union(*map(varying, arrays))

    def cast(x):
        missing = tuple(sorted(axes - varying(x)))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        # Until jax 0.8. By its name, because later ones do not have it.
        return vars(jax.lax)["pvary"](x, missing)

    return jax.tree.map(cast, tree) if axes else tree


def _with_spec(x, mesh, spec):
    """``x`` with this spec. It names the mesh, because ``jax.set_mesh`` is optional."""
    if _whole(jax.typeof(x).sharding.spec, x.ndim) == spec:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def is_partial(spec) -> bool:
    """Whether a spec says that an array, or its gradient, is still to be summed over
    devices. JAX does not let such a spec be iterated over.
    """
    return any(getattr(spec, name, ()) for name in ("reduced", "unreduced"))


def part_of_sum(x) -> str | None:
    """What is wrong with an array that is part of a sum over devices, in explicit mode
    or in ``shard_map``.
    """
    if not isinstance(x, jax.Array):
        return None
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)  # since jax 0.10
    if not is_partial(kind.sharding.spec) and not getattr(manual, "unreduced", ()):
        return None
    return (
        f"{kind}, but must not have reduced or unreduced axes: use "
        "jax.sharding.reshard first, or jax.lax.psum in shard_map."
    )


def _whole(spec, rank):
    """The spec with an entry for every axis."""
    return tuple(spec) + (None,) * (rank - len(spec))
