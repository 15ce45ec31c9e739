"""Critical momenta over the covers of SM3, in plain NumPy (float64).

The momenta are those of ``oracle``, the boxes those of ``oracle_sm3``.
"""

import numpy as np

import oracle
import oracle_sm3


class SM3Cm:
    """A dict of tensors. `step(grads)` returns the directions, without the rate."""

    def __init__(self, boxes, shapes, b1=0.9, b2=0.999, eps=1e-8, **momenta):
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0
        self.momenta = oracle.CriticalMomenta(b1, **momenta)
        self.squares = {
            name: oracle_sm3.SM3(shape, boxes[name], beta=b2)
            for name, shape in shapes.items()
        }

    def step(self, grads):
        """A step that is not finite changes nothing and returns NaN."""
        if not oracle.all_finite(grads):
            return {name: np.full_like(g, np.nan) for name, g in grads.items()}
        self.t += 1
        joined = self.momenta.step(grads)
        return {name: self.direction(name, x) for name, x in joined.items()}

    def direction(self, name, x):
        squares = self.squares[name]
        squares.step(x)
        root = np.sqrt(squares.nu / (1 - self.b2**self.t))
        return x / (1 - self.b1**self.t) / (root + self.eps)
