"""How far a run in limited precision may be from the oracle, entry by entry.

The oracles compute in float64. Here a bound e stands beside each of their numbers x:
the package's number is within x ± e. Three things add to a bound:

- arithmetic: every formula has fewer than 8 roundings per step, each relative to the
  sizes of its terms (and not to their sum, which may cancel);
- storage: x ± e may be rounded to another number of 16 bits, or to another 127th;
- numbers below the smallest normal one: XLA's CPU backend takes them for 0.

A base optimizer divides by a root, so small errors of its input can become large ones
of its output. Its second moment is therefore run on the least and on the largest
magnitudes too. All of this is rigorous and has no constant that was fitted.
"""

import copy
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import oracle

_ROUNDINGS = 8

# Factors that multiply a float without rounding, so that equal keys stay equal.
_EXACT = (0, 0.25, 0.5, 1)


class Unsure(Exception):
    """Rounding decides what happens next, so nothing is promised from here on."""


class Precision(NamedTuple):
    """The arithmetic of a run."""

    eps: float
    tiny: float
    largest: float

    @classmethod
    def of(cls, dtype):
        info = jnp.finfo(dtype)
        return cls(float(info.eps), float(info.tiny), float(info.max))

    @property
    def sum_tolerance(self):
        """That of a running sum as a share of the norms held, with 10 % for bounds."""
        return 1.1e-5 * self.eps / Precision.of(np.float32).eps

    def rounding(self, size, steps=1):
        """What ``steps`` formulas may lose to rounding, for terms of this size."""
        return _ROUNDINGS * steps * (self.eps * size + self.tiny)

    def overflows(self, x, error=0.0):
        """Where ``x`` ± ``error`` is beyond all finite numbers."""
        over = np.abs(x) - error > self.largest * (1 + 1e-4)
        if np.any((np.abs(x) + error > self.largest * (1 - 1e-4)) & ~over):
            raise Unsure
        return over

    def lost(self, x):
        """What may be taken for 0 of numbers that the oracle has exactly."""
        return np.where(np.abs(x) < self.tiny, np.abs(x), 0)

    def close(self, key, other, decay, lost):
        """Whether rounding may reverse the order of two keys, or make a tie of them."""
        if key == other:
            return key != 0 and decay not in _EXACT
        nearly = 100 * self.eps * max(key, other) + 4 * self.tiny + lost
        return abs(key - other) <= nearly


# Storage


def stored_error(x, error, dtype):
    """How far the stored x ± ``error`` may be from the stored x."""
    if dtype is None or x.size == 0:
        return error
    if dtype == "int8":
        return _int8_error(x, error)
    # Two conversions, by float32, may round to the other neighbour of a tie.
    error = error + 2.0**-23 * np.abs(x)
    here = oracle.stored(x, dtype)
    there = [oracle.stored(x + sign * error, dtype) for sign in (1, -1)]
    moved = np.maximum(*(np.abs(each - here) for each in there))
    # bfloat16 has the range of float32, but the package has no subnormal numbers of it.
    return moved if dtype == "float16" else moved + Precision.of(dtype).tiny


def _int8_error(x, error):
    """The scale of a row has 17 bits, and may be rounded to the next."""
    last = tuple(range(x.ndim))[-1:]
    largest, most = (np.max(y, axis=last, keepdims=True) for y in (np.abs(x), error))
    small = largest < 2e-36  # rows below 1.5e-36 become 0
    scale = np.where(small, 1, largest) / 127
    drift = 2.0**-16 + most / (127 * scale)
    steps = x / scale
    off = np.abs(steps) * drift + error / scale
    moved = [np.abs(np.rint(steps + d) - np.rint(steps)) for d in (off, -off)]
    flipped = np.maximum(*moved) * scale * (1 + drift)
    most = np.maximum(np.abs(x), np.abs(np.rint(steps)) * scale)
    return error + np.where(small, np.abs(x), most * drift + flipped)


# The buffer


class Held:
    """An oracle's memory, and bounds on the errors of the values that it holds."""

    def __init__(self, memory, precision, summed):
        self.memory, self.precision, self.summed = memory, precision, summed
        self.errors = {}  # group of leaves -> one dict per entry
        self.lost = {}  # group of leaves -> the most that a key has lost

    def joined(self, group, name, x, error):
        """The bound of ``x`` joined with the entries, before it is offered."""
        memory, p = self.memory, self.precision
        buffer = memory.buffers.get(group)
        if buffer is None or not buffer.values or memory.kappa == 0:
            return error
        values = [entry[name] for entry in buffer.values]
        errors = [entry[name] for entry in self.errors[group]]
        kappa = abs(memory.kappa)
        if self.summed:
            norms = sum(np.linalg.norm(value) for value in values)
            arriving = np.linalg.norm(np.where(np.isfinite(x), x, 0))
            off = p.sum_tolerance * norms + 4 * p.eps * arriving
            errors[0] = errors[0] + off
        size = oracle.aggregate(
            np.abs(x), list(map(np.abs, values)), kappa, memory.aggr
        )
        spread = oracle.aggregate(error, errors, kappa, memory.aggr)
        return spread + p.rounding(size)

    def unsure(self, group, key, grads, fifo):
        """Whether rounding may decide on an offer of this ``key``."""
        small = {name: self.precision.lost(grads[name]) for name in group}
        lost = max(self.lost.get(group, 0.0), self.memory.priority_fn(small))
        self.lost[group] = lost
        buffer = self.memory.buffers.get(group)
        if buffer is None or len(buffer.keys) < buffer.topc or fifo:
            return False
        if not np.isfinite(key):
            return False
        least = min(buffer.keys)
        keys = [key, *(k for k in buffer.keys if k != least)]
        return any(self.precision.close(k, least, buffer.decay, lost) for k in keys)

    def accepted(self):
        return {group: b.accepted for group, b in self.memory.buffers.items()}

    def insert(self, before, errors):
        """Note the bounds of what has been accepted since ``before``."""
        for group, buffer in self.memory.buffers.items():
            if buffer.accepted > before.get(group, 0):
                slot = buffer.ages.index(0)
                held = self.errors.setdefault(group, [])
                held[slot : slot + 1] = [{name: errors[name] for name in group}]


# Bases. Each maps an input and its bound to an output and its bound, for one leaf.


class Linear:
    """A base that adds up its inputs with weights of at least 0."""

    def __init__(self, make, precision):
        self.base, self.errors, self.sizes = make(), make(), make()
        self.precision, self.steps = precision, 0

    def __call__(self, u, error):
        self.steps += 1
        size = self.sizes(np.abs(u))
        rounding = self.precision.rounding(size, self.steps)
        return self.base(u), self.errors(error) + rounding


class Rmsprop:
    def __init__(self, precision, alpha, eps, centered):
        self.precision, self.eps, self.steps = precision, eps, 0
        self.base, self.low, self.high, self.error = (
            oracle.Rmsprop(alpha, eps, None, centered) for _ in range(4)
        )

    def __call__(self, u, error):
        self.steps += 1
        out = self.base(u)
        self.error(error)  # its mean is that of the errors
        least, most = _squares(self, self.low, self.high, u, error, "square")
        if self.base.centered:
            off = self.error.mean
            off = off + self.precision.rounding(self.high.mean, self.steps)
            mean, part = np.abs(self.base.mean), self.precision.rounding(1, self.steps)
            most = most - np.maximum(mean - off, 0) ** 2 * (1 - part)
            least = least - (mean + off) ** 2 * (1 + part)

        def direction(numerator, square):
            return numerator / (np.sqrt(np.maximum(square, 0)) + self.eps)

        return out, _furthest(self, out, direction, u, error, least, most)


class Adam:
    """Adam, or its second half with a ``numerator`` from another source."""

    def __init__(self, precision, b1, b2, eps, amsgrad=False, mu_dtype=None):
        self.precision, self.mu_dtype, self.steps = precision, mu_dtype, 0
        self.base, self.low, self.high = (
            oracle.Adam(b1, b2, eps, amsgrad) for _ in range(3)
        )
        self.mean_error = self.size = 0.0

    def __call__(self, u, error):
        b1, p, base = self.base.b1, self.precision, self.base
        self.mean_error = b1 * self.mean_error + (1 - b1) * error
        self.size = b1 * self.size + (1 - b1) * np.abs(u)
        base.m = b1 * base.m + (1 - b1) * u
        off = self.mean_error + p.rounding(self.size, self.steps + 1)
        found = self.scale(base.m, off, u, error)
        if self.mu_dtype is not None:  # the step is taken before m is rounded
            self.mean_error = stored_error(base.m, off, self.mu_dtype)
            base.m = oracle.stored(base.m, self.mu_dtype)
        return found

    def scale(self, numerator, off, u, error):
        self.steps += 1
        out = self.base.scale(numerator, u)
        least, most = _squares(self, self.low, self.high, u, error, "v")
        if self.base.amsgrad:
            self.least = np.maximum(getattr(self, "least", 0.0), least)
            self.most = np.maximum(getattr(self, "most", 0.0), most)
            least, most = self.least, self.most

        def direction(numerator, square):
            self.low.v = self.low.v_max = square
            return self.low.direction(numerator)

        kept = self.low.v
        found = _furthest(self, out, direction, numerator, off, least, most)
        self.low.v = kept
        # optax computes 1 - b ** t in the precision of the state.
        for b in (self.base.b1, self.base.b2):
            part = self.precision.rounding(1 / (1 - b**self.steps))
            found = found + part * np.abs(out)
        return out, found


class Covered:
    """The second moment of sm3_cm, for an ``alone`` of ``oracle_sm3_cm``."""

    def __init__(self, precision, alone, name):
        self.precision, self.alone, self.name, self.steps = precision, alone, name, 0
        central = alone.squares[name]
        self.low, self.high = copy.copy(central), copy.copy(central)

    def __call__(self, u, error):
        self.steps += 1
        out = self.alone.direction(self.name, u)
        p, alone = self.precision, self.alone
        self.low.step(np.maximum(np.abs(u) - error, 0))
        self.high.step(np.abs(u) + error)
        least, most = between(self, self.low.nu, self.high.nu)

        def direction(numerator, nu):
            root = np.sqrt(np.maximum(nu, 0) / (1 - alone.b2**alone.t))
            return numerator / (1 - alone.b1**alone.t) / (root + alone.eps)

        found = _furthest(self, out, direction, u, error, least, most)
        for b in (alone.b1, alone.b2):
            found = found + p.rounding(1 / (1 - b**alone.t)) * np.abs(out)
        return out, found

    def numbers(self):
        """The accumulators, and their bounds."""
        central = self.alone.squares[self.name]
        return accumulators(self, central, self.low, self.high)


def accumulators(bars, central, low, high):
    """Those of three oracles as pairs of a number and its bound."""
    found = []
    for three in zip(central.numbers, low.numbers, high.numbers):
        numbers, least, most = three[0], *between(bars, *three[1:])
        found.append((numbers, np.maximum(most - numbers, numbers - least)))
    return found


def _squares(bars, low, high, u, error, field):
    """The least and the largest second moment."""
    for each, size in (
        (low, np.maximum(np.abs(u) - error, 0)),
        (high, np.abs(u) + error),
    ):
        each(size)
    return between(bars, getattr(low, field), getattr(high, field))


def between(bars, low, high):
    """Both bounds of a sum of squares, with what its steps have rounded."""
    off = [bars.precision.rounding(square, bars.steps) for square in (low, high)]
    return np.maximum(low - off[0], 0), high + off[1]


def _furthest(bars, out, direction, numerator, off, least, most):
    """How far ``out`` may be from what it is at the corners of both bounds.

    A direction rises with its numerator, and falls in magnitude with the square.
    """
    corners = [
        direction(numerator + sign * off, square)
        for sign in (1, -1)
        for square in (least, most)
    ]
    found = np.max([np.abs(corner - out) for corner in corners], axis=0)
    return found + bars.precision.rounding(np.abs(out) + found)


# Numbers of a leaf's entries that stay where a square overflows.
_MEMORY = ("m", "v", "v_max", "mean", "square", "trace")
_MEMORY += ("mean_error", "size", "least", "most")


class ByEntry:
    """A base of ours, which leaves an entry's moments where its square overflows."""

    def __init__(self, base, precision):
        self.base, self.precision = base, precision

    def __call__(self, u, error):
        root = self.precision._replace(largest=np.sqrt(self.precision.largest))
        over = root.overflows(u, error)
        if not np.any(over):
            return self.base(u, error)
        before = copy.deepcopy(self.base)
        out, error = self.base(np.where(over, 0, u), np.where(over, 0, error))
        _keep(before, self.base, over)
        return np.where(over, np.nan, out), error


class OfFinite:
    """A trace behind a :class:`ByEntry`. It stays where its input is not finite."""

    def __init__(self, trace):
        self.trace = trace

    def __call__(self, u, error):
        there = np.isfinite(u)
        before = copy.deepcopy(self.trace)
        out, error = self.trace(np.where(there, u, 0), np.where(there, error, 0))
        _keep(before, self.trace, ~there)
        return np.where(there, out, np.nan), error


def _keep(before, after, there):
    for name, value in vars(after).items():
        old = getattr(before, name, None)
        if isinstance(value, (oracle.Adam, oracle.Rmsprop, oracle.Sgd)):
            _keep(old, value, there)
        elif name in _MEMORY and value is not None:
            setattr(after, name, np.where(there, 0.0 if old is None else old, value))
