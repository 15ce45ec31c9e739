"""The three ways to hold the C values of a buffer and to know their sum.

*select* is for one value. Its slot has the shape of its parameter.

*read* has C + 1 slots. Every new value is written into the spare slot. Then the slots
of the entries held before are added up. If the value stays, the slot of the entry that
leaves becomes the spare one. The reads have a data dependency on the write, so XLA can
update the slots in place.

*sum* writes in the same way and keeps the sum of all values in the state. A step
touches two slots for any C: :mod:`memoptax._buffer.running_sum`.

``entries`` of a buffer says which entry each slot holds, with C for the spare one. Only
the order of those numbers is used, so zeros mean that the entries are in order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memoptax._buffer import eviction, running_sum
from memoptax._tensors import dtypes, layout, storage

WAYS = ("select", "read", "sum")

# Reading all slots is the default if C values take up to this many bytes per parameter.
# Beyond that it moves more bytes than the sum does. On an H100, adam_c with C = 20
# moves 120 bytes per parameter if it reads float32 slots (80 bytes of values), 57 if it
# reads int8 slots (20 bytes of values), and 52 with float32 slots and their sum.
_READ_BYTES = 20

_TURN = 5  # the number of slots that a CPU adds up at once


def way(holding: str | None, topc: int, itemsize: int) -> str:
    """The way that ``holding`` names. None chooses by C and the itemsize."""
    if holding is not None:
        return holding
    if topc == 1:
        return "select"
    return "read" if topc * itemsize <= _READ_BYTES else "sum"


def itemsize(slots) -> int:
    """The largest number of bytes that one number in a slot takes."""
    return max((leaf.dtype.itemsize for leaf in jax.tree.leaves(slots)), default=4)


def copies(way: str, topc: int) -> int | None:
    """The number of slots, or None for a single one without an axis for slots."""
    return None if way == "select" else topc + 1


def in_order(rows, topc: int) -> jax.Array:
    """``entries`` (R, C + 1) for entries in the order of the slots.

    ``rows`` are any integers of R rows. The result has the batch that a vmap gives
    them.
    """
    order = jnp.arange(topc + 1, dtype=jnp.int32)[None]
    return order + 0 * rows[:, :1].astype(jnp.int32)


def slots_of(entries) -> jax.Array:
    """The slot of each entry, then the spare slot, (R, C + 1)."""
    return _argsort(entries)


def _argsort(x):
    """The order of every row, on the mesh of ``x``, which a sort in jax 0.12 loses."""
    return layout.like(jnp.argsort(x, axis=1), x)


class Row(NamedTuple):
    """A decision on one row and the places of its values, as scalars.

    With scalars, leaves of one shape share one compiled program. Code that picks the
    number of its own leaf out of a vector would be compiled once per leaf.
    """

    offered: jax.Array  # bool
    accepted: jax.Array  # bool
    slots: list  # integers: the slot of each entry (only to read them), then the spare
    evicted: Any  # the slot of the entry that leaves


def rows(way, entries, decision: eviction.Decision) -> list[Row]:
    """The decision on every row."""
    slots = evicted = jnp.zeros((decision.entry.shape[0], 1), jnp.int32)
    if entries is not None:
        slots = slots_of(entries)
        evicted = _evicted(slots, decision)
    if way == "sum":  # at C = 1000, a thousand scalars per row that no step needs
        slots = slots[:, -1:]
    columns = (decision.offered, decision.accepted, slots, evicted)
    return [Row(*row[:2], list(row[2]), row[3][0]) for row in zip(*columns)]


def _evicted(slots, decision: eviction.Decision) -> jax.Array:
    """The slot of the entry that leaves, (R, 1)."""
    leaving = eviction.at(decision.entry, slots.shape)
    return jnp.max(jnp.where(leaving, slots, 0), axis=1, keepdims=True)


def moved(entries, decision: eviction.Decision):
    """``entries`` once the value in the spare slot has been accepted, or refused."""
    if entries is None:
        return None
    topc = entries.shape[1] - 1
    slots = slots_of(entries)
    slot = jnp.arange(topc + 1, dtype=slots.dtype)[None]
    spare = slot == slots[:, -1:]
    evicted = slot == _evicted(slots, decision)
    new = decision.entry[:, None].astype(entries.dtype)
    taken = decision.accepted[:, None]
    # The same order, as a permutation even where a tool has changed the numbers.
    before = _argsort(slots).astype(entries.dtype)
    after = jnp.where(taken & evicted, topc, before)
    return jnp.where(taken & spare, new, after)


def select(value, slot: storage.Stored, stored, row: Row, dtype):
    """The value held before, and the slot after."""
    total = storage.decode(slot, dtype)
    if stored is None:
        value = storage.saturate(value, slot)
        return total, storage.encode(value, slot, row.accepted, slot)
    # Without the barrier, a TPU writes the slot together with the momentum before the
    # slot is read, and copies it: adam_cm in int8 would move 33 bytes per parameter and
    # take a quarter of the parameters in temporaries.
    stored = jax.lax.optimization_barrier(stored)
    return total, storage.choose(row.accepted, stored, slot)


def read(value, stack: storage.Stored, stored, row: Row, dtype):
    """The sum of the values held before, and the slots after."""
    new = storage.to_write(value, stack, stored, row.offered)
    stack = storage.write(stack, new, row.slots[-1])
    return total(stack, row.slots, jnp.zeros((), dtype)), stack


def _by_index(stack, slots, zero):
    return [storage.decoded(stack, slot, zero.dtype) for slot in slots[:-1]]


def _by_choice(stack, slots, zero):
    """The same from every slot, the spare one too."""
    every = [storage.decoded(stack, k, zero.dtype) for k in range(len(slots))]
    *terms, last, spare = [
        layout.where(slots[-1] != k, slot, 0) for k, slot in enumerate(every)
    ]
    return [*terms, last + spare]


_by_index_or_choice = jax.custom_batching.custom_vmap(_by_index)


@_by_index_or_choice.def_vmap
def _batched(axis_size, in_batched, *operands):
    """Under vmap each member reads different slots, so all are read and some masked.

    XLA would store a copy of everything that is read by an index (sgd_c with C = 5 on a
    CPU: 5 copies of the parameters instead of 1).
    """
    axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
    found = jax.vmap(_by_choice, axes, axis_size=axis_size)(*operands)
    return found, [True] * len(found)


@jax.custom_jvp
def terms(stack, slots, zero):
    """C tensors whose sum is that of the entries held, in the dtype of ``zero``.

    The slot of an entry that is not held has zeros, so no choice is compiled per slot
    (adam_c with C = 5 and 200 leaves: 7.3 s instead of 10.5). If a tool has scaled the
    state, an age of 1 became 0, and the value of that entry is in the sum until the
    next offer takes its place.
    """
    return _by_index_or_choice(stack, slots, zero)


@terms.defjvp
def _terms_jvp(primals, tangents):
    return jax.jvp(_by_index, primals, tangents)


@jax.custom_jvp
def total(stack, slots, zero):
    """The sum of :func:`terms`, in their order.

    XLA's CPU backend would compile and read all slots again for each consumer of the
    sum. So a CPU adds up more than ten in a loop, and stores their sum in a temporary
    like the leaf. (For six to ten the loop would have a single turn, and XLA removes
    it.) With C = 20 in int8, a step of adam_c takes 4.0 times as long as Adam's instead
    of 7.6, and one of adam_cm 4.1 instead of 5.8. One of sgd_c, where the sum has a
    single consumer, gains nothing: 3.3 instead of 3.2.
    """
    return _total(stack, slots, zero)


@total.defjvp
def _total_jvp(primals, tangents):
    return jax.jvp(_at_once, primals, tangents)


def _at_once(stack, slots, zero):
    return functools.reduce(jnp.add, _by_index(stack, slots, zero))


def _in_turns(stack, slots, zero):
    *slots, spare = slots
    first = (len(slots) - 1) % _TURN + 1
    total = _at_once(stack, [*slots[:first], spare], zero)
    if first == len(slots):
        return total

    def turn(total, slots):
        terms = _by_index(stack, [*slots, spare], zero)
        return functools.reduce(jnp.add, terms, total), None

    rest = jnp.stack(slots[first:]).reshape(-1, _TURN)
    return jax.lax.scan(turn, total, rest)[0]


@jax.custom_batching.custom_vmap
def _total(*operands):
    return jax.lax.platform_dependent(*operands, cpu=_in_turns, default=_at_once)


@_total.def_vmap
def _total_of_each(*batched):
    found, _ = _batched(*batched)
    return functools.reduce(jnp.add, found), True


# Traced once for all leaves of one shape: 200 leaves in half the time.
_compiled_select = jax.jit(select, static_argnames="dtype")
_compiled_read = jax.jit(read, static_argnames="dtype")


def exchange(way, buffer, values, stored, decision, norms, across):
    """The sum of the values held, per leaf, and the buffer with the new values.

    ``stored`` are the values as the slots store them, or None for each. ``norms`` (L,)
    are those of the values. Only the way *sum* needs them.
    """
    stacks, treedef = stacks_of(buffer)
    each = per_leaf(rows(way, buffer.entries, decision), stacks)
    like = _like_slots(buffer)
    placed = [like(x, s.values) for x, s in zip(values, stacks)]
    stored = [
        None if x is None else jax.tree.map(like, x, s) for x, s in zip(stored, stacks)
    ]
    wide = [dtypes.widest(x.dtype, buffer.keys.dtype) for x in values]
    entries = moved(buffer.entries, decision)
    fields: dict[str, Any] = {}
    if way == "sum":
        totals, stacks, fields = running_sum.exchange(
            buffer, placed, stacks, stored, each, decision, entries, norms, across
        )
    else:
        one = _compiled_select if way == "select" else _compiled_read
        done = [one(*leaf) for leaf in zip(placed, stacks, stored, each, wide)]
        totals, stacks = [d[0] for d in done], [d[1] for d in done]
    totals = [layout.like(t, x) for t, x in zip(totals, values)]
    slots, scales = storage.pack(treedef, stacks, buffer.scales)
    return totals, buffer._replace(
        slots=slots, scales=scales, entries=entries, **fields
    )


def per_leaf(rows: list, leaves) -> list:
    """A list of one item per leaf from a list of one item per row."""
    return rows * len(leaves) if len(rows) == 1 else rows[: len(leaves)]


def value(buffer, leaf: int, entry: int, dtype):
    """The value of one entry of one leaf, or 0 if the entry is empty."""
    stack = stacks_of(buffer)[0][leaf]
    row = 0 if buffer.keys.shape[0] == 1 else leaf
    if buffer.entries is not None:
        stack = storage.read(stack, slots_of(buffer.entries)[row, entry])
    held = eviction.held(buffer)[row, entry]
    return layout.where(held, storage.decode(stack, dtype), 0)


def shape_of(buffer, leaf, batch: int = 0) -> tuple[int, ...]:
    """The shape of the parameter that a leaf of ``buffer.slots`` belongs to, behind the
    axes of a ``batch``.
    """
    if buffer.entries is None:
        return leaf.shape
    return leaf.shape[:batch] + leaf.shape[batch + 1 :]


def beside(buffer, values):
    """The values with the sharding of their slots, in JAX's explicit mode."""
    return jax.tree.map(_like_slots(buffer), values, buffer.slots)


def _like_slots(buffer):
    return functools.partial(layout.like, leading=0 if buffer.entries is None else 1)


def stacks_of(buffer):
    """The slots of every leaf, and the structure of the tree."""
    treedef = jax.tree.structure(buffer.slots)
    return storage.unpack(treedef, buffer.slots, buffer.scales), treedef
