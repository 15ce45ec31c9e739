"""Where the C values of the buffer are, and their sum.

Every leaf of the tree has C + 1 slots, one of them always spare. A step writes the new
value into the spare slot, whether or not it will be kept; if it is, the evicted slot
becomes the spare. Every read of the slots therefore follows the write *by data*, which
is what lets XLA update them in place: a step touches two slots, whatever C is.

``place`` maps the logical index of an entry to the physical slot where its value is. A
slot that was never filled holds zeros, so that sums may run over it.
"""

import jax
import jax.numpy as jnp

from memoptax._buffer import running_sum
from memoptax._tensors import storage


def in_order(rows, topc):
    """Places (R, C) of entries that lie where their index says."""
    return jnp.tile(jnp.arange(topc, dtype=jnp.int32), (rows, 1))


def exchange(totals, stacks, stored, each, spares, inexact):
    """The sums before, the sums after, and the slots with ``stored`` written to them.

    ``each`` is the decision on every leaf, and ``spares`` are the slots that are spare
    after it. The sums are rebuilt where they have become ``inexact``.
    """
    changes = []
    for leaf, (new, here) in enumerate(zip(stored, each)):
        dtype = totals[leaf].dtype
        kept = storage.keep(here.finite, new)
        stacks[leaf] = storage.write(stacks[leaf], kept, here.spare)
        old = storage.decode(storage.read(stacks[leaf], here.evicted), dtype)
        changes.append(jnp.where(here.accept, storage.decode(new, dtype) - old, 0))
        totals[leaf] = totals[leaf] + changes[leaf]
    totals = running_sum.rebuild(totals, stacks, spares, inexact)
    # The sum before is taken back from the sum after: to read it in both places would
    # cost a copy of it.
    before = [total - change for total, change in zip(totals, changes)]
    return before, totals, stacks


def resize(buffer, topc: int):
    """The buffer with ``topc`` slots: its most critical entries, in their order."""
    kept = min(topc, buffer.keys.shape[1])
    entries = jnp.sort(jax.lax.top_k(buffer.keys, kept)[1], axis=1)
    rows, leaves = buffer.keys.shape[0], buffer.norms.shape[0]
    entries_of_leaf = jnp.broadcast_to(entries, (leaves, kept))
    place = jnp.take_along_axis(buffer.place, entries, axis=1)

    def take(array, index, empty):
        more = [(0, 0), (0, topc - kept)]
        taken = jnp.take_along_axis(array, index, axis=1)
        return jnp.pad(taken, more, constant_values=empty)

    totals, treedef = jax.tree.flatten(buffer.total)
    stacks = storage.unpack(treedef, buffer.slots, buffer.scales)
    for leaf, slots in enumerate(jnp.broadcast_to(place, (leaves, kept))):
        stacks[leaf] = storage.select(stacks[leaf], slots, topc + 1)
    totals = running_sum.anew(totals, stacks, [topc])
    slots, scales = storage.pack(treedef, stacks, buffer.scales)
    resized = buffer._replace(
        slots=slots,
        scales=scales,
        total=treedef.unflatten(totals),
        keys=take(buffer.keys, entries, -jnp.inf),
        ages=take(buffer.ages, entries, 0),
        place=in_order(rows, topc),
        spare=jnp.full((rows,), topc, jnp.int32),
        norms=take(buffer.norms, entries_of_leaf, 0),
    )
    units = running_sum.units(totals, buffer.norms.dtype)
    return resized._replace(error=running_sum.fresh_error(resized.norms, units))


def reset(buffer):
    """The buffer, holding none; the key of its draws stays."""
    zeros = jax.tree.map(storage.emptied, buffer)
    rows, topc = buffer.keys.shape
    return zeros._replace(
        keys=jnp.full_like(buffer.keys, -jnp.inf),
        place=in_order(rows, topc),
        spare=jnp.full((rows,), topc, jnp.int32),
        draws=buffer.draws,
    )
