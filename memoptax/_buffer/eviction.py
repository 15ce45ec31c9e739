"""Who enters the buffer and who leaves it: keys and ages alone, and no tensors.

Entries have a logical index, by which ties are broken. R is the number of groups that
are kept or dropped together: one, or one for each leaf.
"""

import jax
import jax.numpy as jnp
import optax


def fill(buffer) -> jax.Array:
    """How many entries there are, (R,), in the dtype of the keys."""
    return jnp.sum(buffer.keys > -jnp.inf, axis=1, dtype=buffer.keys.dtype)


def choose(buffer, priority, finite, fifo):
    """The entry that would leave, and whether it does, (R,) each.

    An empty slot has the least of keys, so slots are filled first, and in order. Among
    equal keys the lowest entry leaves; a priority equal to the least key is refused.
    """
    _, lowest = jax.lax.top_k(-buffer.keys, 1)
    least = jnp.take_along_axis(buffer.keys, lowest, axis=1)[:, 0]
    if fifo is None:
        return lowest[:, 0], finite & (priority > least)
    filled = buffer.keys > -jnp.inf
    oldest = jnp.argmax(jnp.where(filled, buffer.ages, -1), axis=1)
    first_out = fifo & jnp.all(filled, axis=1)
    entry = jnp.where(first_out, oldest.astype(lowest.dtype), lowest[:, 0])
    return entry, finite & (first_out | (priority > least))


def insert(buffer, entry, accept, finite, evicted, priority, decay):
    """Keys, ages, places and counters after the push."""
    new = here(buffer.keys.shape, entry, accept)
    keys = jnp.where(new, priority[:, None], buffer.keys)
    # The key of an empty slot must not be multiplied: -inf times a decay of 0 is NaN.
    held = finite[:, None] & (keys > -jnp.inf)
    ages = jnp.where(held, optax.safe_increment(buffer.ages), buffer.ages)
    return buffer._replace(
        keys=jnp.where(held, keys * jnp.asarray(decay, keys.dtype), keys),
        ages=jnp.where(new, 0, ages),
        place=jnp.where(new, buffer.spare[:, None], buffer.place),
        spare=jnp.where(accept, evicted, buffer.spare),
        offered=count(buffer.offered, finite),
        accepted=count(buffer.accepted, accept),
    )


def draw(draws, probability, finite):
    """Whether this step is first in, first out (None: never), and the next key."""
    if draws is None:
        return None, None
    kept, key = jax.random.split(jax.random.wrap_key_data(draws))
    fifo = jax.random.uniform(key) < probability
    return fifo, jnp.where(jnp.any(finite), jax.random.key_data(kept), draws)


def here(shape, entry, accept):
    """Where in (R or L, C) the new entry goes, if anywhere."""
    column = jnp.arange(shape[1], dtype=entry.dtype)[None]
    return jnp.broadcast_to((column == entry[:, None]) & accept[:, None], shape)


def count(counter, happened):
    return jnp.where(happened, optax.safe_increment(counter), counter)
