"""Row-sparse gradients: of a table only the rows that a step has touched."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO

from memoptax._tensors import row_sparse

__all__ = ["apply_updates", "row_value_and_grad"]


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
      >>> ids = jnp.array([3, 8])
      >>> value, grad = memoptax.sparse.row_value_and_grad(loss, table, ids)
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
      ...         params = memoptax.sparse.apply_updates(self.params, updates)
      ...         return self.replace(
      ...             step=self.step + 1, params=params, opt_state=state, **kwargs
      ...         )
    """

    def add(update, param):
        if not row_sparse.is_row_sparse(update):
            return optax.apply_updates(param, update)
        values = update.data.astype(param.dtype)
        return param.at[update.indices[:, 0]].add(values, mode="drop")

    def is_leaf(x):
        return x is None or row_sparse.is_row_sparse(x)

    return jax.tree.map(add, updates, params, is_leaf=is_leaf)
