"""Algorithm 1 of both papers: read the buffer, join, and offer the value to it.

The buffer has the C most critical values seen so far, their sum, and the keys that say
who leaves next. Entries have a logical index (keys, norms, ages; what ties are broken
by) and a physical one (where the value is).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memoptax import _flax_metadata
from memoptax._buffer import aggregation, eviction, holding, running_sum
from memoptax._buffer.options import Options, check_scales
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


def start(options: Options, params) -> Buffer:
    """The buffer that ``options`` ask for, holding nothing."""
    draws = None
    if options.fifo_probability is not None:
        draws = jax.random.key_data(jax.random.key(options.seed))
    return empty(
        params,
        options.topc,
        synced=options.synced,
        dtype=options.buffer_dtype,
        draws=draws,
    )


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
        place=holding.in_order(rows, topc),
        spare=jnp.full((rows,), topc, jnp.int32),
        norms=jnp.zeros((len(leaves), topc), key_dtype),
        error=jnp.zeros((len(leaves),), key_dtype),
        offered=jnp.zeros((rows,), jnp.int32),
        accepted=jnp.zeros((rows,), jnp.int32),
        rebuilds=jnp.zeros((), jnp.int32),
        draws=draws,
    )


def remember(
    options: Options,
    buffer: Buffer,
    values,
    gradients,
    finite: Any = True,
    stored=None,
):
    """``values`` joined with the buffer, and the buffer once they were offered to it.

    Read before write, as in the papers: a value is never averaged with itself. Its
    priority is that of the ``gradients``; if not ``finite``, nothing is offered. What
    ``stored`` is, :func:`push` says.
    """
    across = options.across
    check_scales(options, gradients, buffer.scales)
    key = priority(
        buffer, gradients, options.rule, synced=options.synced, across=across
    )
    key = jnp.where(finite, key, jnp.nan)
    recall, buffer = push(
        buffer,
        values,
        key,
        options.decay,
        options.fifo_probability,
        stored,
        across,
    )
    joined = aggregation.aggregate(values, recall, options.kappa, options.aggr)
    return joined, buffer


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
    each = _per_leaf(rows, leaves)
    before, totals, stacks = holding.exchange(
        totals, stacks, stored, each, [row.spare_after for row in rows], inexact
    )
    filled = [here.fill for here in each]
    slots, scales = storage.pack(treedef, stacks, buffer.scales)
    return (
        Recall(treedef.unflatten(before), treedef.unflatten(filled)),
        after._replace(slots=slots, scales=scales, total=treedef.unflatten(totals)),
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


def all_finite(buffer: Buffer, gradients, across=None) -> jax.Array:
    """Whether the norm of every leaf is a finite number, and so every gradient."""
    leaves, dtype = _leaves(gradients, buffer), buffer.keys.dtype
    return jnp.all(jnp.isfinite(_norms.of(leaves, dtype, across)))


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
        fifo, draws = eviction.draw(buffer.draws, fifo_probability, finite)
        entry, accept = eviction.choose(buffer, priority, finite, fifo)
        evicted = jnp.take_along_axis(buffer.place, entry[:, None], axis=1)[:, 0]
        after = eviction.insert(buffer, entry, accept, finite, evicted, priority, decay)
        after, inexact = _bound_error(after, entry, accept, norms, units)
        after = after._replace(draws=draws)
        fill = eviction.fill(buffer)
        taken = (finite, accept, evicted, buffer.spare, after.spare, fill)
        return after, _rows(taken), inexact

    def ignored(buffer, finite, *_):
        no, spare = jnp.zeros_like(finite), buffer.spare
        taken = (no, no, spare, spare, spare, eviction.fill(buffer))
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


def _bound_error(buffer, entry, accept, norms, units):
    """The buffer with its norms and error bounds, and whether to take the sums anew."""
    new = eviction.here(buffer.norms.shape, entry, accept)
    norms, error, inexact = running_sum.bound(
        buffer.norms, buffer.error, units, new, norms
    )
    rebuilds = eviction.count(buffer.rebuilds, inexact)
    return buffer._replace(norms=norms, error=error, rebuilds=rebuilds), inexact


@jax.custom_batching.custom_vmap
def _anywhere(predicate):
    """A predicate that stays one scalar under vmap, so that its cond stays a branch."""
    return predicate


@_anywhere.def_vmap
def _anywhere_batched(axis_size, in_batched, predicate):
    del axis_size
    return _anywhere(jnp.any(predicate) if in_batched[0] else predicate), False


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
