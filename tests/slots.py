"""What a buffer holds, read slot by slot."""

import jax
import numpy as np

from memoptax._buffer import eviction, holding


def entries(buffer, row=0, leaf=0):
    """The stored values of a leaf in the order of their entries, as float64."""
    count = int(eviction.fill(buffer)[row])
    values = [holding.value(buffer, leaf, k, buffer.keys.dtype) for k in range(count)]
    return np.asarray(values, np.float64)


def exact_sums(buffer):
    """The sums of the values in float64, leaf by leaf."""
    rows = buffer.keys.shape[0]
    return [
        entries(buffer, leaf if rows > 1 else 0, leaf).sum(0)
        for leaf in range(len(jax.tree.leaves(buffer.slots)))
    ]
