"""Checks that a buffer was made with these options and parameters."""

import jax
import jax.numpy as jnp

from memoptax import _check, _parameters
from memoptax._buffer import holding
from memoptax._buffer.options import Options
from memoptax._tensors import dtypes, layout, storage

_KEEP = "Pass the arguments that the state was made with, or make a new one with init."


def check(options: Options, buffer, updates, params=None) -> None:
    """While tracing, refuse a buffer that other options made.

    Shapes, dtypes and structures are known then, but values are not.
    :func:`memoptax.check_state` checks the values. The dtype that ``buffer_dtype=None``
    means is known if ``params`` are given.
    """
    if type(buffer).__name__ != "Buffer":
        raise ValueError(
            f"state holds no buffer where one is needed, but {type(buffer).__name__}: "
            "it belongs to another optimizer, or was made with a topc or kappa of 0."
        )
    check_shapes(buffer)
    _check_capacity(options, buffer)
    _check_dtypes(options, buffer, params)
    _check_way(options, buffer)
    _check_leaves(buffer, updates)
    leaves = len(jax.tree.leaves(updates))
    rows = 1 if options.synced else max(leaves, 1)
    if buffer.keys.shape[0] != rows:
        raise ValueError(
            f"synced is {options.synced}, which needs keys of shape ({rows}, C) for "
            f"{leaves} leaves, but the state has ({buffer.keys.shape[0]}, C). {_KEEP}"
        )
    drawn = options.fifo_probability is not None
    if drawn != (buffer.draws is not None):
        raise ValueError(
            f"fifo_probability is {options.fifo_probability!r}, but the state was made "
            f"{'without one' if drawn else 'with one'}. {_KEEP}"
        )


def _check_capacity(options, buffer):
    if buffer.keys.ndim != 2:
        raise ValueError(
            f"state has keys of shape {buffer.keys.shape} where (R, C) is needed: a "
            "batched state must be updated under the jax.vmap or jax.pmap that made it."
        )
    topc = buffer.keys.shape[1]
    if topc != options.topc:
        raise ValueError(
            f"topc is {options.topc}, but the state was made with topc={topc}: convert "
            f"it with memoptax.resize_buffer(state, {options.topc})."
        )


def _check_dtypes(options, buffer, params):
    asked, slots = options.buffer_dtype, jax.tree.leaves(buffer.slots)
    found, int8 = {leaf.dtype for leaf in slots}, jnp.dtype(jnp.int8)
    allowed = found - {int8} if asked is None else {asked}
    _check.same_dtype("buffer_dtype", asked, found, allowed)
    leaves = jax.tree.leaves(params)
    if asked is None and len(leaves) == len(slots):
        # Wider slots lose nothing: parameters may have been cast since init.
        narrow = {s.dtype for s, p in zip(slots, leaves) if not _holds(s.dtype, p)}
        _check.same_dtype("buffer_dtype", asked, narrow, ())


def _holds(dtype, param) -> bool:
    """Whether a dtype can represent every value of a parameter's dtype."""
    if not _parameters.is_array(param):
        return True
    own = jnp.result_type(param)
    return not jnp.issubdtype(own, jnp.floating) or dtypes.holds(dtype, own)


def _check_way(options, buffer):
    asked, found = options.way(buffer.slots), way_of(buffer)
    if asked != found:
        topc, holding = options.topc, options.holding
        chosen = f", which for topc={topc} is {asked!r}" if holding is None else ""
        raise ValueError(
            f"holding is {holding!r}{chosen}, but the state holds values by {found!r}: "
            f"pass holding={found!r}, or convert it with memoptax.resize_buffer(state, "
            f"{topc}, holding={asked!r})."
        )


def way_of(buffer) -> str:
    """How a buffer holds its values."""
    if buffer.entries is None:
        return "select"
    return "read" if buffer.norms is None else "sum"  # a total may be a tree of None


def _check_leaves(buffer, updates):
    stacks, made_for = jax.tree.flatten(buffer.slots)
    shapes = [holding.shape_of(buffer, stack) for stack in stacks]
    found = jax.tree.flatten_with_path(updates)
    _check.same_leaves(*found, made_for, shapes)


def check_shapes(buffer) -> None:
    """Refuse a buffer whose arrays do not fit each other, batched or not."""
    for name, field in zip(buffer._fields, buffer):
        _check.arrays(f"a buffer's {name}", jax.tree.leaves(field))
    shape = getattr(buffer.keys, "shape", ())
    if len(shape) < 2 or 0 in shape[-2:]:
        raise ValueError(
            f"state has a buffer whose keys have shape {shape}, not (R, C)."
        )
    for name in ("keys", "norms", "error", "total", "scales"):
        _check.wide(f"a buffer's {name}", getattr(buffer, name))
    for name in ("ages", "entries", "offered", "accepted", "rebuilds"):
        for array in jax.tree.leaves(getattr(buffer, name)):
            _check.counts(f"a buffer's {name}", array)
    for array in jax.tree.leaves(buffer.draws):
        if array.dtype != jnp.uint32:
            raise ValueError(
                f"state has a buffer whose field draws has dtype {array.dtype}, but "
                "needs uint32: restore it in the dtype that init gives."
            )
    for array in jax.tree.leaves(buffer.slots):
        if array.dtype.name not in storage.DTYPES:
            raise ValueError(
                f"state has a buffer whose slots are {array.dtype.name}, not one of "
                f"{', '.join(storage.DTYPES)}: restore it in the dtype that init gives."
            )
    _check_devices(buffer)
    _check_whole(buffer)
    *batch, rows, topc = shape
    for name, found, wanted in _shapes(buffer, rows, topc, tuple(batch)):
        if found != wanted:
            raise ValueError(
                f"state has a buffer whose field {name} has shape {found} where "
                f"{wanted} is needed beside keys of shape {shape}."
            )


def _check_devices(buffer):
    """Refuse arrays that are bound to different devices, as JAX does.

    Some restores bind each array to where it was saved, also the keys that an eager
    ``init`` has left to JAX.
    """
    arrays = [
        (f"{name}{jax.tree_util.keystr(path)}", array)
        for name, field in zip(buffer._fields, buffer)
        for path, array in jax.tree.leaves_with_path(field)
    ]
    if sentence := layout.conflict(arrays):
        raise ValueError(f"state has a buffer whose field {sentence}")


def _check_whole(buffer):
    """Refuse arrays that are divided where every device needs all their numbers.

    In automatic mode the compiler sends the numbers. In explicit mode JAX would fail
    somewhere in the update.
    """
    batch = range(buffer.keys.ndim - 2)
    for name, field in zip(buffer._fields, buffer):
        stacked = name in ("slots", "scales") and buffer.entries is not None
        for array in jax.tree.leaves(field):
            axes = [k for k in range(array.ndim) if k not in batch]
            if name in ("slots", "scales", "total"):
                axes = axes[:1] if stacked else []
            if divided := layout.divided(array, axes):
                raise ValueError(
                    f"state has a buffer whose field {name} is divided over the mesh "
                    f"axis {' and '.join(divided)}, but every device needs all of its "
                    f"entries (its sharding is {jax.typeof(array).sharding.spec}): "
                    "place the state with memoptax.state_shardings."
                )


def _shapes(buffer, rows, topc, batch):
    """The name, the shape and the right shape of each field of a buffer."""
    slots, scales, totals = map(
        jax.tree.leaves, (buffer.slots, buffer.scales, buffer.total)
    )
    leaves, summed = len(slots), buffer.norms is not None
    yield "keys", (rows,), ((leaves,) if rows == leaves else (1,))
    for name, wanted in {
        "ages": (rows, topc),
        "offered": (rows,),
        "accepted": (rows,),
        "entries": None if buffer.entries is None else (rows, topc + 1),
        "norms": (max(leaves, 1), topc) if summed else None,
        "error": (max(leaves, 1),) if summed else None,
        "rebuilds": () if summed else None,
    }.items():
        field = getattr(buffer, name)
        wanted = None if wanted is None else (*batch, *wanted)
        yield name, getattr(field, "shape", field), wanted  # {} is not None
    if (draws := buffer.draws) is not None:
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        yield "draws", getattr(draws, "shape", draws), (*batch, *key.shape)
    if buffer.entries is None:
        yield "slots", (topc,), (1,)
    stack = batch if buffer.entries is None else (*batch, topc + 1)
    for leaf in slots:
        yield "slots", leaf.shape[: len(stack)], stack
    if leaves and (buffer.scales is not None or _has_int8(slots)):
        yield "scales", (len(scales),), (leaves,)
        for leaf, scale in zip(slots, scales):
            rest = leaf.shape[len(stack) :]
            yield "scales", scale.shape, (*stack, *rest[:-1], *([1] if rest else []))
    if not summed:
        yield "total", jax.tree.map(jnp.shape, buffer.total), None
        return
    yield "total", (len(totals),), (leaves,)
    for leaf, total in zip(slots, totals):
        yield "total", total.shape, (*batch, *leaf.shape[len(stack) :])


def _has_int8(slots) -> bool:
    return any(leaf.dtype == jnp.int8 for leaf in slots)
