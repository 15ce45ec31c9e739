"""The sum of a buffer's values, kept in its state with a bound on its error."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from memoptax._buffer import eviction
from memoptax._tensors import layout, storage

# A running sum is rebuilt when its error bound exceeds this share of the summed norms
# of its leaf's slots, in unit roundoffs: 1e-5 in float32, 1.9e-14 in float64.
_TOLERANCE = 1e-5 / float(jnp.finfo(jnp.float32).eps / 2)


def exchange(buffer, values, stacks, stored, rows, decision, entries, norms, across):
    """The sums before the offer, and the slots and the fields of the sums after it.

    ``rows`` has the decision on each leaf. ``entries`` are those after it.
    """
    totals, treedef = jax.tree.flatten(buffer.total)
    done = [_change(*leaf) for leaf in zip(values, stacks, stored, rows, totals)]
    after, changes, stacks, written = ([d[k] for d in done] for k in range(4))
    bounds = storage.norm_bounds(norms, values, written, across)
    new = eviction.here(decision, buffer.keys.shape)
    norms, error, inexact = bound(buffer, totals, new, bounds)
    after = rebuild(after, stacks, in_slots(decision.held | new, entries), inexact)
    before = list(map(_before, totals, after, changes))
    return (
        before,
        stacks,
        dict(
            total=treedef.unflatten(after),
            norms=norms,
            error=error,
            rebuilds=eviction.count(buffer.rebuilds, inexact),
        ),
    )


@jax.jit  # traced once for all leaves of one shape
def _change(value, stack, stored, row, total):
    """One leaf's sum after the offer, its change, its slots, and what was written."""
    written = storage.to_write(value, stack, stored, row.offered)
    stack = storage.write(stack, written, row.slots[-1])
    # What is accepted was offered, so the change needs no second choice.
    new = storage.decode(storage.to_write(value, stack, stored), total.dtype)
    old = storage.decoded(stack, row.evicted, total.dtype)
    change = layout.like(layout.where(row.accepted, new - old, 0), total)
    return total + change, change, stack, written


@jax.jit  # traced once for all leaves of one shape
def _before(total, after, change):
    """The sum before a change.

    XLA's CPU backend copies a sum that is read after it was overwritten. The copy takes
    temporaries of a quarter of the parameters, and a fifth of the step's time. So on a
    CPU the change is subtracted from the updated sum, which costs 2·eps·|new| of
    accuracy.
    """
    return jax.lax.platform_dependent(
        total,
        after,
        change,
        cpu=lambda total, after, change: after - change,
        default=lambda total, after, change: total,
    )


def units(totals, dtype):
    """The unit roundoff of every sum, (L,)."""
    return jnp.asarray([jnp.finfo(t.dtype).eps / 2 for t in totals] or [0], dtype)


def bound(buffer, totals, new, incoming):
    """The norms (L, C) and error bounds (L,) after a change, and whether to rebuild.

    ``new`` (R, C) says where a value of norm ``incoming`` (L,) replaces another. Adding
    new - old to a sum rounds twice: by at most one unit of |new| + |old|, and by one
    unit of the sum, which the norms of the slots bound. Each leaf has its own bound,
    because one bound for the tree would hide an outlier in a small leaf behind a large
    leaf.

    Norms are multiplied by the unit before they are added, because their sum may
    overflow. A product may be so small that it becomes 0. The error grows by what all
    products may have lost, so the smallest sums are rebuilt at every change.
    """
    unit = units(totals, buffer.norms.dtype)
    outgoing = jnp.sum(jnp.where(new, buffer.norms, 0), axis=1)
    norms = jnp.where(new, incoming[:, None], buffer.norms)
    scale = _sum_of_products(unit, norms)
    lost = (norms.shape[1] + 2) * float(jnp.finfo(norms.dtype).tiny)
    lost = jnp.where(jnp.any((norms > 0) | (buffer.norms > 0), axis=1), lost, 0)
    rounding = unit * incoming + unit * outgoing + scale + lost
    error = buffer.error + jnp.where(jnp.any(new, axis=1), rounding, 0)
    # False if a tool has made it NaN.
    exact = jnp.all(error <= largest_error(norms, totals))
    # A sum that overflows, before a change or while it changes, stays infinite until it
    # is rebuilt. The norms may be wider than the sum of a leaf.
    limits = [jnp.finfo(t.dtype).max for t in totals] or [0]
    largest = jnp.sum(buffer.norms, axis=1) + incoming
    overflows = ~(largest <= jnp.asarray(limits, norms.dtype)) & jnp.any(new, axis=1)
    inexact = ~exact | jnp.any(overflows) | _is_changed(buffer)
    return norms, jnp.where(inexact, fresh_error(norms, unit), error), inexact


def _is_changed(buffer):
    """Whether a tool has averaged or scaled the state, so that the sum is not that of
    its slots.

    Integers were truncated then: entries are not a permutation, or a value is no longer
    held but still has a norm. A negative factor makes that norm negative.
    """
    held, entries = eviction.held(buffer), buffer.entries
    in_order = jnp.arange(entries.shape[1], dtype=entries.dtype)[None]
    moved = jnp.any(jnp.sort(entries, axis=1) != in_order, axis=1)
    misplaced = jnp.any(held, axis=1) & moved
    return jnp.any(misplaced) | jnp.any((buffer.norms != 0) & ~held)


def largest_error(norms, totals):
    """The error bounds (L,) beyond which sums of such values are rebuilt."""
    return _TOLERANCE * _sum_of_products(units(totals, norms.dtype), norms)


def fresh_error(norms, units):
    """The error bounds (L,) of sums that were rebuilt from these ``norms`` (L, C)."""
    slots = norms.shape[1] + 1
    block = _block(slots)
    additions = -(-slots // block) + int(math.log2(block))
    return additions * _sum_of_products(units, norms)


def _sum_of_products(units, norms):
    return jnp.sum(units[:, None] * norms, axis=1)


@jax.custom_jvp
def rebuild(totals, stacks, held, wanted):
    """The sums, rebuilt from the slots if ``wanted``, with the same derivative."""
    return from_slots(totals, stacks, held, wanted)


@rebuild.defjvp
def _rebuild_jvp(primals, tangents):
    """A rebuilt sum differs only by rounding."""
    return rebuild(*primals), tangents[0]


def in_slots(held, entries):
    """Which slots hold a value, (R, C + 1), from which entries do, (R, C)."""
    held = jnp.pad(held, [(0, 0), (0, 1)])  # the spare slot holds none
    return jnp.take_along_axis(held, entries, axis=1)


@jax.jit  # so that an eager step compiles it once
def from_slots(totals, stacks, held, wanted: Any = True):
    """The sums. If ``wanted``, each is added up from the slots that are ``held``.

    When one leaf needs it, one loop rebuilds the sums of all leaves: leaves are
    accepted together, so their bounds are reached at about the same time, and a loop
    per leaf would take long to compile. Only sums leave the loop, so no stack is
    copied. If no rebuild is wanted, the loop does not run.
    """
    slots = held.shape[1]
    block = _block(slots)
    rows = [0] * len(stacks) if held.shape[0] == 1 else range(len(stacks))

    # The last turn may reach beyond the last slot.
    held = jnp.pad(held, [(0, 0), (0, -slots % block)])

    def add_block(turn, totals):
        places = [turn * block + k for k in range(block)]
        taken = [storage.at(held, k, axis=1) for k in places]
        masks = [[one[row] for one in taken] for row in rows]
        return [_add(turn, places, *leaf) for leaf in zip(masks, totals, stacks)]

    def one_more(carry):
        turn, totals = carry
        return turn + 1, add_block(turn, totals)

    turns = -(-slots // block)
    if wanted is True:  # a loop whose turns are known has a derivative
        return jax.lax.fori_loop(0, turns, add_block, totals)
    # Each member of an ensemble has a turn of its own. It is made from ``wanted``, so
    # that in explicit mode it is divided between devices as the members are.
    end = turns * wanted.astype(jnp.int32)
    start = jnp.zeros_like(end), totals
    return jax.lax.while_loop(lambda carry: carry[0] < end, one_more, start)[1]


@jax.jit  # traced once for all leaves of one shape
def _add(turn, places, taken, total, stack):
    """``total`` plus those of these slots that are ``taken``. Turn 0 starts from 0."""
    terms = [
        layout.where(one, storage.decoded(stack, k, total.dtype), 0)
        for one, k in zip(taken, places)
    ]
    more = layout.like(_pairwise(terms), total)
    return layout.where(turn > 0, total, 0) + more


def _block(slots):
    """The number of slots that one turn of a rebuild adds up, a power of two.

    Every turn reads and writes the sum once and rounds once, which favours large blocks
    for many slots. Every slot of a block is compiled for each leaf, which favours small
    blocks for many leaves. With C = 20 and 100 leaves, jax 0.12 compiles sgd_c in 5 s
    with blocks of one slot, and in 8 s with two. A step moves 2 % more bytes on average
    with one. More than 64 turns would round so often that a sum would have to be
    rebuilt soon after it was rebuilt.
    """
    return 1 if slots < 32 else max(8, 2 ** math.ceil(math.log2(slots / 64)))


def _pairwise(terms):
    """The sum of ``terms``, whose number is a power of two."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2])]
    return terms[0]
