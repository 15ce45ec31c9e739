"""The momentum m, whose past values a buffer holds: its zeros, average and checks."""

import jax
import jax.numpy as jnp

from memoptax import _check
from memoptax._buffer import algorithm, matching
from memoptax._tensors import dtypes, layout, storage


def zeros(params, dtype):
    """The two fields of the state for a momentum of zero."""
    if dtype is None:
        return jax.tree.map(storage.zero_sum, params), None
    zeros = jax.tree.map(lambda p: storage.zeros(p, None, dtype), params)
    return zeros, storage.zero_scales(params, None, dtype)


def check(options, updates, state, mu_dtype, params=None):
    """Refuse a momentum or a buffer that was made with other arguments."""
    if not options.keeps_nothing:
        matching.check(options, state.buffer, updates, params)
    for name in ("mu", "nu", "nu_max"):
        moments = getattr(state, name, None)
        if name in state._fields and not (name == "nu_max" and moments is None):
            _check.moments(name, moments, updates)
    storage.check_scales("mu_scales", state.mu, state.mu_scales)
    if state.mu_scales is not None:
        options.check_rows(updates)
    found = {leaf.dtype for leaf in jax.tree.leaves(state.mu)}
    allowed = [mu_dtype] if mu_dtype else _check.WIDE
    _check.same_dtype("mu_dtype", mu_dtype, found, allowed)
    for name in ("nu", "nu_max", "accumulators"):
        _check.wide(name, getattr(state, name, None))


def beside(state, gradients):
    """The gradients with the sharding of m, in JAX's explicit mode.

    The rest of the step follows them.
    """
    return jax.tree.map(layout.like, gradients, state.mu)


def is_sound(options, gradients, dtype, in_range, squares=None):
    """Whether the state may change, and the norms of the gradients, (L,).

    It may if the gradients are finite and the traced numbers are ``in_range``.

    ``dtype`` is that of the norms. ``squares`` has for each leaf an array of the dtype
    in which the square of the aggregate M is kept. That square must be finite too. M
    is at most 1 + |κ| times the largest gradient that was let through, so this needs no
    pass over M. With an ``aggr`` of the user, or a κ that changes, M may be larger.
    Then :func:`or_nan` makes the update NaN.
    """
    norms = algorithm.norms_of(options, gradients, dtype)
    limit = jnp.finfo(dtype).max
    if squares:
        largest = [min(jnp.finfo(x.dtype).max, limit) for x in squares]
        limit = jnp.sqrt(jnp.asarray(largest, norms.dtype))
        kappa = jnp.asarray(options.kappa, norms.dtype)
        limit = limit / (2 * (1 + jnp.abs(kappa)))
    return jnp.all(norms <= limit) & options.is_sound() & in_range, norms


def as_released(options, gradients, state, b1, sound, norms):
    """M, the two fields of m, and the buffer, as the authors' released code computes
    them.

    The first step offers the bare gradient to the buffer, and m and M are 0. With a κ
    of 0 the first step is like any other.
    """
    first = (state.count == 0) & jnp.not_equal(options.kappa, 0)
    m, _, mu = average(gradients, state, b1, sound & ~first)
    offered = where(first, gradients, m)
    joined, buffer = algorithm.recall_and_offer(
        options, state.buffer, offered, gradients, sound, norms=norms
    )
    return jax.tree.map(lambda x: layout.where(~first, x, 0), joined), mu, buffer


def average(gradients, state, b1, taken):
    """m = b1·m + (1 − b1)·g, or the old m where the step is not ``taken``.

    It is returned in three forms: as numbers, as stored leaves, and as the two fields
    of the state. The numbers are decoded from the stored leaves. So nothing reads the
    old m after the new one is known, and XLA can overwrite the old one.
    """
    leaves, treedef = jax.tree.flatten(gradients)
    before = storage.unpack(treedef, state.mu, state.mu_scales)
    wide = [
        dtypes.widest(jnp.float32, old.values.dtype, g.dtype)
        for old, g in zip(before, leaves)
    ]
    done = [
        _blended(g.astype(dtype), old, dtypes.weights(b1, dtype), taken)
        for g, old, dtype in zip(leaves, before, wide)
    ]
    m, after = [d[0] for d in done], [d[1] for d in done]
    return treedef.unflatten(m), after, storage.pack(treedef, after, state.mu_scales)


@jax.jit
def _blended(gradient, old, weights, taken):
    def blend(gradient, values, scale):
        m = storage.decode(storage.Stored(values, scale), gradient.dtype)
        of_old, of_new = weights
        return storage.saturate(of_old * m + of_new * gradient, old)

    operands = (gradient, *old)
    new = storage.encode_computed(blend, lambda *numbers: numbers, operands, old)
    new = jax.tree.map(lambda a, b: layout.where(taken, a, b), new, old)
    return storage.decode(new, gradient.dtype), new


def or_nan(sound, updates, gradients, squared=None):
    """``updates``, or NaN where the step is not sound, sharded like the gradients.

    Also NaN where the square of ``squared`` overflows, if given. Such a step, or entry,
    does not change the state. The NaN makes it visible to later transformations, and to
    a training loop that applies only finite updates.
    """

    def leaf(update, gradient, x=None):
        taken = sound
        if x is not None:
            taken &= jnp.isfinite(layout.like(x * x, update))
        update = layout.where(taken, update, jnp.nan).astype(gradient.dtype)
        return layout.like(update, gradient)

    squares = [] if squared is None else [squared]
    return jax.tree.map(leaf, updates, gradients, *squares)


def where(condition, chosen, other):
    """``chosen`` in the dtypes of ``other``, or ``other``."""
    return jax.tree.map(
        lambda a, b: layout.where(condition, a.astype(b.dtype), b),
        chosen,
        other,
    )
