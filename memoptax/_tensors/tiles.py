"""The maxima of a computed tensor over boxes, without storing the tensor.

The preconditioner of SM3 has three consumers: two families of maxima and the update.
XLA does not fuse a producer with several consumers into a reduction: on CPU it would
store the preconditioner, and a temporary of the size of a parameter costs as much as a
whole Adam step. So there every maximum computes what it compares from slices of the
gradient of its own, which nothing else has in common with it, and reads each entry
once, at the speed of memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Box = tuple[int, ...]

_SMALL = 2**15  # entries; below this a temporary lives in the cache
_LONG = 2**13  # entries of a row

# Slices, their width, whether they lie apart, and how often they repeat at most. Along
# a row four slices of eight neighbours are compared. Across rows it is two that lie
# apart, eight times: sixteen rows are as many as XLA unrolls, and what it does not
# unroll walks down the columns one by one.
_ROWS = (4, 8, False, 32)
_COLUMNS = (2, 1, True, 8)


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
) -> jax.Array:
    """The maximum over every box of `f(*entries(*operands)) >= 0`, not storing it.

    Where an operand is not finite, the result is not finite.

    Args:
      f: an elementwise function of arrays that broadcast against each other.
      entries: makes the arguments of f from the operands. The first of them has the
        full shape, the others may have axes of size one.
      operands: arrays; the first has the full shape.
      box: the box shape.
    """
    shape = operands[0].shape

    def stored(*operands):
        return box_max(_no_nan(f(*entries(*operands))), box)

    def folded(*operands):
        return box_max(_fold(f, entries(*operands), shape, spanned), box)

    spanned = [i for i, (b, n) in enumerate(zip(box, shape)) if b >= n > 1]
    if not spanned or math.prod(shape) < _SMALL or any(map(_is_sharded, operands)):
        return stored(*operands)
    # A GPU computes what it compares along rows as it reads, and would store it for the
    # maxima across rows: sm3 would move 20 bytes per parameter of a matrix, not 16.5.
    gpu = stored if len(shape) - 1 in spanned else folded
    return jax.lax.platform_dependent(
        *operands, cpu=folded, cuda=gpu, rocm=gpu, default=stored
    )


def _fold(f, arguments, shape, spanned):
    """The maxima over sections of one of the spanned axes."""
    axis = max(spanned, key=lambda i: shape[i])
    last = len(shape) - 1
    if last in spanned and shape[last] >= math.prod(_ROWS[:2]):
        axis = last
    cut = _cut(shape[axis], _ROWS if axis == last else _COLUMNS)

    def top(section):
        slices = zip(*(_slices(x, axis, cut, section) for x in arguments))
        x = functools.reduce(_larger, (_no_nan(f(*each)) for each in slices))
        x = _maximum(x, (axis + 1, axis + 2))
        # XLA's maximum of what is left is slow where its rows are long.
        while x.shape[axis] > 1 and math.prod(x.shape[axis + 1 :]) > _LONG:
            x = functools.reduce(_larger, _parts(x, axis))
        return x

    tops = [top(section) for section in cut.sections]
    if len(tops) > 1:
        tops = [jnp.max(x, axis, keepdims=True) for x in tops]
    return functools.reduce(_larger, tops)


class _Cut(NamedTuple):
    """How an axis is cut: sections, of slices, of neighbours, over and over."""

    slices: int
    width: int
    apart: bool  # whether a slice's repeats lie side by side, or the slices do
    sections: list[tuple[int, int, int]]  # start, stop, repeats


def _cut(n, like):
    slices, width, apart, most = like
    devices = jax.device_count()
    if devices > 1 and n % 2 == 0:
        # The axis may be divided between devices, which its type need not say. Then
        # what lies far apart would have to be sent; the two of a pair are at one place
        # where a device has an even share, and so are repeats that divide it.
        share = n // 2 // math.gcd(n // 2, devices)
        return _Cut(2, 1, False, [(0, n, _divisor(share, most))])
    slices = min(slices, n)
    width = min(width, n // slices)
    return _Cut(slices, width, apart, _sections(n, slices * width, most))


def _sections(n, size, most):
    """One or two sections, each of at most `most` times `size` entries, over and over.

    The second may overlap the first: a maximum does not mind.
    """
    times = n // size
    repeats = min(most, times)
    if n % size == 0 and 2 * _divisor(times, most) >= repeats:
        repeats = _divisor(times, most)
    rest = n % (repeats * size)
    sections = [(0, n - rest, repeats)]
    if rest:
        repeats = -(-rest // size)
        sections.append((n - repeats * size, n, repeats))
    return sections


def _divisor(n, most):
    """The largest divisor of n that is not above `most`."""
    return max(k for k in range(1, most + 1) if n % k == 0)


def _slices(x, axis, cut, section):
    """The slices of a section, with its repeats and the width as axes of their own."""
    slices, width, apart, _ = cut
    start, stop, repeats = section
    head, n, tail = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if n == 1:
        return [x.reshape(*head, 1, 1, 1, *tail)] * slices
    x = jax.lax.slice_in_dim(x, start, stop, axis=axis)
    inner = (slices, repeats) if apart else (repeats, slices)
    x = x.reshape(*head, -1, *inner, width, *tail)
    place = axis + (1 if apart else 2)
    return [jax.lax.index_in_dim(x, k, place, False) for k in range(slices)]


def _parts(x, axis):
    """Up to eight slices that make up an axis, and may overlap."""
    n = x.shape[axis]
    count = min(8, n)
    width = -(-n // count)
    starts = (min(k * width, n - width) for k in range(count))
    return [jax.lax.slice_in_dim(x, s, s + width, axis=axis) for s in starts]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _maximum(x, axes):
    """The maximum over some axes of numbers that are neither negative nor NaN.

    Their bits are ordered as they are. XLA's CPU backend joins a maximum of integers to
    what computes them, and hands one of floats over to a library, which reads them from
    memory.
    """
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(x, integer)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axes), x.dtype)


@_maximum.defjvp
def _maximum_jvp(axes, primals, tangents):
    return jax.jvp(lambda x: jnp.max(x, axes), primals, tangents)


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
