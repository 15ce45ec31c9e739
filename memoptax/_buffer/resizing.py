"""Resize, reset and inspect a buffer."""

import jax
import jax.numpy as jnp
import numpy as np

from memoptax._buffer import eviction, holding, running_sum
from memoptax._tensors import dtypes, storage
from memoptax._tensors import norms as _norms


def resize(buffer, topc: int, way: str):
    """The buffer with capacity ``topc``: its most critical entries, in order."""
    before = buffer.keys.shape[1]
    kept = min(topc, before)
    chosen = jnp.sort(eviction.most(buffer, kept), axis=1)
    slots = chosen
    if buffer.entries is not None:
        slots = jnp.take_along_axis(holding.slots_of(buffer.entries), chosen, axis=1)
    stacks, treedef = holding.stacks_of(buffer)
    if buffer.entries is None:
        stacks = [jax.tree.map(lambda x: x[None], stack) for stack in stacks]
    copies = holding.copies(way, topc)
    filled = jnp.take_along_axis(eviction.held(buffer), chosen, axis=1)
    places = holding.per_leaf(list(zip(slots, filled)), stacks)
    stacks = [
        storage.select(stack, *place, copies) for stack, place in zip(stacks, places)
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
        entries=None if copies is None else holding.in_order(chosen, topc),
        total=None,
        norms=None,
        error=None,
        rebuilds=None,
    )
    if way != "sum":
        return resized
    return _summed(resized, buffer.total, buffer.rebuilds)


def _summed(buffer, like, rebuilds):
    """The buffer with the sum of its values, their norms and the error bounds."""
    dtype = buffer.keys.dtype
    leaves, treedef = jax.tree.flatten(buffer.slots)
    stacks, _ = holding.stacks_of(buffer)
    if like is None:
        # Slots may be wider or narrower than the parameters. Keys are as wide as the
        # widest parameter, and so is a sum if all slots have one dtype.
        known = dtype if len({x.dtype for x in leaves}) == 1 else jnp.float32
        wide = [
            dtype
            if x.dtype == jnp.int8 or dtypes.holds(x.dtype, dtype)
            else dtypes.widest(x.dtype, known)
            for x in leaves
        ]
        like = treedef.unflatten(
            [
                storage.emptied(storage.read(stack, 0).values).astype(d)
                for stack, d in zip(stacks, wide)
            ]
        )
    zeros = list(map(storage.emptied, jax.tree.leaves(like)))
    held = running_sum.in_slots(eviction.held(buffer), buffer.entries)
    totals = running_sum.from_slots(zeros, stacks, held)
    norms = _norms_of_entries(buffer) if leaves else jnp.zeros_like(buffer.keys)
    norms = jnp.minimum(norms, jnp.finfo(dtype).max)  # as those that update takes
    units = running_sum.units(totals, dtype)
    return buffer._replace(
        total=treedef.unflatten(totals),
        norms=norms,
        error=running_sum.fresh_error(norms, units),
        rebuilds=0 * jnp.max(buffer.ages) if rebuilds is None else rebuilds,
    )


def reset(buffer):
    """The buffer without its values. The key of the draws stays."""
    zeros = jax.tree.map(storage.emptied, buffer)._replace(draws=buffer.draws)
    if buffer.entries is None:
        return zeros
    topc = buffer.keys.shape[1]
    return zeros._replace(entries=holding.in_order(buffer.entries, topc))


def has_equal_ages(buffer):
    """Whether two entries of a row came in at the same step. Ages stop at a limit."""
    if buffer.ages.shape[1] == 1:
        return jnp.zeros((), bool)
    ages = jnp.sort(buffer.ages, axis=1)
    old, new = ages[:, 1:], ages[:, :-1]
    return jnp.any((old == new) & (new > 0) & (old < jnp.iinfo(ages.dtype).max))


def has_leftovers(buffer):
    """Whether a slot, a key or a norm is not 0, but belongs to no entry that is held.

    The spare slot may have a value that was refused or evicted.
    """
    filled = eviction.held(buffer)
    allowed = filled
    if buffer.entries is not None:
        spare = buffer.entries == filled.shape[1]
        allowed = running_sum.in_slots(filled, buffer.entries)
        allowed |= spare & jnp.any(filled, axis=1, keepdims=True)
    leaves = jax.tree.leaves(buffer.slots)
    found = jnp.any(~filled & (buffer.keys != 0))
    if buffer.norms is not None:
        found |= jnp.any(~filled & (buffer.norms != 0))
    for slots, right in zip(leaves, holding.per_leaf(list(allowed), leaves)):
        slots = storage.on_device(slots)
        slots = slots[None] if buffer.entries is None else slots
        used = jnp.any(slots != 0, axis=tuple(range(1, slots.ndim)))
        found |= jnp.any(used & ~right)
    return found


def has_wrong_sum(buffer):
    """Whether a running sum, its norms or its error bound contradict the slots.

    A tool that averages two states, but only their floating-point numbers, mixes the
    sums of one with the slots of the other.
    """
    if buffer.norms is None:
        return jnp.zeros((), bool)
    stacks, _ = holding.stacks_of(buffer)
    totals, dtype = jax.tree.leaves(buffer.total), buffer.keys.dtype
    held = running_sum.in_slots(eviction.held(buffer), buffer.entries)
    zeros = list(map(storage.emptied, totals))
    found = running_sum.from_slots(zeros, stacks, held)
    # Equal infinities are no gap.
    gaps = [jnp.where(a == b, 0, a - b) for a, b in zip(totals, found)]
    fresh = running_sum.fresh_error(buffer.norms, running_sum.units(totals, dtype))
    # A step may have kept products that are 0 here: not every thread of a CPU has
    # subnormal numbers.
    norms = jnp.maximum(buffer.norms, 2.0**-100)
    allowed = running_sum.largest_error(norms, totals)
    slack = 1.01  # norms are rounded too
    wrong = ~(_norms.of(gaps, dtype) <= slack * (buffer.error + fresh))
    wrong |= ~(buffer.error <= slack * jnp.maximum(allowed, fresh))
    return jnp.any(wrong) | jnp.any(
        ~(_norms_of_entries(buffer) <= slack * buffer.norms)
    )


@jax.jit  # so that a loop outside of jit is compiled once
def _norms_of_entries(buffer):
    """The norms (L, C) of the values held, one entry at a time."""
    dtype, leaves = buffer.keys.dtype, range(len(jax.tree.leaves(buffer.slots)))

    def of(entry):
        values = [holding.value(buffer, leaf, entry, dtype) for leaf in leaves]
        return _norms.of(values, dtype)

    return jax.lax.map(of, jnp.arange(buffer.keys.shape[1])).T


def problem(buffer) -> str | None:
    """A fault in the numbers of a buffer that is not traced, or None."""
    held = np.asarray(buffer.ages) > 0
    offered, accepted = np.ravel(buffer.offered), np.ravel(buffer.accepted)
    found = {
        "keys are negative or not finite": not _are_norms(buffer.keys),
        "ages are negative, or positive after an empty entry": (
            np.any(np.asarray(buffer.ages) < 0)
            or np.any(np.diff(held.astype(int), axis=1) > 0)
        ),
        "accepted and offered contradict the entries that are held": (
            np.any(accepted < held.sum(1))
            or np.any(offered < accepted)
            or np.any(offered < np.max(buffer.ages, axis=1))
        ),
        "entries are not a permutation of the slots": _are_misplaced(buffer.entries),
        "norms are negative or not finite": not _are_norms(buffer.norms),
        "error is negative or not finite": not _are_norms(buffer.error),
        "rebuilds are negative": not _are_norms(buffer.rebuilds),
    }
    return next((sentence for sentence, wrong in found.items() if wrong), None)


def _are_norms(numbers) -> bool:
    if numbers is None:
        return True
    numbers = np.asarray(numbers)
    return bool(np.all(np.isfinite(numbers) & (numbers >= 0)))


def _are_misplaced(entries) -> bool:
    """Whether a row is neither all zeros nor a permutation of the entries."""
    if entries is None:
        return False
    rows = np.sort(np.asarray(entries), axis=1)
    in_order = np.all(rows == np.arange(rows.shape[1]), axis=1)
    return not np.all(in_order | ~np.any(rows, axis=1))
