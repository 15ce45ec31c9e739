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


def state(found, kind: type) -> None:
    """Refuse the state of another optimizer."""
    if not isinstance(found, kind):
        raise ValueError(
            f"state must be a {kind.__name__}, but is a {type(found).__name__}: it "
            "belongs to another optimizer."
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
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must return a real scalar, but returned an array of shape {shape} "
            f"and dtype {dtype}."
        )
