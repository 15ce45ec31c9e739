"""SM3 in plain NumPy, box by box, from the equations of the paper (float64)."""

import itertools

import numpy as np


def tiles(shape, box):
    """The boxes of one family, each as a tuple of slices."""
    edges = [range(0, n, b) for n, b in zip(shape, box)]
    for corner in itertools.product(*edges):
        yield tuple(slice(c, c + b) for c, b in zip(corner, box))


class SM3:
    """One tensor. `step(g)` returns the update direction, without learning rate."""

    def __init__(self, shape, boxes, variant="II", momentum=None, beta=None, eps=1e-30):
        self.families = [list(tiles(shape, box)) for box in boxes]
        self.numbers = [np.zeros(len(family)) for family in self.families]
        self.variant, self.momentum, self.beta = variant, momentum, beta
        self.eps, self.m, self.shape = eps, np.zeros(shape), shape
        self.nu = np.zeros(shape)

    def least(self):
        out = np.full(self.shape, np.inf)
        for family, numbers in zip(self.families, self.numbers):
            for box, number in zip(family, numbers):
                out[box] = np.minimum(out[box], number)
        return out

    def blend(self, old, new):
        if self.beta is None:
            return old + new
        return self.beta * old + (1 - self.beta) * new

    def step(self, g):
        g = np.asarray(g, np.float64)
        if self.variant == "II":
            self.nu = self.blend(self.least(), g**2)
            self.numbers = [
                np.array([self.nu[box].max() for box in family])
                for family in self.families
            ]
        else:
            self.numbers = [
                self.blend(numbers, np.array([(g[box] ** 2).max() for box in family]))
                for family, numbers in zip(self.families, self.numbers)
            ]
            self.nu = self.least()
        q = g / np.sqrt(self.nu + self.eps)
        if self.momentum is None:
            return q
        self.m = self.momentum * self.m + (1 - self.momentum) * q
        return self.m


class RowSparseSM3:
    """A table with one number per row. Rows that are not named stay as they are."""

    def __init__(self, rows, beta=None, eps=1e-30):
        self.numbers, self.beta, self.eps = np.zeros(rows), beta, eps

    def step(self, ids, values):
        """Returns the distinct ids and the update of each."""
        ids, values = np.asarray(ids), np.asarray(values, np.float64)
        distinct = np.unique(ids)
        out = []
        for i in distinct:
            g = values[ids == i].sum(0)
            if self.beta is None:
                nu = self.numbers[i] + g**2
            else:
                nu = self.beta * self.numbers[i] + (1 - self.beta) * g**2
            self.numbers[i] = nu.max()
            out.append(g / np.sqrt(nu + self.eps))
        return distinct, np.array(out)
