"""Flax's boxes: pytree nodes around a parameter that name its axes.

Linen puts parameters into ``nn.Partitioned``, nnx into a ``Variable`` with metadata.
``jax.tree.map`` over such parameters gives the state the same boxes and names. That is
right for arrays with the shape of a parameter. It is wrong for slots, which have one
more axis, and for accumulators, which have other axes. So this module gives them names
that fit, and an update works on bare arrays.

Flax is not imported. Its boxes are recognised by their methods.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from memoptax._tensors import row_sparse

# The keys under which versions of nnx keep the names.
_KEYS = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


def is_box(node) -> bool:
    """Whether this is a box with one array in it."""
    return _is_any_box(node) and len(_arrays(node)) == 1


def _is_emptied(node) -> bool:
    """Whether this is a box in which optax.masked has put a MaskedNode."""
    return _is_any_box(node) and not _arrays(node)


def _is_any_box(node) -> bool:
    return _is_linen(node) or _is_nnx(node)


def make(function, params):
    """``jax.tree.map(function, params)``, with every new array in a box that fits it.

    An axis has the name of its parameter's axis if it has the same length, and that is
    not one. So slots have none, nor have blocks, whose number the devices may not
    divide.
    """

    return jax.tree.map(
        lambda node: fit(node, function(inside(node))), params, is_leaf=is_box
    )


def fit(box, made):
    """Every array of ``made`` in a box like ``box``, if that is a box."""
    return jax.tree.map(lambda x: _renamed(box, x), made) if is_box(box) else made


def leaves_with_path(params):
    """The path, the box (or the array if there is none) and the array of each
    parameter.

    Unlike the path that JAX gives, this one is the same for parameters without boxes.
    """
    nodes = jax.tree.leaves_with_path(params, is_leaf=is_box)
    return [(path, node, inside(node)) for path, node in nodes]


def inside(node):
    """The array in a box, or the node itself."""
    return _arrays(node)[0] if is_box(node) else node


def bare(tree):
    """The tree with the array, or optax's MaskedNode, in place of each box.

    nnx puts its state into boxes of another type than the parameters have.
    """

    def content(node):
        if _is_emptied(node):
            return jax.tree.leaves(node, is_leaf=lambda x: x is not node)[0]
        return inside(node)

    return jax.tree.map(
        content, tree, is_leaf=lambda node: is_box(node) or _is_emptied(node)
    )


def like(boxed, tree):
    """The bare ``tree`` in the boxes of ``boxed``."""
    return jax.tree.unflatten(jax.tree.structure(boxed), jax.tree.leaves(tree))


def has_boxes(tree) -> bool:
    return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def on_arrays(update_fn):
    """``update_fn`` of a transformation, which gets bare arrays and returns boxes."""

    def boxed_update_fn(updates, state, params=None):
        if not has_boxes((updates, state)):
            return update_fn(updates, state, params)
        new_updates, new_state = update_fn(bare(updates), bare(state), bare(params))
        return like(updates, new_updates), like(state, new_state)

    return boxed_update_fn


def _arrays(node):
    """The arrays in a node. A row-sparse gradient is one."""
    return jax.tree.leaves(node, is_leaf=row_sparse.is_row_sparse)


def _is_linen(node):
    return hasattr(node, "replace_boxed") and hasattr(node, "names")


def _is_nnx(node):
    return hasattr(node, "get_metadata") and hasattr(node, "set_metadata")


def _renamed(box, array):
    shape = inside(box).shape
    if _is_linen(box):
        return box.replace(value=array, names=_fitting(box.names, shape, array))
    new = jax.tree.unflatten(jax.tree.structure(box), [array])
    for key in _KEYS:
        names = box.get_metadata().get(key)
        if isinstance(names, NamedSharding):
            spec = PartitionSpec(*_fitting(names.spec, shape, array))
            new.set_metadata(key, NamedSharding(names.mesh, spec))
        elif names is not None:
            new.set_metadata(key, _fitting(names, shape, array))
    return new


def _fitting(names, shape, array):
    """The names of the axes of ``array``, from those of an array of another shape.

    If the ranks differ, then in the axes in front.
    """
    names = tuple(names) + (None,) * (len(shape) - len(names))
    last = list(zip(array.shape[::-1], shape[::-1], names[::-1]))
    found = [name if n == size and n != 1 else None for n, size, name in last[::-1]]
    return (None,) * (array.ndim - len(found)) + tuple(found)
