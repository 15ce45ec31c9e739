"""Checks of arguments, made once when an optimizer is built.

A number may be a tracer (``optax.inject_hyperparams``): only concrete ones are looked
at, and only by these functions.
"""

import math
import numbers

import jax.numpy as jnp
import numpy as np


def concrete(value) -> bool:
    """Whether ``value`` is a plain number, so that Python may compare it."""
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, bool)


def is_zero(value) -> bool:
    return concrete(value) and value == 0


def number(name: str, value, low=-math.inf, high=math.inf, *, below=False) -> None:
    """Refuse a concrete ``value`` outside [low, high], or [low, high) if ``below``."""
    if callable(value):
        raise ValueError(
            f"{name} must be a number, but is the function {value!r}; for a schedule, "
            "build the optimizer with optax.inject_hyperparams."
        )
    if isinstance(value, (bool, str, type(None))):
        raise ValueError(f"{name} must be a number, but is {value!r}.")
    if not concrete(value):
        return
    value = float(value)
    inside = low <= value < high if below else low <= value <= high
    if not (inside and math.isfinite(value)):
        bracket = ")" if below or high == math.inf else "]"
        left = "(" if low == -math.inf else "["
        raise ValueError(
            f"{name} must lie in {left}{low}, {high}{bracket}, but is {value}."
        )


def learning_rate(value) -> None:
    """Refuse a negative learning rate; schedules and tracers are taken as they are."""
    if not callable(value):
        number("learning_rate", value, 0)


def flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, but is {value!r}.")


def dtype(name: str, value) -> None:
    """Refuse what is neither None nor a real floating-point dtype."""
    try:
        floating = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            f"{name} must be None or a real floating-point dtype, but is {value!r}."
        )


def dtype_name(value):
    """The name of a dtype; what is none is returned as it is."""
    try:
        return jnp.dtype(value).name
    except TypeError:
        return value


def choice(name: str, value, allowed) -> None:
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}, but is {value!r}.")
