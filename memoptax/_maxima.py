"""The maxima of a computed tensor over boxes, without storing the tensor.

The preconditioner of SM3 has three consumers: two families of maxima and the update.
XLA does not fuse a producer with several consumers into a reduction: on CPU it would
store the preconditioner, and a temporary of the size of a parameter costs as much as a
whole Adam step. Two things make the reductions read the gradient and nothing else. An
always-true conditional around each of them keeps the compiler from merging the copies
of the preconditioner. And since XLA's CPU reductions of a computed operand are slow
(they run operation by operation, and collapse on wide matrices), an elementwise maximum
over eight interleaved slices comes first, in one vector loop.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Box = tuple[int, ...]

_LANES = 8
_SMALL = 2**15  # entries; below this a temporary lives in the cache
_LONG = 2**13  # entries of a row


def counts(shape: Box, box: Box) -> Box:
    """How many boxes lie along each axis: the shape of a family's accumulator."""
    return tuple(-(-n // max(b, 1)) for n, b in zip(shape, box))


def box_max(x: jax.Array, box: Box) -> jax.Array:
    """The maximum of the non-negative `x` over every box."""
    spanned = tuple(i for i, (b, n) in enumerate(zip(box, x.shape)) if b >= n > 1)
    if spanned:
        x = jnp.max(x, axis=spanned, keepdims=True)
    for axis, (b, n) in enumerate(zip(box, x.shape)):
        if 1 < b < n:
            pad = [(0, 0)] * axis + [(0, -n % b)] + [(0, 0)] * (x.ndim - axis - 1)
            split = x.shape[:axis] + (-(-n // b), b) + x.shape[axis + 1 :]
            x = jnp.pad(x, pad).reshape(split).max(axis + 1)
    return x


def maxima(
    f: Callable[..., jax.Array],
    entries: Callable[..., Sequence[jax.Array]],
    operands: Sequence[jax.Array],
    box: Box,
    step: jax.Array,
) -> jax.Array:
    """The maximum over every box of `f(*entries(*operands)) >= 0`, not storing it.

    Where an operand is not finite, the result is not finite.

    Args:
      f: an elementwise function of arrays that broadcast against each other.
      entries: makes the arguments of f from the operands. The first of them has the
        full shape, the others may have axes of size one.
      operands: arrays; the first has the full shape.
      box: the box shape.
      step: an integer scalar >= 0 that the compiler cannot know.
    """
    shape = operands[0].shape

    def stored(step, *operands):
        return box_max(_no_nan(f(*entries(*operands))), box)

    def folded(step, *operands):
        def taken(*operands):
            return box_max(_fold(f, entries(*operands), shape, spanned), box)

        def refused(*operands):
            # Made of an operand: inside shard_map it varies over the same axes.
            corner = jax.lax.slice(operands[0], (0,) * len(shape), (1,) * len(shape))
            return jnp.zeros_like(jnp.broadcast_to(corner, counts(shape, box)))

        return jax.lax.cond(step >= 0, taken, refused, *operands)

    spanned = [i for i, (b, n) in enumerate(zip(box, shape)) if b >= n > 1]
    if not spanned or math.prod(shape) < _SMALL or _is_sharded(operands[0]):
        return stored(step, *operands)
    return jax.lax.platform_dependent(step, *operands, cpu=folded, default=stored)


def _fold(f, arguments, shape, spanned):
    axis = max(spanned, key=lambda i: shape[i])
    window = [i for i in spanned if i != axis]
    if _LANES <= math.prod(shape[i] for i in window) <= 4 * _LANES:
        # The window of a convolution: twice as quick as to split its channels.
        lanes = zip(*(_places(x, window, shape) for x in arguments))
    else:
        lanes = zip(*(_lanes(x, axis) for x in arguments))
    x = functools.reduce(_larger, (_no_nan(f(*lane)) for lane in lanes))
    # What is left is an eighth, and XLA reduces it well unless its rows are long.
    while x.shape[axis] > 1 and math.prod(x.shape[axis + 1 :]) > _LONG:
        x = functools.reduce(_larger, _lanes(x, axis))
    return x


def _places(x, axes, shape):
    """The slices at all places of some axes."""
    slices = [x]
    for axis in axes:
        slices = [
            part if part.shape[axis] == 1 else jax.lax.index_in_dim(part, k, axis)
            for part in slices
            for k in range(shape[axis])
        ]
    return slices


def _lanes(x, axis):
    """Eight slices along an axis. They may overlap: a maximum does not mind."""
    n = x.shape[axis]
    if n == 1:
        return [x] * _LANES
    if n % _LANES == 0:  # interleaved, so that a sharded axis stays where it is
        x = x.reshape(x.shape[:axis] + (n // _LANES, _LANES) + x.shape[axis + 1 :])
        return [jax.lax.index_in_dim(x, k, axis + 1, False) for k in range(_LANES)]
    width = -(-n // _LANES)
    starts = (min(k * width, n - width) for k in range(_LANES))
    return [jax.lax.slice_in_dim(x, s, s + width, axis=axis) for s in starts]


def _larger(x, y):
    # One comparison and one select; jnp.maximum, which also orders NaN and the two
    # zeros, takes three times as long on CPU.
    return jax.lax.select(x > y, x, y)


def smaller(x: jax.Array, y: jax.Array) -> jax.Array:
    """The smaller of two finite numbers, broadcast; quicker than jnp.minimum on CPU."""
    return jnp.where(x < y, x, y)


def _no_nan(x):
    # A NaN counts as infinite. XLA's own maximum on CPU may lose it, too.
    return jnp.where(x <= jnp.finfo(x.dtype).max, x, jnp.inf)


def _is_sharded(x):
    """Whether the type says so: under explicit sharding an axis is not split freely."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)
