"""Covers: families of boxes that tile a tensor, one accumulator per box.

A box shape tiles a tensor with boxes of that size. Boxes at the far edges are cut short
if the size does not divide. `(1, 4)` tiles a 3 x 4 matrix by its rows, `(3, 1)` by its
columns and `(1, 1)` by its entries, and `(3, 4)` is one box for the whole matrix. A
cover is a function that gives each parameter a list of box shapes. Every family tiles
the tensor, so every entry is in one box of each family.
"""

from collections.abc import Callable, Sequence
from typing import Any

from memoptax import _check
from memoptax._tensors.tiles import Box

__all__ = ["axes", "blocks", "full", "rows", "whole"]

Cover = Callable[[Any, Any], Sequence[Box]]


def axes(path: Any, leaf: Any) -> list[Box]:
    """Slices of codimension one, the paper's cover: sum(n_i) numbers.

    A tensor of shape `(n_1, ..., n_k)` gets one family per axis. Rank 0 and rank 1 get
    one number per entry, which is Adagrad.

    Args:
      path: the key path of the parameter (not used).
      leaf: anything with a `shape`.

    Returns:
      The box shapes.

    Examples:
      >>> import jax, memoptax
      >>> memoptax.covers.axes((), jax.ShapeDtypeStruct((3, 4), "float32"))
      [(1, 4), (3, 1)]
    """
    shape = leaf.shape
    return [shape[:i] + (1,) + shape[i + 1 :] for i in range(len(shape))] or [()]


def rows(path: Any, leaf: Any) -> list[Box]:
    """One box per index of the first axis: n_1 numbers. This is for embeddings.

    Args:
      path: the key path of the parameter (not used).
      leaf: anything with a `shape`.

    Returns:
      The box shapes.

    Examples:
      >>> import jax, memoptax
      >>> memoptax.covers.rows((), jax.ShapeDtypeStruct((3, 4), "float32"))
      [(1, 4)]
    """
    return axes(path, leaf)[:1]


def full(path: Any, leaf: Any) -> list[Box]:
    """One box per entry. This is Adagrad, with Adagrad's memory.

    Args:
      path: the key path of the parameter (not used).
      leaf: anything with a `shape`.

    Returns:
      The box shapes.

    Examples:
      >>> import jax, memoptax
      >>> memoptax.covers.full((), jax.ShapeDtypeStruct((3, 4), "float32"))
      [(1, 1)]
    """
    return [(1,) * len(leaf.shape)]


def whole(path: Any, leaf: Any) -> list[Box]:
    """One box for the whole tensor: one number, and one step size for all entries.

    Args:
      path: the key path of the parameter (not used).
      leaf: anything with a `shape`.

    Returns:
      The box shapes.

    Examples:
      >>> import jax, memoptax
      >>> memoptax.covers.whole((), jax.ShapeDtypeStruct((3, 4), "float32"))
      [(3, 4)]
    """
    return [tuple(leaf.shape)]


def blocks(*size: int | None) -> Callable[[Any, Any], list[Box]]:
    """Boxes of a given size: prod(ceil(n_i / size_i)) numbers.

    The sizes are those of the last axes. `None` spans its axis. Axes to the left of the
    given sizes are split into single indices.

    Args:
      *size: a positive integer or None for each of the last axes.

    Returns:
      A cover.

    Raises:
      ValueError: if a size is neither None nor a positive integer.

    Examples:
      >>> import jax, memoptax
      >>> blocks = memoptax.covers.blocks(None, 128)
      >>> blocks((), jax.ShapeDtypeStruct((512, 1024), "float32"))
      [(512, 128)]

      Lists of box shapes can be concatenated, so covers can be combined:

      >>> axes = memoptax.covers.axes
      >>> cover = lambda path, leaf: axes(path, leaf) + blocks(path, leaf)
    """
    name = "size of covers.blocks"
    if any(isinstance(s, tuple) for s in size):
        raise ValueError(
            f"{name} must be integers or None, as in covers.blocks(None, 128), but is "
            f"{size!r}: a cover is what covers.blocks returns."
        )
    size = tuple(None if s is None else _check.integer(name, s, 1) for s in size)

    def cover(path: Any, leaf: Any) -> list[Box]:
        shape = leaf.shape
        padded = (1,) * (len(shape) - len(size)) + size[
            max(0, len(size) - len(shape)) :
        ]
        return [tuple(n if s is None else s for s, n in zip(padded, shape))]

    return cover
