"""The families of boxes that cover one tensor, and the few sweeps that serve them.

Every family tiles the tensor and has one number per box, its accumulator.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memoptax import _check
from memoptax._tensors import tiles
from memoptax._tensors.tiles import Box


def check_cover(cover: Any) -> None:
    """Refuse what cannot be a cover of any parameters."""
    if cover is None or callable(cover):
        return _check.function("cover", cover, 2)
    if not (isinstance(cover, (list, tuple)) and all(map(_may_be_a_box, cover))):
        raise ValueError(
            "cover must be None, a function (path, leaf) -> list of box shapes or a "
            f"list of box shapes, but is {cover!r}."
        )


def _may_be_a_box(box: Any) -> bool:
    return isinstance(box, (list, tuple)) and all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0
        for n in box
    )


def resolve(cover: Any, path: Any, leaf: Any) -> tuple[Box, ...]:
    """The box shapes a cover gives a parameter, checked and cut to its shape."""
    of, shape = _check.leaf_name(path), tuple(leaf.shape)
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(
            f"{of} has the shape {shape}, but the accumulators of SM3 need sizes that "
            "are known while tracing: export it with sizes that are numbers."
        )
    boxes: Any = cover(path, leaf) if callable(cover) else cover
    if not isinstance(boxes, (list, tuple)):
        raise ValueError(
            f"The cover of {of} with shape {shape} is {boxes!r}: it must be a list of "
            "box shapes."
        )
    if not boxes:
        raise ValueError(
            f"The cover leaves every entry of {of} with shape {shape} uncovered: "
            "its list of box shapes is empty."
        )
    for box in boxes:
        if not (
            _may_be_a_box(box)
            and len(box) == len(shape)
            and all(b >= 1 or n == 0 for b, n in zip(box, shape))
        ):
            raise ValueError(
                f"The cover of {of} with shape {shape} contains the box shape "
                f"{box!r}: a box needs one positive integer per axis, or it "
                "leaves entries uncovered."
            )
    return tuple(
        tuple(int(min(max(b, 1), max(n, 1))) for b, n in zip(x, shape)) for x in boxes
    )


def check_shapes(boxes: Sequence[Box], path: Any, leaf: Any, numbers) -> None:
    """Refuse a cover that differs from the one that made the accumulators."""
    if not isinstance(numbers, (tuple, list)):
        raise ValueError(
            f"state has an object of type {type(numbers).__name__} in accumulators, "
            "but needs a tuple of arrays for each parameter."
        )
    _check.arrays("accumulators", numbers)
    want = [tiles.counts(tuple(leaf.shape), box) for box in boxes]
    have = [tuple(x.shape) for x in numbers]
    if want != have:
        raise ValueError(
            f"The cover of {_check.leaf_name(path)} asks for accumulators of the "
            f"shapes {want}, but the state has {have}: a cover must be the same in "
            "init and update."
        )


def zeros(leaf: Any, box: Box, dtype) -> jax.Array:
    """The accumulators of a family, sharded like the axes of the leaf they follow."""
    if 0 in leaf.shape:
        return jnp.zeros(tiles.counts(leaf.shape, box), dtype)
    # The result of a reduction is sharded like the axes that remain. jnp.zeros would
    # not be. The value is not used, so a compiled init does not compute it.
    return jnp.zeros_like(tiles.box_max(jnp.zeros_like(leaf, dtype=bool), box), dtype)


def spread(x: jax.Array, box: Box, shape: Box) -> jax.Array:
    """Give every entry the number of its box.

    An axis that one box spans keeps the size one, and is broadcast later.
    """
    for axis, (b, n) in enumerate(zip(box, shape)):
        if 1 < b < n:
            # jnp.repeat in a form that supports explicit shardings.
            head, tail = x.shape[:axis], x.shape[axis + 1 :]
            x = jnp.broadcast_to(
                jnp.expand_dims(x, axis + 1), (*head, x.shape[axis], b, *tail)
            )
            x = x.reshape(*head, -1, *tail)
            x = jax.lax.slice_in_dim(x, 0, n, axis=axis)
    return x


def sweeps(boxes: Sequence[Box], shape: Box) -> list[tuple[Box, list[int]]]:
    """Group families, so that few sweeps over the tensor serve all of them.

    Each group has a common box that divides the boxes of its members. The maxima over
    the common box are a small array, and those of the members follow from it. The axes
    of a convolution kernel, for example, need two sweeps instead of four.

    Returns:
      Pairs of a common box and the indices of the families it serves.
    """
    alone = [(box, [i]) for i, box in enumerate(boxes)]
    plans = [
        [_group(boxes, range(k)), _group(boxes, range(k, len(boxes)))]
        for k in range(1, len(boxes))
    ]
    plans = [
        p for p in plans if all(_divides(c, boxes[i], shape) for c, f in p for i in f)
    ]

    def numbers(plan):
        return sum(math.prod(tiles.counts(shape, common)) for common, _ in plan)

    best = min(plans, key=numbers, default=alone)
    return best if len(boxes) > 2 and 8 * numbers(best) <= math.prod(shape) else alone


def _group(boxes, members):
    return tuple(map(min, zip(*(boxes[i] for i in members)))), list(members)


def _divides(common, box, shape):
    return all(b % c == 0 or b >= n for c, b, n in zip(common, box, shape))


def coarsen(box: Box, common: Box) -> Box:
    """The size of `box` counted in boxes of the size `common`."""
    return tuple(-(-b // c) for b, c in zip(box, common))


class Families:
    """The families of boxes of one tensor, and the sweeps that serve them."""

    def __init__(self, boxes: Sequence[Box], shape: Box):
        self.boxes, self.shape = boxes, shape
        self.sweeps = sweeps(boxes, shape)

    def floors(self, accumulators: Sequence[jax.Array]) -> list[jax.Array]:
        """For each sweep, the least of its families' numbers, box by common box."""
        return [
            functools.reduce(
                tiles.smaller,
                (
                    spread(
                        accumulators[i],
                        coarsen(self.boxes[i], common),
                        tiles.counts(self.shape, common),
                    )
                    for i in members
                ),
            )
            for common, members in self.sweeps
        ]

    def maxima(self, f, g, floors=(), parts=None) -> tuple[jax.Array, ...]:
        """For each family, the maximum over its boxes of `f(g, *numbers)` (>= 0).

        f works entry by entry. Its `numbers` are those of the boxes that contain the
        entry, one for each sweep. `parts` are an entrywise function and the tensors
        from which it computes g. Sweeps across rows call it, because a GPU would store
        a g that they share with the update (sm3_cm with C = 5 in int8: one copy of the
        parameters instead of .06).
        """
        out = {}
        for common, members in self.sweeps:
            along = self.shape and common[-1] >= self.shape[-1] > 1
            compute, tensors = (_itself, (g,)) if along or not parts else parts
            top = tiles.maxima(
                functools.partial(_composed, f, compute, len(tensors)),
                functools.partial(self._entries, len(tensors)),
                (*tensors, *floors),
                common,
            )
            for i in members:
                out[i] = tiles.box_max(top, coarsen(self.boxes[i], common))
        return tuple(out[i] for i in range(len(self.boxes)))

    def _entries(self, count, *operands):
        return *operands[:count], *self.spread(operands[count:])

    def spread(self, floors: Sequence[jax.Array]) -> list[jax.Array]:
        """For each sweep, give every entry the number of its box."""
        return [
            spread(x, common, self.shape) for x, (common, _) in zip(floors, self.sweeps)
        ]


def _itself(g):
    return g


def _composed(f, compute, count, *numbers):
    """``f`` of ``compute(*numbers[:count])`` and of the remaining numbers."""
    return f(compute(*numbers[:count]), *numbers[count:])
