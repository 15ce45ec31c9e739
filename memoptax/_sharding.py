"""The shardings of an optimizer's state on a mesh, before it is allocated.

No structure is guessed. In JAX's explicit mode the sharding of an array is part of its
type, and every operation derives that of its result. So ``init`` is traced once,
without running it, over parameters whose types carry their specs. The type of each
array of the state then has its spec.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from memoptax import _check, _parameters
from memoptax._buffer import algorithm, matching
from memoptax._tensors import layout


def state_partition_specs(
    tx: _check.Optimizer,
    params: Any,
    specs: Any,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    over: str | tuple[str, ...] = (),
) -> Any:
    """The ``PartitionSpec`` of every array of ``tx.init(params)``.

    An array with the shape of a parameter (a moment, the sum of a buffer) has the spec
    of the parameter. Slots have it behind an unsharded axis. The accumulators of SM3
    keep the axes that they follow, and scales of int8 have all axes but the last. All
    other arrays are replicated: counters, and the keys, norms and ages of a buffer.
    This holds in any chain, under ``optax.masked``, ``optax.partition``,
    ``optax.MultiSteps`` and ``optax.inject_hyperparams``, and for optax's own states,
    but not in ``optax.flatten``, which joins parameters of different specs.

    ``over`` divides the state further than the parameters (ZeRO-1). Specs are made as
    if each parameter were also divided over these mesh axes, along the first axis that
    its spec leaves free and that they divide evenly. The parts are contiguous, and rows
    of int8 stay whole if an axis other than the last can be divided. A parameter
    without such an axis has its whole state on every device. The axis of slots is never
    divided, because a step reads and writes single slots. Such specs are for
    ``jax.jit`` and not for ``jax.shard_map``, where gradients and state would differ in
    shape.

    Args:
      tx: any optax transformation.
      params: parameters, or ``jax.ShapeDtypeStruct`` leaves like them.
      specs: a tree like ``params`` of ``PartitionSpec``, or a prefix of one, such as a
        single spec for all. None is a replicated parameter.
      mesh: a ``Mesh`` or ``AbstractMesh``, whose sizes say which axes divide evenly. An
        axis that does not, such as one of SM3's blocks, is not sharded. Only ``over``
        needs a mesh.
      over: names of mesh axes, as a tuple or a single name, over which parameters are
        replicated and their state is to be divided.

    Returns:
      A tree like the state, for ``in_specs`` and ``out_specs`` of ``jax.shard_map``.
      :func:`state_shardings` makes shardings of them.

    Raises:
      ValueError: if ``specs`` is neither like ``params`` nor a prefix; if a spec is not
        a ``PartitionSpec``, has more entries than its parameter has axes, or names a
        mesh axis twice (the error names the parameter); if ``over`` does not name axes
        of the mesh, or names one that already divides a parameter.

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
    _check.transformation("tx", tx)
    _check_mesh(mesh)
    over = _checked_over(over, mesh)
    leaves, treedef = jax.tree.flatten_with_path(params)
    # What is no array has no spec. It stays as it is, because optax.masked may leave it
    # out.
    every = [
        _divided_further(path, np.shape(leaf), spec, over, mesh)
        if _parameters.is_array(leaf)
        else None
        for (path, leaf), spec in zip(leaves, _per_parameter(specs, params))
    ]
    # Every mesh axis has size one, so that it divides every axis of an array.
    names = tuple(dict.fromkeys(layout.mesh_axes(tuple(every))))
    tracing = AbstractMesh((1,) * len(names), names, (AxisType.Explicit,) * len(names))

    def carrying(leaf, spec):
        if spec is None:
            return leaf
        sharding = NamedSharding(tracing, spec)
        shape, dtype = np.shape(leaf), jnp.result_type(leaf)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    found = []

    def init(params):
        state = tx.init(params)
        found.append(jax.tree.map(functools.partial(_spec_of, mesh), state))
        return state

    # The mesh of the caller is put aside, because JAX does not let its size change.
    with use_abstract_mesh(AbstractMesh((), ())), use_abstract_mesh(tracing):
        typed = [carrying(leaf, spec) for (_, leaf), spec in zip(leaves, every)]
        _parameters.shapes_of(init, treedef.unflatten(typed))
    return found[0]


def state_shardings(
    tx: _check.Optimizer,
    params: Any,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    over: str | tuple[str, ...] = (),
    slots_memory_kind: str | None = None,
) -> Any:
    """The ``NamedSharding`` of every array of ``tx.init(params)``.

    The specs are those of :func:`state_partition_specs`. An eager ``init`` follows the
    parameters by itself, and so does a jitted one in explicit mode. In JAX's automatic
    mode, a jitted ``init`` replicates its zeros unless it gets the shardings::

      shardings = memoptax.state_shardings(tx, params)
      state = jax.jit(tx.init, out_shardings=shardings)(params)

    They also serve as a target for checkpoints and for ``jax.device_put``.

    With ``over`` each device holds a part of the state that would otherwise be
    replicated (ZeRO-1). In both modes such a state is made as above. The step then also
    needs the shardings of its results, so that it gathers the parameters::

      of_params = jax.tree.map(lambda p: p.sharding, params)
      step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(of_params, shardings))

    Args:
      tx: any optax transformation.
      params: arrays on a mesh, or ``jax.ShapeDtypeStruct`` leaves that have a sharding.
        A parameter that is on no mesh counts as replicated.
      mesh: the ``Mesh`` of the shardings. None means that of the parameters.
      over: names of mesh axes, as a tuple or a single name, over which parameters are
        replicated and their state is to be divided.
      slots_memory_kind: ``'pinned_host'`` puts the slots of buffers into the memory of
        the host. This needs ``holding='sum'``: a step fetches one slot and writes one,
        for any C. All other arrays stay on the devices. On a CPU this needs a newer JAX
        than the oldest supported. It has not been measured on an accelerator.

    Returns:
      A tree like the state.

    Raises:
      ValueError: if ``mesh`` is None and the parameters are on no mesh, or on two;
        if ``over`` does not name axes of the mesh, or names one that already divides a
        parameter; if the devices have no memory of that kind, or a buffer with slots in
        host memory is not held as a sum, or is that of an ensemble under ``jax.vmap``.

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
    _check.transformation("tx", tx)
    _check_mesh(mesh)
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding)}
    if mesh is None and len(meshes) != 1:
        raise ValueError(
            f"params must be on one mesh, but are on {len(meshes)}: place them with "
            "jax.device_put and a NamedSharding, or pass mesh."
        )
    mesh = meshes.pop() if mesh is None else mesh
    specs = jax.tree.structure(params).unflatten(
        [getattr(s, "spec", None) for s in shardings]
    )
    if slots_memory_kind is not None:
        _check_memory(slots_memory_kind, mesh)
        update: Any = tx.update
        init = functools.partial(_init_for_host, tx, slots_memory_kind)
        tx = optax.GradientTransformation(init, update)
    specs = state_partition_specs(tx, params, specs, mesh, over=over)
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    if slots_memory_kind is None:
        return shardings
    return jax.tree.map(
        functools.partial(_with_slots_in, slots_memory_kind),
        shardings,
        is_leaf=_is_buffer,
    )


def _check_mesh(mesh):
    if not (mesh is None or isinstance(mesh, Mesh | AbstractMesh)):
        raise ValueError(
            f"mesh must be None, a Mesh or an AbstractMesh, but is {mesh!r}."
        )


def _check_memory(kind, mesh):
    _check.choice("slots_memory_kind", kind, ("pinned_host", "device"))
    if isinstance(mesh, AbstractMesh):
        raise ValueError(
            f"slots_memory_kind is {kind!r}, which needs a mesh of devices, but mesh "
            f"is {mesh!r}."
        )
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise ValueError(
            f"slots_memory_kind is {kind!r}, but the devices of the mesh "
            f"({device.device_kind}) have only {', '.join(kinds)}."
        )


def _is_buffer(node):
    return isinstance(node, algorithm.Buffer)


def _init_for_host(tx, kind, params):
    """The state, whose buffers are refused if their slots cannot be in host memory."""
    state = tx.init(params)
    for node in jax.tree.leaves(state, is_leaf=_is_buffer):
        if not _is_buffer(node) or kind != "pinned_host":
            continue
        if (way := matching.way_of(node)) != "sum":
            raise ValueError(
                f"slots_memory_kind is {kind!r}, but the state holds values by {way!r},"
                " which reads all of them on every step: pass holding='sum'."
            )
        if node.keys.ndim > 2:
            raise ValueError(
                f"slots_memory_kind is {kind!r}, but the state is of several members "
                "(under jax.vmap): JAX cannot fetch a slot of each from the host. Use "
                "slots_memory_kind=None, or a state for each member."
            )
    return state


def _with_slots_in(kind, node):
    if not _is_buffer(node):
        return node
    slots = jax.tree.map(lambda s: s.with_memory_kind(kind), node.slots)
    return node._replace(slots=slots)


def _is_spec(node):
    return node is None or isinstance(node, PartitionSpec)


def _per_parameter(specs, params) -> list[Any]:
    """The spec of each parameter."""
    try:
        specs = jax.tree.broadcast(specs, params, is_leaf=_is_spec)
    except ValueError as error:
        raise ValueError(
            "specs must be a tree like params, or a prefix of it, but is "
            f"{jax.tree.structure(specs, is_leaf=_is_spec)} where params is "
            f"{jax.tree.structure(params)}."
        ) from error
    return jax.tree.structure(params).flatten_up_to(specs)


def _checked(path, shape, spec, mesh) -> PartitionSpec:
    if not _is_spec(spec):
        raise ValueError(
            f"specs must hold PartitionSpecs, but has {spec!r} for {_called(path)}."
        )
    if spec is not None and len(spec) > len(shape):
        raise ValueError(
            f"specs has {spec} for {_called(path)}, whose shape {shape} has only "
            f"{len(shape)} axes."
        )
    spec = PartitionSpec() if spec is None else spec
    if layout.is_partial(spec):
        raise ValueError(
            f"specs has {spec} for {_called(path)}, but must not have reduced or "
            "unreduced axes."
        )
    for name in layout.mesh_axes(spec):
        if not isinstance(name, str):
            raise ValueError(
                f"specs must name mesh axes, but has {spec} for {_called(path)}."
            )
        if mesh is not None and name not in mesh.shape:
            raise ValueError(
                f"specs has {spec} for {_called(path)}, but the mesh has no axis "
                f"{name!r}: it has {', '.join(map(repr, mesh.shape))}."
            )
    if len(set(layout.mesh_axes(spec))) < len(layout.mesh_axes(spec)):
        raise ValueError(
            f"specs has {spec} for {_called(path)}, but must name each mesh axis once."
        )
    return spec


def _checked_over(over, mesh) -> tuple[str, ...]:
    names = (over,) if isinstance(over, str) else over
    if not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"over must be a mesh axis name or a tuple of names, but is {over!r}."
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


def _divided_further(path, shape, spec, over, mesh) -> PartitionSpec:
    """The spec, checked, with ``over`` at the first free axis that it divides."""
    spec = _checked(path, shape, spec, mesh)
    taken = [name for name in over if name in layout.mesh_axes(spec)]
    if taken:
        raise ValueError(
            f"over is {over!r}, but {_called(path)} is divided over {taken[0]!r} "
            f"already: its spec is {spec}."
        )
    parts = math.prod(mesh.shape[name] for name in over)
    entries = [*spec] + [None] * (len(shape) - len(spec))
    for axis, size in enumerate(shape if over else ()):
        if entries[axis] is None and size and size % parts == 0:
            entries[axis] = over[0] if len(over) == 1 else over
            break
    return _trimmed(entries)


def _called(path):
    return f"parameter {jax.tree_util.keystr(path) or '(the only one)'}"


def _spec_of(mesh, array):
    """The spec in the type of a traced array, without axes that the mesh cannot divide.

    Constants are replicated.
    """
    spec = jax.typeof(array).sharding.spec
    return _trimmed(spec if mesh is None else _divided(array.shape, spec, mesh))


def _trimmed(entries):
    """The spec without the unsharded axes at its end, as one would write it."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _divided(shape, spec, mesh):
    """The entries of the spec, with None for those that the mesh cannot divide."""
    names = map(layout.mesh_axes, spec)
    parts = [math.prod(mesh.shape[name] for name in entry) for entry in names]
    return [
        None if size % part else entry for size, part, entry in zip(shape, parts, spec)
    ]
