"""Critical momenta: the buffer of critical gradients, holding momenta instead.

Malviya et al., Promoting Exploration in Memory-Augmented Adam using Critical Momenta,
TMLR 2024.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from memoptax import _check, _momentum, _parameters
from memoptax._bases import guards, precision, pytorch
from memoptax._buffer import algorithm
from memoptax._buffer import options as _options
from memoptax._buffer.options import Aggregate, BufferArguments, Priority
from memoptax._tensors import flax_metadata, layout, storage


class CriticalMomentaState(NamedTuple):
    """State of :func:`critical_momenta`."""

    mu: Any  # like the params, in mu_dtype: the momentum m
    mu_scales: Any  # int8: per leaf (*shape[:-1], 1), float32; else None
    buffer: algorithm.Buffer  # of momenta; see Buffer for shapes and dtypes


class ScaleByAdamCmState(NamedTuple):
    """State of :func:`scale_by_adam_cm`."""

    count: Any  # (), int32: finite steps taken
    mu: Any  # like the params, in mu_dtype: the momentum m
    mu_scales: Any  # int8: per leaf (*shape[:-1], 1), float32; else None
    nu: Any  # like the params, float32 or better: second moment of the aggregate M
    nu_max: Any  # like nu: its maximum so far; None without AMSGrad
    buffer: algorithm.Buffer  # of momenta; see Buffer for shapes and dtypes


def critical_momenta(
    b1: ArrayLike = 0.9,
    topc: int | None = None,
    decay: ArrayLike = 0.7,
    kappa: ArrayLike = 1.0,
    aggr: Aggregate = "sum",
    *,
    mu_dtype: DTypeLike | None = None,
    synced: bool = True,
    priority_fn: Priority | None = None,
    buffer_dtype: DTypeLike | None = None,
    fifo_probability: ArrayLike | None = None,
    seed: int | jax.Array = 0,
    holding: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Join the momentum to the C momenta of the most critical gradients before it.

    .. math::
      m_t = \beta_1 m_{t-1} + (1 - \beta_1)\,g_t, \qquad
      M_t = m_t + \frac{\kappa}{|B_t|} \sum_{b \in B_t} b, \qquad
      B_{t+1} = \mathrm{top}_C\big(B_t \cup \{m_t\}\big)

    The update is M. The key of a momentum is that of its *gradient*: it starts as
    :math:`\lVert g_t \rVert` and is multiplied by ``decay`` at every step. M is not
    written back into m, and there is no bias correction. If a gradient is not finite,
    the whole update is NaN and the state does not change, except for the spare slot,
    which holds no value. Without a buffer m takes it, as ``optax.ema`` does.

    Memory: C + 2 copies of float32 parameters (2 for C = 1), for the slots and m; less
    with ``buffer_dtype`` and ``mu_dtype``. What :func:`critical_gradients` says of its
    buffer holds here too.

    Args:
      b1: β₁ in [0, 1), the decay of the momentum.
      topc, decay, kappa, aggr: as in :func:`critical_gradients`.
      mu_dtype: dtype in which m is stored between steps: None (float32 or better),
        float64, float32, bfloat16, float16 or int8 (with scales as for
        ``buffer_dtype``). The arithmetic stays in float32 or better. m is rounded to
        nearest and clipped to the range of the dtype. The buffer joins and stores the
        rounded m. Rounding stalls m. With b1 = .9, m approaches a constant gradient
        only to within 4 % in bfloat16 and .5 % in float16. In int8 an element stays 0
        while its gradients are below 4 % of the largest m in its row. Without a buffer
        (a concrete κ or C of 0) the update uses m before rounding, and int8 takes a
        temporary copy of the parameters. No derivative flows through
        int8. ``docs/low_precision.md`` has the measured effect on accuracy.
      synced, priority_fn, buffer_dtype, fifo_probability, seed, holding: as in
        :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. It ignores extra arguments, and its
      updates have the dtype of the gradients.

    Raises:
      ValueError: as :func:`critical_gradients` does.

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = optax.chain(memoptax.critical_momenta(0.9, topc=5), optax.sgd(0.1))
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.34E+01
      1.19E+01
      9.91E+00
      7.68E+00
      5.47E+00

    References:
      Malviya et al, `Promoting Exploration in Memory-Augmented Adam using Critical
      Momenta <https://arxiv.org/abs/2307.09638>`_, TMLR 2024

    Differs from the authors' code (CMOptimizer) in:
      1. The first step stores the first momentum and moves the parameters. Theirs
         stores the bare gradient and moves nothing.
      2. ``aggr`` and ``kappa`` work, and FIFO draws replace the oldest entry. Theirs
         ignores the first two, and its FIFO always replaces the same slot.
      3. What :func:`critical_gradients` lists of the buffer.
    """
    b1 = _check.number("b1", b1, 0, 1, below=True)
    mu_dtype = _options.storage_dtype("mu_dtype", mu_dtype)
    options = _options.options(
        topc,
        decay,
        kappa,
        aggr,
        synced,
        priority_fn,
        buffer_dtype,
        fifo_probability,
        seed,
        holding,
    )
    in_range = _check.is_inside(b1, 0, 1, below=True)
    if options.keeps_nothing:
        average = guards.checking_moments(optax.ema(b1, debias=False))
        average = guards.expecting(average, optax.EmaState, mu_dtype=mu_dtype)
        rows = options.check_rows
        average = precision.stored_moment(average, "ema", mu_dtype, rows)
        return _without_buffer(average, in_range, CriticalMomentaState)

    def init_fn(params):
        mu, mu_scales = _momentum.zeros(params, mu_dtype)
        state = CriticalMomentaState(mu, mu_scales, algorithm.empty(options, params))
        return options.in_shards(state, params)

    def update_fn(updates, state, params=None):
        _check.state(state, CriticalMomentaState)
        _momentum.check(options, updates, state, mu_dtype, params)
        g = _momentum.beside(state, updates)
        sound, norms = _momentum.is_sound(options, g, state.buffer.keys.dtype, in_range)
        m, stored, mu = _momentum.average(g, state, b1, sound)  # m_t
        M, buffer = algorithm.recall_and_offer(  # M_t, B_{t+1}
            options, state.buffer, m, g, sound, stored, norms=norms
        )
        return _momentum.or_nan(sound, M, updates), CriticalMomentaState(*mu, buffer)

    return _parameters.transformation(init_fn, flax_metadata.on_arrays(update_fn))


@_options.flat
def scale_by_adam_cm(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    amsgrad: bool = False,
    skip_first: bool = False,
    mu_dtype: DTypeLike | None = None,
    aggr: Aggregate = "sum",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the aggregate of critical momenta by the root of its second moment.

    .. math::
      M_t &= m_t + \frac{\kappa}{|B_t|} \sum_{b \in B_t} b, \qquad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) M_t^2 \\
      u_t &= \frac{M_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with m and B of :func:`critical_momenta`. A κ or C of 0 gives Adam, whose v is that
    of the gradients, and which does with a gradient that is not finite what Adam does.
    Else the whole update is then NaN and the state does not change, except for the
    spare slot, which holds no value.

    Memory: C + 3 copies of float32 parameters, 3 for C = 1, for the slots, m and v; one
    more each with AMSGrad and with a running sum (``holding='sum'``). With C = 1 and
    int8 for ``buffer_dtype`` and ``mu_dtype`` it is 6 bytes per float32 parameter. Adam
    takes 8.

    Args:
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      amsgrad: whether to divide by the maximum of the uncorrected v so far.
      skip_first: whether to reproduce the first step of the authors' code. That step
        stores the bare gradient, and leaves the moments at 0 and the parameters as they
        are. The option costs one temporary copy of the parameters.
      mu_dtype: dtype in which m is stored, as in :func:`critical_momenta`.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. It ignores extra arguments, and its
      updates have the dtype of the gradients.

    Raises:
      ValueError: as :func:`critical_gradients` does.

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = optax.chain(memoptax.scale_by_adam_cm(), optax.scale(-0.03))
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.07E+01
      8.66E+00
      7.38E+00
      6.46E+00
      5.74E+00

    References:
      Malviya et al, `Promoting Exploration in Memory-Augmented Adam using Critical
      Momenta <https://arxiv.org/abs/2307.09638>`_, TMLR 2024

    Differs from the authors' Adam_CM in:
      1. What :func:`critical_momenta` lists. ``skip_first=True`` restores theirs.
      2. A κ of 0 is Adam. Theirs raises a KeyError.
      3. It has no weight decay. :func:`adamw_cm` adds it, decoupled as in theirs.
    """
    b1, b2, eps, eps_root = pytorch.check_adam(b1, b2, eps, eps_root)
    _check.flag("amsgrad", amsgrad)
    _check.flag("skip_first", skip_first)
    mu_dtype = _options.storage_dtype("mu_dtype", mu_dtype)
    options = _options.options(aggr=aggr, **buffer)
    in_range = pytorch.adam_is_sound(b1, b2, eps, eps_root)
    if options.keeps_nothing:
        rows, numbers = options.check_rows, (b1, b2, eps, eps_root)
        adam = pytorch.scale_by_adam(
            *numbers, mu_dtype, amsgrad=amsgrad, check_rows=rows
        )
        return _without_buffer(adam, in_range, ScaleByAdamCmState)

    def init_fn(params):
        def zeros():
            return jax.tree.map(storage.zero_sum, params)

        mu, mu_scales = _momentum.zeros(params, mu_dtype)
        state = ScaleByAdamCmState(
            count=jnp.zeros((), jnp.int32),
            mu=mu,
            mu_scales=mu_scales,
            nu=zeros(),
            nu_max=zeros() if amsgrad else None,
            buffer=algorithm.empty(options, params),
        )
        return options.in_shards(state, params)

    def check(updates, state, params):
        _check.state(state, ScaleByAdamCmState)
        _momentum.check(options, updates, state, mu_dtype, params)
        if state.nu is not None:  # None for a tree of None
            _check.same("amsgrad", amsgrad, state.nu_max is not None)

    def update_fn(updates, state, params=None):
        check(updates, state, params)
        g = _momentum.beside(state, updates)
        sound, norms = _momentum.is_sound(
            options,
            g,
            state.buffer.keys.dtype,
            in_range,
            jax.tree.leaves(state.nu),
        )
        if skip_first:
            M, mu, buffer = _momentum.as_released(options, g, state, b1, sound, norms)
        else:
            m, stored, mu = _momentum.average(g, state, b1, sound)  # m_t
            M, buffer = algorithm.recall_and_offer(  # M_t, B_{t+1}
                options, state.buffer, m, g, sound, stored, norms=norms
            )
        squared = _momentum.where(jnp.equal(options.kappa, 0), g, M)  # Adam's v is of g
        nu, nu_max = _second_moment(squared, state, b2, sound)  # v_t
        count = jnp.where(sound, optax.safe_increment(state.count), state.count)
        v, t = nu_max if amsgrad else nu, jnp.maximum(count, 1)
        u = pytorch.normalize(M, v, t, b1, b2, eps, eps_root)  # u_t
        state = ScaleByAdamCmState(count, *mu, nu, nu_max, buffer)
        return _momentum.or_nan(sound, u, updates, M), state

    return _parameters.transformation(init_fn, flax_metadata.on_arrays(update_fn))


@_options.flat
def sgd_cm(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    *,
    mu_dtype: DTypeLike | None = None,
    aggr: Aggregate = "sum",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with critical momenta: :math:`\theta_{t+1} = \theta_t - \eta\,M_t`.

    This is :func:`critical_momenta` with a learning rate. Gradients enter m with the
    weight 1 − β₁, and there is no bias correction, so the first steps are short. The
    authors provide no SGD variant of critical momenta.

    Memory: C + 2 copies of float32 parameters, 2 for C = 1, and one more with a running
    sum (``holding='sum'``).

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1), the decay of the momentum.
      mu_dtype: dtype in which m is stored, as in :func:`critical_momenta`.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.sgd_cm(0.1, topc=10)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['-0.010', '-0.020', '-0.030']
    """
    learning_rate = _check.learning_rate(learning_rate)
    return optax.chain(
        critical_momenta(b1, mu_dtype=mu_dtype, aggr=aggr, **buffer),
        precision.in_float32(pytorch.learning_rate(learning_rate)),
    )


@_options.flat
def adam_cm(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    amsgrad: bool = False,
    skip_first: bool = False,
    aggr: Aggregate = "sum",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical momenta, which escapes the sharp basins of toy surfaces.

    :math:`\theta_{t+1} = \theta_t - \eta\,u_t` with the u of :func:`scale_by_adam_cm`,
    which has the equations and the reference. The escape needs a large learning rate.
    Without a warm-up and with a ``decay`` of .99, the optimizer leaves the sharp basin
    and settles in a flat one. On networks it was level with Adam, or worse, after full
    training (``docs/evidence.md``).

    Memory: C + 3 copies of float32 parameters, 3 for C = 1; one more each with AMSGrad
    and with a running sum (``holding='sum'``).

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      mu_dtype: dtype in which m is stored, as in :func:`critical_momenta`.
      amsgrad: as in :func:`scale_by_adam_cm`.
      skip_first: as in :func:`scale_by_adam_cm`.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.adam_cm(0.03, topc=10)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['-0.300', '-0.300', '-0.300']

    Differs from the authors' Adam_CM in what :func:`scale_by_adam_cm` lists.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return optax.chain(
        scale_by_adam_cm(
            b1,
            b2,
            eps,
            eps_root,
            amsgrad=amsgrad,
            skip_first=skip_first,
            mu_dtype=mu_dtype,
            aggr=aggr,
            **buffer,
        ),
        precision.in_float32(pytorch.learning_rate(learning_rate)),
    )


@_options.flat
def adamw_cm(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: optax.MaskOrFn = None,
    *,
    amsgrad: bool = False,
    skip_first: bool = False,
    aggr: Aggregate = "sum",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical momenta and decoupled weight decay.

    :math:`\theta_{t+1} = \theta_t - \eta\,(u_t + \lambda\,\theta_t)` with the u of
    :func:`scale_by_adam_cm`, which has the equations and the reference.

    Memory: C + 3 copies of float32 parameters, 3 for C = 1; one more each with AMSGrad
    and with a running sum (``holding='sum'``).

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      mu_dtype: dtype in which m is stored, as in :func:`critical_momenta`.
      weight_decay: λ ≥ 0, a number or a schedule, per unit of learning rate.
      mask: a tree of booleans that says which parameters decay, or a function from the
        parameters to such a tree. None decays all.
      amsgrad: as in :func:`scale_by_adam_cm`.
      skip_first: as in :func:`scale_by_adam_cm`. The first step then
        only applies weight decay.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.adamw_cm(0.03, weight_decay=0.1, topc=10)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['-0.303', '-0.306', '-0.309']

    Differs from the authors' Adam_CM with weight decay in:
      1. What :func:`scale_by_adam_cm` lists.
      2. λ·θ is added to the step before η multiplies both. Theirs first multiplies the
         parameters by 1 − η·λ, which is rounded.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return optax.chain(
        scale_by_adam_cm(
            b1,
            b2,
            eps,
            eps_root,
            amsgrad=amsgrad,
            skip_first=skip_first,
            mu_dtype=mu_dtype,
            aggr=aggr,
            **buffer,
        ),
        precision.in_float32(
            optax.chain(
                pytorch.weight_decay(weight_decay, mask),
                pytorch.learning_rate(learning_rate),
            )
        ),
    )


def _without_buffer(base, in_range, kind):
    """``base`` in float32, which keeps no buffer and refuses a state that has one."""
    base = guards.without_buffer(guards.while_sound(base, in_range), kind)
    return precision.in_float32(base)


def _second_moment(squared, state, b2, taken):
    """v and its maximum (None if the state has none) after this step.

    An entry that overflows stays as it was. An infinite v would never come down.
    """
    nu = optax.tree.update_moment_per_elem_norm(squared, state.nu, b2, 2)
    nu = jax.tree.map(layout.like, nu, state.nu)
    nu = jax.tree.map(
        lambda new, old: _momentum.where(taken & jnp.isfinite(new), new, old),
        nu,
        state.nu,
    )
    if state.nu_max is None:
        return nu, None
    largest = jax.tree.map(jnp.maximum, state.nu_max, nu)
    return nu, jax.tree.map(layout.like, largest, state.nu_max)
