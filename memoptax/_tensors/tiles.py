"""The maxima of a computed tensor over boxes, without storing the tensor.

The preconditioner of SM3 has three consumers: two families of maxima and the update.
XLA does not fuse a producer with several consumers into a reduction. On a CPU it would
store the preconditioner, and a temporary as large as a parameter costs as much as a
whole Adam step. So on a CPU every maximum computes its operands from its own slices of
the gradient. It shares them with no other consumer, and reads each entry once, at the
speed of memory.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from memoptax._tensors import layout

Box = tuple[int, ...]

_SMALL = 2**15  # entries; a smaller temporary stays in the cache
_LONG = 2**13  # entries of a row

# The largest number of pairs in a group, along rows and across them. Across rows a CPU
# has groups of sixteen rows, which XLA unrolls. A loop that it does not unroll walks
# down the columns one by one. A GPU stores the maxima of the groups, in float32. They
# take a 16th of a bfloat16 leaf. In groups of sixteen rows they would take an eighth.
_ALONG, _ACROSS, _ACROSS_ON_GPU = 32, 8, 16
_DEVICES = 8  # where possible, sections divide an axis evenly over this many devices


def counts(shape: Box, box: Box) -> Box:
    """The number of boxes along each axis: the shape of a family's accumulator."""
    return tuple(-(-n // max(b, 1)) for n, b in zip(shape, box))


def box_max(x: jax.Array, box: Box) -> jax.Array:
    """The maximum of the non-negative `x` over every box."""
    spanned = tuple(i for i, (b, n) in enumerate(zip(box, x.shape)) if b >= n > 1)
    if spanned:
        x = jnp.max(x, axis=spanned, keepdims=True)
    for axis, (b, n) in enumerate(zip(box, x.shape)):
        if 1 < b < n:
            x = layout.in_runs(x, axis, b)
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
    """The maximum of `f(*entries(*operands))` over every box. f is never negative.

    If an operand is not finite, the maximum over its box is not finite.

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

    def folded(across, *operands):
        return box_max(_fold(f, entries(*operands), shape, spanned, across), box)

    spanned = [i for i, (b, n) in enumerate(zip(box, shape)) if b >= n > 1]
    if not spanned or math.prod(shape) < _SMALL or any(map(_is_sharded, operands)):
        return stored(*operands)
    # For maxima along rows a GPU computes the operands as it reads. For maxima across
    # rows it would store them. sm3 would then move 20 bytes per parameter of a matrix
    # instead of 16.3.
    across_rows = len(shape) - 1 not in spanned
    gpu = functools.partial(folded, _ACROSS_ON_GPU) if across_rows else stored
    cpu = functools.partial(folded, _ACROSS)
    return jax.lax.platform_dependent(
        *operands, cpu=cpu, cuda=gpu, rocm=gpu, default=stored
    )


def _fold(f, arguments, shape, spanned, across):
    """The maxima over sections of one of the spanned axes.

    Neighbours are compared first. An axis may be divided between devices without a sign
    of it in the type, and entries that are far apart would have to be sent.
    """
    axis = max(spanned, key=lambda i: shape[i])
    last = len(shape) - 1
    if last in spanned and shape[last] >= _ALONG:
        axis = last

    def top(section):
        pairs = zip(*(_pair(x, axis, *section) for x in arguments))
        x = functools.reduce(_larger, (_no_nan(f(*each)) for each in pairs))
        x = _maximum(x, (axis + 1,))
        # XLA's own maximum of the rest is slow if rows are long.
        while x.shape[axis] > 1 and math.prod(x.shape[axis + 1 :]) > _LONG:
            x = functools.reduce(_larger, _parts(x, axis))
        return x

    most = _ALONG if axis == last else across
    tops = [top(s) for s in _sections(shape[axis], most)]
    if len(tops) > 1:
        tops = [jnp.max(x, axis, keepdims=True) for x in tops]
    return functools.reduce(_larger, tops)


def _sections(n, most):
    """One or two sections of an axis: start, stop, and the number of pairs in a group.

    They may overlap, which does not change a maximum.
    """
    pairs = n // 2
    repeats = max(1, min(most, pairs))
    even = _divisor(max(1, pairs // math.gcd(pairs, _DEVICES)), most)
    if n % (2 * _DEVICES) == 0 or (n % 2 == 0 and 4 * even >= repeats):
        repeats = even
    rest = n % (2 * repeats)
    sections = [(0, n - rest, repeats)] if n > rest else []
    if rest:
        length = min(n, rest + rest % 2)
        sections.append((n - length, n, length // 2))
    return sections


def _divisor(n, most):
    """The largest divisor of n that is not above `most`."""
    return max(k for k in range(1, most + 1) if n % k == 0)


def _pair(x, axis, start, stop, repeats):
    """The even and odd entries of a section, with the pairs of a group as an axis."""
    head, n, tail = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if n == 1:
        return [x.reshape(*head, 1, 1, *tail)] * 2
    x = jax.lax.slice_in_dim(x, start, stop, axis=axis)
    x = x.reshape(*head, -1, repeats, 2, *tail)
    return [jax.lax.index_in_dim(x, k, axis + 2, False) for k in range(2)]


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

    The bits of such numbers have the same order. XLA's CPU backend fuses a maximum of
    integers with its producer, but calls a library for floats, which reads them from
    memory.
    """
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(x, integer)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axes), x.dtype)


@_maximum.defjvp
def _maximum_jvp(axes, primals, tangents):
    return jax.jvp(lambda x: jnp.max(x, axes), primals, tangents)


def _larger(x, y):
    # One comparison and one select. jnp.maximum also orders NaN and the two zeros, and
    # takes three times as long on a CPU.
    return jax.lax.select(x > y, x, y)


def smaller(x: jax.Array, y: jax.Array) -> jax.Array:
    """The smaller of two finite numbers. It is faster than jnp.minimum on a CPU."""
    if jax.typeof(x).sharding.spec != jax.typeof(y).sharding.spec:
        return jnp.minimum(x, y)  # a choice would need both laid out alike
    return jnp.where(x < y, x, y)


def _no_nan(x):
    # A NaN counts as infinite. XLA's own maximum on a CPU may lose it.
    return jnp.where(x <= jnp.finfo(x.dtype).max, x, jnp.inf)


def _is_sharded(x):
    """Whether the type has a sharded axis, which cannot be reshaped freely."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)
