"""Running sums of slots: taken anew before their rounding errors can matter."""

import math

import jax
import jax.numpy as jnp

from memoptax._tensors import storage

# A running sum is rebuilt when its error may exceed this share of the summed norms of
# its leaf's slots, in unit roundoffs: 1e-5 in float32, 1.9e-14 in float64.
_TOLERANCE = 1e-5 / float(jnp.finfo(jnp.float32).eps / 2)


def units(totals, dtype):
    """The unit roundoff of every sum, (L,)."""
    return jnp.asarray([jnp.finfo(t.dtype).eps / 2 for t in totals], dtype)


def bound(norms, error, units, new, incoming):
    """The norms (L, C) and error bounds (L,) after slots changed, and whether to take
    the sums anew.

    ``new`` (L, C) says where a value of norm ``incoming`` (L,) replaces one. A sum that
    takes in new - old rounds twice: at most one unit of |new| + |old|, and one of
    itself, which the norms of the slots bound. One bound for the whole tree would let
    an outlier in a small leaf hide behind a large leaf.
    """
    outgoing = jnp.sum(jnp.where(new, norms, 0), axis=1)
    norms = jnp.where(new, incoming[:, None], norms)
    scale = units * jnp.sum(norms, axis=1)
    rounding = units * (incoming + outgoing) + scale
    error = error + jnp.where(jnp.any(new, axis=1), rounding, 0)
    inexact = jnp.any(error > _TOLERANCE * scale)
    return norms, jnp.where(inexact, fresh_error(norms, units), error), inexact


def fresh_error(norms, units):
    """The error bounds (L,) of sums taken anew over slots of these ``norms`` (L, C)."""
    topc = norms.shape[1]
    additions = topc // _block(topc) + int(math.log2(_block(topc)))
    return additions * units * jnp.sum(norms, axis=1)


@jax.custom_jvp
def rebuild(totals, stacks, spares, wanted):
    """The sums, taken anew if ``wanted``; their derivative stays what it was."""
    return anew(totals, stacks, spares, wanted)


@rebuild.defjvp
def _rebuild_jvp(primals, tangents):
    """A sum taken anew is the same sum, but for its roundings."""
    return rebuild(*primals), tangents[0]


def anew(totals, stacks, spares, wanted=True):
    """The sums; if ``wanted``, each is that of all slots but the spare one.

    ``spares`` has an item per leaf, or one for all of them. When one leaf needs it, all
    sums are taken anew, in one loop: leaves are accepted together, so their bounds are
    reached at about the same time, and a loop per leaf would take long to compile. Only
    sums leave the loop, so that no stack is copied, and without need it takes no turn.
    """
    topc = max((storage.copies(stack) for stack in stacks), default=1) - 1
    block = _block(topc)

    def add_block(turn, totals):
        def add(total, stack, slots):
            terms = [
                storage.decode(storage.read(stack, slot), total.dtype) for slot in slots
            ]
            return jnp.where(turn == 0, 0, total) + _pairwise(terms)

        entries = [turn * block + k for k in range(block)]
        slots = [[k + (k >= spare) for k in entries] for spare in spares]
        slots = slots * len(totals) if len(slots) == 1 else slots
        return [add(*leaf) for leaf in zip(totals, stacks, slots)]

    turns = topc // block
    if wanted is not True:
        turns = jnp.where(wanted, turns, 0)
    return jax.lax.fori_loop(0, turns, add_block, totals)


def _block(topc):
    """Slots that one turn of a rebuild adds up.

    Every turn reads and writes the sum once and adds a rounding, which many slots feel;
    every slot of a turn has to be compiled, which many leaves feel.
    """
    return math.gcd(topc, 2 if topc < 32 else 8)


def _pairwise(terms):
    """The sum of ``terms``, a power of two of them."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2])]
    return terms[0]
