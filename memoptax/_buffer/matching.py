"""Checks that a buffer was made with these options and parameters."""

import jax
import jax.numpy as jnp

from memoptax._buffer import holding
from memoptax._buffer.options import Options

_KEEP = "Pass the arguments that the state was made with, or make a new one with init."


def check(options: Options, buffer, updates) -> None:
    """Refuse a buffer that other options made, while tracing.

    Shapes, dtypes and structures are known then, but values are not.
    :func:`memoptax.check_state` checks the values.
    """
    if type(buffer).__name__ != "Buffer":
        raise ValueError(
            f"state holds no buffer where one is needed, but {type(buffer).__name__}: "
            "it belongs to another optimizer."
        )
    _check_capacity(options, buffer)
    _check_dtypes(options, buffer)
    _check_way(options, buffer)
    _check_leaves(buffer, updates)
    leaves = len(jax.tree.leaves(updates))
    rows = 1 if options.synced else max(leaves, 1)
    if buffer.keys.shape[0] != rows:
        raise ValueError(
            f"synced is {options.synced}, which needs {rows} rows of keys for "
            f"{leaves} leaves, but the state has {buffer.keys.shape[0]}. {_KEEP}"
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
            "batched state is updated under the jax.vmap or jax.pmap that made it."
        )
    topc = buffer.keys.shape[1]
    if topc != options.topc:
        raise ValueError(
            f"topc is {options.topc}, but the state was made with topc={topc}: convert "
            f"it with memoptax.resize_buffer(state, {options.topc})."
        )


def _check_dtypes(options, buffer):
    asked = options.buffer_dtype
    found = {leaf.dtype for leaf in jax.tree.leaves(buffer.slots)}
    int8 = jnp.dtype(jnp.int8)
    if asked is None and int8 in found or asked is not None and found - {asked}:
        names = ", ".join(sorted(dtype.name for dtype in found))
        raise ValueError(
            f"buffer_dtype is {None if asked is None else asked.name!r}, but the state "
            f"has slots of {names}. {_KEEP}"
        )


def _check_way(options, buffer):
    asked, found = options.way(buffer.slots), way_of(buffer)
    if asked != found:
        raise ValueError(
            f"holding is {options.holding!r}, which for topc={options.topc} is "
            f"{asked!r}, but the state holds values by {found!r}: pass "
            f"holding={found!r}, or convert it with memoptax.resize_buffer(state, "
            f"{options.topc}, holding={asked!r})."
        )


def way_of(buffer) -> str:
    """How a buffer holds its values."""
    if buffer.entries is None:
        return "select"
    return "read" if buffer.total is None else "sum"


def _check_leaves(buffer, updates):
    slots, expected = jax.tree.flatten(buffer.slots)
    leaves, treedef = jax.tree.flatten(updates)
    if treedef != expected:
        raise ValueError(
            f"updates have the structure {treedef}, but the state was made for "
            f"parameters of the structure {expected}."
        )
    for leaf, stack in zip(leaves, slots):
        shape = holding.shape_of(buffer, stack)
        if leaf.shape != shape:
            raise ValueError(
                f"updates have a leaf of shape {leaf.shape}, but the state was made "
                f"for a parameter of shape {shape}."
            )
