"""Row-sparse gradients: BCOO leaves that hold only the rows a step has touched."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO


def is_row_sparse(leaf: Any) -> bool:
    """Whether a leaf of an update tree is a BCOO array."""
    return isinstance(leaf, BCOO)


def row_value_and_grad(
    loss: Callable[..., jax.Array], table: Any, ids: Any, *others: Any
) -> tuple[jax.Array, Any]:
    r"""The value of a loss and its gradient by the rows of a table that it looks up.

    The gradient of a lookup by :func:`jax.grad` is as large as the table. This one
    differentiates the gathered rows and returns them with their indices, in
    :math:`O(\text{ids.size} \cdot d)` time and memory.

    Args:
      loss: a function `(rows, *others) -> scalar`, where `rows` is `table[ids]`.
      table: shape `(n, ...)`, any floating dtype; or a pytree of tables.
      ids: integers of any shape; or a pytree of them, one array per table. A negative
        id counts from the end; an id outside of the table gives a row of zeros and no
        gradient (use it for padding).
      *others: pytrees of dense parameters, differentiated too.

    Returns:
      The value, and the gradient of the table: a BCOO array of shape `table.shape`
      with one sparse dimension and `ids.size` rows, in which an id may occur more than
      once. With `others`, a tuple of it and of their gradients.

    Examples:
      >>> import jax.numpy as jnp, memoptax
      >>> table = jnp.ones((1000, 4))
      >>> loss = lambda rows: (rows**2).sum()
      >>> value, grad = memoptax.row_value_and_grad(loss, table, jnp.array([3, 8]))
      >>> print(value, grad.shape, grad.data.shape)
      8.0 (1000, 4) (2, 4)
    """
    ids = jax.tree.map(lambda t, i: jnp.where(i < 0, i + t.shape[0], i), table, ids)
    rows = jax.tree.map(lambda t, i: t.at[i].get(mode="fill", fill_value=0), table, ids)
    argnums = tuple(range(1 + len(others)))
    value, (by_rows, *by_others) = jax.value_and_grad(loss, argnums)(rows, *others)

    def as_sparse(table, ids, grad):
        data = grad.reshape(ids.size, *table.shape[1:])
        return BCOO((data, ids.reshape(-1, 1)), shape=table.shape)

    by_table = jax.tree.map(as_sparse, table, ids, by_rows)
    return value, (by_table, *by_others) if others else by_table


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Adds updates to parameters, as :func:`optax.apply_updates` does, rows included.

    A row-sparse update is scatter-added: under `jax.jit` with donated parameters the
    table is changed in place, and the cost is that of the rows touched.

    Args:
      params: a tree of parameters.
      updates: a tree of updates of the same structure; its leaves are arrays or, for
        tables, BCOO arrays with one sparse dimension.

    Returns:
      The new parameters, with the structure, shapes and dtypes of `params`.

    Examples:
      Flax's `TrainState` calls optax's function. This one calls ours:

      >>> import memoptax
      >>> from flax.training import train_state
      >>> class TrainState(train_state.TrainState):
      ...     def apply_gradients(self, *, grads, **kwargs):
      ...         updates, state = self.tx.update(grads, self.opt_state, self.params)
      ...         params = memoptax.apply_updates(self.params, updates)
      ...         return self.replace(
      ...             step=self.step + 1, params=params, opt_state=state, **kwargs
      ...         )
    """

    def add(update, param):
        if not is_row_sparse(update):
            return optax.apply_updates(param, update)
        values = update.data.astype(param.dtype)
        return param.at[update.indices[:, 0]].add(values, mode="drop")

    def is_leaf(x):
        return x is None or is_row_sparse(x)

    return jax.tree.map(add, updates, params, is_leaf=is_leaf)


def on_values(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies an elementwise transformation to the values of row-sparse leaves.

    optax's own would scale the indices too. Updates keep the dtype they came in.
    """

    def update_fn(updates, state, params=None):
        values = _map(lambda u: u.data if is_row_sparse(u) else u, updates)
        values, state = inner.update(values, state, params)
        return _map(_with_values, updates, values), state

    return optax.GradientTransformation(inner.init, update_fn)


def add_decayed_weights(weight_decay) -> optax.GradientTransformation:
    """Decoupled weight decay; row-sparse leaves, whose rows must rest, pass by."""

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                f"weight_decay={weight_decay!r} needs the parameters: "
                "call update(updates, state, params)."
            )

        def decayed(u, p):
            if is_row_sparse(u):
                return u
            return (u + weight_decay * p).astype(u.dtype)

        return _map(decayed, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _map(f, updates, *rest):
    return jax.tree.map(f, updates, *rest, is_leaf=is_row_sparse)


def _with_values(update, values) -> Any:
    if not is_row_sparse(update):
        return values.astype(update.dtype)
    values = values.astype(update.data.dtype)
    return BCOO(
        (values, update.indices),
        shape=update.shape,
        indices_sorted=update.indices_sorted,
        unique_indices=update.unique_indices,
    )


def merged(gradient: BCOO, name: str) -> BCOO:
    """The gradient with every row once; rows left over point outside of the table."""
    if gradient.n_batch or gradient.n_sparse != 1:
        raise ValueError(
            f"The row-sparse gradient of {name} has {gradient.n_batch} batch and "
            f"{gradient.n_sparse} sparse dimensions; 0 and 1 are needed."
        )
    if gradient.unique_indices:
        return gradient
    return gradient.sum_duplicates(nse=gradient.nse)


def check_rows(gradient: BCOO, boxes, name: str) -> None:
    """Refuses covers in which a row that rests would have a share."""
    if tuple(boxes) != ((1, *gradient.shape[1:]),):
        raise ValueError(
            f"{name} has a row-sparse gradient and the cover {list(boxes)!r}. Only "
            "memoptax.rows can follow it: the numbers of other boxes would go stale. "
            "Pass cover=memoptax.rows, or a function that gives rows to this parameter."
        )


def gather(x: jax.Array, gradient: BCOO) -> jax.Array:
    """The rows of `x` that the gradient touches."""
    return x.at[gradient.indices[:, 0]].get(mode="fill", fill_value=0)


def scatter(x: jax.Array, gradient: BCOO, rows: jax.Array) -> jax.Array:
    """`x` with these rows in the places that the gradient touches."""
    return x.at[gradient.indices[:, 0]].set(rows, mode="drop")


def with_values(gradient: BCOO, values: jax.Array) -> BCOO:
    """The same rows with other values."""
    return _with_values(gradient, values)
