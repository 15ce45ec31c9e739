"""A buffer with another capacity or way of holding, emptied, or looked through."""

import jax
import jax.numpy as jnp
import numpy as np

from memoptax._buffer import eviction, holding, running_sum
from memoptax._tensors import norms as _norms
from memoptax._tensors import storage


def resize(buffer, topc: int, way: str):
    """The buffer with ``topc`` values: its most critical entries, in their order."""
    rows, before = buffer.keys.shape
    kept = min(topc, before)
    chosen = jnp.sort(jax.lax.top_k(eviction.ranks(buffer), kept)[1], axis=1)
    slots = chosen
    if buffer.entries is not None:
        slots = jnp.take_along_axis(holding.slots_of(buffer.entries), chosen, axis=1)
    stacks, treedef = holding.stacks_of(buffer)
    if buffer.entries is None:
        stacks = [jax.tree.map(lambda x: x[None], stack) for stack in stacks]
    copies = holding.copies(way, topc)
    stacks = [
        storage.select(stack, row, copies)
        for stack, row in zip(stacks, holding.per_leaf(list(slots), stacks))
    ]

    def take(array):
        more = [(0, 0), (0, topc - kept)]
        return jnp.pad(jnp.take_along_axis(array, chosen, axis=1), more)

    values, scales = storage.pack(treedef, stacks, buffer.scales)
    resized = buffer._replace(
        slots=values,
        scales=scales,
        keys=take(jnp.where(eviction.held(buffer), buffer.keys, 0)),
        ages=take(buffer.ages),
        entries=None if copies is None else holding.in_order(rows, topc),
        total=None,
        norms=None,
        error=None,
        rebuilds=None,
    )
    if way != "sum":
        return resized
    return _summed(resized, buffer.total, buffer.rebuilds)


def _summed(buffer, like, rebuilds):
    """The buffer with the sum of its values, and what is known of it."""
    topc, dtype = buffer.keys.shape[1], buffer.keys.dtype
    leaves, treedef = jax.tree.flatten(buffer.slots)
    stacks, _ = holding.stacks_of(buffer)
    if like is None:
        wide = [jnp.promote_types(x.dtype, jnp.float32) for x in leaves]
        like = treedef.unflatten(
            [jnp.zeros_like(x[0], dtype=d) for x, d in zip(leaves, wide)]
        )
    zeros = [jnp.zeros_like(x) for x in jax.tree.leaves(like)]
    totals = running_sum.from_slots(zeros, stacks, [topc] * len(leaves))
    norms = jnp.stack(
        [
            _norms.of([holding.value(buffer, k, i, dtype) for i in range(topc)], dtype)
            for k in range(len(leaves))
        ]
        or [jnp.zeros((topc,), dtype)]
    )
    units = running_sum.units(totals, dtype)
    return buffer._replace(
        total=treedef.unflatten(totals),
        norms=norms,
        error=running_sum.fresh_error(norms, units),
        rebuilds=jnp.zeros((), jnp.int32) if rebuilds is None else rebuilds,
    )


def reset(buffer):
    """The buffer, holding none; the key of its draws stays."""
    return jax.tree.map(storage.emptied, buffer)._replace(draws=buffer.draws)


def problem(buffer) -> str | None:
    """What is wrong with the numbers of a buffer that is not traced, if anything is."""
    found = {
        "entries must be a permutation of the slots in every row": _misplaced(buffer),
        "ages must be at least 0, and of the first entries if not all are held": (
            np.any(buffer.ages < 0)
            | np.any(np.diff((buffer.ages > 0).astype(int), axis=1) > 0)
        ),
        "keys must be finite and at least 0": not _is_norm(buffer.keys),
        "accepted must be from the number of entries held to offered": (
            np.any(buffer.accepted < np.sum(buffer.ages > 0, axis=1))
            | np.any(buffer.offered < buffer.accepted)
        ),
        "norms must be finite and at least 0": not _is_norm(buffer.norms),
        "error must be finite and at least 0": not _is_norm(buffer.error),
    }
    return next((sentence for sentence, wrong in found.items() if wrong), None)


def _is_norm(numbers) -> bool:
    return numbers is None or bool(np.all(np.isfinite(numbers) & (numbers >= 0)))


def _misplaced(buffer) -> bool:
    if buffer.entries is None:
        return False
    slots = np.sort(np.asarray(buffer.entries), axis=1)
    in_order = slots == np.arange(slots.shape[1])
    return not np.all(in_order | ~np.any(slots, axis=1, keepdims=True))
