"""Bases with PyTorch's semantics, where optax's own transformations have others.

The authors put a buffer in front of PyTorch's optimizers, so their variants have these
bases. Everything else is optax's own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from memoptax import _check, _parameters
from memoptax._bases import guards, precision
from memoptax._tensors import layout, row_sparse, storage


def weight_decay(
    rate: optax.ScalarOrSchedule, mask: optax.MaskOrFn = None, *, as_it_is: bool = False
) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``. A concrete rate of 0 needs no parameters.

    The rate is in float32 or better, unless it is taken ``as_it_is``.
    """
    rate = _check.rate("weight_decay", rate)
    rate = rate if as_it_is else _in_float32(rate)
    _check.mask("mask", mask)
    if _check.is_zero(rate):
        return guards.expecting(optax.identity(), optax.EmptyState, weight_decay=rate)
    decay = optax.add_decayed_weights(rate)
    kind = type(jax.eval_shape(decay.init, ()))  # with a count if it is a schedule
    decay = guards.expecting(decay, kind, weight_decay=rate, mask=mask)
    if mask is None:
        return decay
    decay = masked(decay, mask)
    return guards.expecting(decay, optax.MaskedState, weight_decay=rate, mask=mask)


def masked(inner: optax.GradientTransformation, mask):
    """``optax.masked``, whose function sees the parameters and not the updates.

    An update may have another dtype, or be row-sparse. Without parameters, it sees a
    row-sparse update as the shape of its table, which ``jax.tree.map`` does not enter.
    """
    if not _check.is_function(mask):
        return optax.masked(inner, mask)

    def whole(leaf):
        if not row_sparse.is_row_sparse(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    def chosen(tree):
        return mask(row_sparse.tree_map(whole, _parameters.real_arrays(tree)))

    def update_fn(updates, state, params=None, **extra_args):
        seen = extra_args.get(precision.GIVEN)
        seen = params if seen is None else seen
        seen = updates if seen is None else _parameters.trained(updates, seen)
        return optax.masked(inner, chosen(seen)).update(updates, state, params)

    init_fn = optax.masked(inner, chosen).init
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def learning_rate(
    rate: optax.ScalarOrSchedule, *, as_it_is: bool = False
) -> optax.GradientTransformation:
    """``optax.scale_by_learning_rate`` of a rate that has been checked.

    The rate is in float32 or better, unless it is taken ``as_it_is``.
    """
    rate = rate if as_it_is else _in_float32(rate)
    kind = optax.ScaleByScheduleState if callable(rate) else optax.EmptyState
    scale = optax.scale_by_learning_rate(rate)
    return guards.expecting(scale, kind, learning_rate=rate)


def _in_float32(rate) -> Any:
    """A rate or a schedule of rates, whose JAX numbers are in float32 or better."""
    if callable(rate):
        return lambda count: _in_float32(rate(count))
    return _check.widened(rate)


def scale_by_adam(
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    eps_root: ArrayLike,
    mu_dtype: DTypeLike | None = None,
    nesterov: bool = False,
    amsgrad: bool = False,
    *,
    check_rows: Callable[[Any], None],
) -> optax.GradientTransformation:
    """``optax.scale_by_adam``, or with ``amsgrad`` PyTorch's form of it.

    ``check_rows`` is as in :func:`precision.stored_moment`.
    """
    b1, b2, eps, eps_root = check_adam(b1, b2, eps, eps_root)
    _check.flag("nesterov", nesterov)
    _check.flag("amsgrad", amsgrad)
    mu_dtype = _check.stored_dtype("mu_dtype", mu_dtype, storage.DTYPES)
    if amsgrad and nesterov:
        raise ValueError("amsgrad and nesterov are both True, but exclude each other.")
    if amsgrad:
        adam, kind = scale_by_amsgrad(b1, b2, eps, eps_root), AmsgradState
    else:
        adam = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
        kind = optax.ScaleByAdamState
    adam = guards.expecting(guards.checking_moments(adam), kind, amsgrad=amsgrad)
    return precision.stored_moment(adam, "mu", mu_dtype, check_rows)


def check_adam(b1, b2, eps, eps_root):
    return (
        _check.number("b1", b1, 0, 1, below=True),
        _check.number("b2", b2, 0, 1, below=True),
        _check.number("eps", eps, 0),
        _check.number("eps_root", eps_root, 0),
    )


def adam_is_sound(b1, b2, eps, eps_root):
    """Whether those that are traced are in these ranges. True if none is traced."""
    return (
        _check.is_inside(b1, 0, 1, below=True)
        & _check.is_inside(b2, 0, 1, below=True)
        & _check.is_inside(eps, 0)
        & _check.is_inside(eps_root, 0)
    )


def trace(
    momentum: ArrayLike | None,
    dampening: ArrayLike,
    nesterov: bool,
    accumulator_dtype: DTypeLike | None = None,
    *,
    finite: bool = False,
) -> optax.GradientTransformation:
    """``optax.trace``, or a dampened one, or nothing for a momentum of None.

    If ``finite``, its entries stay where an update is not finite.
    """
    momentum = _check.number("momentum", momentum, 0, 1, optional=True)
    dampening = _check.number("dampening", dampening, 0, 1)
    _check.flag("nesterov", nesterov)
    _check.dtype("accumulator_dtype", accumulator_dtype)
    if momentum is None:
        return guards.expecting(optax.identity(), optax.EmptyState, momentum=None)
    if _check.is_zero(dampening):
        inner = optax.trace(momentum, nesterov, accumulator_dtype)
        kind = optax.TraceState
    else:
        inner = dampened_trace(momentum, dampening, nesterov, accumulator_dtype)
        kind = DampenedTraceState

    def check(state, updates):
        _check.moments("trace", state.trace, updates)
        found = {leaf.dtype for leaf in jax.tree.leaves(state.trace)}
        allowed = [accumulator_dtype] if accumulator_dtype else _check.WIDE
        _check.same_dtype("accumulator_dtype", accumulator_dtype, found, allowed)

    inner = _of_finite(inner) if finite else inner
    inner = guards.checking(inner, check)
    return guards.expecting(inner, kind, momentum=momentum, dampening=dampening)


def _of_finite(inner):
    """``inner``, whose trace stays where an update is not finite."""

    def update_fn(updates, state, params=None):
        found, new = inner.update(updates, state, params)
        trace = jax.tree.map(
            lambda u, a, b: layout.where(jnp.isfinite(layout.like(u, b)), a, b),
            updates,
            new.trace,
            state.trace,
        )
        return found, new._replace(trace=trace)

    return optax.GradientTransformation(inner.init, update_fn)


def scale_by_rms(alpha, eps, initial_scale, centered):
    """``optax.scale_by_rms`` with eps outside the root, or centered and clamped."""
    alpha = _check.number("alpha", alpha, 0, 1)
    eps = _check.number("eps", eps, 0)
    initial_scale = _check.number("initial_scale", initial_scale, 0)
    _check.flag("centered", centered)
    if centered:
        inner, kind = scale_by_centered_rms(alpha, eps, initial_scale), CenteredRmsState
    else:
        inner = optax.scale_by_rms(alpha, eps, initial_scale, eps_in_sqrt=False)
        kind = optax.ScaleByRmsState
    return guards.expecting(guards.checking_moments(inner), kind, centered=centered)


class DampenedTraceState(NamedTuple):
    """State of a momentum with dampening, as in :func:`memoptax.sgd_c`."""

    count: Any  # (), int32: steps taken
    trace: Any  # like the params, and in their dtypes


def dampened_trace(momentum, dampening, nesterov, accumulator_dtype):
    """b₁ = u₁, then b = momentum·b + (1 − dampening)·u. The update is b.

    Differs from ``optax.trace`` in the dampening, which does not apply to the first
    step.
    """

    def init_fn(params):
        trace = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        return DampenedTraceState(jnp.zeros((), jnp.int32), trace)

    def update_fn(updates, state, params=None):
        del params
        # In a divided ensemble a choice between two constants would be on no mesh.
        rate = jnp.asarray(dampening)
        scale = 1 - rate * (state.count > 0).astype(rate.dtype)
        trace = jax.tree.map(
            lambda u, b: scale.astype(u.dtype) * u + momentum * b.astype(u.dtype),
            updates,
            state.trace,
        )
        if nesterov:
            updates = jax.tree.map(lambda u, b: u + momentum * b, updates, trace)
        else:
            updates = trace
        trace = optax.tree.cast_like(trace, state.trace)
        return updates, DampenedTraceState(optax.safe_increment(state.count), trace)

    return optax.GradientTransformation(init_fn, update_fn)


class CenteredRmsState(NamedTuple):
    """State of a centered RMSprop, as in :func:`memoptax.rmsprop_c`."""

    mu: Any  # like the params: mean of the updates
    nu: Any  # like the params: mean of their squares


def scale_by_centered_rms(decay, eps, initial_scale):
    """u / (√max(v − h², 0) + eps), with h and v the averages of u and u².

    Differs from ``optax.scale_by_stddev`` in the clamp. Rounding makes the variance of
    a constant gradient negative, and its root is then NaN.
    """

    def init_fn(params):
        return CenteredRmsState(
            mu=optax.tree.zeros_like(params),
            nu=optax.tree.full_like(params, initial_scale),
        )

    def update_fn(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, decay, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, decay, 2)
        mu = _in_range(updates, mu, state.mu)
        nu = _in_range(updates, nu, state.nu)
        scaled = jax.tree.map(
            lambda u, h, v: u / (jnp.sqrt(jnp.maximum(v - h * h, 0)) + eps),
            updates,
            mu,
            nu,
        )
        return _shown(updates, scaled), CenteredRmsState(mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


class AmsgradState(NamedTuple):
    """State of Adam with AMSGrad, as in :func:`memoptax.adam_c`."""

    count: Any  # (), int32: steps taken
    mu: Any  # like the params: first moment
    nu: Any  # like the params: second moment
    nu_max: Any  # like the params: its maximum so far


def scale_by_amsgrad(b1, b2, eps, eps_root):
    """Adam over the maximum of the *uncorrected* second moment.

    Differs from ``optax.scale_by_amsgrad``, which takes the maximum of the corrected
    one.
    """

    def init_fn(params):
        return AmsgradState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=optax.tree.zeros_like(params),
            nu_max=optax.tree.zeros_like(params),
        )

    def update_fn(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        mu = _in_range(updates, mu, state.mu)
        nu = _in_range(updates, nu, state.nu)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)
        count = optax.safe_increment(state.count)
        scaled = normalize(mu, nu_max, count, b1, b2, eps, eps_root)
        return _shown(updates, scaled), AmsgradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(init_fn, update_fn)


def normalize(mu, nu, count, b1, b2, eps, eps_root):
    """(m / (1 − b1ᵗ)) / (√(v / (1 − b2ᵗ) + eps_root) + eps)."""
    # The scalars are inverted first. Otherwise every consumer that recomputes this
    # would repeat a division per element.
    m_scale, v_scale = (1 / bias_correction(decay, count) for decay in (b1, b2))

    def leaf(m, v):
        v = v * v_scale.astype(v.dtype)
        return m * m_scale.astype(m.dtype) / (_root(v + eps_root) + eps)

    return jax.tree.map(leaf, mu, nu)


def _root(x):
    """√x with derivatives of 0 at 0, where v has only seen zeros."""
    seen = x != 0
    # Of an empty x jnp.where returns the first choice. A 0 would be on no mesh.
    return jnp.where(seen, jnp.sqrt(jnp.where(seen, x, 1)), 0)


def bias_correction(decay, count):
    """1 − decayᵗ, for large decays as −expm1(t·log decay).

    For them the plain form is off by 2e-5 in float32. For small ones the derivative of
    expm1 cancels, and 0 has no log.
    """
    if _check.static(decay):
        small, log = decay < 0.5, math.log(max(decay, 0.5))
    else:
        small = decay < 0.5
        log = jnp.log(jnp.where(small, 1, decay))
    t = count.astype(jnp.result_type(log, float))
    # The second derivative that JAX gives x**1 is NaN at 0.
    power = jnp.where(t == 1, decay, decay ** jnp.where(t == 1, 2, t))
    return jnp.where(small, 1 - power, -jnp.expm1(t * log))


def _in_range(updates, new, old):
    """A moment after a step, or before it where the square of an update overflows."""
    return jax.tree.map(
        lambda u, a, b: layout.where(_squares(u, b), a, b.astype(a.dtype)),
        updates,
        new,
        old,
    )


def _shown(updates, scaled):
    """What was made of the updates, or NaN where their square overflows."""
    return jax.tree.map(
        lambda u, x: jnp.where(_squares(u, x), x, jnp.nan), updates, scaled
    )


def _squares(update, like):
    """Where the square of an update is finite, with the sharding of a moment."""
    update = layout.like(update, like)
    return jnp.isfinite(update * update)
