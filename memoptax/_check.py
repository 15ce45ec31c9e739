"""Checks of arguments, made once when an optimizer is built.

A number is a Python number, or a NumPy or JAX scalar. Numbers of Python and NumPy are
static. They are returned as Python's own, and may decide the structure of a state. A
JAX scalar decides nothing, because it is a tracer under ``jax.jit``, and
``optax.inject_hyperparams`` passes one. Its range is checked if its value is known.
"""

import inspect
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

# What has an init. MultiSteps is a class of its own.
Optimizer = optax.GradientTransformation | optax.MultiSteps

WIDE = (jnp.dtype(jnp.float32), jnp.dtype(jnp.float64))

# Beyond it a number is infinite in float32, and eps=1e39 would divide by infinity.
_LARGEST = float(jnp.finfo(jnp.float32).max)


def static(value) -> bool:
    """Whether ``value`` is a number of Python or NumPy, which Python can compare."""
    return is_real(value) and not isinstance(value, jax.Array)


def is_zero(value) -> bool:
    return static(value) and value == 0


def is_real(value) -> bool:
    """Whether ``value`` is one real number, known or traced. A bool is not."""
    return _is_scalar_of(value, (jnp.floating, jnp.integer))


def _is_scalar_of(value, kinds) -> bool:
    if isinstance(value, (bool, np.ma.MaskedArray)):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, np.generic):
        own = jnp.integer if isinstance(value, int) else jnp.floating
        return own in kinds
    if not isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return False
    right = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return value.shape == () and right and _computes(value.dtype)


def _computes(dtype) -> bool:
    """Whether JAX computes with this dtype next to any other."""
    if jnp.issubdtype(dtype, jnp.floating):  # neither float8 nor NumPy's long double
        return 2 <= dtype.itemsize <= 8
    if jnp.issubdtype(dtype, jnp.integer):  # not int4, nor durations: NumPy's integers
        return dtype.kind != "m" and jnp.iinfo(dtype).bits >= 8
    return True


def number(
    name: str,
    value,
    low=-math.inf,
    high=math.inf,
    *,
    above: bool = False,
    below: bool = False,
    optional: bool = False,
    finite: bool = True,
) -> Any:
    """``value``, refused unless it is a number in [low, high].

    ``above`` excludes the lower end, and ``below`` the upper one. A JAX number is
    returned in float32 or better, because 1 − b would be rounded in bfloat16.
    """
    if optional and value is None:
        return None
    if callable(value):
        raise ValueError(
            f"{name} must be a number, but is the function {value!r}; for a schedule, "
            "build the optimizer with optax.inject_hyperparams."
        )
    if not is_real(value):
        either = "None or " if optional else ""
        raise ValueError(f"{name} must be {either}a number, but is {value!r}.")
    if isinstance(value, Tracer):
        return widened(value)
    found = _as_float(value)
    inside = low <= found <= high and (math.isfinite(found) or not finite)
    at_an_end = (above and found == low) or (below and found == high)
    if not inside or at_an_end:
        left = "(" if above or low == -math.inf else "["
        right = ")" if below or high == math.inf else "]"
        raise ValueError(
            f"{name} must be in {left}{low}, {high}{right}, but is {value!r}."
        )
    if finite and abs(found) > _LARGEST:
        raise ValueError(
            f"{name} must fit into float32, up to {_LARGEST:.2e} in magnitude, "
            f"but is {value!r}."
        )
    return _plain(value)


def widened(value):
    """A JAX number in float32 or better, and any other as it is."""
    narrow = isinstance(value, jax.Array) and value.dtype not in WIDE
    return value.astype(jnp.float32) if narrow else value


def is_inside(
    value, low=-math.inf, high=math.inf, *, above: bool = False, below: bool = False
) -> Any:
    """Whether a traced number is finite and in the range that ``number`` is given.

    True if the number is known, because it has been checked already.
    """
    if not isinstance(value, jax.Array):
        return True
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(jnp.float32)
    over = value > low if above else value >= low
    under = value < high if below else value <= high
    return jnp.isfinite(value) & over & under


def known(name: str, value, *bounds, **options) -> Any:
    """Like :func:`number`, for one that must not be traced. Returns a Python number."""
    if isinstance(value, Tracer):
        raise ValueError(f"{name} must be a static number, but is {value!r}.")
    value = number(name, value, *bounds, **options)
    return float(value) if isinstance(value, jax.Array) else value


def integer(
    name: str, value, low=-math.inf, high=math.inf, *, traced: bool = False
) -> Any:
    """``value`` as an integer in [low, high]. With ``traced``, also a JAX one."""
    whole = _is_scalar_of(value, (jnp.integer,))
    if whole and traced and isinstance(value, jax.Array):
        return value
    if not whole or isinstance(value, jax.Array) or not low <= int(value) <= high:
        floor = "" if low == -math.inf else f" of at least {low}"
        ceiling = "" if high == math.inf else f", of at most {high}"
        raise ValueError(
            f"{name} must be an integer{floor}{ceiling}, but is {value!r}."
        )
    return int(value)


def size(name: str, value, low: int) -> int:
    """``value`` as an integer of at least ``low``. int32 must also hold one more."""
    return integer(name, integer(name, value, low), high=2**31 - 2)


def rate(name: str, value) -> Any:
    """``value``, refused unless it is a number of at least 0 or a schedule."""
    if not callable(value) or isinstance(value, type):
        if not is_real(value):
            raise ValueError(
                f"{name} must be a number or a schedule, but is {value!r}."
            )
        found = number(name, value, 0)
        # As it came: sm3 multiplies by it in the dtype of the gradients.
        return _with_sign(value if isinstance(value, jax.Array) else found)
    if not _takes(value, 1):
        raise ValueError(
            f"{name} must be a function of the step alone if it is a schedule, but is "
            f"{value!r}."
        )

    def scheduled(count):
        found = value(count)
        # A Decimal or a Fraction is a number that JAX does not take.
        known = isinstance(found, numbers.Number) and not isinstance(found, bool)
        if known and not is_real(found) or jnp.iscomplexobj(found):
            raise ValueError(
                f"{name} must return a real number, but returned {found!r}."
            )
        return _with_sign(found)

    return scheduled


def _with_sign(value):
    """A rate of unsigned integers as float32: it has no negative, and steps go down."""
    if isinstance(value, jax.Array) and jnp.isdtype(value.dtype, "unsigned integer"):
        return value.astype(jnp.float32)
    return value


def _takes(function, count: int) -> bool:
    """Whether a function takes ``count`` arguments, as far as Python knows.

    A decorator may take other arguments than the function that it wraps.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # some built-in functions have none
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def learning_rate(value) -> Any:
    return rate("learning_rate", value)


def flag(name: str, value) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, but is {value!r}.")


def function(name: str, value, count: int) -> None:
    """Refuse what is neither None nor a function of ``count`` arguments."""
    if not (value is None or callable(value)):
        raise ValueError(f"{name} must be a function, but is {value!r}.")
    if value is not None and not _takes(value, count):
        many = "one argument" if count == 1 else f"{count} arguments"
        raise ValueError(f"{name} must be a function of {many}, but is {value!r}.")


def deleted(leaf) -> str | None:
    """What is wrong with an array of a state that was donated to an earlier step."""
    known = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if not (known and leaf.is_deleted()):
        return None
    return (
        "was deleted, as donated arrays are: pass the state that the step has returned."
    )


def mask(name: str, value) -> None:
    """Refuse what is neither None, nor a function, nor a tree of booleans."""
    if value is None or is_function(value):
        return function(name, value, 1)
    leaves = jax.tree.leaves(value)
    if not all(map(_is_truth, leaves)):
        raise ValueError(
            f"{name} must be None, a tree of booleans or a function that makes one, "
            f"but is {value!r}."
        )


def is_function(mask) -> bool:
    """Whether a mask is a function, and not a tree that can be called, as a model."""
    return callable(mask) and [leaf is mask for leaf in jax.tree.leaves(mask)] == [True]


def _is_truth(leaf) -> bool:
    return isinstance(leaf, bool) or _is_scalar_of(leaf, (jnp.bool_,))


def dtype(name: str, value) -> None:
    """Refuse what is neither None nor a real floating-point dtype."""
    try:
        floating = value is None or (
            not _is_array(value)
            and jnp.issubdtype(found := jnp.dtype(value), jnp.floating)
            and _computes(found)
            and found.isnative
        )
    except (TypeError, ValueError):
        floating = False
    if not floating:
        raise ValueError(
            f"{name} must be None or a real floating-point dtype of 16 to 64 bits in "
            f"this machine's byte order, but is {value!r}."
        )


def _is_array(value) -> bool:
    """Whether it is an array. It has a dtype, but is not meant as one."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def stored_dtype(name: str, value, allowed):
    """A dtype among the names ``allowed``, or None."""
    if value is None:
        return None
    try:
        kind = None if _is_array(value) else jnp.dtype(value)
        found = kind.name if kind is not None and kind.isnative else None
    except (TypeError, ValueError):
        found = value
    if not isinstance(found, str) or found not in allowed:
        options = ", ".join(map(repr, (None, *allowed)))
        raise ValueError(f"{name} must be one of {options}, but is {value!r}.")
    return jnp.dtype(found)


def choice(name: str, value, allowed) -> None:
    """Refuse what is not one of the strings, or None, that are ``allowed``."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}, but is {value!r}.")


def transformation(name: str, value) -> None:
    """Refuse what is not an optax transformation."""
    methods = [getattr(value, name, None) for name in ("init", "update")]
    if isinstance(value, type) or not all(map(callable, methods)):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation, whose init and update "
            f"are functions, but is of type {type(value).__name__}."
        )


def sharding(name: str, value) -> None:
    """Refuse what is not a sharding."""
    if not isinstance(value, jax.sharding.Sharding):
        raise ValueError(f"{name} must be a jax.sharding.Sharding, but is {value!r}.")


def state(found, kind: Any) -> None:
    """Refuse the state of another optimizer."""
    if not isinstance(found, kind):
        buffered = "buffer" in kind._fields
        rest = ", or was made with a topc or kappa of 0" if buffered else ""
        why = f"it belongs to another optimizer{rest}"
        raise ValueError(
            f"state must be a {kind.__name__}, but is of type {type(found).__name__}: "
            f"{without_target(found) or why}."
        )
    if "count" in kind._fields:
        count(found.count)


def without_target(found) -> str:
    """What went wrong if a state was restored without a target, else nothing.

    ``optax.chain`` passes the keys of a dict on.
    """
    if isinstance(found, (dict, list, str)):
        return "it was restored without the structure of a state from init"
    return ""


def without_buffer(has_one: bool) -> None:
    """Refuse the buffer of a state where a topc or kappa of 0 keeps none."""
    if has_one:
        raise ValueError(
            "topc or kappa is 0, which keeps no buffer, but the state has one: pass "
            "the arguments that it was made with, or make a new one with init."
        )


def leaf_name(path: Any) -> str:
    """The name of the leaf at a key path."""
    return jax.tree_util.keystr(path) or "the parameter"


def same_leaves(leaves, treedef, made_for, shapes, why: str = "") -> None:
    """Refuse updates of a structure or of shapes for which the state was not made.

    ``leaves`` are those of the updates, with their paths.
    """
    if treedef != made_for:
        raise ValueError(
            f"updates have the structure {treedef}, but the state was made for "
            f"parameters of the structure {made_for}{why}."
        )
    for (path, leaf), shape in zip(leaves, shapes):
        same_shape(path, leaf.shape, shape, why)


def same_shape(path: Any, found, made_for, why: str = "") -> None:
    """Refuse an update of another shape, which could be broadcast."""
    if found != made_for:
        raise ValueError(
            f"updates have a leaf of shape {found} at {leaf_name(path)}, but the state "
            f"was made for a parameter of shape {made_for}{why}."
        )


def moments(name: str, tree, updates) -> None:
    """Refuse moments of a state, its field ``name``, that do not fit the updates.

    Moments of another shape could be broadcast.
    """
    kept, made_for = jax.tree.flatten(tree)
    arrays(name, kept)
    found, shapes = jax.tree.flatten_with_path(updates), [m.shape for m in kept]
    same_leaves(*found, made_for, shapes, f" ({name} has it)")


def arrays(name: str, leaves) -> None:
    """Refuse leaves of a state, its field ``name``, that are no arrays."""
    for leaf in leaves:
        native(f"An array of the state, in {name},", leaf)
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                f"state has an object of type {type(leaf).__name__} in {name}, but "
                "needs arrays there."
            )


def native(name: str, value) -> None:
    """Refuse an array of NumPy that JAX does not take."""
    if why := foreign(value):
        raise ValueError(
            f"{name} is a NumPy array that JAX does not take, because it is {why}: "
            "fill or convert it first."
        )


def foreign(value) -> str:
    """Why JAX does not take this array of NumPy, or nothing if it is no such array."""
    if isinstance(value, np.ma.MaskedArray):
        return "masked"
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        return f"in another byte order, {value.dtype.str!r}"
    return ""


def same_dtype(name: str, asked, found, allowed) -> None:
    """Refuse arrays of a state that another value of ``name`` made.

    ``asked`` is that value. All dtypes in ``found`` must be in ``allowed``.
    """
    canonical = {jax.dtypes.canonicalize_dtype(dtype) for dtype in allowed}
    if wrong := sorted(dtype.name for dtype in set(found) - canonical):
        asked = None if asked is None else jnp.dtype(asked).name
        raise ValueError(
            f"{name} is {asked!r}, but the state has {', '.join(wrong)} there: pass "
            f"the {name} that it was made with, or make a new state with init."
        )


def wide(name: str, tree) -> None:
    """Refuse arrays of a state that must be float32 or float64 and are not."""
    for leaf in jax.tree.leaves(tree):
        _stored_in(name, leaf, "float32 or float64", lambda dtype: dtype in WIDE)


def count(found) -> None:
    """Refuse a count of steps that is not one number, or is one in under 32 bits."""
    counts("count", found)
    if shape := jnp.shape(found):
        raise ValueError(
            f"state has a count of shape {shape}, but needs one number: a batched "
            "state must be updated under the jax.vmap or jax.pmap that made it."
        )


def counts(name: str, array) -> None:
    """Refuse an array of a state that counts without a sign or in under 32 bits."""

    def fits(dtype):
        return jnp.issubdtype(dtype, jnp.signedinteger) and dtype.itemsize >= 4

    _stored_in(name, array, "int32", fits)


def _stored_in(name, leaf, needed, fits):
    """Refuse a leaf of a state whose dtype does not fit."""
    try:
        dtype = None if leaf is None else jnp.result_type(leaf)
    except (TypeError, ValueError):  # no array, or of a dtype that JAX does not have
        dtype = None
    if dtype is None or not fits(dtype):
        known = getattr(leaf, "dtype", type(leaf).__name__)
        found = known if dtype is None else dtype.name
        raise ValueError(
            f"state has {name} in {found}, but needs {needed}: restore it in the dtype "
            "that init gives."
        )


def same(name: str, value: bool, found: bool) -> None:
    """Refuse a state that was made with another value of a flag."""
    if value != found:
        raise ValueError(
            f"{name} is {value}, but the state was made with {name}={found}: pass the "
            "arguments that it was made with, or make a new one with init."
        )


def scalar(name: str, value) -> None:
    """Refuse what a function of the user returned unless it is a real scalar."""
    if is_real(value):
        return
    if isinstance(value, (np.ndarray, jax.Array)):
        what = f"an array of shape {value.shape} and dtype {value.dtype}"
    else:
        what = repr(value)
    raise ValueError(f"{name} must return a real scalar, but returned {what}.")


def _as_float(value) -> float:
    try:
        # An explicit transfer, which jax.transfer_guard allows.
        return float(jax.device_get(value))
    except OverflowError:  # a Python integer beyond all floats
        return math.inf if value > 0 else -math.inf


def _plain(value):
    """A static number as Python's own, and a JAX scalar in float32 or better."""
    if isinstance(value, jax.Array):
        return widened(value)
    # Subclasses too, such as the numbers of some configuration files.
    whole = _is_scalar_of(value, (jnp.integer,))
    value = int(value) if whole else float(value)
    # Without x64, JAX takes no integer of more than 32 bits.
    return value if abs(value) < 2**31 else _as_float(value)
