"""Look into, resize or empty the buffers inside any optimizer's state."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

from memoptax import _check, _parameters
from memoptax._buffer import algorithm, eviction, matching, resizing
from memoptax._buffer import holding as _holding
from memoptax._buffer import options as _options
from memoptax._tensors import dtypes, flax_metadata, layout, norms, storage

State = TypeVar("State")


def buffer_stats(state: Any, updates: Any = None) -> dict[str, jax.Array]:
    r"""Statistics of the buffers inside an optimizer's state, as scalars for a logger.

    It finds the buffers in any nesting of chains and wrappers, and in the
    ``opt_state`` of Flax's ``nnx.Optimizer``. It copies no slot. Jit it on its own,
    apart from the training step. Without ``synced`` the statistics are taken over all
    leaves together.

    With :math:`\bar B_l` the mean of the F stored values of leaf l, and g the updates,

    .. math::
      \mathrm{coherence} = \sqrt{\frac{\sum_l \lVert \bar B_l \rVert^2}
      {\sum_l \big(\frac{1}{F} \sum_{b \in B_l} \lVert b \rVert\big)^2}},
      \qquad
      \mathrm{share} = \frac{\lVert \bar B \rVert}
      {\lVert \bar B \rVert + \lVert g \rVert}.

    The coherence is the part of the stored values that survives averaging. It is 1 if
    they all have one direction, and about :math:`1/\sqrt F` if they are independent.

    Args:
      state: the state of an optimizer with critical gradients or momenta.
      updates: the next values that the buffer would be offered, a tree like the
        parameters: gradients, or the momenta under critical momenta. None leaves out
        ``share``.

    Returns:
      A dict of float32 scalars: ``fill`` (filled slots), ``acceptance`` (share of the
      offers that were stored), ``key_min``, ``key_mean``, ``key_max`` (of the decayed
      priorities), ``age_mean``, ``age_max`` (in steps), ``mean_norm`` (the L2 norm of
      the buffer's mean), ``coherence``, ``share`` (of the buffer in the joined update,
      for κ = 1 and an ``aggr`` of ``'sum'`` or ``'mid'``; under ``'mean'`` the buffer
      weighs F times as much) and ``rebuilds`` (how often the running sums were
      rebuilt). All are 0 while the buffer is empty. With several buffers, as under
      ``optax.partition``, names start with ``0/``, ``1/`` and so on.

    Raises:
      ValueError: if the state holds no buffer, or if ``updates`` lack a leaf of it or
        are not real.

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
    buffers, updates = _buffers(state, "buffer_stats"), flax_metadata.bare(updates)
    found = [for_each(_stats, b, _leaves_like(b, updates)) for b in buffers]
    if len(found) == 1:
        return found[0]
    return {
        f"{i}/{name}": value
        for i, stats in enumerate(found)
        for name, value in stats.items()
    }


def resize_buffer(state: State, topc: int, *, holding: str | None = None) -> State:
    """The state for the same optimizer with another ``topc``.

    A smaller buffer keeps the most critical entries. Of equally critical ones it keeps
    those with the lowest index, or the youngest if their keys have decayed to 0. A
    larger one has empty slots. Keys, ages and counters stay, and the sums are rebuilt.
    Restore a checkpoint with the ``topc`` that it was saved with, and then resize it.

    In one case a new sum has a different dtype than in ``init``: with a
    ``buffer_dtype``, and parameters in both float32 and float64. The state does not say
    which leaf is which, so all sums are in float64. ``update`` accepts them, but
    :func:`check_state` does not.

    Args:
      state: the state of an optimizer with critical gradients or momenta.
      topc: the new capacity, a static integer of at least 1.
      holding: how the values are held, as in :func:`critical_gradients`.

    Returns:
      The state, with every buffer resized.

    Raises:
      ValueError: if ``topc`` is not such an integer, or if the state holds no buffer
        because its ``topc`` or ``kappa`` was 0.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> small, large = (memoptax.adam_c(0.1, topc=c) for c in (5, 20))
      >>> state = memoptax.resize_buffer(small.init(jnp.zeros(3)), 20)
      >>> _, state = large.update(jnp.ones(3), state)
    """
    topc = _options.capacity(topc, 1)
    _check.choice("holding", holding, (None, *_holding.WAYS))

    def resized(buffer):
        way = _holding.way(holding, topc, _holding.itemsize(buffer.slots))
        if way == "select" and topc != 1:
            raise ValueError(f"holding='select' is for topc=1, but topc is {topc}.")
        return resizing.resize(buffer, topc, way)

    for buffer in _buffers(state, "resize_buffer"):
        check_numbers(buffer)
    return _map_buffers(resized, state)


def reset_buffer(state: State) -> State:
    """The state with its buffers emptied, for a change of task. Moments are kept.

    Under ``jax.jit`` on a mesh in automatic mode its zeros are replicated, as those of
    ``init`` are. Call it outside of ``jax.jit`` there, or pass ``out_shardings``.

    Args:
      state: the state of an optimizer with critical gradients or momenta.

    Returns:
      The state, with buffers as after ``init``. Only the key of FIFO draws stays.

    Raises:
      ValueError: if the state holds no buffer.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.sgd_c(0.1)
      >>> _, state = tx.update(jnp.ones(3), tx.init(jnp.zeros(3)))
      >>> int(memoptax.buffer_stats(memoptax.reset_buffer(state))["fill"])
      0
    """
    _buffers(state, "reset_buffer")
    return _map_buffers(resizing.reset, state)


def check_numbers(buffer):
    """Refuse a buffer with impossible numbers, unless they are traced."""
    numbers = buffer._replace(slots=None, scales=None, total=None)
    if any(isinstance(x, Tracer) or _is_abstract(x) for x in jax.tree.leaves(numbers)):
        return
    numbers = jax.tree.map(_in_numpy, numbers)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-1:]), numbers)
    if problem := resizing.problem(flat):
        raise ValueError(f"state has a buffer whose {problem}.")


def _in_numpy(x):
    """The array in NumPy's. One of JAX would be traced inside jit.

    The members of an ensemble may be divided over several processes.
    """
    local = not isinstance(x, jax.Array) or x.is_fully_addressable
    if local or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


@jax.jit
def _stats(buffer, updates):
    dtype = buffer.keys.dtype
    filled = eviction.held(buffer)
    entries = jnp.maximum(jnp.sum(filled), 1).astype(dtype)
    empty = ~jnp.any(filled)
    fill = eviction.fill(buffer)
    leaves = range(len(jax.tree.leaves(buffer.slots)))
    counts = _holding.per_leaf(list(jnp.maximum(fill, 1)), leaves)
    means, apart = [], []
    for leaf, count in zip(leaves, counts):
        total, lengths = _sums(buffer, leaf)
        means.append(total / count)
        apart.append(lengths / count)
    mean_norm = _norm(means, dtype)
    ages = jnp.where(filled, buffer.ages - 1, 0).astype(dtype)
    stats = {
        "fill": jnp.mean(fill),
        "acceptance": jnp.sum(buffer.accepted, dtype=dtype)  # int32 would overflow
        / jnp.maximum(jnp.sum(buffer.offered, dtype=dtype), 1),
        "key_min": jnp.min(buffer.keys, where=filled, initial=jnp.finfo(dtype).max),
        "key_mean": jnp.sum(jnp.where(filled, buffer.keys, 0)) / entries,
        "key_max": jnp.max(buffer.keys, where=filled, initial=0),
        "age_mean": jnp.sum(ages) / entries,
        "age_max": jnp.max(ages, initial=0),
        "mean_norm": mean_norm,
        "coherence": _ratio(mean_norm, _norm(apart, dtype)),
        "rebuilds": jnp.zeros(()) if buffer.rebuilds is None else buffer.rebuilds,
    }
    if updates is not None:
        offered = _norm(updates, dtype)
        stats["share"] = _ratio(mean_norm, mean_norm + offered)
    return {
        name: jnp.where(empty, 0, value).astype(jnp.float32)
        for name, value in stats.items()
    }


def _sums(buffer, leaf):
    """The sums of a leaf's values and of their norms, one value at a time."""

    def one(entry):
        value = _holding.value(buffer, leaf, entry, buffer.keys.dtype)
        return value, norms.of([value], value.dtype)[0]

    def add(sums, entry):
        return jax.tree.map(jnp.add, sums, one(entry)), None

    # It starts with a value, which knows its mesh. In explicit mode zeros do not.
    first, others = one(0), jnp.arange(1, buffer.keys.shape[1])
    if not others.size:  # jax.disable_jit cannot scan over nothing
        return first
    return jax.lax.scan(add, first, others)[0]


def _norm(leaves, dtype):
    """The L2 norm of all leaves together."""
    return norms.of([norms.of(leaves, dtype)], dtype)[0]


def _ratio(part, whole):
    """``part / whole``, or 0 if ``whole`` is 0."""
    return part / jnp.where(whole == 0, 1, whole)


def _leaves_like(buffer, updates):
    """The leaves of ``updates`` that the buffer has. A mask may leave some out."""
    if updates is None:
        return None
    by_path = dict(jax.tree_util.tree_leaves_with_path(updates))
    batch, found = buffer.keys.ndim - 2, []
    for path, slots in jax.tree_util.tree_leaves_with_path(buffer.slots):
        name = jax.tree_util.keystr(path) or "the root"
        if path not in by_path:
            raise ValueError(
                f"updates have no leaf at {name}, but the state holds a buffer for it."
            )
        leaf, rest = by_path[path], _holding.shape_of(buffer, slots, batch)
        if np.shape(leaf) != rest:
            raise ValueError(
                f"updates have a leaf of shape {np.shape(leaf)} at {name}, but the "
                f"state was made for {rest}."
            )
        why = _check.foreign(leaf)
        if why or not _parameters.is_array(leaf):
            raise ValueError(
                f"updates have a leaf at {name} that JAX does not take: it is "
                f"{why or f'of type {type(leaf).__name__}'}."
            )
        if wrong := layout.part_of_sum(leaf):
            raise ValueError(f"The leaf of updates at {name} is {wrong}")
        if not dtypes.is_real(dtype := jnp.result_type(leaf)):
            raise ValueError(f"updates must be real, but have {dtype} at {name}.")
        found.append(leaf)
    return found


def _is_buffer(node):
    return isinstance(node, algorithm.Buffer)


def buffers_in(state):
    nodes = jax.tree.leaves(state, is_leaf=_is_buffer)
    return [node for node in nodes if _is_buffer(node)]


def _buffers(state, caller):
    buffers = buffers_in(flax_metadata.bare(state))
    for buffer in buffers:
        for path, leaf in jax.tree.leaves_with_path(buffer):
            if wrong := _check.deleted(leaf):
                name = f"buffer{jax.tree_util.keystr(path)} of the state"
                raise ValueError(f"{name} {wrong}")
        matching.check_shapes(buffer)
    if not buffers:
        raise ValueError(
            f"{caller} found no buffer in state: it belongs to another optimizer, or "
            "to one built with a topc or kappa of 0."
        )
    return buffers


def _map_buffers(function, state):
    return jax.tree.map(
        lambda node: _boxed(node, function) if _is_buffer(node) else node,
        state,
        is_leaf=lambda node: _is_buffer(node) or flax_metadata.is_box(node),
    )


def _boxed(buffer, function):
    """``function`` of a buffer whose arrays may be in Flax's boxes, in boxes again."""
    bare = flax_metadata.bare(buffer)
    # JAX thinks that new counters are equal on all devices of a shard_map. If the keys
    # differ there, the counters must have the same type.
    new = layout.vary_together(for_each(function, bare), bare.keys)
    new = _in_memory_of(bare, new)
    if jax.tree.structure(bare) == jax.tree.structure(buffer):  # there are no boxes
        return new
    batch = bare.keys.ndim - 2

    def fit(name) -> Any:
        # A field that the old buffer lacks gets the boxes of another one.
        like, tree = getattr(buffer, name), getattr(new, name)
        if like is None:
            like = buffer.slots if name == "total" else buffer.keys
        # A box that a mask has emptied is no leaf. It stays in the structure.
        boxes, treedef = jax.tree.flatten(like, is_leaf=flax_metadata.is_box)
        leaves = [
            flax_metadata.fit(box, leaf, batch)
            for box, leaf in zip(boxes, jax.tree.leaves(tree))
        ]
        return None if tree is None else treedef.unflatten(leaves)

    return algorithm.Buffer(*map(fit, algorithm.Buffer._fields))


def for_each(function, buffer, *rest):
    """``function`` of a buffer, or of each buffer of a batch. It takes shapes too."""
    buffer, rest = jax.tree.map(layout.as_placed, (buffer, rest))
    buffer = _fetched(buffer)
    rest = jax.tree.map(_of_arrays(storage.on_device), rest)
    for _ in range(buffer.keys.ndim - 2):
        function = jax.vmap(function)
    if any(map(_is_abstract, jax.tree.leaves((buffer, rest)))):
        return jax.eval_shape(function, buffer, *rest)
    return function(buffer, *rest)


def _fetched(buffer):
    """The buffer, fetched from the memory of the host, where nothing computes.

    Stacks of slots stay there, because one slot is fetched at a time. Under vmap JAX
    cannot do that.
    """
    stays = buffer.entries is not None and buffer.keys.ndim == 2
    stacks = {"slots", "scales"} if stays else set()

    def fetched(name):
        move = storage.as_typed if name in stacks else storage.on_device
        return jax.tree.map(_of_arrays(move), getattr(buffer, name))

    return algorithm.Buffer(*map(fetched, algorithm.Buffer._fields))


def _of_arrays(function):
    """``function`` of JAX's arrays. Shapes and NumPy's arrays are in no memory."""
    return lambda x: function(x) if isinstance(x, jax.Array) else x


def _in_memory_of(old, new):
    """The ``new`` buffer with every array in the memory where the ``old`` one had it.

    A field that the old buffer lacks is where its keys are. So are slots that were a
    stack and are no more, because a step cannot fetch one of them.
    """
    if (old.entries is None) != (new.entries is None):
        old = old._replace(slots=None, scales=None)

    def placed(name):
        leaves, treedef = jax.tree.flatten(getattr(new, name))
        like = jax.tree.leaves(getattr(old, name)) or [old.keys] * len(leaves)
        return treedef.unflatten(
            [
                storage.in_memory_of(y, x) if isinstance(y, jax.Array) else x
                for x, y in zip(leaves, like)
            ]
        )

    return algorithm.Buffer(*map(placed, algorithm.Buffer._fields))


def _is_abstract(array):
    return isinstance(array, jax.ShapeDtypeStruct)
