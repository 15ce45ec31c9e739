"""How far SM3 in limited precision may be from its oracle, entry by entry.

The bounds are those of ``error_bars``.
"""

import copy

import numpy as np

import oracle
import oracle_sm3
from error_bars import accumulators, between, stored_error


class SM3:
    """One dense leaf: maps a gradient to an update and its bound."""

    def __init__(self, precision, shape, boxes, momentum_dtype=None, **rule):
        self.precision, self.momentum_dtype, self.steps = precision, momentum_dtype, 0
        self.oracle = oracle_sm3.SM3(shape, boxes, **rule)
        self.by_entry = len(boxes) == 1 and all(
            -(-n // b) == n for n, b in zip(shape, boxes[0])
        )
        self.error = np.zeros(shape)

    def __call__(self, g):
        self.steps += 1
        sm3, before, error = self.oracle, copy.copy(self.oracle), self.error
        root = self.precision._replace(largest=np.sqrt(self.precision.largest))
        bad = ~np.isfinite(g) | root.overflows(np.where(np.isfinite(g), g, 0))
        clean = np.where(bad, 0, g)
        out = sm3.step(clean)
        over = self.precision.overflows(sm3.nu)
        raised = any(self.precision.overflows(n).any() for n in sm3.numbers)
        if not self.by_entry:
            if not bad.any() and not raised:
                off = self._error(clean)
                return out if sm3.momentum is None else sm3.m, off
            self.oracle, self.error = before, error  # the leaf stays as it is
            shown = np.full(g.shape, True) if sm3.momentum is not None else bad | over
            return np.where(shown, np.nan, 0), np.full(g.shape, np.inf)
        # A sum that would overflow stays, and divides as it is.
        old = before.numbers[0].reshape(g.shape)
        sm3.nu = np.where(over, old, sm3.nu)
        q = out = clean / np.sqrt(sm3.nu + sm3.eps)
        if sm3.momentum is not None:
            sm3.m = sm3.momentum * before.m + (1 - sm3.momentum) * q
        off = self._error(clean)
        numbers = np.where(bad, old, sm3.nu)
        sm3.numbers = [numbers.reshape(before.numbers[0].shape)]
        if sm3.momentum is None:
            return np.where(bad, np.nan, out), off
        rows = bad
        if self.momentum_dtype == "int8" and g.ndim:
            rows = np.broadcast_to(bad.any(axis=-1, keepdims=True), g.shape)
        sm3.m = np.where(rows, before.m, sm3.m)
        self.error = off = np.where(rows, error, off)
        return np.where(bad, np.nan, sm3.m), off

    def _error(self, g):
        """The bound after a step, with the momentum as it is stored."""
        sm3, p = self.oracle, self.precision
        q = g / np.sqrt(sm3.nu + sm3.eps)
        nus = between(self, sm3.nu, sm3.nu)
        off = quotient_error(p, g, q, p.lost(g), *nus, sm3.eps, sm3.beta)
        if sm3.momentum is None:
            return off
        part = sm3.momentum
        off = part * self.error + (1 - part) * off
        off = off + p.rounding(np.abs(sm3.m) + 2 * (1 - part) * np.abs(q))
        self.error = stored_error(sm3.m, off, self.momentum_dtype)
        sm3.m = oracle.stored(sm3.m, self.momentum_dtype)
        return self.error

    def numbers(self):
        return accumulators(self, self.oracle, self.oracle, self.oracle)


def quotient_error(p, g, q, error, least, most, eps, beta):
    """That of q = g / √(nu + eps), with nu between two bounds."""
    size = np.abs(g)
    with np.errstate(divide="ignore", invalid="ignore"):
        large = (size + error) / np.sqrt(least + eps)
        small = np.maximum(size - error, 0) / np.sqrt(most + eps)
    # Where the square vanishes, and eps is 0, only the largest q is known.
    unknown = least + eps < p.tiny
    limit = 1.5 if beta is None else 1.5 / np.sqrt(1 - beta)
    large = np.where(unknown | (large > limit), limit, large)
    small = np.where(unknown, 0, small)
    off = np.maximum(large - np.abs(q), np.abs(q) - small)
    return np.where((size == 0) & (error == 0), 0, off) + p.rounding(np.abs(q))


class RowSparseSM3:
    """A table with one number per row: maps ids and values to distinct ids, updates
    and their bounds."""

    def __init__(self, precision, summing, rows, beta=None, eps=1e-30):
        self.precision, self.summing, self.steps = precision, summing, 0
        self.oracle, self.low, self.high = (
            oracle_sm3.RowSparseSM3(rows, beta, eps) for _ in range(3)
        )

    def __call__(self, ids, values):
        self.steps += 1
        distinct = np.unique(ids)
        sums = np.array([values[ids == i].sum(0) for i in distinct])
        sums = sums.reshape(len(distinct), values.shape[1])
        sizes = np.array([np.abs(values[ids == i]).sum(0) for i in distinct])
        root = self.precision._replace(largest=np.sqrt(self.precision.largest))
        bad = ~np.isfinite(sums) | root.overflows(np.where(np.isfinite(sums), sums, 0))
        if bad.any():  # the table stays as it is
            return distinct, np.where(bad, np.nan, 0), np.full(sums.shape, np.inf)
        before = [o.numbers.copy() for o in (self.oracle, self.low, self.high)]
        error = self.summing.rounding(sizes).reshape(sums.shape)
        # A row that occurs once is added to nothing.
        once = np.array([np.sum(ids == i) == 1 for i in distinct], bool)
        error = np.where(once[:, None], 0, error) + self.precision.lost(sums)
        size = np.abs(sums)
        bounds = np.maximum(size - error, 0), size + error
        for each, bound in zip((self.low, self.high), bounds):
            each.step(distinct, bound)
        nus = [
            self._blend(old[distinct][:, None], bound**2)
            for old, bound in zip(before[1:], bounds)
        ]
        _, q = self.oracle.step(ids, values)
        q = q.reshape(sums.shape)
        if self.precision.overflows(self.oracle.numbers[distinct]).any():
            over = self.precision.overflows(
                self._blend(before[0][distinct][:, None], size**2)
            )
            for each, old in zip((self.oracle, self.low, self.high), before):
                each.numbers = old
            return distinct, np.where(over, np.nan, 0), np.full(sums.shape, np.inf)
        nus = between(self, *nus)
        rule = self.oracle.eps, self.oracle.beta
        off = quotient_error(self.precision, sums, q, error, *nus, *rule)
        return distinct, q, off

    def _blend(self, old, new):
        beta = self.oracle.beta
        return old + new if beta is None else beta * old + (1 - beta) * new

    def numbers(self):
        numbers = self.oracle.numbers
        least, most = between(self, self.low.numbers, self.high.numbers)
        return [(numbers, np.maximum(most - numbers, numbers - least))]
