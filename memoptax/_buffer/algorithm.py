"""Algorithm 1 of both papers: read the buffer, join, and offer the value to it.

For a value x_t (the gradient g_t, or the momentum m_t) and a buffer B_t of at most C
values with keys::

  read    ΣB_t and |B_t|                              holding.exchange, eviction.fill
  join    u_t = x_t + κ/|B_t| · ΣB_t                  aggregation.join
  offer   if |B_t| < C, or if ‖g_t‖ is above the
          least key: store x_t with the key ‖g_t‖     eviction.decide, holding.exchange
          in an empty entry, or else in place of
          the entry with the least key
  decay   multiply all keys by the decay              eviction.insert

:func:`recall_and_offer` does one step of it. Each slot is read and written in the same
pass, so the code decides on the offer first, and joins last. The sum is still that of
B_t.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoptax._buffer import aggregation, eviction, holding, matching
from memoptax._buffer.options import Options
from memoptax._tensors import dtypes, flax_metadata, layout, storage
from memoptax._tensors import norms as _norms


class Buffer(NamedTuple):
    """C values of a tree with L leaves, and the keys that decide which one is evicted.

    There are R rows of keys. R is 1 if all leaves are kept or dropped together
    (``synced``), and L if not. A buffer of zeros is empty. Values are held in one of
    three ways: *select*, *read* or *sum* (``holding``).
    """

    slots: Any  # (C + 1, ...), or for select like the params, in the storage's dtype
    scales: Any  # int8: per leaf, as slots with a last axis of 1, float32; else None
    keys: jax.Array  # (R, C), float32 or better: decayed priorities
    ages: jax.Array  # (R, C), int32: offers since the entry came in, from 1; 0 is empty
    entries: Any  # (R, C + 1), int32: the entry in each slot, C for none; select: None
    offered: jax.Array  # (R,), int32: finite values offered
    accepted: jax.Array  # (R,), int32: those of them that were stored
    draws: Any  # (2,), uint32: raw key of the FIFO draws; None where there are none
    total: Any  # sum: like the params, float32 or better: of all values; else None
    norms: Any  # sum: (L, C), dtype of keys: bound on the L2 norm of each value
    error: Any  # sum: (L,), dtype of keys: bound on the L2 error of total
    rebuilds: Any  # sum: (), int32: how often total was rebuilt


def empty(options: Options, params) -> Buffer:
    """An empty buffer for these options and parameters."""
    leaves, topc = jax.tree.leaves(params), options.topc
    dtype = dtypes.widest(jnp.float32, *(leaf.dtype for leaf in leaves))
    rows = 1 if options.synced else max(len(leaves), 1)
    way = options.way(jax.tree.map(lambda p: _slot_dtype(options, p), params))
    copies = holding.copies(way, topc)
    draws = None
    if options.fifo_probability is not None:
        draws = jax.random.key_data(_key(options.seed))
    summed = way == "sum"
    norms = jnp.zeros((max(len(leaves), 1), topc), dtype)
    ages = jnp.zeros((rows, topc), jnp.int32)
    return Buffer(
        slots=flax_metadata.make(
            lambda p: storage.zeros(p, copies, options.buffer_dtype), params
        ),
        scales=storage.zero_scales(params, copies, options.buffer_dtype),
        keys=jnp.zeros((rows, topc), dtype),
        ages=ages,
        entries=None if copies is None else holding.in_order(ages, topc),
        offered=jnp.zeros((rows,), jnp.int32),
        accepted=jnp.zeros((rows,), jnp.int32),
        draws=draws,
        total=jax.tree.map(storage.zero_sum, params) if summed else None,
        norms=norms if summed else None,
        error=norms[:, 0] if summed else None,
        rebuilds=jnp.zeros((), jnp.int32) if summed else None,
    )


def recall_and_offer(
    options: Options,
    buffer: Buffer,
    values,
    gradients,
    sound: Any = True,
    stored=None,
    params=None,
    norms=None,
):
    """``values`` joined with the buffer, and the buffer after ``values`` were offered.

    The result is in float32 or better, because a sum may overflow in float16.
    The sum is that of the values held before, as in the papers, so a value is never
    averaged with itself. The new value goes to a slot that is not in that sum, or to
    the only slot after it was read. The priority is that of the ``gradients``. The
    values are only offered if the norms of the gradients are finite, the priority is at
    least 0, and the step is ``sound``. ``stored`` are the values as the slots store
    them, if the caller has encoded them already, and ``norms`` those of the gradients,
    if it has taken them.
    """
    matching.check(options, buffer, gradients, params)
    if buffer.scales is not None:
        options.check_rows(gradients)
    if values is gradients:  # momenta have the sharding of m
        summed = options.way(buffer.slots) == "sum"
        gradients = jax.tree.map(
            lambda g: storage.in_own_precision(g, summed), gradients
        )
        values = gradients = holding.beside(buffer, gradients)
    leaves, treedef = jax.tree.flatten(values)
    stored = [None] * len(leaves) if stored is None else stored
    norms, priority, fit = _measured(options, buffer, values, gradients, norms)
    sound = sound & fit & options.is_sound()
    totals, fill, after = _read_and_offer(
        options, buffer, leaves, stored, norms, priority, sound
    )
    joined = aggregation.join(
        [dtypes.wide(x) for x in leaves],
        totals,
        fill,
        options.kappa,
        options.is_sound(),
        options.aggr,
    )
    return treedef.unflatten(joined), after


def _measured(options: Options, buffer: Buffer, values, gradients, norms):
    """The norms (L,) of the values, the priority (R,), and which values can be stored.

    A momentum is a mean of gradients. So it is finite if they are, and in the range of
    slots of their dtype. It is clipped to it if earlier gradients had a wider dtype.
    Its own norms are taken only where its storage needs them.
    """
    offers, treedef = jax.tree.flatten(values)
    leaves = treedef.flatten_up_to(gradients)
    dtype = buffer.keys.dtype
    if norms is None:
        norms = norms_of(options, leaves, dtype)
    norms = own = norms.astype(dtype)
    if values is not gradients and _needs_own_norms(options, buffer, leaves):
        own = norms_of(options, offers, dtype)
    fit = jnp.isfinite(norms) & storage.fits(own, leaves, holding.stacks_of(buffer)[0])
    return own, _priority(options, gradients, leaves, norms), fit


def _read_and_offer(options: Options, buffer, values, stored, norms, priority, sound):
    """The sum of the values held, per leaf, their number, and the buffer afterwards."""
    step = _compiled_step if options.across is None else _one_step
    return step(
        buffer,
        values,
        stored,
        norms,
        priority,
        sound,
        options.decay,
        options.fifo_probability,
        way=options.way(buffer.slots),
        across=options.across,
    )


class Parts(NamedTuple):
    """What a leaf of the result was computed from: a value and the slots held."""

    value: jax.Array
    stack: storage.Stored
    slots: list  # C integers and the spare slot
    weights: tuple  # of the value, and of the sum of the slots


def parts(options: Options, before: Buffer, after: Buffer, values) -> list:
    """Per leaf, the :class:`Parts` of what :func:`recall_and_offer` returned, or None.

    It is None unless the way is *read*, because other ways overwrite what they read. It
    is None if ``aggr`` is a function, which may look at other elements. It is None if
    the slots are as wide as the result. Reading them again would then move more bytes
    than storing the result (sm3_cm with C = 5 on an H100: 88 bytes per parameter
    instead of 68).
    """
    leaves, stacks = jax.tree.leaves(values), holding.stacks_of(after)[0]
    if options.way(before.slots) != "read" or callable(options.aggr):
        return [None] * len(leaves)
    slots = holding.slots_of(before.entries)
    fill, sound, found = eviction.fill(before), options.is_sound(), []
    for leaf, (value, stack) in enumerate(zip(leaves, stacks)):
        if stack.values.dtype.itemsize >= value.dtype.itemsize:
            found.append(None)
            continue
        row = 0 if options.synced else leaf
        weights = aggregation.weights(fill[row], options.kappa, sound, options.aggr)
        found.append(Parts(value, stack, list(slots[row]), weights))
    return found


def joining(parts: Parts, dtype):
    """An entrywise function, and the tensors from which it computes the result."""

    def join(value, *terms):
        total = functools.reduce(jnp.add, terms)
        return aggregation.combine(value, total, parts.weights).astype(dtype)

    zero = jnp.zeros((), parts.weights[0].dtype)
    terms = holding.terms(parts.stack, parts.slots, zero)
    return join, (parts.value, *(layout.like(t, parts.value) for t in terms))


def _one_step(
    buffer: Buffer,
    values,
    stored,
    norms,
    priority,
    sound,
    decay,
    fifo_probability,
    *,
    way,
    across,
):
    stacks, _ = holding.stacks_of(buffer)
    finite = sound & jnp.isfinite(priority) & (priority >= 0)
    offered = eviction.together(finite, priority.shape[0])
    fifo, draws = eviction.draw(buffer.draws, fifo_probability, offered)
    decision = eviction.decide(buffer, priority, finite, fifo)
    # The barrier completes the decision before any leaf is touched. Otherwise a GPU
    # fuses the update with the norm, and the slot takes a pass of its own (adam_c,
    # C = 1: 44 bytes instead of 40).
    decision, fill = jax.lax.optimization_barrier((decision, eviction.fill(buffer)))
    stored = [
        None if s is None else storage.as_in(s, stack, x.dtype)
        for s, stack, x in zip(stored, stacks, values)
    ]
    totals, after = holding.exchange(
        way, buffer, values, stored, decision, norms, across
    )
    after = eviction.insert(after, decision, priority, decay)
    return totals, fill, after._replace(draws=draws)


# Compiled once for all optimizers and steps, so that an eager update compiles nothing.
# Under jax.shard_map, which traces it, _one_step is called directly.
_compiled_step = jax.jit(_one_step, static_argnames=("way", "across"))


def norms_of(options: Options, tree, dtype) -> jax.Array:
    """The L2 norms of the leaves, (L,), over all devices that share them."""
    return _norms.of(jax.tree.leaves(tree), dtype, options.across)


def _priority(options: Options, gradients, leaves, norms) -> jax.Array:
    """How critical ``gradients`` are, (R,): the sum of the L2 norms of a row's leaves.

    A ``priority_fn`` replaces this rule. If not ``synced``, it is called for each leaf.
    It sees float32 or better, because squares of float16 overflow above 255.
    """
    rule = options.rule
    if rule is None:
        return _norms.total(norms) if options.synced else norms
    parts = [gradients] if options.synced else leaves
    parts = jax.lax.stop_gradient(jax.tree.map(dtypes.wide, parts))
    return _norms.vector(
        [options.priority_of(rule(part), norms.dtype) for part in parts], norms.dtype
    )


def _needs_own_norms(options: Options, buffer: Buffer, gradients) -> bool:
    """Whether storage needs the norms of the momenta, not only of their gradients."""
    stacks, _ = holding.stacks_of(buffer)
    narrower = any(map(storage.is_narrower, gradients, stacks))
    return narrower or options.way(buffer.slots) == "sum"


def _key(seed):
    """A key made from all 64 bits of a seed. JAX alone would use the last 32."""
    if isinstance(seed, jax.Array):
        return jax.random.key(seed)
    high, low = divmod(seed % 2**64, 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def _slot_dtype(options: Options, param):
    dtype = param.dtype if options.buffer_dtype is None else options.buffer_dtype
    return jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(dtype))
