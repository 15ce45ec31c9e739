"""One step of SM3 on one tensor: accumulators, direction and momentum.

:func:`sm3_i` and :func:`sm3_ii` are the paper's algorithms SM3-I and SM3-II.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memoptax import _check, covers
from memoptax._tensors import dtypes, flax_metadata, layout, row_sparse, storage, tiles
from memoptax._tensors import families as _families


class Rule(NamedTuple):
    momentum: Any
    beta: Any
    eps: Any
    precondition: Callable  # sm3_i or sm3_ii

    def is_sound(self):
        """Whether the traced numbers are in their ranges. True if none is traced."""
        return (
            _check.is_inside(self.momentum, 0, 1, below=True)
            & _check.is_inside(self.beta, 0, 1, above=True, below=True)
            & _check.is_inside(self.eps, 0)
        )


def step(rule, path, boxes, gradient, accumulators, memory):
    """One leaf: its update, its new accumulators and its new momentum."""
    del path
    if gradient.size == 0:
        return gradient, accumulators, memory
    # A state that was negated or extrapolated may have sums of squares below 0. The
    # momentum would keep the NaN of their roots for ever.
    accumulators = tuple(jnp.where(a < 0, 0, a) for a in accumulators)
    dtype = accumulators[0].dtype
    momentum, beta = (_weights(x, dtype) for x in rule[:2])
    eps: Any = rule.eps
    if isinstance(eps, jax.Array):
        eps = eps.astype(dtype)
    sound = rule.is_sound()
    if sound is not True:
        eps = jnp.where(sound, eps, jnp.nan)  # so that no direction is finite
    g = _beside(gradient, accumulators, memory).astype(dtype)
    families = _families.Families(boxes, g.shape)
    homes = accumulators
    by_entry = len(accumulators) == 1 and accumulators[0].shape == g.shape
    if by_entry:  # JAX chooses only between arrays that are sharded alike
        accumulators = (layout.like(accumulators[0], g),)
    agreeing = layout.agreeing(accumulators, g)
    nu, floors, raised = rule.precondition(g, agreeing, families, beta)
    raised = tuple(map(layout.like, raised, accumulators))
    if by_entry:
        # Adagrad rejects entries one at a time. Reading only the new sum lets XLA reuse
        # the memory of the old one. So a sum that overflows becomes the largest number,
        # which shows later that it did.
        most = jnp.finfo(dtype).max
        raised = _select(
            _is_finite(g) & sound, (jnp.minimum(raised[0], most),), accumulators
        )
        nu, floors = _adagrad, raised

        def accept(new, old):
            return _if_in(g, raised[0], jnp.where(sound, new, old), old)
    else:
        finite = _are_finite(raised, rule.precondition) & sound
        raised = _select(finite, raised, accumulators)

        def accept(new, old):
            return layout.where(finite, new, old)

    direction = functools.partial(_direction, nu, eps)
    if memory is None:
        q = direction(g, *families.spread(floors))
    else:
        average = functools.partial(_average, direction, momentum, families)
        q, memory = average(g, floors, memory, accept, by_entry)
    raised = tuple(map(layout.like, raised, homes))
    return layout.like(q.astype(gradient.dtype), gradient), raised, memory


def _beside(gradient, accumulators, memory):
    """The gradient with the sharding of an array of its shape in the state, if any."""
    home = accumulators[0] if memory is None else memory.values
    return layout.like(gradient, home) if home.shape == gradient.shape else gradient


def _average(direction, weights, families, g, floors, memory, accept, by_entry):
    """The momentum, in the dtype of g and in storage."""

    def blend(g, values, scale, *floors):
        old = storage.decode(storage.Stored(values, scale), g.dtype)
        return _accumulate(old, direction(g, *floors), weights)

    def entries(g, values, scale, *floors):
        return g, values, scale, *families.spread(floors)

    operands = (g, *memory, *floors)
    new = storage.encode_computed(blend, entries, operands, memory)
    new = jax.tree.map(layout.like, new, memory)  # floors may be divided otherwise
    memory = jax.tree.map(layout.like, memory, new)  # it may be on no mesh
    if by_entry and new.scale is not None:
        # A row of int8 is rejected as a whole. Its scale says whether it is finite.
        memory = _select(jnp.isfinite(new.scale), new, memory)
    else:
        memory = jax.tree.map(accept, new, memory)
    # Reading only the stored momentum lets XLA reuse the memory of the old one.
    return accept(storage.decode(memory, g.dtype), jnp.nan), memory


def row_sparse_step(rule, path, boxes, gradient, accumulators, memory):
    """One row-sparse leaf: a step on the rows touched, as if they were the table."""
    _check_rows(gradient, boxes, _check.leaf_name(path))
    gradient = row_sparse.merged(gradient, _check.leaf_name(path))
    (table,) = accumulators
    rows, data = row_sparse.gather(table, gradient), gradient.data
    boxes = covers.rows(path, data)
    q, (raised,), _ = step(rule, path, boxes, data, (rows,), None)
    table = row_sparse.scatter(table, gradient, raised)
    return row_sparse.with_values(gradient, q), (table,), memory


def _check_rows(gradient, boxes, name: str) -> None:
    """Refuse covers whose boxes would also hold rows that are not touched."""
    # A box has at least one entry, even along an axis of size 0.
    if tuple(boxes) != ((1, *(max(n, 1) for n in gradient.shape[1:])),):
        raise ValueError(
            f"{name} has a row-sparse gradient and the cover {list(boxes)!r}. It "
            "needs memoptax.covers.rows, because the accumulators of other boxes would "
            "go stale. Pass cover=memoptax.covers.rows, or a function that gives rows "
            "to this parameter."
        )


# The two variants, and Adagrad, to which both reduce with one box per entry. nu is a
# function of the gradient and the floors (the least accumulators, from
# Families.floors), so that each consumer can recompute it.


def sm3_ii(g, accumulators, families, weights, parts=None):
    """SM3-II: nu = min A + g^2, then A = max nu. g may be computed from ``parts``.

    The floors are of the old A.
    """

    def nu(g, *floors):
        return _accumulate(_least(floors), g * g, weights)

    floors = families.floors(accumulators)
    return nu, floors, families.maxima(nu, g, floors, parts)


def sm3_i(g, accumulators, families, weights):
    """SM3-I: A = A + max g^2, then nu = min A. The floors are of the new A."""

    def nu(g, *floors):
        return _least(floors)

    tops = families.maxima(jnp.square, g)
    raised = tuple(_accumulate(a, top, weights) for a, top in zip(accumulators, tops))
    return nu, families.floors(raised), raised


def _adagrad(g, total):
    """nu from the total, or infinity if that does not contain g^2."""
    return _if_in(g, total, total, jnp.inf)


def _if_in(g, total, yes, no):
    """``yes`` where g^2 is in the total, and ``no`` where it was too large for it.

    Each condition reads one array. XLA's CPU backend would store a mask made from both,
    a byte for every entry. A ``no`` of NaN or infinity stays a number, because JAX's
    debug flags refuse an array of these in an eager step.
    """
    info, square = jnp.finfo(total.dtype), g * g
    unseen = float(info.max) * float(info.eps) / 4  # what does not change the largest
    yes = layout.as_placed(yes)
    seen = jnp.where(layout.like(jnp.isfinite(square), yes), yes, no)
    unknown = jnp.where(layout.like(square < unseen, yes), yes, no)
    return layout.where(total < info.max, seen, unknown)


def _least(floors):
    return functools.reduce(tiles.smaller, floors)


def _accumulate(old, new, weights):
    """The sum of old and new, or with two weights their average."""
    return old + new if weights is None else weights[0] * old + weights[1] * new


def _direction(nu, eps, g, *floors):
    """g / sqrt(nu + eps), with 0 / 0 = 0 and finite derivatives.

    NaN where nu overflows. The quotient would be 0, and the overflow would go
    unnoticed. A sum that overflows only with eps is the largest number instead.
    """
    square = nu(g, *floors)
    most = float(jnp.finfo(g.dtype).max)
    zero, total = square == 0, square + eps
    total = jnp.where(total > most, most, total)
    q = g / jnp.sqrt(jnp.where(zero, 1, total))
    # The second derivative of 1 / sqrt(eps) would overflow, and 0 times that is NaN.
    least = jnp.where(eps < jnp.finfo(square.dtype).tiny, 1, eps)
    q = jnp.where(zero, q / jnp.sqrt(least), q)
    return jnp.where(jnp.isfinite(square), q, jnp.nan)


def _is_finite(g):
    """Which squares are finite."""
    return jnp.isfinite(g * g)


def _are_finite(raised, precondition):
    """Whether all new accumulators are finite.

    In SM3-I each family is a sum of its own, so all are tested. In SM3-II they are
    maxima of one nu, so testing the smallest array is enough.
    """
    if precondition is sm3_ii:
        raised = [min(raised, key=jnp.size)]
    finite = [jnp.all(jnp.isfinite(new)) for new in raised]
    return functools.reduce(jnp.logical_and, finite)


def _select(condition, yes, no):
    """``yes`` or ``no``, trees of one structure."""
    return jax.tree.map(lambda y, n: layout.where(condition, y, n), yes, no)


def _weights(decay, dtype):
    """The weights of a moving average with this decay, or None for a sum."""
    return None if decay is None else dtypes.weights(decay, dtype)


def zero_accumulators(params, cover, dtype=None):
    """The accumulators of every leaf, a tuple in the order of ``jax.tree.leaves``."""

    def of(path, box, leaf):
        boxes = _families.resolve(cover, path, leaf)
        own = accumulator_dtype(leaf, dtype)
        accumulators = tuple(_families.zeros(leaf, size, own) for size in boxes)
        return flax_metadata.fit(box, accumulators)

    leaves = flax_metadata.leaves_with_path(params)
    # optax.tree.map_params finds the parameters by passing init a tree without leaves.
    # Even then, every other field of the state must have a leaf.
    return tuple(of(*leaf) for leaf in leaves) or jnp.zeros(())


def accumulator_dtype(leaf, dtype):
    """The ``dtype`` of the user, or if it is None, float32 or better."""
    wide = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    return jax.dtypes.canonicalize_dtype(wide if dtype is None else dtype)


def check_leaves(leaves, accumulators):
    """Refuse updates with more or fewer leaves than the accumulators were made for."""
    # It is one scalar for a tree without leaves.
    made_for = len(accumulators) if isinstance(accumulators, (tuple, list)) else 0
    if len(leaves) != made_for:
        raise ValueError(
            f"updates have {len(leaves)} leaves, but the state was made for {made_for}:"
            " a gradient may be None only where init saw None."
        )
