"""How arrays are kept in few bytes: as they are, rounded, or in int8 with scales.

A state keeps what it stores of a tree in two fields: the values, a tree like the
parameters, and the scales, a tuple with one array per leaf (None without int8). They
are apart because a scale has neither the shape nor the sharding of its parameter, and
must not be taken for one. In between, every leaf is a :class:`Stored`. Where there is a
slot axis it comes first: a stack holds several values of one parameter.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memoptax import _flax_metadata
from memoptax._tensors import tiles

DTYPES = ("float64", "float32", "bfloat16", "float16", "int8")

# A step of int8, where the largest magnitude of the row is 1.
_STEP = (1 - 2**-16) / 127


class Stored(NamedTuple):
    """One leaf in storage: an array, or a stack of them."""

    values: jax.Array  # shape of the leaf; one of DTYPES
    scale: Any  # int8: float32, the same with a last axis of 1; else None


def zeros(leaf, copies: int | None = None, dtype=None):
    """The values of an empty stack ``(copies, *leaf.shape)``; None is a lone array.

    Made from the leaf's own zeros, to follow its sharding: ``jnp.zeros`` would
    replicate the stack on every device of a mesh.
    """
    dtype = jnp.dtype(leaf.dtype if dtype is None else dtype)
    return _repeat(jnp.zeros_like(leaf, dtype=dtype), copies)


def zero_scales(params, copies: int | None = None, dtype=None):
    """The scales of :func:`zeros` of every leaf, sharded like all axes but the last."""
    if dtype is None or jnp.dtype(dtype) != jnp.int8:
        return None

    def scale(leaf):
        # A reduction leaves the other axes sharded. It is not computed: nothing but
        # its shape is used.
        rows = _row(jnp.any, jnp.zeros_like(leaf, dtype=bool))
        return _repeat(jnp.zeros_like(rows, dtype=jnp.float32), copies)

    # optax.tree.map_params finds the parameters in a state by a tree without leaves,
    # and needs a leaf wherever else there is something.
    leaves = _flax_metadata.leaves_with_path(params)
    scales = tuple(_flax_metadata.fit(box, scale(leaf)) for _, box, leaf in leaves)
    return scales or jnp.zeros(())


def zero_sum(leaf):
    """Zeros like the leaf, in the dtype that its values are added up in."""
    return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))


def copies(stack: Stored) -> int:
    """How many slots a stack has."""
    return stack.values.shape[0]


def unpack(treedef, values, scales) -> list[Stored]:
    """The leaves of two fields of a state."""
    values = treedef.flatten_up_to(values)
    if scales is None or not values:
        scales = [None] * len(values)
    return [Stored(*pair) for pair in zip(values, scales)]


def pack(treedef, stored: list[Stored], scales):
    """The two fields again; ``scales`` are those before, and say if there are any."""
    if stored and scales is not None:
        scales = tuple(leaf.scale for leaf in stored)
    return treedef.unflatten([leaf.values for leaf in stored]), scales


def encode(x, like: Stored, wanted: Any = True, other: Stored | None = None) -> Stored:
    """``x`` as ``like`` stores it, rounded to nearest; where not ``wanted``, ``other``.

    In int8 the largest magnitude of a row (of the last axis) becomes ±127, and no
    derivative flows. Without ``other``, what is not wanted is zero.
    """
    return _chosen(_rounded(x, like), like, wanted, other)


def encode_computed(f, entries, operands, like: Stored, wanted: Any = True) -> Stored:
    """``f(*entries(*operands))`` as ``like`` stores it, or ``like``; without storing
    the numbers on the way.

    The arguments are those of :func:`memoptax._tensors.tiles.maxima`.
    """
    if like.scale is None or operands[0].size == 0:
        return encode(f(*entries(*operands)), like, wanted, like)

    def magnitude(*numbers):
        return jnp.abs(f(*numbers))

    shape = operands[0].shape
    row = (1,) * (len(shape) - 1) + shape[-1:]
    most = tiles.maxima(magnitude, entries, operands, row)
    return _chosen(_quantized(f(*entries(*operands)), most), like, wanted, like)


def _chosen(rounded: Stored, like: Stored, wanted, other) -> Stored:
    """The rounded numbers or the others, and only then in the dtypes of ``like``.

    On a TPU a choice between int8 values would be a pass of its own: sgd_c with one
    slot then moves 23 bytes per parameter, and 18 like this.
    """

    def leaf(new, like, other=0):
        if wanted is not True:
            new = jnp.where(wanted, new, jnp.asarray(other, new.dtype))
        return new.astype(like.dtype)

    return jax.tree.map(leaf, rounded, like, *([] if other is None else [other]))


def _rounded(x, like: Stored) -> Stored:
    """``x`` rounded to what ``like`` can store, still in a dtype of arithmetic."""
    if like.scale is not None:
        return _quantized(x, _row(jnp.max, jnp.abs(x), initial=0))
    dtype = like.values.dtype
    if dtype != x.dtype and dtype in (jnp.bfloat16, jnp.float16):
        x = _rounded_to(jnp.finfo(dtype), x)
    return Stored(x, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded_to(info, x):
    """``x`` as a dtype of 16 bits has it.

    A GPU leaves out a conversion there and back. The running sum would then add what no
    slot holds.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rounded = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
    # Without the subnormal numbers, which float16 needs for what is below 6e-5.
    step = float(info.smallest_subnormal)
    if step < jnp.finfo(jnp.float32).tiny:
        return rounded
    small = jnp.abs(wide) < float(info.tiny)
    return jnp.where(small, jnp.round(wide / step) * step, rounded)


@_rounded_to.defjvp
def _rounded_to_jvp(info, primals, tangents):
    """That of the number itself: a rounding has none."""
    rounded = _rounded_to(info, *primals)
    return rounded, tangents[0].astype(rounded.dtype)


def _quantized(x, largest) -> Stored:
    x, largest = jax.lax.stop_gradient((x, largest))
    wide = largest.astype(jnp.promote_types(largest.dtype, jnp.float32))
    # With 17 bits, so that its products with 7 bits are exact: however XLA fuses them,
    # a slot adds to the sum what it will take away. A little less than a 127th, so
    # that no row overflows.
    scale = jax.lax.reduce_precision((wide * _STEP).astype(jnp.float32), 8, 16)
    # XLA's CPU backend takes subnormal numbers for 0, which has no inverse.
    inverse = 1 / jnp.where(scale > jnp.finfo(scale.dtype).tiny, scale, 1)
    return Stored(jnp.round(x * inverse), scale)


def as_in(stored: Stored, like: Stored, dtype) -> Stored:
    """The stored value, which is of ``dtype``, as ``like`` stores it."""
    if stored.values.dtype == like.values.dtype:
        return stored
    return encode(decode(stored, dtype), like)


def saturate(x, like: Stored):
    """``x``, or the largest number of its sign that ``like`` can store."""
    dtype = _precision(like)
    if jnp.promote_types(x.dtype, dtype) == dtype:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest)


def fits(norms, leaves, stacks: list[Stored]):
    """Which leaves (L,) of these L2 norms (L,) are within the range of their slots.

    int8 has the range of its scales.
    """
    limits = [_limit(x.dtype, _precision(s)) for x, s in zip(leaves, stacks)]
    return norms <= jnp.asarray(limits or [math.inf], norms.dtype)


def is_narrower(leaf, stack: Stored) -> bool:
    """Whether a number of the leaf may be out of the range of its slots."""
    return math.isfinite(_limit(leaf.dtype, _precision(stack)))


def _limit(dtype, stored) -> float:
    narrower = jnp.finfo(stored).maxexp < jnp.finfo(dtype).maxexp
    return float(jnp.finfo(stored).max) if narrower else math.inf


def norm_bounds(norms, leaves, stored: list[Stored], across=None):
    """The most that L2 norms (L,) may be in storage."""
    roundings = list(map(_rounding, leaves, stored))
    squares = [rounding[1] for rounding in roundings]
    squares = squares if across is None else across(squares)
    factors = jnp.asarray([rounding[0] for rounding in roundings] or [1], norms.dtype)
    return norms * factors + jnp.sqrt(jnp.asarray(squares or [0], norms.dtype))


def _rounding(x, stored):
    """What storage makes of the norm of ``x``: at most factor * norm + √square."""
    if stored.scale is not None:
        return 1, jnp.sum(jnp.square(stored.scale)) * math.prod(x.shape[-1:]) / 4
    info = jnp.finfo(stored.values.dtype)
    if info.bits >= jnp.finfo(x.dtype).bits:
        return 1, 0
    # The sum of no elements: a 0 that shard_map knows to be of this shard alone.
    lost = jnp.sum(jnp.atleast_1d(x)[:0], dtype=jnp.float32)
    lost += float(info.smallest_subnormal) ** 2 / 4 * x.size
    return 1 + float(info.eps) / 2, lost


def _precision(stored):
    """The floating-point dtype whose range a stored value has."""
    if stored.scale is not None:
        return stored.scale.dtype
    return stored.values.dtype


def decode(stored: Stored, dtype):
    """The number that a stored value stands for, in ``dtype``."""
    values = stored.values.astype(dtype)
    return values if stored.scale is None else values * stored.scale.astype(dtype)


def choose(wanted, stored: Stored, other: Stored | None = None) -> Stored:
    """The stored value, or the other one; without one, that of zero."""
    wide = jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), stored
    )
    return _chosen(wide, stored, wanted, other)


def read(stack: Stored, slot) -> Stored:
    """The stored value in ``slot``, on the device whatever memory the stack is in."""

    def taken(x):
        value = jax.lax.dynamic_index_in_dim(
            x, slot, 0, keepdims=False, allow_negative_indices=False
        )
        return _moved(value, jax.memory.Space.Device)

    return jax.tree.map(taken, stack)


def write(stack: Stored, stored: Stored, slot) -> Stored:
    """The stack with ``stored`` in ``slot``, in the memory that the stack is in."""

    def written(x, new):
        new = _moved(new, jax.typeof(x).memory_space)
        return jax.lax.dynamic_update_index_in_dim(
            x, new, slot, 0, allow_negative_indices=False
        )

    return jax.tree.map(written, stack, stored)


def select(stack: Stored, slots, copies: int | None) -> Stored:
    """A stack of ``copies`` that begins with ``slots`` of this one, and is else 0; for
    None the first of them without a slot axis.
    """

    def taken(x):
        chosen = jnp.take(_moved(x, jax.memory.Space.Device), slots, axis=0)
        if copies is None:
            return _moved(chosen[0], jax.typeof(x).memory_space)
        more = [(0, copies - chosen.shape[0])] + [(0, 0)] * (chosen.ndim - 1)
        return _moved(jnp.pad(chosen, more), jax.typeof(x).memory_space)

    return jax.tree.map(taken, stack)


def emptied(array):
    """Zeros like a stack, or any array of a state, in the same memory."""
    zeros = jnp.zeros_like(_moved(array, jax.memory.Space.Device))
    return _moved(zeros, jax.typeof(array).memory_space)


def _moved(x, space):
    """A stack may stand in the host's memory, from where one slot is fetched."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def _repeat(one, copies):
    return one if copies is None else jnp.broadcast_to(one[None], (copies, *one.shape))


def _row(reduction, x, **options):
    """``reduction`` over the last axis, which stays; at rank 0 over none."""
    last = tuple(range(x.ndim))[-1:]
    return reduction(x, axis=last, keepdims=True, **options)
