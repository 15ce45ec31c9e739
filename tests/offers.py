"""A buffer by itself, and what is offered to it."""

import jax
import jax.numpy as jnp

from memoptax._buffer import algorithm, matching
from memoptax._buffer.options import options

DEFAULTS = dict(
    topc=5,
    decay=1.0,
    kappa=1.0,
    aggr=lambda update, mean, fill: mean * fill,  # the sum of the values held
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
)


def empty(like, topc, **chosen):
    return algorithm.empty(options(**{**DEFAULTS, "topc": topc, **chosen}), like)


def offer(buffer, values, key=None, decay=1.0, way=None, **chosen):
    """The sums before an offer, the buffer after it. The key need not be the norm."""
    values = jax.tree.map(jnp.asarray, values)
    rule = None if key is None else lambda _: jnp.asarray(key, jnp.float32)
    own = options(
        **{
            **DEFAULTS,
            "topc": buffer.keys.shape[1],
            "decay": decay,
            "priority_fn": rule,
            "holding": way or matching.way_of(buffer),
            "synced": buffer.keys.shape[0] == 1,
            **chosen,
        }
    )
    return algorithm.recall_and_offer(own, buffer, values, values)
