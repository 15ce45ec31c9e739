"""The values in a buffer, read slot by slot."""

import jax
import jax.numpy as jnp
import numpy as np

from memoptax._buffer import eviction, holding


@jax.jit
def _all(buffer):
    """The values of every leaf, those of empty entries too, and how many are held."""

    def of(leaf):
        def value(entry):
            return holding.value(buffer, leaf, entry, buffer.keys.dtype)

        return jax.vmap(value)(jnp.arange(buffer.keys.shape[1]))

    leaves = range(len(jax.tree.leaves(buffer.slots)))
    return [of(leaf) for leaf in leaves], eviction.fill(buffer)


def entries(buffer, row=0, leaf=0):
    """The stored values of a leaf in the order of their entries, as float64."""
    values, fill = _all(buffer)
    return np.asarray(values[leaf], np.float64)[: int(fill[row])]


def exact_sums(buffer):
    """The sums of the values in float64, leaf by leaf."""
    values, fill = _all(buffer)
    counts = np.asarray(fill, int)
    rows = range(len(values)) if len(counts) > 1 else [0] * len(values)
    return [
        np.asarray(value, np.float64)[: counts[row]].sum(0)
        for value, row in zip(values, rows)
    ]
