"""The buffer: the C most critical values seen so far, their sum, and who leaves next.

Every leaf of the tree has C + 1 slots, one of them always spare. A step writes the new
value into the spare slot, whether or not it will be kept; if it is, the evicted slot
becomes the spare. Every read of the slots therefore follows the write *by data*, which
is what lets XLA update them in place: a step touches two slots, whatever C is.

Entries have a logical index (keys, norms, ages; what ties are broken by) and a physical
one (where the value lies); ``place`` maps the first to the second. A slot that was
never filled holds zeros, so that sums may run over it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memoptax import _flax_metadata
from memoptax._buffer import running_sum
from memoptax._tensors import norms as _norms
from memoptax._tensors import storage


class Buffer(NamedTuple):
    """Fixed-shape memory of C values of a tree with L leaves.

    There are R rows of keys: one where all leaves are kept or dropped together
    (synced), else L.
    """

    slots: Any  # like the params, leaves (C + 1, *shape), in the storage's dtype
    scales: Any  # int8: per leaf (C + 1, *shape[:-1], 1), float32; else None
    total: Any  # like the params, float32 or better: the sum of the filled slots
    keys: jax.Array  # (R, C), float32 or better: decayed priorities, -inf where empty
    ages: jax.Array  # (R, C), int32: offers since the entry came in
    place: jax.Array  # (R, C), int32: the physical slot of each entry
    spare: jax.Array  # (R,), int32: the physical slot of no entry
    norms: jax.Array  # (L, C), dtype of keys: bound on the L2 norm of each entry
    error: jax.Array  # (L,), dtype of keys: bound on the L2 error of total
    offered: jax.Array  # (R,), int32: finite values offered
    accepted: jax.Array  # (R,), int32: those of them that were stored
    rebuilds: jax.Array  # (), int32: times that total was summed anew
    draws: Any  # (2,), uint32: raw key of the FIFO draws; None where there are none


class Recall(NamedTuple):
    """What a buffer held before a push."""

    total: Any  # like the params: the sum of the filled slots
    fill: Any  # like the params, leaves (): how many slots were filled


def empty(params, topc: int, *, synced: bool = True, dtype=None, draws=None) -> Buffer:
    """A buffer for ``topc`` values like ``params``, holding none."""
    jax.tree_util.tree_map_with_path(_check_floating, params)
    leaves = jax.tree.leaves(params)
    rows = 1 if synced else len(leaves)
    key_dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
    return Buffer(
        slots=_flax_metadata.make(lambda p: storage.zeros(p, topc + 1, dtype), params),
        scales=storage.zero_scales(params, topc + 1, dtype),
        total=jax.tree.map(storage.zero_sum, params),
        keys=jnp.full((rows, topc), -jnp.inf, key_dtype),
        ages=jnp.zeros((rows, topc), jnp.int32),
        place=_in_order(rows, topc),
        spare=jnp.full((rows,), topc, jnp.int32),
        norms=jnp.zeros((len(leaves), topc), key_dtype),
        error=jnp.zeros((len(leaves),), key_dtype),
        offered=jnp.zeros((rows,), jnp.int32),
        accepted=jnp.zeros((rows,), jnp.int32),
        rebuilds=jnp.zeros((), jnp.int32),
        draws=draws,
    )


def priority(
    buffer: Buffer, gradients, priority_fn=None, *, synced: bool = True, across=None
) -> jax.Array:
    """How critical ``gradients`` are, (R,): the sum of the L2 norms of a row's leaves.

    ``priority_fn`` replaces the rule; without syncing it is given one leaf at a time.
    Here and below ``across`` is that of :func:`memoptax._tensors.norms.of`: with it all
    devices decide alike.
    """
    dtype, leaves = buffer.keys.dtype, _leaves(gradients, buffer)
    if priority_fn is None:
        norms = _norms.of(leaves, dtype, across)
        return jnp.sum(norms, keepdims=True) if synced else norms
    parts = jax.lax.stop_gradient([gradients] if synced else leaves)
    return _norms.vector(
        [jnp.asarray(priority_fn(part), dtype) for part in parts], dtype
    )


def fill(buffer: Buffer) -> jax.Array:
    """How many entries there are, (R,), in the dtype of the keys."""
    return jnp.sum(buffer.keys > -jnp.inf, axis=1, dtype=buffer.keys.dtype)


def all_finite(buffer: Buffer, gradients, across=None) -> jax.Array:
    """Whether the norm of every leaf is a finite number, and so every gradient."""
    leaves, dtype = _leaves(gradients, buffer), buffer.keys.dtype
    return jnp.all(jnp.isfinite(_norms.of(leaves, dtype, across)))


def push(
    buffer: Buffer,
    values,
    priority,
    decay,
    fifo_probability=None,
    stored=None,
    across=None,
) -> tuple[Recall, Buffer]:
    """Offer ``values``; return what was held before, and the buffer after.

    A row takes its values if their ``priority`` (R,) is strictly greater than the least
    of its keys, or if a FIFO draw says so. They replace the entry with that key (under
    FIFO the oldest), and then the keys of all filled entries decay, the new one's too.
    Values that are not finite, or whose priority is not, count as never offered. Where
    the caller keeps them in storage itself, ``stored`` are the leaves there.
    """
    leaves, treedef = jax.tree.flatten(values)
    stacks = storage.unpack(treedef, buffer.slots, buffer.scales)
    totals = treedef.flatten_up_to(buffer.total)
    if stored is None:
        stored, norms = _norms.encode_and_bound(
            leaves, stacks, buffer.keys.dtype, across
        )
    else:
        dtypes, step = [x.dtype for x in leaves], jnp.min(buffer.offered, initial=0)
        stored, norms = _norms.keep_and_bound(
            stored, stacks, dtypes, buffer.keys.dtype, step, across
        )
    after, rows, inexact = _decide(
        buffer, priority, norms, totals, decay, fifo_probability
    )
    each, changes = _per_leaf(rows, leaves), []
    for leaf, (new, here) in enumerate(zip(stored, each)):
        dtype = totals[leaf].dtype
        kept = storage.keep(here.finite, new)
        stacks[leaf] = storage.write(stacks[leaf], kept, here.spare)
        old = storage.decode(storage.read(stacks[leaf], here.evicted), dtype)
        changes.append(jnp.where(here.accept, storage.decode(new, dtype) - old, 0))
        totals[leaf] = totals[leaf] + changes[leaf]
    totals = running_sum.rebuild(
        totals, stacks, [row.spare_after for row in rows], inexact
    )
    # The sum before is taken back from the sum after: to read it in both places would
    # cost a copy of it.
    before = [total - change for total, change in zip(totals, changes)]
    filled = [here.fill for here in each]
    slots, scales = storage.pack(treedef, stacks, buffer.scales)
    return (
        Recall(treedef.unflatten(before), treedef.unflatten(filled)),
        after._replace(slots=slots, scales=scales, total=treedef.unflatten(totals)),
    )


class _Decision(NamedTuple):
    """What becomes of the offer of one row: scalars."""

    finite: jax.Array  # bool: it counts as offered
    accept: jax.Array  # bool: it is stored
    evicted: jax.Array  # int32: the physical slot that it empties
    spare: jax.Array  # int32: the spare slot before
    spare_after: jax.Array  # int32
    fill: jax.Array  # dtype of keys: entries before


def _decide(buffer, priority, norms, totals, decay, fifo_probability):
    """The buffer without slots and total after an offer, a decision per row, and
    whether the sums are to be taken anew.

    In a branch, and as scalars, so that decisions are stored before they are used, and
    leaves of one shape are compiled once: whatever picks its own leaf's number out of a
    vector is a program of its own. At 200 leaves that is ten times the time to compile.
    """
    buffer = buffer._replace(slots=None, scales=None, total=None)
    finite = jnp.isfinite(priority) & _in_rows(jnp.isfinite(norms), buffer)
    units = running_sum.units(totals, norms.dtype)

    def offered(buffer, finite, priority, norms, decay, fifo_probability):
        fifo, draws = _draw(buffer.draws, fifo_probability, finite)
        entry, accept = _choose(buffer, priority, finite, fifo)
        evicted = jnp.take_along_axis(buffer.place, entry[:, None], axis=1)[:, 0]
        after = _insert(buffer, entry, accept, finite, evicted, priority, decay)
        after, inexact = _bound_error(after, entry, accept, norms, units)
        after = after._replace(draws=draws)
        taken = (finite, accept, evicted, buffer.spare, after.spare, fill(buffer))
        return after, _rows(taken), inexact

    def ignored(buffer, finite, *_):
        no, spare = jnp.zeros_like(finite), buffer.spare
        taken = (no, no, spare, spare, spare, fill(buffer))
        return buffer, _rows(taken), jnp.zeros((), bool)

    return jax.lax.cond(
        _anywhere(jnp.any(finite)),
        offered,
        ignored,
        buffer,
        finite,
        priority,
        norms,
        decay,
        fifo_probability,
    )


def resize(buffer: Buffer, topc: int) -> Buffer:
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
        place=_in_order(rows, topc),
        spare=jnp.full((rows,), topc, jnp.int32),
        norms=take(buffer.norms, entries_of_leaf, 0),
    )
    units = running_sum.units(totals, buffer.norms.dtype)
    return resized._replace(error=running_sum.fresh_error(resized.norms, units))


def reset(buffer: Buffer) -> Buffer:
    """The buffer, holding none; the key of its draws stays."""
    zeros = jax.tree.map(storage.emptied, buffer)
    rows, topc = buffer.keys.shape
    return zeros._replace(
        keys=jnp.full_like(buffer.keys, -jnp.inf),
        place=_in_order(rows, topc),
        spare=jnp.full((rows,), topc, jnp.int32),
        draws=buffer.draws,
    )


def _choose(buffer, priority, finite, fifo):
    """The entry that would leave, and whether it does, (R,) each.

    An empty slot has the least of keys, so slots are filled first, and in order. Among
    equal keys the lowest entry leaves; a priority equal to the least key is refused.
    """
    _, lowest = jax.lax.top_k(-buffer.keys, 1)
    least = jnp.take_along_axis(buffer.keys, lowest, axis=1)[:, 0]
    if fifo is None:
        return lowest[:, 0], finite & (priority > least)
    filled = buffer.keys > -jnp.inf
    oldest = jnp.argmax(jnp.where(filled, buffer.ages, -1), axis=1)
    first_out = fifo & jnp.all(filled, axis=1)
    entry = jnp.where(first_out, oldest.astype(lowest.dtype), lowest[:, 0])
    return entry, finite & (first_out | (priority > least))


def _insert(buffer, entry, accept, finite, evicted, priority, decay):
    """Keys, ages, places and counters after the push."""
    new = _here(buffer.keys.shape, entry, accept)
    keys = jnp.where(new, priority[:, None], buffer.keys)
    # The key of an empty slot must not be multiplied: -inf times a decay of 0 is NaN.
    held = finite[:, None] & (keys > -jnp.inf)
    ages = jnp.where(held, optax.safe_increment(buffer.ages), buffer.ages)
    return buffer._replace(
        keys=jnp.where(held, keys * jnp.asarray(decay, keys.dtype), keys),
        ages=jnp.where(new, 0, ages),
        place=jnp.where(new, buffer.spare[:, None], buffer.place),
        spare=jnp.where(accept, evicted, buffer.spare),
        offered=_count(buffer.offered, finite),
        accepted=_count(buffer.accepted, accept),
    )


def _bound_error(buffer, entry, accept, norms, units):
    """The buffer with its norms and error bounds, and whether to take the sums anew."""
    new = _here(buffer.norms.shape, entry, accept)
    norms, error, inexact = running_sum.bound(
        buffer.norms, buffer.error, units, new, norms
    )
    rebuilds = _count(buffer.rebuilds, inexact)
    return buffer._replace(norms=norms, error=error, rebuilds=rebuilds), inexact


@jax.custom_batching.custom_vmap
def _anywhere(predicate):
    """A predicate that stays one scalar under vmap, so that its cond stays a branch."""
    return predicate


@_anywhere.def_vmap
def _anywhere_batched(axis_size, in_batched, predicate):
    del axis_size
    return _anywhere(jnp.any(predicate) if in_batched[0] else predicate), False


def _draw(draws, probability, finite):
    """Whether this step is first in, first out (None: never), and the next key."""
    if draws is None:
        return None, None
    kept, key = jax.random.split(jax.random.wrap_key_data(draws))
    fifo = jax.random.uniform(key) < probability
    return fifo, jnp.where(jnp.any(finite), jax.random.key_data(kept), draws)


def _in_order(rows, topc):
    """Places (R, C) of entries that lie where their index says."""
    return jnp.tile(jnp.arange(topc, dtype=jnp.int32), (rows, 1))


def _here(shape, entry, accept):
    """Where in (R or L, C) the new entry goes, if anywhere."""
    column = jnp.arange(shape[1], dtype=entry.dtype)[None]
    return jnp.broadcast_to((column == entry[:, None]) & accept[:, None], shape)


def _rows(columns):
    """Arrays (R,), of scalars each, as a decision per row."""
    return [_Decision(*row) for row in zip(*(list(column) for column in columns))]


def _per_leaf(rows, leaves):
    """A list with an item per row as one with an item per leaf."""
    return rows * len(leaves) if len(rows) == 1 else rows


def _in_rows(per_leaf, buffer):
    """Truth of each leaf (L,) as truth of each row (R,)."""
    synced = buffer.keys.shape[0] == 1
    return jnp.all(per_leaf, keepdims=True) if synced else per_leaf


def _count(counter, happened):
    return jnp.where(happened, optax.safe_increment(counter), counter)


def _leaves(updates, buffer):
    """The leaves of ``updates``, which must be like what the buffer was made for."""
    leaves, treedef = jax.tree.flatten(updates)
    totals, expected = jax.tree.flatten(buffer.total)
    if treedef != expected:
        raise ValueError(
            f"updates have the structure {treedef}, but the state was made for "
            f"parameters of the structure {expected}."
        )
    for leaf, total in zip(leaves, totals):
        if leaf.shape != total.shape:
            raise ValueError(
                f"updates have a leaf of shape {leaf.shape}, but the state was made "
                f"for a parameter of shape {total.shape}."
            )
    return leaves


def _check_floating(path, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            "A buffer keeps real floating-point values, but parameter "
            f"{jax.tree_util.keystr(path) or '(the only one)'} has dtype {leaf.dtype};"
            " leave it out with optax.masked."
        )
