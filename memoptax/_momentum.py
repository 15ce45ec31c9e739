"""The momentum m whose past values a buffer holds: made, averaged, joined, guarded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memoptax._buffer import algorithm, matching
from memoptax._buffer import options as _options
from memoptax._tensors import layout, storage


def zeros(params, dtype):
    """The two fields of a momentum of zero."""
    if dtype is None:
        return jax.tree.map(storage.zero_sum, params), None
    zeros = jax.tree.map(lambda p: storage.zeros(p, None, dtype), params)
    return zeros, storage.zero_scales(params, None, dtype)


def check(options, updates, state, mu_dtype):
    """Refuse a momentum or a buffer that other arguments made, while tracing."""
    if not options.keeps_nothing:
        matching.check(options, state.buffer, updates)
    _options.check_scales(options, updates, state.mu_scales)
    found = {leaf.dtype for leaf in jax.tree.leaves(state.mu)}
    wide = {jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)}
    if found - ({mu_dtype} if mu_dtype else wide):
        names = ", ".join(sorted(dtype.name for dtype in found))
        raise ValueError(
            f"mu_dtype is {mu_dtype.name if mu_dtype else None!r}, but the state has a "
            f"momentum of {names}. Pass the mu_dtype that the state was made with."
        )


def beside(state, gradients):
    """The gradients laid out as m is, in JAX's explicit mode: then the step is, too."""
    return jax.tree.map(layout.like, gradients, state.mu)


def is_sound(options, gradients, dtype, *hyperparameters, squares=False):
    """Whether gradients and hyperparameters are finite, so that the state may move.

    ``dtype`` is that of the state's arithmetic. With ``squares`` the square
    of the aggregate M must be finite, too. M is a mean of gradients and κ of them
    again, so no pass over M is needed to know.
    """
    limit = None
    if squares:
        limit = jnp.sqrt(jnp.finfo(dtype).max) / (2 * (1 + jnp.abs(options.kappa)))
    sound = algorithm.is_within(options, gradients, dtype, limit)
    for number in hyperparameters:
        sound &= jnp.all(jnp.isfinite(jnp.asarray(number)))
    return sound & options.is_sound()


def aggregate(
    options, gradients, state, b1, sound, *, skip_first=False
) -> tuple[Any, tuple[Any, Any], Any]:
    """The aggregate M, the two fields of m, and the buffer, after this step.

    With ``skip_first`` the first step is that of the authors' code: the bare gradient
    is offered, and m and M are 0. A κ of 0 has nothing to skip.

    Without a buffer M is m.
    """
    if options.keeps_nothing:
        m, _, momentum = average(gradients, state, b1, sound)
        return m, momentum, None
    if not skip_first:
        m, stored, momentum = average(gradients, state, b1, sound)  # m_t
        joined, buffer = algorithm.recall_and_offer(  # M_t, B_{t+1}
            options, state.buffer, m, gradients, sound, stored
        )
        return joined, momentum, buffer
    first = (state.count == 0) & jnp.not_equal(options.kappa, 0)
    m, _, momentum = average(gradients, state, b1, sound & ~first)
    joined, buffer = algorithm.recall_and_offer(
        options, state.buffer, where(first, gradients, m), gradients, sound
    )
    return where(first, optax.tree.zeros_like(joined), joined), momentum, buffer


def parts(options, gradients, before, momentum, buffer, *, skip_first=False):
    """Per leaf what M is computed from, entry by entry: a function, and its tensors.

    Or None. For a reader to which M is not worth storing.
    """
    leaves, treedef = jax.tree.flatten(gradients)
    if options.keeps_nothing:
        return [None] * len(leaves)
    stored = storage.unpack(treedef, *momentum)
    first = skip_first & (before.count == 0) & jnp.not_equal(options.kappa, 0)

    def of(leaf, gradient):
        dtype = _wide(stored[leaf].values.dtype, gradient.dtype)
        m = storage.decode(stored[leaf], dtype)
        offered = where(first, gradient, m) if skip_first else m
        found = algorithm.parts(options, before.buffer, buffer, leaf, offered)
        if found is None or not skip_first:
            return found
        join, tensors = found
        return lambda *tensors: jnp.where(first, 0, join(*tensors)), tensors

    return [of(*each) for each in enumerate(leaves)]


def average(gradients, state, b1, taken):
    """b1·m + (1 − b1)·g, or m where the step is not taken: as it is, as the leaves in
    storage, and as the two fields of the state.

    The first is decoded from the others, so that nobody else reads what was there
    before: it can be overwritten.
    """
    leaves, treedef = jax.tree.flatten(gradients)
    before = storage.unpack(treedef, state.mu, state.mu_scales)
    dtypes = [_wide(old.values.dtype, g.dtype) for old, g in zip(before, leaves)]
    after = [
        _blended(g.astype(dtype), old, b1, 1 - b1, taken)
        for g, old, dtype in zip(leaves, before, dtypes)
    ]
    m = [storage.decode(new, dtype) for new, dtype in zip(after, dtypes)]
    return treedef.unflatten(m), after, storage.pack(treedef, after, state.mu_scales)


@jax.jit
def _blended(gradient, old, b1, rest, taken):
    def blend(gradient, values, scale):
        m = storage.decode(storage.Stored(values, scale), gradient.dtype)
        m = jnp.asarray(b1, m.dtype) * m + jnp.asarray(rest, m.dtype) * gradient
        return storage.saturate(m, old)

    operands = (gradient, *old)
    new = storage.encode_computed(blend, lambda *numbers: numbers, operands, old)
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)


def or_nan(sound, updates, gradients):
    """``updates``, or NaN where the step is not sound, laid out as the gradients.

    The state never sees such a step, but whoever guards the loop must.
    """
    return jax.tree.map(
        lambda u, g: layout.like(jnp.where(sound, u, jnp.nan).astype(g.dtype), g),
        updates,
        gradients,
    )


def where(condition, chosen, other):
    """``chosen`` in the dtypes of ``other``, or ``other``."""
    return jax.tree.map(
        lambda a, b: jnp.where(condition, layout.like(a, b).astype(b.dtype), b),
        chosen,
        other,
    )


def _wide(*dtypes):
    """float32, or the widest of the floating ones."""
    floating = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return functools.reduce(jnp.promote_types, floating, jnp.dtype(jnp.float32))
