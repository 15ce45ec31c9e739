"""How arrays are kept in few bytes: as they are, rounded, or in int8 with scales.

A state stores a tree in two fields: the values, a tree like the parameters, and the
scales, a tuple with one array per leaf (None without int8). The scales are separate
because they have neither the shape nor the sharding of the parameters, and code must
not take them for parameters. Outside of the state, every leaf is a :class:`Stored`. A
stack holds several values of one parameter, with the axis of slots first.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from memoptax import _check
from memoptax._tensors import dtypes, flax_metadata, layout, tiles

DTYPES = ("float64", "float32", "bfloat16", "float16", "int8")

# A step of int8, where the largest magnitude of the row is 1.
_STEP = (1 - 2**-16) / 127


class Stored(NamedTuple):
    """One leaf in storage: an array, or a stack of them."""

    values: jax.Array  # shape of the leaf; one of DTYPES
    scale: Any  # int8: float32, the same with a last axis of 1; else None


def zeros(leaf, copies: int | None = None, dtype=None):
    """The values of an empty stack ``(copies, *leaf.shape)``, or of one array for None.

    It is made from zeros like the leaf, to follow its sharding. ``jnp.zeros`` would
    replicate the stack on every device of a mesh.
    """
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if dtype is None else dtype)
    return _repeat(jnp.zeros_like(leaf, dtype=dtype), copies)


def zero_scales(params, copies: int | None = None, dtype=None):
    """The scales for :func:`zeros` of each leaf, sharded like its axes but the last."""
    if dtype is None or jnp.dtype(dtype) != jnp.int8:
        return None

    def scale(leaf):
        # A reduction leaves the other axes sharded. Only its shape is used, so it is
        # not computed.
        rows = _row(jnp.any, jnp.zeros_like(leaf, dtype=bool))
        return _repeat(jnp.zeros_like(rows, dtype=jnp.float32), copies)

    # optax.tree.map_params finds the parameters by passing init a tree without leaves.
    # Even then, every other field of the state must have a leaf.
    leaves = flax_metadata.leaves_with_path(params)
    scales = tuple(flax_metadata.fit(box, scale(leaf)) for _, box, leaf in leaves)
    return scales or jnp.zeros(())


def zero_sum(leaf):
    """Zeros like the leaf, in the dtype of a sum of its values."""
    return jnp.zeros_like(leaf, dtype=dtypes.widest(leaf.dtype, jnp.float32))


def unpack(treedef, values, scales) -> list[Stored]:
    """The leaves of two fields of a state. Scales get the sharding of their rows."""
    values = treedef.flatten_up_to(values)
    if scales is None or not values:
        return [Stored(x, None) for x in values]
    return [Stored(x, layout.like(scale, x)) for x, scale in zip(values, scales)]


def check_scales(name: str, values, scales) -> None:
    """Refuse scales of a state, its field ``name``, that do not fit its values.

    Numbers in int8 have one array of scales per leaf, and others have None.
    """
    leaves = jax.tree.leaves(values)
    needed = any(leaf.dtype == jnp.int8 for leaf in leaves)
    found = [jnp.shape(scale) for scale in jax.tree.leaves(scales)]
    wanted = [(*x.shape[:-1], *(1,) * min(x.ndim, 1)) for x in leaves if needed]
    if leaves and (found != wanted or needed == (scales is None)):
        raise ValueError(
            f"state has {name} of shapes {found}, but its values are in "
            f"{leaves[0].dtype.name} and need {wanted if needed else None}: it was "
            "restored without its scales, or belongs to another optimizer."
        )
    _check.wide(name, scales)


def pack(treedef, stored: list[Stored], scales):
    """The two fields of a state. The old ``scales`` say whether there are any.

    The new scales keep their sharding.
    """

    def kept(scale, old):
        # resize_buffer adds or drops the axis of slots.
        return layout.like(scale, old) if scale.ndim == old.ndim else scale

    if stored and scales is not None:
        scales = tuple(kept(leaf.scale, old) for leaf, old in zip(stored, scales))
    return treedef.unflatten([leaf.values for leaf in stored]), scales


def encode(x, like: Stored, wanted: Any = True, other: Stored | None = None) -> Stored:
    """``x`` as ``like`` stores it, rounded to nearest, or ``other`` if not ``wanted``.

    In int8 the largest magnitude of a row (of the last axis) becomes ±127, and no
    derivative flows. Without ``other`` the result is then zero.
    """
    return _chosen(_rounded(x, like), like, wanted, other)


def encode_computed(f, entries, operands, like: Stored, wanted: Any = True) -> Stored:
    """Encode ``f(*entries(*operands))`` without materialising it first.

    The result is stored as ``like``, and is ``like`` if not ``wanted``. The arguments
    are those of :func:`memoptax._tensors.tiles.maxima`.
    """
    shape = operands[0].shape
    unknown = not all(isinstance(size, int) for size in shape)  # symbols of jax.export
    if like.scale is None or unknown or operands[0].size == 0:
        return encode(f(*entries(*operands)), like, wanted, like)

    def magnitude(*numbers):
        return jnp.abs(f(*numbers))

    row = (1,) * (len(shape) - 1) + shape[-1:]
    most = tiles.maxima(magnitude, entries, operands, row)
    return _chosen(_quantized(f(*entries(*operands)), most), like, wanted, like)


def _chosen(rounded: Stored, like: Stored, wanted, other) -> Stored:
    """The rounded numbers or the others, cast to the dtypes of ``like`` at the end.

    On a TPU a choice between int8 values would be a pass of its own. sgd_c with one
    slot would then move 23 bytes per parameter instead of 18.
    """

    def leaf(new, like, other=None):
        if wanted is not True:
            new = new.astype(dtypes.widest(new.dtype, like.dtype))
            if other is None:
                new = layout.where(wanted, new, 0)
            else:
                new = layout.where(wanted, new, other.astype(new.dtype))
        return new.astype(like.dtype)

    return jax.tree.map(leaf, rounded, like, *([] if other is None else [other]))


def _rounded(x, like: Stored) -> Stored:
    """``x`` rounded to a number that ``like`` can store, still in a wide dtype."""
    if like.scale is not None:
        return _quantized(x, _row(jnp.max, jnp.abs(x), initial=0))
    dtype = like.values.dtype
    if dtype != x.dtype and dtype in (jnp.bfloat16, jnp.float16):
        x = _rounded_to(jnp.finfo(dtype), x)
    return Stored(x, None)


def in_own_precision(x, summed: bool):
    """``x``, whose numbers have no more bits than its dtype, where that matters.

    XLA may skip a conversion to 16 bits that ends the computation of ``x``. One use of
    a number may then see all its bits, and another the rounded number. What is
    ``summed`` must be what the slot stores. A norm must see the infinity of float16
    that a slot would store. For other uses of bfloat16, the rounding would cost a CPU
    another copy of it.
    """
    if x.dtype == jnp.float16 or (summed and x.dtype == jnp.bfloat16):
        return _rounded_to(jnp.finfo(x.dtype), x).astype(x.dtype)
    return x


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded_to(info, x):
    """``x`` rounded to a dtype of 16 bits.

    A GPU skips a conversion to a narrow dtype and back. The running sum would then add
    a number that differs from the one in the slot.
    """
    wide = dtypes.wide(x)
    rounded = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
    # reduce_precision has no subnormal numbers, which float16 needs below 6e-5.
    step = float(info.smallest_subnormal)
    if step < jnp.finfo(jnp.float32).tiny:
        return rounded
    small = jnp.abs(wide) < float(info.tiny)
    return jnp.where(small, jnp.round(wide / step) * step, rounded)


@_rounded_to.defjvp
def _rounded_to_jvp(info, primals, tangents):
    """The derivative of the number itself, as if it were not rounded."""
    rounded = _rounded_to(info, *primals)
    return rounded, tangents[0].astype(rounded.dtype)


def _quantized(x, largest) -> Stored:
    x, largest = jax.lax.stop_gradient((x, largest))
    dtype = dtypes.widest(x.dtype, jnp.float32)
    # The scale has 17 bits, so its products with 7 bits are exact. A slot then adds to
    # the sum exactly what it will subtract, however XLA fuses the products. It is a
    # little less than a 127th, so that no row overflows.
    scale = jax.lax.reduce_precision(
        (largest.astype(dtype) * _STEP).astype(jnp.float32), 8, 16
    )
    # XLA's CPU backend flushes subnormal numbers to 0, which has no inverse.
    inverse = 1 / jnp.where(scale > jnp.finfo(scale.dtype).tiny, scale, 1)
    return Stored(jnp.round(x.astype(dtype) * inverse.astype(dtype)), scale)


def as_in(stored: Stored, like: Stored, dtype) -> Stored:
    """The stored value, a number of ``dtype``, as ``like`` stores it."""
    if stored.values.dtype == like.values.dtype:
        return stored
    return encode(saturate(decode(stored, dtype), like), like)


def saturate(x, like: Stored):
    """``x``, or the largest number of its sign that ``like`` can store."""
    dtype = _precision(like)
    if dtypes.holds(dtype, x.dtype):
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest)


def fits(norms, leaves, stacks: list[Stored]) -> Any:
    """Which leaves (L,), with these L2 norms (L,), are in the range of their slots.

    The result is True if the slots have the range of their leaves, so that every norm
    fits. The range of int8 is that of its scales.
    """
    limits = [_limit(x.dtype, _precision(s)) for x, s in zip(leaves, stacks)]
    if not any(limits):
        return True
    # An infinite limit would raise under jax.debug_infs.
    unlimited = jnp.asarray([limit is None for limit in limits])
    limits = jnp.asarray([limit or 0 for limit in limits], norms.dtype)
    return unlimited | (norms <= limits)


def is_narrower(leaf, stack: Stored) -> bool:
    """Whether the dtype of the leaf has a larger exponent range than its slots."""
    return jnp.finfo(_precision(stack)).maxexp < jnp.finfo(leaf.dtype).maxexp


def _limit(dtype, stored) -> float | None:
    """The largest number in ``stored``, or None if all of ``dtype`` are in it.

    bfloat16 has the exponents of float32, but the largest numbers of float32 round to
    infinity in it.
    """
    largest = float(jnp.finfo(stored).max)
    return largest if largest < float(jnp.finfo(dtype).max) else None


def norm_bounds(norms, leaves, stored: list[Stored], across=None):
    """Upper bounds (L,) of the L2 norms (L,) after storage.

    They are clipped, because rounding may lift a norm above the largest float32, and a
    state has finite numbers only.
    """
    roundings = list(map(_rounding, leaves, stored, norms))
    squares = [rounding[1] for rounding in roundings]
    squares = squares if across is None else across(squares)
    factors = jnp.asarray([rounding[0] for rounding in roundings] or [1], norms.dtype)
    units = jnp.asarray([rounding[2] for rounding in roundings] or [1], norms.dtype)
    lost = units * jnp.sqrt(jnp.asarray(squares or [0], norms.dtype))
    return jnp.minimum(norms * factors + lost, jnp.finfo(norms.dtype).max)


def _rounding(x, stored, norm):
    """A factor, a square and a unit, which bound a stored norm.

    It is at most factor * norm + unit * √square.
    """
    if stored.scale is not None:
        # The square of a scale may overflow, but not that of its share of the norm.
        # XLA divides by multiplying, so the inverse of the unit must be finite too. If
        # a norm is known to be 0, XLA multiplies 0 by 1 / unit², which is infinite.
        unit = jnp.where(norm > 0, jnp.clip(norm, 2.0**-100, 2.0**120), 1)
        squares = jnp.square(stored.scale.astype(norm.dtype) / unit)
        return 1, jnp.sum(squares) * (math.prod(x.shape[-1:]) / 4), unit
    info = jnp.finfo(stored.values.dtype)
    if dtypes.holds(stored.values.dtype, x.dtype):
        return 1, 0, 1
    # The sum of no elements is a 0 that shard_map tracks as belonging to this shard.
    lost = jnp.sum(jnp.atleast_1d(x)[:0], dtype=jnp.float32)
    lost += float(info.smallest_subnormal) ** 2 / 4 * x.size
    return 1 + float(info.eps) / 2, lost, 1


def _precision(stored):
    """The floating-point dtype whose range a stored value has."""
    if stored.scale is not None:
        return stored.scale.dtype
    return stored.values.dtype


def decode(stored: Stored, dtype):
    """The numbers of a stored value, in ``dtype``."""
    values = stored.values.astype(dtype)
    return values if stored.scale is None else values * stored.scale.astype(dtype)


def choose(wanted, stored: Stored, other: Stored | None = None) -> Stored:
    """The stored value if ``wanted``, and if not, ``other`` or zero."""
    wide = jax.tree.map(dtypes.wide, stored)
    return _chosen(wide, stored, wanted, other)


def read(stack: Stored, slot) -> Stored:
    """The stored value in ``slot``, in device memory."""
    return jax.tree.map(lambda x: on_device(at(x, slot)), stack)


def decoded(stack: Stored, slot, dtype):
    """The numbers in ``slot``, in this dtype and in device memory."""
    return decode(read(stack, slot), dtype)


def at(x, index, axis=0):
    """``x`` at one index of an axis, which XLA clips to the axis."""
    return jax.lax.dynamic_index_in_dim(
        x, index, axis, keepdims=False, allow_negative_indices=False
    )


def to_write(value, stack: Stored, stored, wanted: Any = True):
    """The value as the stack stores it, in its range, or zeros if not ``wanted``.

    ``stored`` is the same value if it has been encoded already, or None.
    """
    if stored is None:
        return encode(saturate(value, stack), stack, wanted)
    return choose(wanted, stored)


def write(stack: Stored, stored: Stored, slot) -> Stored:
    """The stack with ``stored`` in ``slot``, in the memory of the stack.

    In JAX's explicit mode a stack that is on no mesh is put on that of ``stored``, and
    the other way round.
    """

    def written(x, new):
        x = layout.on_mesh_of(x, new)
        new = layout.like(new, x, leading=1)
        new = _moved(new, jax.typeof(x).memory_space)
        return jax.lax.dynamic_update_index_in_dim(
            x, new, slot, 0, allow_negative_indices=False
        )

    return jax.tree.map(written, stack, stored)


def select(stack: Stored, slots, filled, copies: int | None) -> Stored:
    """A stack of ``copies`` that starts with these ``slots`` and goes on with zeros.

    Slots that are not ``filled`` become zeros. For ``copies=None`` the result is the
    first of the slots, without an axis of slots, in the memory of the device.
    """

    def taken(x):
        chosen = jnp.take(on_device(x), slots, axis=0)
        full = jnp.reshape(filled, (-1,) + (1,) * (chosen.ndim - 1))
        chosen = jnp.where(full, chosen, jnp.zeros((), chosen.dtype))
        if copies is None:
            return chosen[0]
        more = [(0, copies - chosen.shape[0])] + [(0, 0)] * (chosen.ndim - 1)
        return in_memory_of(x, jnp.pad(chosen, more))

    return jax.tree.map(taken, stack)


def emptied(array):
    """Zeros like a stack, or any array of a state, in the same memory."""
    # A vmap outside of jax.set_mesh hides the devices that zeros_like would need.
    zeros = jnp.where(False, on_device(array), 0)
    return in_memory_of(array, zeros)


def on_device(x):
    """``x`` in the memory of the device."""
    return _moved(x, jax.memory.Space.Device)


def in_memory_of(like, x):
    """``x`` in the memory where ``like`` is."""
    return _moved(x, _space(like))


def as_typed(x):
    """``x``, whose type says in which memory it is. JAX can then take parts of it."""
    space = _space(x)
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def _moved(x, space):
    """``x`` in this memory space. A stack may be in the memory of the host."""
    return x if _space(x) == space else jax.device_put(x, space)


def _space(x):
    """The memory in which ``x`` is.

    The type of an array that ``jax.jit`` has put into the memory of the host, beside a
    single device, does not say so. Its sharding does.
    """
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        if x.sharding.memory_kind == "pinned_host":
            return jax.memory.Space.Host
    return jax.typeof(x).memory_space


def _repeat(one, copies):
    return one if copies is None else jnp.broadcast_to(one[None], (copies, *one.shape))


def _row(reduction, x, **options):
    """``reduction`` over the last axis, which keeps the size 1. Rank 0 has none."""
    last = tuple(range(x.ndim))[-1:]
    return reduction(x, axis=last, keepdims=True, **options)
