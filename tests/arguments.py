"""Good and bad values of every argument of every optimizer and building block.

To add an argument, add a line to ``ARGUMENTS``.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import memoptax

FACTORIES = [
    memoptax.critical_gradients,
    memoptax.sgd_c,
    memoptax.rmsprop_c,
    memoptax.adam_c,
    memoptax.adamw_c,
    memoptax.critical_momenta,
    memoptax.scale_by_adam_cm,
    memoptax.sgd_cm,
    memoptax.adam_cm,
    memoptax.adamw_cm,
    memoptax.scale_by_sm3,
    memoptax.sm3,
    memoptax.scale_by_sm3_cm,
    memoptax.sm3_cm,
]
BUFFERED: list[Callable[..., Any]] = [
    f for f in FACTORIES if "topc" in inspect.signature(f).parameters
]


def alike(*values):
    """These numbers as Python, NumPy and JAX numbers."""
    kinds = [float, np.float32, np.array, jnp.asarray, jnp.bfloat16]
    return [kind(value) for value in values for kind in kinds]


def two_arguments(count, total):
    return 0.1 * count / total


def completed(function):
    """A function that a decorator gives one more argument, as gin does."""

    @functools.wraps(function)
    def with_one_more(*arguments):
        return function(*arguments, 2)

    return with_one_more


NO_NUMBERS = [
    jnp.int4(1),  # JAX does not compute with these two next to float32
    jnp.float8_e4m3fn(0.5),
    "x",
    True,
    1j,
    [0.5],
    {},
    np.array([0.5, 0.5]),
    jnp.array([0.5, 0.5]),
    np.bool_(True),
    jnp.array(True),
    np.complex64(1),
    jnp.array(1j),
    np.array("x"),
    *alike(math.nan, math.inf, -math.inf),
    # Infinite in float32, so that eps would divide by infinity.
    *(kind(x) for x in (1e39, -1e39) for kind in (float, np.float64, np.array)),
]
NO_SCHEDULES = [(x for x in [0.1]), two_arguments, lambda: 0.1]


def numbers(*outside, good=0.5):
    """Good and bad values of a number. ``outside`` are out of its range."""
    return alike(good), [*NO_NUMBERS, None, lambda count: 0.5, *alike(*outside)]


def optional(*outside):
    good, bad = numbers(*outside)
    return [None, *good], [value for value in bad if value is not None]


def rates():
    schedules = [optax.constant_schedule(0.5), jax.jit(lambda count: 0.5)]
    good = [*alike(0.0, 0.5), *schedules, lambda count=0, power=2: 0.5]
    good.append(completed(two_arguments))
    return good, [*NO_NUMBERS, None, *alike(-5.0), *NO_SCHEDULES]


FLAGS = [True, False, np.bool_(True)], ["x", None, 1, 0.0, [], jnp.array(True)]
MASKS = (
    [
        *(None, {"w": True}, {"w": np.bool_(True)}),
        *(lambda p: {"w": True}, completed(lambda p, _: {"w": True})),
    ],
    [
        *("x", {"w": "x"}, {"w": 1}, 1, [0.5], {"w": np.array([True, False])}),
        two_arguments,
    ],
)
STORAGE = (
    [None, "int8", "bfloat16", jnp.float16, np.float32],
    ["int4", "x", 3, ["float32"], jnp.int32, {}, "complex64", np.array([1.0, 2.0])],
)
FLOATING = (
    [None, "bfloat16", jnp.float16, np.dtype("float32")],
    [
        *("int8", "x", 3, ["float32"], jnp.int32, {}, "complex64", np.array([1.0, 2])),
        *("float8_e4m3fn", np.longdouble, ">f4"),
    ],
)
PRIORITIES = (
    [None, optax.tree.norm, completed(optax.tree.norm)],
    ["x", 2, [], jnp.array(1.0), two_arguments],
)
BETA = numbers(-0.1, 1.0, 5.0)

ARGUMENTS = {
    "learning_rate": rates(),
    "weight_decay": rates(),
    "momentum": optional(-0.1, 1.5),
    "dampening": numbers(-3.0, 1.5),
    "nesterov": FLAGS,
    "centered": FLAGS,
    "amsgrad": FLAGS,
    "skip_first": FLAGS,
    "synced": FLAGS,
    "accumulator_dtype": FLOATING,
    "mu_dtype": STORAGE,
    "momentum_dtype": STORAGE,
    "buffer_dtype": STORAGE,
    "b1": BETA,
    "b2": BETA,
    "alpha": numbers(-0.1, 1.5),
    "beta": optional(0.0, 1.0, 2.0, -0.5),
    "eps": numbers(-1.0),
    "eps_root": numbers(-5.0),
    "initial_scale": numbers(-1.0),
    "mask": MASKS,
    "decay": numbers(-0.1, 1.5),
    "kappa": numbers(),
    "fifo_probability": optional(-0.1, 1.5),
    "priority_fn": PRIORITIES,
    "aggr": (
        [
            *("sum", "mid", "mean", lambda u, mean, fill: u),
            completed(lambda u, mean, fill, _: u),
        ],
        ["x", None, {}, [], 1, ["sum"], np.array(["sum"]), two_arguments],
    ),
    "topc": (
        [None, 0, 1, np.int64(3), np.uint8(3), np.array(3)],
        [
            *(-1, 2.5, "x", True, [3], np.array([3, 3]), np.float32(3), 3j),
            *(jnp.array(3), 2**63, 10**400),
        ],
    ),
    "seed": (
        [0, -1, np.int64(3), np.array(3), jnp.array(3), 2**40],
        [1.5, "x", None, True, [3], np.array([3, 3]), jnp.array(1.0), 10**30],
    ),
    "holding": ([None, "read", "sum"], ["x", 1, [], {}, True]),
    "variant": (["I", "II"], ["III", ["I"], None, 2, {}]),
    "cover": (
        [None, memoptax.covers.rows, [(1, 1)], [(np.int64(1), 1)], ((1, 1),)],
        [
            *("x", 4, [4], [["x"]], [(1.5, 1)], [(-1, 1)], [(True, 1)], {}),
            *(jnp.ones(2), len),
        ],
    ),
}
ANY_SIZE = {"learning_rate", "weight_decay", "eps", "eps_root", "kappa"}
# Only these dtypes for SM3's accumulators.
WIDE = ([None, "float32", jnp.float32], [*FLOATING[1], "bfloat16"])


def arguments_of(factory):
    """The name, good values and bad values of every argument."""
    sm3 = factory in (memoptax.sm3, memoptax.scale_by_sm3)
    for name in inspect.signature(factory).parameters:
        good, bad = ARGUMENTS[name]
        if sm3 and name == "accumulator_dtype":
            good, bad = WIDE
        if sm3 and name == "momentum":
            bad = [*bad, *alike(1.0)]
        yield name, good, bad


def build(factory, **options):
    if "learning_rate" in inspect.signature(factory).parameters:
        options = {"learning_rate": 0.1, **options}
    return factory(**options)
