"""Row-sparse tensors: BCOO arrays that hold only the rows a step has touched.

jax.experimental.sparse is imported where there is such an array, and not before.
"""

import sys
from typing import Any

import jax


def is_row_sparse(leaf: Any) -> bool:
    """Whether a leaf of an update tree is a BCOO array.

    There is none before somebody has imported jax.experimental.sparse.
    """
    sparse = sys.modules.get("jax.experimental.sparse")
    return isinstance(leaf, getattr(sparse, "BCOO", ()))


def merged(gradient, name: str) -> Any:
    """The gradient with every row once; rows left over point outside of the table."""
    if gradient.n_batch or gradient.n_sparse != 1:
        raise ValueError(
            f"The row-sparse gradient of {name} has {gradient.n_batch} batch and "
            f"{gradient.n_sparse} sparse dimensions; 0 and 1 are needed."
        )
    if gradient.unique_indices:
        return gradient
    return gradient.sum_duplicates(nse=gradient.nse)


def gather(x: jax.Array, gradient) -> jax.Array:
    """The rows of `x` that the gradient touches."""
    return x.at[gradient.indices[:, 0]].get(mode="fill", fill_value=0)


def scatter(x: jax.Array, gradient, rows: jax.Array) -> jax.Array:
    """`x` with these rows in the places that the gradient touches."""
    return x.at[gradient.indices[:, 0]].set(rows, mode="drop")


def with_values(update, values) -> Any:
    """The same rows with other values; for a dense update the values themselves."""
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
