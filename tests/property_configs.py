"""Configurations: an optimizer, its static options and a tree, and its numbers.

Each family of optimizers has a table of them, drawn once from a seed.
"""

import dataclasses
import functools
import random

import hypothesis.strategies as st
import jax
import jax.numpy as jnp

import memoptax

from error_bars import Precision

STEPS = 16

TREES = {
    "no leaves": {},
    "scalar": {"a": ()},
    "vector": {"a": (5,)},
    "matrix": {"a": (3, 4)},
    "with an empty leaf": {"a": (2,), "b": (0, 3)},
    "small": {"a": (), "b": (2, 3)},
    "of four axes": {"a": (2, 1, 2, 3)},
    "all ranks": {"a": (), "b": (3,), "c": (2, 3), "d": (2, 2, 2), "e": (1, 2, 2, 2)},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Config:
    """What is compiled once: an optimizer with its static options, and a tree."""

    family: str
    name: str
    tree: str
    dtype: str
    static: dict
    numbers: tuple
    sparse: bool = False  # a table with row-sparse gradients is in the tree, as "t"

    @property
    def shapes(self):
        return TREES[self.tree]

    @property
    def half(self):
        return self.dtype in ("bfloat16", "float16")

    @property
    def wide(self):
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def arithmetic(self):
        return Precision.of(self.static.get("accumulator_dtype") or self.wide)

    @property
    def entrywise(self):
        """Whether the second moment is ours, and refuses squares that overflow."""
        return bool(self.static.get("amsgrad") or self.static.get("centered"))

    @property
    def reach(self):
        """Gradients may be as large as two to this power, or as small.

        Beyond it optax's second moments overflow, or float16, or a sum of 16 steps.
        """
        stored = (self.static.get(k) for k in ("buffer_dtype", "mu_dtype"))
        if "float16" in (self.dtype, *stored):
            return 9
        if self.name in ("rmsprop_c", "adam_c", "adamw_c") and not self.entrywise:
            return 50 if self.wide == "float32" else 122
        return 115 if self.name == "sgd_c" else 122


# Tables


@functools.cache
def table(family, count=80):
    """``count`` configurations of a family, the same on every machine."""
    pick = random.Random(f"{family} 0")
    return [CONFIGURE[family](pick) for _ in range(count)]


def _dtype(pick, half=False):
    halves = ["bfloat16", "float16"] if half else []
    return pick.choice(["float32"] * 4 + ["float64"] * 2 + halves)


def _buffer(pick, dtype, tree):
    topc = pick.choice([1, 1, 2, 3, 4, 5, 7])
    ways = [None, "read", "sum"] + ["select"] * (topc == 1)
    static = {
        "topc": topc,
        "holding": pick.choice(ways),
        "synced": tree == "no leaves" or pick.random() < 0.6,
        "aggr": pick.choice(["sum", "mean", "mid", "halved", "dropped"]),
        "buffer_dtype": pick.choice([None] * 4 + ["bfloat16", "float16", "int8"]),
        "priority_fn": pick.choice([None] * 4 + ["largest"]),
        "fifo_probability": pick.choice([None] * 4 + [0.0, 1.0]),
    }
    if dtype == "float64" and pick.random() < 0.2:
        static["buffer_dtype"] = "float32"
    return static


def _tree(pick):
    return pick.choice([*TREES, "small", "small", "all ranks", "vector"])


def _critical_gradients(pick):
    name = pick.choice(
        ["critical_gradients", "sgd_c", "sgd_c", "rmsprop_c", "adam_c", "adamw_c"]
    )
    dtype, tree = (
        _dtype(pick, half=name in ("critical_gradients", "sgd_c")),
        _tree(pick),
    )
    static, numbers = _buffer(pick, dtype, tree), ["decay", "kappa"]
    if name != "critical_gradients":
        numbers.append("learning_rate")
        if dtype in ("float32", "float64"):
            numbers.append("weight_decay")
    if name == "sgd_c" and pick.random() < 0.7:
        numbers += ["momentum", "dampening"]
        static["nesterov"] = pick.random() < 0.4
    if name == "rmsprop_c":
        static["centered"] = pick.random() < 0.5
        numbers += ["eps", "centered alpha" if static["centered"] else "alpha"]
        numbers += ["momentum"] * (pick.random() < 0.5)
    if name.startswith("adam"):
        numbers += ["b1", "b2", "eps"]
        static["amsgrad"] = pick.random() < 0.5
        static["mu_dtype"] = pick.choice([None] * 4 + ["bfloat16", "int8"])
    return Config("critical gradients", name, tree, dtype, static, tuple(numbers))


def _critical_momenta(pick):
    name = pick.choice(
        [
            "critical_momenta",
            "sgd_cm",
            "adam_cm",
            "adam_cm",
            "adamw_cm",
            "sm3_cm",
            "sm3_cm",
        ]
    )
    half = name in ("critical_momenta", "sgd_cm")
    dtype, tree = _dtype(pick, half), _tree(pick)
    static, numbers = _buffer(pick, dtype, tree), ["decay", "kappa", "b1"]
    static["mu_dtype"] = pick.choice([None] * 4 + ["bfloat16", "float16", "int8"])
    if pick.random() < 0.4 and static["mu_dtype"]:
        static["buffer_dtype"] = static["mu_dtype"]
    if name != "critical_momenta":
        numbers.append("learning_rate")
    if name in ("adam_cm", "adamw_cm", "sm3_cm"):
        numbers += ["b2", "eps"]
        # If both dtypes are equal, the oracle does not round the bare gradient that the
        # first step stores.
        static["skip_first"] = static["mu_dtype"] is None and pick.random() < 0.4
    if name in ("adamw_cm", "sm3_cm"):
        numbers.append("weight_decay")
    if name.startswith("adam"):
        static["amsgrad"] = pick.random() < 0.4
    if name == "sm3_cm":
        static["cover"] = pick.choice([None, None, "rows", "full", "whole", "boxes"])
    return Config("critical momenta", name, tree, dtype, static, tuple(numbers))


def _sm3(pick):
    dtype, tree = _dtype(pick, half=True), _tree(pick)
    half, sparse = dtype in ("bfloat16", "float16"), pick.random() < 0.3
    static = {
        "variant": "II" if sparse else pick.choice(["II", "I"]),
        "cover": pick.choice([None, None, None, "rows", "full", "whole", "boxes"]),
    }
    numbers = [] if half else ["learning_rate", "weight_decay"]
    numbers += ["sm3 eps"] + ["beta"] * (pick.random() < 0.5)
    if pick.random() < 0.6:
        numbers.append("sm3 momentum")
        kinds = [None] * 3 + ["bfloat16", "float16", "int8"]
        static["momentum_dtype"] = pick.choice(kinds)
    if dtype == "float64":
        static["accumulator_dtype"] = pick.choice([None, "float32"])
    name = "scale_by_sm3" if half else "sm3"
    return Config("SM3", name, tree, dtype, static, tuple(numbers), sparse)


CONFIGURE = {
    "critical gradients": _critical_gradients,
    "critical momenta": _critical_momenta,
    "SM3": _sm3,
}

FAMILIES = tuple(CONFIGURE)

# Those of the fast suite: with few leaves, because compiling takes most of the time.
SHORT = {
    "critical gradients": (15, 35, 51),
    "critical momenta": (3, 53),
    "SM3": (25, 31, 33),
}


def short(family):
    return [table(family)[k] for k in SHORT[family]]


# A traced number of each name. κ is rounded, because a subnormal one is 0 to XLA.
NUMBERS = {
    "decay": st.sampled_from([1.0, 0.5, 0.0, 0.7, 0.9, 0.99])
    | st.floats(0, 1).map(lambda x: round(x, 4)),
    "kappa": st.sampled_from([1.0, 0.5, 0.0, -1.0])
    | st.floats(-1, 2).map(lambda x: round(x, 3)),
    "learning_rate": st.sampled_from([0.1, 1e-3]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "momentum": st.sampled_from([0.9, 0.5, 0.0, 1.0]),
    "dampening": st.sampled_from([0.0, 0.5, 1.0]),
    "alpha": st.sampled_from([0.9, 0.99, 0.5, 0.0]),
    "centered alpha": st.sampled_from([0.9, 0.99, 0.5]),
    "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
    "b1": st.sampled_from([0.9, 0.5, 0.99, 0.0]),
    "b2": st.sampled_from([0.9, 0.999, 0.5, 0.0]),
    "beta": st.sampled_from([0.9, 0.5, 0.999]),
    "sm3 eps": st.sampled_from([1e-30, 1e-8, 0.0]),
    "sm3 momentum": st.sampled_from([0.9, 0.5, 0.0]),
}


def named(numbers):
    """The numbers under the names of the arguments."""
    return {name.split()[-1]: x for name, x in numbers.items()}


# What a name of an option stands for


def _joined(update, mean, fill):
    return update + mean / 2


def _dropped(update, mean, fill):
    return mean


def _largest(tree):
    sizes = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.maximum, sizes, jnp.zeros((), jnp.float32))


def _boxes(path, leaf):
    """Slices, and blocks of two that do not divide every axis."""
    blocks = memoptax.covers.blocks(2, 2)
    return memoptax.covers.axes(path, leaf) + blocks(path, leaf)


FUNCTIONS = {"halved": _joined, "dropped": _dropped, "largest": _largest}
COVERS = {
    None: memoptax.covers.axes,
    "rows": memoptax.covers.rows,
    "full": memoptax.covers.full,
    "whole": memoptax.covers.whole,
    "boxes": _boxes,
}
