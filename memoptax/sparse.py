"""Row-sparse gradients, which hold only the rows of a table that a step has touched."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.sparse import BCOO

from memoptax import _check, _parameters
from memoptax._tensors import row_sparse

__all__ = ["apply_updates", "on_values", "row_value_and_grad"]


def row_value_and_grad(
    loss: Callable[..., jax.Array], table: Any, ids: Any, *others: Any
) -> tuple[jax.Array, Any]:
    r"""The value of a loss, and its gradient with respect to the rows that it looks up.

    With ``jax.grad`` the gradient of a lookup is as large as the table. This function
    differentiates with respect to the gathered rows, and returns their gradient with
    their indices, in :math:`O(\text{ids.size} \cdot d)` time and memory.

    Args:
      loss: a function `(rows, *others) -> scalar`, where `rows` is `table[ids]`.
      table: shape `(n, ...)`, any floating dtype, or a pytree of tables.
      ids: integers of any shape and dtype, or a pytree of them with one array per
        table. A negative id counts from the end. An id outside of [-n, n) gives a row
        of zeros and no gradient, so it can serve as padding.
      *others: pytrees of dense parameters. The loss is differentiated with respect to
        them too.

    Returns:
      The value, and the gradient of the table: a BCOO array of shape `table.shape`
      with one sparse dimension and `ids.size` rows, in which an id may occur more than
      once. With `others`, a tuple of this gradient and theirs.

    Raises:
      ValueError: if a table is not real and floating-point or has no axis, or if ids
        are not integers or not one array for each table.

    Examples:
      >>> import jax.numpy as jnp, memoptax
      >>> table = jnp.ones((1000, 4))
      >>> loss = lambda rows: (rows**2).sum()
      >>> ids = jnp.array([3, 8])
      >>> value, grad = memoptax.sparse.row_value_and_grad(loss, table, ids)
      >>> print(value, grad.shape, grad.data.shape)
      8.0 (1000, 4) (2, 4)
    """
    table = _parameters.real_arrays(table, "table")
    try:
        jax.tree.structure(table).flatten_up_to(ids)
    except ValueError as error:
        raise ValueError(f"ids must have an array for each table: {error}") from None
    ids = jax.tree.map(_places, table, ids)
    rows = jax.tree.map(row_sparse.take, table, ids)
    argnums = tuple(range(1 + len(others)))
    value, (by_rows, *by_others) = jax.value_and_grad(loss, argnums)(rows, *others)

    def as_sparse(table, ids, grad):
        data = grad.reshape(ids.size, *table.shape[1:])
        return BCOO((data, ids.reshape(-1, 1)), shape=table.shape)

    by_table = jax.tree.map(as_sparse, table, ids, by_rows)
    return value, (by_table, *by_others) if others else by_table


def apply_updates(params: optax.Params, updates: Any) -> optax.Params:
    """Add updates to parameters as ``optax.apply_updates`` does, row-sparse ones too.

    A row-sparse update is added by a scatter, in the dtype of its table. Under
    `jax.jit` with donated parameters it changes the table in place, and the cost is
    that of the rows touched.

    Args:
      params: a tree of parameters.
      updates: a tree of updates of the same structure. Its leaves are arrays or, for
        tables, BCOO arrays with one sparse dimension. Where it has None, the parameter
        stays as it is.

    Returns:
      The new parameters, with the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: if a row-sparse update does not hold rows of its parameter.

    Examples:
      Flax's `TrainState` calls optax's function. This one calls memoptax's:

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

    def add(path, update, param):
        if update is None:
            return param
        if not row_sparse.is_row_sparse(update):
            return optax.apply_updates(param, update)
        row_sparse.check(update, _check.leaf_name(path))
        param = jnp.asarray(param)
        if update.shape != param.shape:
            raise ValueError(
                f"The row-sparse update of {_check.leaf_name(path)} has the shape "
                f"{update.shape}, but the parameter has {param.shape}."
            )
        if param.size == 0:
            return param
        values = update.data.astype(param.dtype)
        ids = row_sparse.places(update.indices[:, 0], param.shape[0])
        return param.at[ids].add(values, mode="drop")

    return jax.tree_util.tree_map_with_path(
        add, updates, params, is_leaf=row_sparse.is_whole
    )


def on_values(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Let an optax transformation work on trees with row-sparse leaves.

    A row-sparse leaf has values and indices, and optax's own transformations would
    change both. This wrapper first sums rows that occur more than once. Then it gives
    `inner` the values of the rows, and the rows of the parameters. So an L2 norm is
    that of the dense gradient. Use it for `optax.clip`, `clip_by_global_norm`, `scale`,
    `zero_nans` and the like, before or after :func:`memoptax.sm3`.

    Do not use it for a mean over entries (`clip_by_block_rms`), which then depends on
    the number of padding ids. Do not use it for the norm of a parameter either
    (`adaptive_grad_clip`, `scale_by_trust_ratio`), because it is then that of the rows.
    Weight decay and noise reach only the rows of the batch.

    `optax.apply_if_finite` can wrap :func:`memoptax.sm3` without this wrapper, if the
    dtype of the indices can hold the number of rows.

    Args:
      inner: a transformation whose state has nothing per row of a row-sparse leaf.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: if `inner` is not a transformation. In `update`, if a leaf is
        row-sparse and the state of `inner` has something per row of its parameter, as
        with momenta, `optax.MultiSteps` and :func:`memoptax.sm3`. In place of
        `optax.MultiSteps`, look up the ids of all micro-batches at once.

    Examples:
      >>> import memoptax, optax
      >>> tx = optax.chain(
      ...     memoptax.sparse.on_values(optax.clip_by_global_norm(1.0)),
      ...     memoptax.sm3(0.1, cover=memoptax.covers.rows),
      ... )
    """
    _check.transformation("inner", inner)
    extended = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        def merged(path, update):
            if not row_sparse.is_row_sparse(update):
                return update
            return row_sparse.merged(update, _check.leaf_name(path))

        params = _parameters.trained(updates, params)
        _check_state(inner, updates, updates if params is None else params)
        updates = jax.tree_util.tree_map_with_path(
            merged, updates, is_leaf=row_sparse.is_row_sparse
        )
        values = row_sparse.tree_map(row_sparse.values, updates)
        if params is not None:
            params = row_sparse.tree_map(_rows, updates, params)
        values, state = extended.update(values, state, params, **extra_args)
        return row_sparse.tree_map(row_sparse.with_values, updates, values), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _rows(update, param):
    if not row_sparse.is_row_sparse(update):
        return param
    return row_sparse.gather(jnp.asarray(param), update)


def _check_state(inner, updates, params):
    """Refuse a transformation that keeps something for each row of a row-sparse leaf.

    Its state would have other shapes if the table had one row more.
    """
    is_leaf = row_sparse.is_row_sparse

    def shapes(longer=None):
        def like(path, update, param):
            param = param if hasattr(param, "shape") else jnp.asarray(param)
            shape = param.shape
            if path == longer:
                shape = (shape[0] + 1, *shape[1:])
            return jax.ShapeDtypeStruct(shape, param.dtype)

        tree = jax.tree.map_with_path(like, updates, params, is_leaf=is_leaf)
        return [x.shape for x in jax.tree.leaves(jax.eval_shape(inner.init, tree))]

    leaves = jax.tree.leaves_with_path(updates, is_leaf=is_leaf)
    tables = [path for path, update in leaves if is_leaf(update)]
    as_they_are = shapes() if tables else []
    for path in tables:
        if shapes(longer=path) != as_they_are:
            raise ValueError(
                f"inner must keep nothing for each row of a row-sparse leaf, but "
                f"{_check.leaf_name(path)} has a row-sparse gradient and inner is "
                f"{inner!r}: its numbers cannot follow the rows. memoptax.sm3 belongs "
                "beside this wrapper in the chain, not inside it. In place of "
                "optax.MultiSteps look up the ids of all micro-batches at once."
            )


def _places(table, ids):
    """The row numbers of ids, as integers of a known dtype."""
    if table.ndim == 0:
        raise ValueError(f"table must have an axis of rows, but is {table!r}.")
    try:
        known: Any = ids if hasattr(ids, "dtype") else np.asarray(ids)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"ids must be integers, but are {ids!r}.") from error
    if known.size == 0 and not hasattr(ids, "dtype"):  # NumPy makes floats of []
        known = known.astype(np.int32)
    # NumPy counts durations among the integers.
    if not jnp.issubdtype(known.dtype, jnp.integer) or known.dtype.kind == "m":
        raise ValueError(f"ids must be integers, but are {ids!r}.")
    rows = table.shape[0]
    if isinstance(known, (np.ndarray, np.generic)):
        # JAX would cut 64 bits to 32, and 2^32 would become row 0.
        if known.dtype == np.uint64:
            known = np.minimum(known, np.uint64(2**63 - 1))
        known = np.clip(known.astype(np.int64), -rows - 1, rows).astype(np.int32)
    return row_sparse.places(jnp.asarray(known), rows)
