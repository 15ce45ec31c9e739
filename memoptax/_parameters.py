"""What all building blocks share: they take real arrays, and ignore extra arguments.

Parameters may be Python numbers or NumPy arrays, as in optax. If a leaf is not real and
floating-point, it is refused with its path.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memoptax import _check
from memoptax._tensors import layout, row_sparse


def transformation(
    init_fn, update_fn, *, by_rows: bool = False
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose functions get real arrays only.

    Row-sparse gradients are refused unless it can take them ``by_rows``. Extra
    arguments are for other transformations in a chain.
    """

    def checked_init_fn(params):
        return init_fn(whole_arrays(params))

    def checked_update_fn(updates, state, params=None, **extra_args):
        del extra_args
        updates, state = whole_arrays(updates, "gradient"), state_arrays(state)
        if not by_rows:
            row_sparse.refuse(updates)
        params = jax.tree.map(layout.as_placed, params)
        return update_fn(updates, state, params)

    return optax.GradientTransformationExtraArgs(checked_init_fn, checked_update_fn)


def whole_arrays(tree, kind: str = "parameter"):
    """Like :func:`real_arrays`. No array may be part of a sum over devices."""
    tree = real_arrays(tree, kind)
    leaves = jax.tree.leaves_with_path(tree, is_leaf=row_sparse.is_row_sparse)
    for path, leaf in leaves:
        if wrong := layout.part_of_sum(leaf):
            raise ValueError(f"{_called(kind, path)} is {wrong}")
    return tree


def real_arrays(tree, kind: str = "parameter"):
    """The tree with arrays in place of numbers. Every leaf must be real."""

    def checked(path, leaf):
        _check_real(kind, path, leaf)
        return _array(leaf)

    return jax.tree_util.tree_map_with_path(
        checked, tree, is_leaf=row_sparse.is_row_sparse
    )


def shapes_of(init_fn, params):
    """The shapes and dtypes of ``init_fn(params)``, without running it.

    A leaf that is no array stays as it is, because ``optax.masked`` may leave it out.
    """
    leaves, treedef = jax.tree.flatten(params)
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]

    def init(arrays):
        found = [leaf if a is None else a for a, leaf in zip(arrays, leaves)]
        return init_fn(treedef.unflatten(found))

    return jax.eval_shape(init, arrays)


def is_array(leaf) -> bool:
    """Whether JAX can trace a leaf: an array, its shape and dtype, or a number."""
    number = isinstance(leaf, (bool, int, float, complex))
    if not number and not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return False
    try:
        jnp.result_type(leaf)
    except TypeError:  # a dtype that JAX does not have
        return False
    return True


def trained(updates, params):
    """The parameters, with None where the update is None.

    Such a parameter is not trained, so it may be of any kind, as in optax.
    """
    leaves = jax.tree.leaves(updates, is_leaf=row_sparse.is_whole)
    if params is None or all(leaf is not None for leaf in leaves):
        return params
    return jax.tree.map(
        lambda u, p: None if u is None else p,
        updates,
        params,
        is_leaf=row_sparse.is_whole,
    )


def state_arrays(state):
    """The state with JAX's arrays in place of numbers and NumPy's arrays.

    A restored state may have them. An eager ``update`` then accepts the same states as
    one under ``jax.jit``. Any other leaf stays as it is, and a later check names it.
    """

    def array(path, leaf):
        if wrong := layout.part_of_sum(leaf):
            raise ValueError(f"state{jax.tree_util.keystr(path)} is {wrong}")
        if isinstance(leaf, np.ndarray):
            _check.native(f"state{jax.tree_util.keystr(path)}", leaf)
        try:
            return _array(leaf)
        except TypeError:  # a dtype that JAX does not have
            return leaf

    return jax.tree.map_with_path(array, state)


def _array(leaf):
    """A Python number or NumPy array as a JAX array that is not weakly typed.

    Shapes stay as they are. So do JAX's arrays, in a type that says where they are.
    Without x64, zeros like a NumPy array in float64 would give a warning. Zeros like
    this array do not.
    """
    if isinstance(leaf, (int, float, np.ndarray, np.generic)):
        return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))
    return layout.as_placed(leaf)


def _called(kind, path):
    name = jax.tree_util.keystr(path)
    return f"The {kind} {name}" if name else f"The {kind}"


def _check_real(kind, path, leaf):
    name = _called(kind, path)
    if isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(leaf)
    else:
        dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        raise ValueError(
            f"{name} must be an array, but is {leaf!r}: keep only the arrays, with "
            "equinox.filter(model, equinox.is_inexact_array) or with optax.masked."
        )
    _check.native(name, leaf)
    try:
        real = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # the dtype of another library
        real = False
    if not real:
        raise ValueError(
            f"{name} has dtype {dtype}, but must be real and floating-point: leave it "
            "out with optax.masked or optax.partition; for complex parameters see "
            "optax.contrib.split_real_and_imaginary."
        )
    if isinstance(leaf, jax.Array) and dtype == jnp.float64 and _is_explicit_only():
        raise ValueError(
            f"{name} has dtype float64, which needs jax_enable_x64: with "
            "jax_explicit_x64_dtypes='allow' JAX still takes Python numbers as float32."
        )
    if jnp.dtype(dtype).itemsize < 2:  # JAX promotes these to no other dtype
        raise ValueError(
            f"{name} has dtype {dtype}, but needs 16 bits or more: keep it in bfloat16 "
            "or float32, and cast it in the model."
        )


def _is_explicit_only() -> bool:
    """Whether JAX has float64, but only where a program names it."""
    flags: Any = jax.config
    allowed = flags.jax_explicit_x64_dtypes.name == "ALLOW"
    return allowed and not flags.jax_enable_x64
