"""What is expected of a configuration, from the oracles and their bounds.

A replay yields, step by step, what is expected of every leaf: a number (NaN where the
update must not be finite) and its bound.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import error_bars
import error_bars_sm3
import oracle
import oracle_sm3_cm
from error_bars import Precision, stored_error
from property_configs import COVERS, FUNCTIONS, named
from property_streams import ROWS


def _sum_of_norms(tree):
    """The oracle's rule over the whole range of float64."""
    return sum(math.hypot(*x.ravel()) for x in tree.values())


def _largest_of(tree):
    return max((np.max(np.abs(x), initial=0) for x in tree.values()), default=0.0)


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
            momenta: dict[str, Any] = options | dict(
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
                self.transform: Any = self.alone.momenta
            else:
                self.transform = oracle.CriticalMomenta(numbers["b1"], **momenta)
        else:
            self.transform = oracle.CriticalGradients(**options)
        self.held = error_bars.Held(self.transform.memory, self.p, summed)
        self.bases: dict[str, Any] = {name: self._base(name) for name in names}
        self.trace = {name: self._trace() for name in names}
        self.m_error = {n: np.zeros(s) for n, s in config.shapes.items()}
        start = {n: np.full(s, 0.5) for n, s in config.shapes.items()}
        self.params = {n: (x, np.zeros_like(x)) for n, x in start.items()}
        self.rate, self.wd = get("learning_rate"), get("weight_decay", 0.0)

    def _base(self, name):
        p, numbers, static = self.p, named(self.numbers), self.config.static
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
        # The buffer of a whole optimizer hands its base float32.
        if self.config.half and (self.cm or self.rate is None):
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
        numbers = named(numbers)
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
