"""Look into, resize or empty the buffers inside any optimizer's state."""

import jax
import jax.numpy as jnp

from memoptax import _boxes, _buffer, _options


def buffer_stats(state) -> dict[str, jax.Array]:
    """What the buffers inside an optimizer's state hold, as scalars for a logger.

    Finds them in any nesting of chains and wrappers, and copies no slot; may be jitted
    on its own, apart from the training step. Numbers of rows and leaves are averaged.

    Args:
      state: the state of an optimizer with critical gradients or momenta.

    Returns:
      A dict of float32 scalars: ``fill`` (filled slots), ``acceptance`` (share of the
      offers that were stored), ``key_min``, ``key_mean``, ``key_max`` (of the decayed
      priorities), ``age_mean``, ``age_max`` (in steps), ``mean_norm`` (the L2 norm of
      the buffer's mean, to be held against the gradient's) and ``rebuilds`` (of the
      running sums, by leaf). All are 0 while the buffer is empty. With several buffers,
      as under ``optax.partition``, names start with ``0/``, ``1/`` and so on.

    Raises:
      ValueError: if the state holds no buffer.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.sgd_c(0.1, topc=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in ([3.0, 4.0], [0.0, 1.0], [0.0, 0.0]):
      ...   _, state = tx.update(jnp.array(gradient), state)
      >>> stats = memoptax.buffer_stats(state)
      >>> f"{stats['fill']:.0f} of 2, {stats['acceptance']:.0%} taken"
      '2 of 2, 67% taken'
    """
    buffers = _buffers(state, "buffer_stats")
    if len(buffers) == 1:
        return _stats(buffers[0])
    return {
        f"{i}/{name}": value
        for i, buffer in enumerate(buffers)
        for name, value in _stats(buffer).items()
    }


def resize_buffer(state, topc: int):
    """The state for the same optimizer with another ``topc``.

    Fewer slots keep the most critical entries; more start out empty. Keys, ages and
    counters stay, and the sums are rebuilt. A checkpoint is restored with the ``topc``
    it was saved with, and resized then.

    Args:
      state: the state of an optimizer with critical gradients or momenta.
      topc: the new capacity, a static integer of at least 1.

    Returns:
      The state, with every buffer resized.

    Raises:
      ValueError: if ``topc`` is not such an integer, or the state holds no buffer (it
        was built with a ``topc`` or ``kappa`` of 0).

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> small, large = (memoptax.adam_c(0.1, topc=c) for c in (5, 20))
      >>> state = memoptax.resize_buffer(small.init(jnp.zeros(3)), 20)
      >>> _, state = large.update(jnp.ones(3), state)
    """
    topc = _options.capacity(topc)
    if topc == 0:
        raise ValueError("topc must be at least 1 to resize a buffer, but is 0.")
    return _map_buffers(lambda b: _buffer.resize(b, topc), state, "resize_buffer")


def reset_buffer(state):
    """The state with its buffers emptied, as at a change of task; moments stay.

    Args:
      state: the state of an optimizer with critical gradients or momenta.

    Returns:
      The state, with buffers as they are after ``init`` but for the key of FIFO draws.

    Raises:
      ValueError: if the state holds no buffer.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.sgd_c(0.1)
      >>> _, state = tx.update(jnp.ones(3), tx.init(jnp.zeros(3)))
      >>> int(memoptax.buffer_stats(memoptax.reset_buffer(state))["fill"])
      0
    """
    return _map_buffers(_buffer.reset, state, "reset_buffer")


def _stats(buffer):
    filled = buffer.keys > -jnp.inf
    entries = jnp.maximum(jnp.sum(filled), 1)
    empty = ~jnp.any(filled)
    fill = _buffer.fill(buffer)
    per_leaf = jnp.broadcast_to(fill, buffer.error.shape)
    means = [
        total / jnp.maximum(count, 1).astype(total.dtype)
        for total, count in zip(jax.tree.leaves(buffer.total), per_leaf)
    ]
    squares = [jnp.sum(jnp.square(mean)).astype(buffer.keys.dtype) for mean in means]
    stats = {
        "fill": jnp.mean(fill),
        "acceptance": jnp.sum(buffer.accepted)
        / jnp.maximum(jnp.sum(buffer.offered), 1),
        "key_min": jnp.min(buffer.keys, where=filled, initial=jnp.inf),
        "key_mean": jnp.sum(jnp.where(filled, buffer.keys, 0)) / entries,
        "key_max": jnp.max(buffer.keys, where=filled, initial=-jnp.inf),
        "age_mean": jnp.sum(jnp.where(filled, buffer.ages, 0)) / entries,
        "age_max": jnp.max(buffer.ages, where=filled, initial=0),
        "mean_norm": jnp.sqrt(sum(squares, jnp.zeros((), buffer.keys.dtype))),
        "rebuilds": buffer.rebuilds,
    }
    return {
        name: jnp.where(empty, 0, value).astype(jnp.float32)
        for name, value in stats.items()
    }


def _is_buffer(node):
    return isinstance(node, _buffer.Buffer)


def _mapped(function, buffer):
    return _boxes.like(buffer, function(_boxes.bare(buffer)))


def _buffers(state, caller):
    nodes = jax.tree.leaves(_boxes.bare(state), is_leaf=_is_buffer)
    buffers = [node for node in nodes if _is_buffer(node)]
    if not buffers:
        raise ValueError(
            f"{caller} found no buffer in state: it belongs to another optimizer, or "
            "to one built with a topc or kappa of 0."
        )
    return buffers


def _map_buffers(function, state, caller):
    _buffers(state, caller)
    return jax.tree.map(
        lambda node: _mapped(function, node) if _is_buffer(node) else node,
        state,
        is_leaf=_is_buffer,
    )
