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
    """Whether this is a box with one array in it.

    A Variable of nnx's hijax mode has the methods of a box, but JAX takes it for an
    array: it is its own leaf.
    """
    return _is_any_box(node) and [x is node for x in _arrays(node)] == [False]


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


def fit(box, made, batch: int = 0):
    """Every array of ``made`` in a box like ``box``, if that is a box.

    The first ``batch`` axes of both are those of an ensemble.
    """
    if not is_box(box):
        return made
    return jax.tree.map(lambda x: _renamed(box, x, batch), made)


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


def _renamed(box, array, batch):
    def fitting(names):
        return _fitting(names, inside(box).shape, array.shape, batch)

    if _is_linen(box):
        return box.replace(value=array, names=fitting(box.names))
    new = jax.tree.unflatten(jax.tree.structure(box), [array])
    for key in _KEYS:
        names = box.get_metadata().get(key)
        if isinstance(names, NamedSharding):
            spec = PartitionSpec(*fitting(names.spec))
            new.set_metadata(key, NamedSharding(names.mesh, spec))
        elif names is not None:
            new.set_metadata(key, fitting(names))
    return new


def _fitting(names, old, new, batch):
    """The names of the axes of a ``new`` shape, from those of the ``old`` one.

    If the ranks differ, then in the axes in front. The axes of an ensemble are before
    those, and keep their names: ``batch`` axes, and those that ``jax.vmap`` hides. Of
    these it sees only that there are more names than axes.
    """
    names = tuple(names) + (None,) * (len(old) - len(names))
    members = len(names) - len(old) + batch
    old, new = old[batch:], new[batch:]
    last = list(zip(new[::-1], old[::-1], names[members:][::-1]))
    found = [name if n == size and n != 1 else None for n, size, name in last[::-1]]
    return (*names[:members], *(None,) * (len(new) - len(found)), *found)
