"""Row-sparse tensors: BCOO arrays that hold only the rows that a step has touched.

jax.experimental.sparse is imported only when there is such an array.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from memoptax._tensors import dtypes


def is_row_sparse(leaf: Any) -> bool:
    """Whether a leaf of an update tree is a BCOO array.

    There is none before jax.experimental.sparse has been imported.
    """
    sparse = sys.modules.get("jax.experimental.sparse")
    return isinstance(leaf, getattr(sparse, "BCOO", ()))


def is_whole(node: Any) -> bool:
    """Whether a node is one update that is no dense array: BCOO, or None for none."""
    return node is None or is_row_sparse(node)


def tree_map(f, updates, *rest) -> Any:
    """``f`` of every update, which may be row-sparse. None is no update, and stays.

    The other trees may have anything in its place.
    """

    def of_one(update, *others):
        return None if update is None else f(update, *others)

    return jax.tree.map(of_one, updates, *rest, is_leaf=is_whole)


def values(update):
    """The values of a row-sparse update, or a dense one as it is."""
    return update.data if is_row_sparse(update) else update


def places(ids, rows: int) -> jax.Array:
    """Row numbers in [0, rows), and `rows` for ids outside of [-rows, rows).

    A negative id counts from the end. The result is int32 at least, so that it can hold
    `rows` for ids of any dtype.
    """
    wide = jnp.int64 if ids.dtype.itemsize == 8 else jnp.int32
    if jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        # A larger id would become negative as a signed number, and count from the end.
        ids = jnp.minimum(ids, min(jnp.iinfo(wide).max, jnp.iinfo(ids.dtype).max))
    ids = ids.astype(wide)
    inside = (ids >= -rows) & (ids < rows)
    return jnp.where(inside, jnp.where(ids < 0, ids + rows, ids), rows)


def merged(gradient, name: str) -> Any:
    """The gradient with every row once, under a number that is not negative.

    Rows are added in float32 or better, because many may be the same. Unused rows are 0
    and point outside of the table. The indices keep their flags, and their dtype if it
    can hold the number of rows. Both are part of the type, which `lax.cond` compares.
    """
    check(gradient, name)
    from jax.experimental.sparse import BCOO

    rows = gradient.shape[0]
    indices, data = places(gradient.indices, rows), gradient.data
    inside = (indices < rows).reshape(-1, *[1] * (data.ndim - 1))
    data = dtypes.wide(jnp.where(inside, data, 0))
    if rows and gradient.nse:
        # Indices that are marked as unique may still have -1 and the last row.
        once = BCOO((data, indices), shape=gradient.shape)
        once = once.sum_duplicates(nse=gradient.nse, remove_zeros=False)
        data, indices = once.data, once.indices
    if rows <= jnp.iinfo(gradient.indices.dtype).max:
        indices = indices.astype(gradient.indices.dtype)
    return BCOO(
        (data.astype(gradient.dtype), indices),
        shape=gradient.shape,
        indices_sorted=gradient.indices_sorted,
        unique_indices=gradient.unique_indices,
    )


def check(update, name: str) -> None:
    """Refuse what holds no rows, and indices that were changed like values."""
    if update.n_batch or update.n_sparse != 1:
        raise ValueError(
            f"The row-sparse gradient of {name} has {update.n_batch} batch and "
            f"{update.n_sparse} sparse dimensions; 0 and 1 are needed."
        )
    if not jnp.issubdtype(update.indices.dtype, jnp.integer):
        raise ValueError(
            f"The row-sparse gradient of {name} has indices of dtype "
            f"{update.indices.dtype}: an optax transformation has changed them like "
            "values. Wrap it in memoptax.sparse.on_values."
        )


def gather(x: jax.Array, gradient) -> jax.Array:
    """The rows of `x` that the gradient touches."""
    return take(x, gradient.indices[:, 0])


def take(x: jax.Array, ids: jax.Array) -> jax.Array:
    """`x[ids]`, with 0 for rows outside of `x`."""
    if x.shape[0] == 0:
        return jnp.zeros((*ids.shape, *x.shape[1:]), x.dtype)
    return x.at[ids].get(mode="fill", fill_value=0)


def scatter(x: jax.Array, gradient, rows: jax.Array) -> jax.Array:
    """`x` with these `rows` in place of those that the gradient touches."""
    return x.at[gradient.indices[:, 0]].set(rows, mode="drop") if x.size else x


def with_values(update, values) -> Any:
    """The same rows with other values, or the values themselves for a dense update."""
    if not is_row_sparse(update):
        return values.astype(update.dtype)
    from jax.experimental.sparse import BCOO

    values = values.astype(update.data.dtype)
    return BCOO(
        (values, update.indices),
        shape=update.shape,
        indices_sorted=update.indices_sorted,
        unique_indices=update.unique_indices,
    )


def refuse(updates) -> None:
    """Refuse row-sparse gradients. Other optimizers would scale the indices."""
    for path, leaf in jax.tree.leaves_with_path(updates, is_row_sparse):
        if is_row_sparse(leaf):
            name = jax.tree_util.keystr(path) or "the parameter"
            raise ValueError(
                f"The gradient of {name} is row-sparse: only sm3 and scale_by_sm3 take "
                "such gradients. Make it dense with its todense(), or give this "
                "parameter to sm3 with optax.partition."
            )
