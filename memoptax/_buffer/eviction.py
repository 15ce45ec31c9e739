"""Decide which value enters a buffer and which is evicted, from keys and ages only.

Entries have an index, and the lowest index wins a tie. An entry is held if its age is
at least 1, so a buffer of zeros is empty. R is the number of groups that are kept or
dropped together: one, or one for each leaf.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Decision(NamedTuple):
    """The answer to an offer."""

    offered: jax.Array  # (R,), bool: it was finite
    accepted: jax.Array  # (R,), bool: it takes the place of an entry
    entry: jax.Array  # (R,), int32: that entry
    held: jax.Array  # (R, C), bool: the entries before


def held(buffer) -> jax.Array:
    """Which entries hold a value, (R, C)."""
    return buffer.ages > 0


def fill(buffer) -> jax.Array:
    """How many entries there are, (R,), in the dtype of the keys."""
    return jnp.sum(held(buffer), axis=1, dtype=buffer.keys.dtype)


def ranks(buffer) -> jax.Array:
    """The keys, with 0 for what is not a normal number and -1 for empty entries.

    A tool may have made an infinite key, which would never leave. A subnormal key may
    be 0 on one device, and on another stay what it is when it decays.
    """
    tiny = jnp.finfo(buffer.keys.dtype).tiny
    real = (buffer.keys >= tiny) & (buffer.keys < jnp.inf)
    keys = jnp.where(real, buffer.keys, 0)
    return jnp.where(held(buffer), keys, -1)


def _turns(buffer, ranks) -> jax.Array:
    """Which of the entries of equal rank leaves first: that with the largest turn.

    A key that has decayed to 0 no longer tells how critical its value is, so of these
    entries the oldest leaves. If the lowest index left, the entries with low indices
    would take turns, and all others would stay for ever.
    """
    return jnp.where(ranks == 0, buffer.ages, 0)


def least(buffer) -> jax.Array:
    """The entry with the least key, (R,). An empty entry is below all others."""
    found = ranks(buffer)
    lowest = jnp.min(found, axis=1, keepdims=True)
    turns = jnp.where(found == lowest, _turns(buffer, found), -1)
    return jax.lax.top_k(turns, 1)[1][:, 0]


def most(buffer, number: int) -> jax.Array:
    """The ``number`` entries with the largest keys, (R, number), largest first."""
    found = ranks(buffer)
    return jnp.lexsort((_turns(buffer, found), -found), axis=1)[:, :number]


def oldest(buffer) -> jax.Array:
    """The entry that came in first, (R,)."""
    return jax.lax.top_k(buffer.ages, 1)[1][:, 0]


# A rule says which entry of a full buffer leaves, and whether a new value must be more
# critical than that entry. A new rule is a function of the buffer and a line here;
# `decide` says when a rule applies.
RULES = {"priority": (least, True), "fifo": (oldest, False)}


def decide(buffer, priority, finite, fifo) -> Decision:
    """Decide on an offer of this ``priority`` (R,), if all of it is ``finite`` (L,).

    ``fifo`` says whether this step evicts the oldest entry. None means never. Empty
    entries are filled first, in order. A priority equal to the least key is refused.
    """
    entry, gate = _by_rule(buffer, "priority", priority)
    if fifo is not None:
        drawn = fifo & jnp.all(held(buffer), axis=1)
        by_age, free = _by_rule(buffer, "fifo", priority)
        entry, gate = jnp.where(drawn, by_age, entry), jnp.where(drawn, free, gate)
    # The gate is inside of the reduction because XLA's CPU backend would repeat its
    # arithmetic in the code of every leaf (adam_c with C = 1: 138 instructions per leaf
    # instead of 120).
    accepted = together(finite & gate, priority.shape[0])
    return Decision(together(finite, priority.shape[0]), accepted, entry, held(buffer))


def together(each, rows):
    """``each`` (L,), or whether it is all true, if there is one row."""
    return jnp.all(each, keepdims=True) if rows == 1 else each


def _by_rule(buffer, name, priority):
    rule, must_be_greater = RULES[name]
    entry, own = rule(buffer), ranks(buffer)
    if not must_be_greater:
        return entry, True
    greater = priority[:, None] > own
    return entry, jnp.any(at(entry, own.shape) & greater, axis=1)


def insert(buffer, decision: Decision, priority, decay):
    """The buffer's keys, ages and counters after a decision.

    The new key is inserted first. Then all keys decay, including the new one. A
    ``decay`` is clipped to [0, 1], and NaN counts as 1.
    """
    offered, accepted, _, before = decision
    new = here(decision, buffer.keys.shape)
    decay = jnp.asarray(decay, buffer.keys.dtype)
    decay = jnp.where(jnp.isnan(decay), 1, jnp.clip(decay, 0, 1))
    keys = jnp.where(new, priority[:, None], buffer.keys)
    ages = jnp.where(before, optax.safe_increment(buffer.ages), 0)
    ages = jnp.where(offered[:, None], jnp.where(new, 1, ages), buffer.ages)
    return buffer._replace(
        keys=jnp.where(offered[:, None], keys * decay, buffer.keys),
        ages=ages,
        offered=count(buffer.offered, offered),
        accepted=count(buffer.accepted, accepted),
    )


def here(decision: Decision, shape) -> jax.Array:
    """A mask (R, C) of the place of the new entry, if it is accepted."""
    return at(decision.entry, shape) & decision.accepted[:, None]


def at(entry, shape) -> jax.Array:
    """A mask, in this shape, of one entry per row, (R,).

    A choice by a mask and a reduction takes the place of an index. XLA's CPU backend
    would repeat the arithmetic of an index in the code of every leaf (sgd_c with C = 20
    and 100 leaves: 251 instructions per leaf instead of 169, and a fifth more time to
    compile).
    """
    return jnp.arange(shape[1], dtype=entry.dtype)[None] == entry[:, None]


def draw(draws: Any, probability, finite):
    """Whether this step evicts the oldest entry (None is never), and the next key."""
    if draws is None:
        return None, None
    kept, key = jax.random.split(jax.random.wrap_key_data(draws))
    fifo = jax.random.uniform(key) < probability
    return fifo, jnp.where(jnp.any(finite), jax.random.key_data(kept), draws)


def count(counter, happened):
    return jnp.where(happened, optax.safe_increment(counter), counter)
