"""Adversarial streams through many configurations, against the oracles.

Each family of optimizers has a table of configurations, drawn once from a seed. Every
configuration is compiled once per process, with all numbers traced, and hypothesis
chooses the configuration, the numbers and the stream: exact ties, zeros of both signs,
NaN and infinity, subnormal numbers, and entries from 1e-37 to 1e37. ``error_bars`` says
how far a result may be from the oracle's.

Where two keys are so close that rounding decides between them, or a square so close to
the largest number, the comparison ends with that step. The state must be a valid one
even then.
"""

import collections
import copy
import dataclasses
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

import memoptax

import error_bars
import error_bars_sm3
import oracle
import oracle_sm3_cm
from error_bars import Precision, Unsure, stored_error

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
        # The oracle's first slot of the released code is not rounded with m.
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


# A traced number of each name. κ is rounded, for a subnormal one is 0 to XLA.
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


def _named(numbers):
    """The numbers under the names of the arguments."""
    return {name.split()[-1]: x for name, x in numbers.items()}


# Streams

KINDS = (
    *("pattern", "repeat") * 3,
    *(
        "plain",
        "zero",
        "lonely",
        "mixed",
        "by leaf",
        "subnormal",
        "huge",
        "edge",
        "bad",
    ),
)


def stream_of(config, kinds, seed, whole, shapes=None):
    """A gradient per step, each a dict of arrays in the dtype of the parameters.

    Sizes are powers of two, over the ``whole`` range or near 1.
    """
    shapes = config.shapes if shapes is None else shapes
    rng, steps = np.random.default_rng(seed), []
    info = jnp.finfo(config.dtype)
    limit = min(2.0 ** (config.reach + 1), float(info.max) / 64)
    for kind in kinds:
        drawn = _gradient(rng, kind, shapes, config.reach, steps, whole, info)
        steps.append({name: np.clip(g, -limit, limit) for name, g in drawn.items()})
        if kind == "bad":
            _spoil(rng, steps[-1])
    return {
        name: np.stack([step[name] for step in steps]).astype(jnp.dtype(config.dtype))
        for name in shapes
    }


def _gradient(rng, kind, shapes, reach, steps, whole, info):
    low, high = (-reach, reach) if whole else (-2, 2)

    def power(shape=()):
        return 2.0 ** rng.integers(low, high + 1, shape)

    one = power()
    normal = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if kind == "repeat" and steps:
        # An earlier gradient, or half or twice of it: norms that are equal, or will be.
        earlier, factor = steps[rng.integers(len(steps))], 2.0 ** rng.integers(-1, 2)
        return {name: factor * rng.choice([1, -1]) * g for name, g in earlier.items()}
    if kind == "edge" and reach > 64:  # the sum of two squares overflows in float32
        return {n: 1.5 * 2.0**63 * _pattern(rng, shape) for n, shape in shapes.items()}
    if kind in ("pattern", "edge"):
        one = 2.0 ** rng.integers(-2, 3) if rng.random() < 0.8 else one
        return {name: one * _pattern(rng, shape) for name, shape in shapes.items()}
    if kind == "zero":
        return {name: np.copysign(0.0, x) for name, x in normal.items()}
    if kind == "lonely":
        alone = {name: np.copysign(0.0, x) for name, x in normal.items()}
        _put(rng, alone, one)
        return alone
    if kind == "mixed":
        return {name: x * power(x.shape) for name, x in normal.items()}
    if kind == "by leaf":
        return {name: x * power() for name, x in normal.items()}
    if kind == "subnormal":
        tiny = float(info.smallest_normal)
        return {
            n: np.copysign(tiny * rng.random(x.shape), x) for n, x in normal.items()
        }
    if kind == "huge" and reach > 60:
        one = 2.0 ** rng.integers(60, reach + 1)
    return {name: x * one for name, x in normal.items()}


def _pattern(rng, shape):
    """Entries of 0 and ±1, whose norm is exactly 0, 1 or 2."""
    flat = np.zeros(int(np.prod(shape)))
    ones = rng.choice([n for n in (0, 1, 1, 4) if n <= flat.size])
    flat[rng.permutation(flat.size)[:ones]] = rng.choice([1, -1], ones)
    return flat.reshape(shape)


def _spoil(rng, step):
    _put(rng, step, rng.choice([np.nan, np.inf, -np.inf]))


def _put(rng, step, value):
    names = [name for name, g in step.items() if g.size]
    if names:
        name = rng.choice(names)
        flat = step[name].ravel()
        flat[rng.integers(flat.size)] = value
        step[name] = flat.reshape(step[name].shape)


ROWS, WIDTH, TOUCHED = 6, 3, 4


def rows_of(seed, config, kinds, whole):
    """Ids (also negative ones, and some outside of the table) and values per step."""
    rng = np.random.default_rng([seed, 1])
    ids = rng.integers(-ROWS - 1, ROWS + 1, (len(kinds), TOUCHED))
    shapes = {"t": (TOUCHED, WIDTH)}
    values = stream_of(config, kinds, seed, whole, shapes)["t"]
    return ids.astype(np.int32), values


@st.composite
def cases(draw, configs):
    config = draw(st.sampled_from(configs))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=STEPS, max_size=STEPS))
    numbers = {name: draw(NUMBERS[name]) for name in config.numbers}
    return config, numbers, kinds, draw(st.integers(0, 2**32 - 1)), draw(st.booleans())


# The package


def _joined(update, mean, fill):
    return update + mean / 2


def _dropped(update, mean, fill):
    return mean


def _largest(tree):
    sizes = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.maximum, sizes, jnp.zeros((), jnp.float32))


def _sum_of_norms(tree):
    """The oracle's rule over the whole range of float64."""
    return sum(math.hypot(*x.ravel()) for x in tree.values())


def _largest_of(tree):
    return max((np.max(np.abs(x), initial=0) for x in tree.values()), default=0.0)


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


def build(config, numbers):
    static = dict(config.static)
    for key in ("aggr", "priority_fn"):
        if key in static:
            static[key] = FUNCTIONS.get(static[key], static[key])
    if "cover" in static:
        static["cover"] = functools.partial(_cover_of, static["cover"])
    return getattr(memoptax, config.name)(**static, **_named(numbers))


def _cover_of(cover, path, leaf):
    if jax.tree_util.keystr(path) == "['t']":
        cover = "rows"
    return COVERS[cover](path, leaf)


@functools.cache
def params_of(config):
    dtype = jnp.dtype(config.dtype)
    shapes = dict(config.shapes) | ({"t": (ROWS, WIDTH)} if config.sparse else {})
    return {name: np.full(shape, 0.5, dtype) for name, shape in shapes.items()}


@functools.cache
def compiled(config):
    """All updates of a stream, the last parameters and the last state.

    A gradient that is not finite reaches the buffer alone, and leaves the state of
    optax's transformations behind it. Updates that are not finite are not applied.
    """

    def run(params, stream, rows, numbers):
        tx = build(config, numbers)

        def body(carry, step):
            params, state = carry
            gradient, rows = step
            fine = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient)]
            fine = functools.reduce(jnp.logical_and, fine, True)
            if config.sparse:
                ids, values = rows
                table = BCOO((values, ids[:, None]), shape=(ROWS, WIDTH))
                gradient = gradient | {"t": table}
            updates, new = tx.update(gradient, state, params)
            if config.family == "critical gradients" and isinstance(new, tuple):
                new = _behind(config, fine, new, state)
            if config.sparse:
                table = updates.pop("t")
                rows = table.indices[:, 0], table.data
            applied = {
                name: jnp.where(fine & jnp.isfinite(u), p + u, p).astype(p.dtype)
                for (name, u), p in zip(updates.items(), map(params.get, updates))
            }
            return (params | applied, new), (updates, rows)

        start = params, tx.init(params)
        (params, state), (updates, rows) = jax.lax.scan(
            body, start, (stream, rows), length=STEPS
        )
        return updates, rows, params, state

    return jax.jit(run)


def _behind(config, fine, new, old):
    if config.name == "critical_gradients":
        return new
    kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new[1:], old[1:])
    return (new[0], *kept)


@functools.cache
def concrete(config):
    """The optimizer with numbers that are known, for its structure alone."""
    return build(config, dict.fromkeys(config.numbers, 0.5))


# The oracles. A replay yields, step by step, what is expected of every leaf: a number
# (NaN where the update must not be finite) and its bound.


class Critical:
    """The oracle of a buffer and what stands behind it."""

    def __init__(self, config, numbers, summed):
        self.config, self.numbers, self.p = config, numbers, config.arithmetic
        static, get = config.static, numbers.get
        self.cm = config.family == "critical momenta"
        stored = static["buffer_dtype"] or (config.dtype if config.half else None)
        rule = _largest_of if static["priority_fn"] else _sum_of_norms
        aggr = FUNCTIONS.get(static["aggr"], static["aggr"])
        options = dict(
            topc=static["topc"],
            decay=numbers["decay"],
            kappa=numbers["kappa"],
            aggr=aggr,
            synced=static["synced"],
            priority_fn=rule,
            buffer_dtype=stored,
        )
        self.fifo = static["fifo_probability"] == 1.0
        self.squares = config.name in ("adam_cm", "adamw_cm", "sm3_cm")
        self.first = bool(static.get("skip_first")) and numbers["kappa"] != 0
        names = list(config.shapes)
        self.boxes = {
            name: [
                tuple(max(b, 1) for b in box)
                for box in COVERS[static.get("cover")]((), np.empty(shape))
            ]
            for name, shape in config.shapes.items()
        }
        if self.cm:
            momenta = options | dict(
                skip_first=self.first, mu_dtype=static.get("mu_dtype")
            )
            if config.name == "sm3_cm":
                self.alone = oracle_sm3_cm.SM3Cm(
                    self.boxes,
                    config.shapes,
                    b1=numbers["b1"],
                    b2=numbers["b2"],
                    eps=numbers["eps"],
                    **momenta,
                )
                self.transform = self.alone.momenta
            else:
                self.transform = oracle.CriticalMomenta(numbers["b1"], **momenta)
        else:
            self.transform = oracle.CriticalGradients(**options)
        self.held = error_bars.Held(self.transform.memory, self.p, summed)
        self.bases = {name: self._base(name) for name in names}
        self.trace = {name: self._trace() for name in names}
        self.m_error = {n: np.zeros(s) for n, s in config.shapes.items()}
        start = {n: np.full(s, 0.5) for n, s in config.shapes.items()}
        self.params = {n: (x, np.zeros_like(x)) for n, x in start.items()}
        self.rate, self.wd = get("learning_rate"), get("weight_decay", 0.0)

    def _base(self, name):
        p, numbers, static = self.p, _named(self.numbers), self.config.static
        own = {k: numbers[k] for k in ("alpha", "b1", "b2", "eps") if k in numbers}
        kind = self.config.name
        if kind == "rmsprop_c":
            base = error_bars.Rmsprop(p, centered=static["centered"], **own)
        elif kind in ("adam_c", "adamw_c"):
            own |= {"amsgrad": static["amsgrad"], "mu_dtype": static["mu_dtype"]}
            base = error_bars.Adam(p, **own)
        elif kind in ("adam_cm", "adamw_cm"):
            return error_bars.Adam(p, amsgrad=static["amsgrad"], **own)
        elif kind == "sm3_cm":
            return error_bars.Covered(p, self.alone, name)
        else:
            return None
        return error_bars.ByEntry(base, p) if self.config.entrywise else base

    def _trace(self):
        numbers = self.numbers
        if "momentum" not in numbers:
            return None
        rule = [numbers["momentum"], self.config.static.get("nesterov", False)]
        rule.append(numbers.get("dampening", 0.0))
        trace = error_bars.Linear(lambda: oracle.Sgd(*rule), self.p)
        return error_bars.OfFinite(trace) if self.config.entrywise else trace

    def step(self, grads):
        """What is expected of this step. Afterwards `sure` says whether to go on."""
        held, transform = self.held, self.transform
        keys = transform.memory.keys(grads)
        finite, self.sure = oracle.all_finite(grads), True
        if self.cm and not self._sound(grads):
            return {
                n: (np.full_like(g, np.nan), np.zeros_like(g)) for n, g in grads.items()
            }
        self.sure = not any(
            [held.unsure(g, key, grads, self.fifo) for g, key in keys.items()]
        )
        values, errors = grads, {n: self.p.lost(g) for n, g in grads.items()}
        if self.cm:
            values, errors, offered = self._momenta(grads, errors)
        else:
            offered = {n: self._slot_error(g, errors[n]) for n, g in grads.items()}
        bounds = {
            name: held.joined(group, name, values[name], errors[name])
            for group in keys
            for name in group
        }
        if self.config.name == "sm3_cm":
            self.alone.t += 1
        before = held.accepted()
        joined = transform.step(grads, fifo=self.fifo)
        held.insert(before, offered)
        if self.config.half:
            joined, bounds = self._in_half(joined, bounds)
        saved = None if finite else copy.deepcopy((self.bases, self.trace, self.params))
        found = {
            name: self._behind(name, grads[name], joined[name], bounds[name])
            for name in grads
        }
        if saved is not None:
            self.bases, self.trace, self.params = saved
        return found

    def families(self):
        """The accumulators of every leaf, and their bounds."""
        return {name: base.numbers() for name, base in self.bases.items()}

    def _sound(self, grads):
        if not oracle.all_finite(grads):
            return False
        limit = self.p.largest
        if self.squares:
            limit = np.sqrt(limit) / (2 * (1 + abs(self.numbers["kappa"])))
        within = self.p._replace(largest=limit)
        return not any(within.overflows(np.linalg.norm(g)) for g in grads.values())

    def _momenta(self, grads, small):
        """The momenta of this step, their bounds, and those of what is offered."""
        transform, b1 = self.transform, self.numbers["b1"]
        if transform.taken == 0 and self.first:
            offered = {n: self._slot_error(g, small[n]) for n, g in grads.items()}
            zeros = {name: np.zeros_like(g) for name, g in grads.items()}
            return zeros, zeros, offered
        values, errors = {}, {}
        for name, g in grads.items():
            old = transform.m[name] if transform.m else np.zeros_like(g)
            m = b1 * old + (1 - b1) * g
            size = b1 * np.abs(old) + (1 - b1) * np.abs(g)
            off = b1 * self.m_error[name] + self.p.rounding(size)
            off = off + (1 - b1) * small[name]
            errors[name] = stored_error(m, off, transform.mu_dtype)
            values[name] = oracle.stored(m, transform.mu_dtype)
        self.m_error = errors
        offered = {n: self._slot_error(m, errors[n]) for n, m in values.items()}
        return values, errors, offered

    def _slot_error(self, x, error):
        finite = np.where(np.isfinite(x), x, 0)
        return stored_error(finite, error, self.transform.memory.buffer_dtype)

    def _in_half(self, values, errors):
        dtype = self.config.dtype
        bounds = {n: stored_error(x, errors[n], dtype) for n, x in values.items()}
        return {n: oracle.stored(x, dtype) for n, x in values.items()}, bounds

    def _behind(self, name, g, u, error):
        """The update of one leaf, and the parameters after it."""
        config, p, base = self.config, self.p, self.bases[name]
        param, off = self.params[name]
        decoupled = config.name in ("adamw_c", "adamw_cm", "sm3_cm")
        if not decoupled and self.wd:
            u = u + self.wd * param
            error = (
                error + self.wd * off + p.rounding(np.abs(u) + self.wd * np.abs(param))
            )
        if isinstance(base, error_bars.Adam) and self.cm:
            squared = u, error
            if self.numbers["kappa"] == 0:  # Adam's v is of the gradients
                squared = g, p.lost(g)
            u, error = base.scale(u, error, *squared)
        elif base is not None:
            u, error = base(u, error)
        if (trace := self.trace[name]) is not None:
            u, error = trace(u, error)
        if decoupled and self.wd:
            u = u + self.wd * param
            error = (
                error + self.wd * off + p.rounding(np.abs(u) + self.wd * np.abs(param))
            )
        if self.rate is not None:
            u = -self.rate * u
            error = self.rate * error + p.rounding(np.abs(u))
            if config.half:
                error = stored_error(u, error, config.dtype)
                u = oracle.stored(u, config.dtype)
        u = np.where(np.isfinite(u), u, np.nan)
        applied = np.where(np.isfinite(u), u, 0)
        known = np.where(np.isfinite(u), error, 0)
        off = off + known + p.rounding(np.abs(param) + np.abs(applied))
        self.params[name] = param + applied, off
        return u, error


class Covers:
    """The oracle of SM3."""

    def __init__(self, config, numbers, summed=False):
        del summed
        self.config, self.p = config, config.arithmetic
        self.sure = True
        numbers = _named(numbers)
        rule = {k: numbers[k] for k in ("beta", "eps") if k in numbers}
        # 0 / 0 is 0.
        rule["eps"] = rule["eps"] or 5e-324
        self.rate, self.wd = (
            numbers.get("learning_rate"),
            numbers.get("weight_decay", 0),
        )
        cover = COVERS[config.static["cover"]]
        self.leaves = {
            name: error_bars_sm3.SM3(
                self.p,
                shape,
                [tuple(max(b, 1) for b in box) for box in cover((), np.empty(shape))],
                config.static.get("momentum_dtype"),
                variant=config.static["variant"],
                momentum=numbers.get("momentum"),
                **rule,
            )
            for name, shape in config.shapes.items()
        }
        self.table = error_bars_sm3.RowSparseSM3(
            self.p, Precision.of(config.dtype), ROWS, **rule
        )
        start = {n: np.full(s, 0.5) for n, s in config.shapes.items()}
        self.params = {n: (x, np.zeros_like(x)) for n, x in start.items()}

    def step(self, grads):
        finite = oracle.all_finite(grads)
        found = {name: self._leaf(name, g) for name, g in grads.items()}
        for name, (u, error) in found.items():
            param, off = self.params[name]
            applied = np.where(finite & np.isfinite(u), u, 0)
            known = np.where(finite & np.isfinite(u), error, 0)
            off = off + known + self.p.rounding(np.abs(param) + np.abs(applied))
            self.params[name] = param + applied, off
        return found

    def families(self):
        found = {name: leaf.numbers() for name, leaf in self.leaves.items()}
        return found | ({"t": self.table.numbers()} if self.config.sparse else {})

    def rows(self, ids, values):
        ids = np.where(ids < 0, ids + ROWS, ids)
        inside = (ids >= 0) & (ids < ROWS)
        distinct, u, error = self.table(ids[inside], values[inside])
        if self.rate is not None:
            u, error = -self.rate * u, self.rate * error + self.p.rounding(np.abs(u))
        return distinct, *self._in_half(u, error)

    def _leaf(self, name, g):
        u, error = self.leaves[name](g)
        param, off = self.params[name]
        if self.wd:
            u = u + self.wd * param
            error = error + self.wd * off + self.p.rounding(np.abs(u) + np.abs(param))
        if self.rate is not None:
            u, error = -self.rate * u, self.rate * error + self.p.rounding(np.abs(u))
        return self._in_half(u, error)

    def _in_half(self, u, error):
        if not self.config.half:
            return u, error
        there = np.isfinite(u)
        known = np.where(there, u, 0)
        error = stored_error(known, error, self.config.dtype)
        return np.where(there, oracle.stored(known, self.config.dtype), np.nan), error


ORACLES: dict[str, Callable[..., Any]] = {
    "critical gradients": Critical,
    "critical momenta": Critical,
    "SM3": Covers,
}


# Comparisons


def within(got, want, error, what):
    """``got`` is within the bound, and not finite exactly where ``want`` is not.

    Where the bound is infinite it may be anything.
    """
    got = np.asarray(got, np.float64)
    assert got.shape == np.shape(want), what
    known = np.isfinite(error) | np.isnan(want)
    got, want, error = got[known], want[known], error[known]
    shown = np.isnan(want)
    np.testing.assert_array_equal(np.isfinite(got), ~shown, f"finite: {what}")
    if not np.all(np.abs(got - want)[~shown] <= error[~shown]):
        raise AssertionError(f"{what}: {got} is not within {error} of {want}.")


def same_buffer(buffer, held, names):
    """Keys, ages and counters are the oracle's, and so is every value."""
    groups = [(row, group) for row, group in enumerate(held.memory.buffers)]
    for row, group in groups:
        theirs, fill = held.memory.buffers[group], len(held.memory.buffers[group].keys)
        counts = int(buffer.offered[row]), int(buffer.accepted[row])
        assert counts == (theirs.offered, theirs.accepted)
        ages = [age + 1 for age in theirs.ages]
        empty = [0] * (theirs.topc - fill)
        assert buffer.ages[row].tolist() == ages + empty, group
        p, keys = held.precision, np.array(theirs.keys)
        off = p.rounding(np.abs(keys), 2 * STEPS)
        within(buffer.keys[row, :fill], keys, off, f"keys {group}")
        for entry in range(fill):
            for name in group:
                value = _value(buffer, names.index(name), row, entry)
                want = theirs.values[entry][name]
                error = held.errors[group][entry][name] + p.tiny
                within(value, want, error, f"entry {entry} of {name}")


def _value(buffer, leaf, row, entry):
    slots = jax.tree.leaves(buffer.slots)[leaf]
    scales = None if buffer.scales is None else buffer.scales[leaf]
    if buffer.entries is not None:
        slot = np.argsort(buffer.entries[row])[entry]
        slots, scales = slots[slot], None if scales is None else scales[slot]
    slots = np.asarray(slots, np.float64)
    return slots if scales is None else slots * np.asarray(scales, np.float64)


def check(case):
    """One example: the package against the oracle. Returns the steps compared."""
    config, numbers, kinds, seed, whole = case
    dtype = np.dtype(config.wide)
    numbers = {name: dtype.type(x) for name, x in numbers.items()}
    stream = stream_of(config, kinds, seed, whole)
    rows = rows_of(seed, config, kinds, whole) if config.sparse else None
    with jax.enable_x64(config.wide == "float64"):
        found = compiled(config)(params_of(config), stream, rows, numbers)
        updates, touched, params, state = jax.device_get(found)
        memoptax.check_state(concrete(config), params_of(config), state)
    with np.errstate(all="ignore"):
        return _compare(
            config, numbers, (stream, rows), updates, touched, params, state
        )


def _compare(config, numbers, given, updates, touched, params, state):
    """How many steps were compared."""
    stream, rows = given
    numbers = {name: float(x) for name, x in numbers.items()}
    buffer = _buffer_of(state)
    summed = buffer is not None and buffer.total is not None
    alone = ORACLES[config.family](config, numbers, summed)
    for t in range(STEPS):
        grads = {name: np.asarray(g[t], np.float64) for name, g in stream.items()}
        try:
            expected = alone.step(grads)
            if rows is not None:
                ids, values = rows[0][t], np.asarray(rows[1][t], np.float64)
                _same_rows(alone.rows(ids, values), touched[0][t], touched[1][t], t)
        except Unsure:
            return t
        for name, (want, error) in expected.items():
            within(updates[name][t], want, error, f"update {t} of {name}")
        if not alone.sure:
            return t + 1
    _same_state(config, alone, buffer, params, state)
    return STEPS


def _same_state(config, alone, buffer, params, state):
    names = list(config.shapes)
    if not config.half:
        for name in names:
            within(params[name], *alone.params[name], f"parameter {name}")
    if buffer is not None:
        same_buffer(buffer, alone.held, names)
    if config.name in ("sm3_cm", "sm3", "scale_by_sm3"):
        first = state if hasattr(state, "accumulators") else state[0]
        families = alone.families()
        for name, mine in zip(families, first.accumulators if families else ()):
            for numbers, (want, error) in zip(mine, families[name], strict=True):
                within(np.ravel(numbers), np.ravel(want), np.ravel(error), name)


def _same_rows(expected, ids, values, t):
    """Rows of an update come in any order, each once, with padding outside."""
    distinct, want, error = expected
    inside = ids < ROWS
    order = np.argsort(ids[inside])
    assert ids[inside][order].tolist() == distinct.tolist(), f"rows {t}"
    got = values[inside][order]
    within(got, want.reshape(got.shape), error.reshape(got.shape), f"rows {t}")


def _buffer_of(state):
    def is_buffer(node):
        return hasattr(node, "_fields") and "accepted" in node._fields

    nodes = jax.tree.leaves(state, is_leaf=is_buffer)
    return next((node for node in nodes if is_buffer(node)), None)


def search(family, examples, configs, phases=tuple(hypothesis.Phase)):
    """Try that many examples, and count what was tried.

    The first that fails is made small, and raises.
    """
    counts, used = collections.Counter(), set()

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(configs))
    def examine(case):
        counts["failures"] += 1
        ended = check(case)
        counts["failures"] -= 1
        counts["examples"] += 1
        counts["to the end"] += ended == STEPS
        used.add(case[0])

    examine()
    return {
        "family": family,
        "configurations": len(used),
        **{key: counts[key] for key in ("examples", "to the end", "failures")},
    }
