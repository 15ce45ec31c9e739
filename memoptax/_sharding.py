"""How an optimizer's state lies on a mesh, before it is allocated.

No structure is guessed at. In JAX's explicit mode an array's sharding is part of its
type, and every operation says what becomes of it. So ``init`` is traced once, without
running it, over parameters whose types carry their specs, and each array of the state
tells where its axes come from.
"""

import functools
import math
from typing import Any

import jax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from memoptax import _check
from memoptax._buffer import algorithm, matching


def state_partition_specs(tx, params, specs, mesh: Any = None, *, over=()):
    """The ``PartitionSpec`` of every array of ``tx.init(params)``.

    What has the shape of a parameter (moments, the sum of a buffer) has its spec, slots
    have it behind an unsharded axis, SM3's accumulators keep the axes that they follow,
    and scales of int8 have all but the last axis. Whatever is made without regard to a
    parameter is replicated: counters, and the keys, norms and ages of a buffer. This
    holds in any chain, under ``optax.masked``, ``optax.partition``,
    ``optax.MultiSteps`` and ``optax.inject_hyperparams``, and for optax's own states.

    ``over`` divides the state further than the parameters (ZeRO-1): each parameter is
    taken to be divided over these mesh axes too, along the first of its axes that its
    spec leaves free and that they divide evenly. The parts are then contiguous, and
    rows of int8 stay whole where there is another axis than the last. A parameter
    without such an axis has its whole state everywhere. The axis of slots is never
    divided: a step reads and writes single slots. Such specs are for ``jax.jit`` and
    not for ``jax.shard_map``, where gradients and state would differ in shape.

    Args:
      tx: any optax transformation.
      params: parameters, or ``jax.ShapeDtypeStruct`` leaves like them.
      specs: a tree like ``params`` of ``PartitionSpec``, or a prefix of one, such as a
        single spec for all. None is a replicated parameter.
      mesh: a ``Mesh`` or ``AbstractMesh``, whose sizes say what divides evenly. What it
        does not divide (blocks of SM3 may be such) is not sharded. Only ``over`` needs
        it.
      over: names of mesh axes, as a tuple or a single name, over which parameters are
        replicated and their state is to be divided.

    Returns:
      A tree like the state: for ``in_specs`` and ``out_specs`` of ``jax.shard_map``
      and, with a mesh, for all that takes shardings (:func:`state_shardings`).

    Raises:
      ValueError: if a spec is not a ``PartitionSpec``, or has more entries than its
        parameter has axes, naming the parameter; if ``over`` is not names of axes of
        the mesh, or names one that divides a parameter already.

    Examples:
      >>> import jax, jax.numpy as jnp, memoptax
      >>> from jax.sharding import AbstractMesh, PartitionSpec as P
      >>> params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
      >>> tx = memoptax.critical_gradients()
      >>> specs = memoptax.state_partition_specs(tx, params, {"w": P("data", "model")})
      >>> print(specs.buffer.slots["w"], specs.buffer.keys)
      P(None, 'data', 'model') P()
      >>> mesh = AbstractMesh((4, 2), ("data", "model"))
      >>> specs = {"w": P(None, "model")}
      >>> specs = memoptax.state_partition_specs(tx, params, specs, mesh, over="data")
      >>> print(specs.buffer.slots["w"])
      P(None, 'data', 'model')
    """
    over = _checked_over(over, mesh)
    leaves, treedef = jax.tree.flatten_with_path(params)
    every = treedef.flatten_up_to(jax.tree.broadcast(specs, params, is_leaf=_is_spec))
    every = [
        _divided_further(*leaf, _checked(*leaf, spec), over, mesh)
        for leaf, spec in zip(leaves, every)
    ]
    # Of size one, so that it divides every axis.
    names = tuple(dict.fromkeys(name for spec in every for name in _names(spec)))
    tracing = AbstractMesh((1,) * len(names), names, (AxisType.Explicit,) * len(names))

    def carrying(leaf, spec):
        sharding = NamedSharding(tracing, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    found = []

    def init(params):
        state = tx.init(params)
        found.append(jax.tree.map(functools.partial(_spec_of, mesh), state))
        return state

    # The mesh of the caller is put aside: JAX does not let its size be changed.
    with use_abstract_mesh(AbstractMesh((), ())), use_abstract_mesh(tracing):
        typed = [carrying(leaf, spec) for (_, leaf), spec in zip(leaves, every)]
        jax.eval_shape(init, treedef.unflatten(typed))
    return found[0]


def state_shardings(tx, params, mesh: Any = None, *, over=(), slots_memory_kind=None):
    """The ``NamedSharding`` of every array of ``tx.init(params)``.

    The specs are those of :func:`state_partition_specs`. An eager ``init``, and in
    explicit mode a jitted one, follow the parameters by themselves. A jitted ``init``
    in JAX's automatic mode replicates its zeros unless told::

      shardings = memoptax.state_shardings(tx, params)
      state = jax.jit(tx.init, out_shardings=shardings)(params)

    They also serve as a target for checkpoints and for ``jax.device_put``.

    With ``over`` each device holds a part of what its copies of the parameters would
    have in common (ZeRO-1). In both modes such a state is made as above, and the step
    is told where its results belong, so that it gathers the updates::

      of_params = jax.tree.map(lambda p: p.sharding, params)
      step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(of_params, shardings))

    Args:
      tx: any optax transformation.
      params: arrays on a mesh, or ``jax.ShapeDtypeStruct`` leaves that have a sharding.
        One that is on no mesh counts as replicated.
      mesh: the ``Mesh`` of the shardings; None takes that of the parameters.
      over: names of mesh axes, as a tuple or a single name, over which parameters are
        replicated and their state is to be divided.
      slots_memory_kind: ``'pinned_host'`` puts the slots of buffers into the memory of
        the host, from which a step fetches one and writes one, whatever C is. The whole
        rest stays on the devices. Needs a newer JAX on CPU than the oldest supported,
        and has not been measured on an accelerator.

    Returns:
      A tree like the state.

    Raises:
      ValueError: if the parameters lie on no mesh and ``mesh`` is None, or on two; if
        ``over`` is not names of axes of the mesh, or names one that divides a parameter
        already; if the devices have no memory of the kind.

    Examples:
      >>> import jax, jax.numpy as jnp, memoptax
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> x = jax.device_put(jnp.zeros((8, 4)), jax.NamedSharding(mesh, P("data")))
      >>> memoptax.state_shardings(memoptax.sgd_c(0.1), x)[0].buffer.slots.spec
      P(None, 'data')
      >>> x = jax.device_put(x, jax.NamedSharding(mesh, P()))
      >>> shardings = memoptax.state_shardings(memoptax.sgd_c(0.1), x, over="data")
      >>> shardings[0].buffer.slots.spec
      P(None, 'data')
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding)}
    if mesh is None and len(meshes) != 1:
        raise ValueError(
            f"params must lie on one mesh, but lie on {len(meshes)}: place them with "
            "jax.device_put and a NamedSharding, or pass mesh."
        )
    mesh = meshes.pop() if mesh is None else mesh
    specs = jax.tree.structure(params).unflatten(
        [getattr(s, "spec", None) for s in shardings]
    )
    specs = state_partition_specs(tx, params, specs, mesh, over=over)
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    if slots_memory_kind is None:
        return shardings
    _check_memory(slots_memory_kind, mesh.devices.flat[0])
    return jax.tree.map(
        functools.partial(_with_slots_in, slots_memory_kind),
        shardings,
        is_leaf=_is_buffer,
    )


def _check_memory(kind, device):
    _check.choice("slots_memory_kind", kind, ("pinned_host", "device"))
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise ValueError(
            f"slots_memory_kind is {kind!r}, but the devices of the mesh "
            f"({device.device_kind}) have only {', '.join(kinds)}."
        )


def _is_buffer(node):
    return isinstance(node, algorithm.Buffer)


def _with_slots_in(kind, node):
    if not _is_buffer(node):
        return node
    way = matching.way_of(node)
    if kind == "pinned_host" and way != "sum":
        raise ValueError(
            f"slots_memory_kind is {kind!r}, but the state holds values by {way!r}, "
            "which reads all of them on every step: pass holding='sum'."
        )
    slots = jax.tree.map(lambda s: s.with_memory_kind(kind), node.slots)
    return node._replace(slots=slots)


def _is_spec(node):
    return node is None or isinstance(node, PartitionSpec)


def _checked(path, leaf, spec) -> PartitionSpec:
    if not _is_spec(spec):
        raise ValueError(
            f"specs must hold PartitionSpecs, but has {spec!r} for {_called(path)}."
        )
    if spec is not None and len(spec) > len(leaf.shape):
        raise ValueError(
            f"specs has {spec} for {_called(path)}, whose shape {leaf.shape} has only "
            f"{len(leaf.shape)} axes."
        )
    return PartitionSpec() if spec is None else spec


def _checked_over(over, mesh) -> tuple[str, ...]:
    names = (over,) if isinstance(over, str) else over
    if not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"over must be a name of a mesh axis or a tuple of such, but is {over!r}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"over is {over!r}, but must name each mesh axis once.")
    if names and mesh is None:
        raise ValueError(
            f"over is {over!r}, but what divides evenly depends on the sizes of the "
            "mesh axes: pass mesh."
        )
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"over is {over!r}, but the mesh has no axis {unknown[0]!r}: it has "
            f"{', '.join(map(repr, mesh.shape))}."
        )
    return names


def _divided_further(path, leaf, spec, over, mesh) -> PartitionSpec:
    """The spec with ``over`` at the first free axis that it divides, if any."""
    taken = [name for name in over if name in _names(spec)]
    if taken:
        raise ValueError(
            f"over is {over!r}, but {_called(path)} is divided over {taken[0]!r} "
            f"already: its spec is {spec}."
        )
    parts = math.prod(mesh.shape[name] for name in over)
    entries = [*spec] + [None] * (len(leaf.shape) - len(spec))
    for axis, size in enumerate(leaf.shape if over else ()):
        if entries[axis] is None and size and size % parts == 0:
            entries[axis] = over[0] if len(over) == 1 else over
            break
    return _trimmed(entries)


def _called(path):
    return f"parameter {jax.tree_util.keystr(path) or '(the only one)'}"


def _names(spec) -> list[Any]:
    """The names of mesh axes that a spec uses."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return [name for entry in entries for name in entry if name is not None]


def _spec_of(mesh, array):
    """The spec in the type of a traced array, less what the mesh cannot divide.

    Constants are replicated.
    """
    spec = jax.typeof(array).sharding.spec
    return _trimmed(spec if mesh is None else _divided(array.shape, spec, mesh))


def _trimmed(entries):
    """Without the unsharded axes at the end, as one would write it."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _divided(shape, spec, mesh):
    """The entries of the spec, with None for those that the mesh cannot divide."""
    parts = [math.prod(mesh.shape[n] for n in _names((entry,))) for entry in spec]
    return [
        None if size % part else entry for size, part, entry in zip(shape, parts, spec)
    ]
