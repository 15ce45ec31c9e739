"""Critical momenta: the buffer of critical gradients, holding momenta instead.

Malviya et al., Promoting Exploration in Memory-Augmented Adam using Critical Momenta,
TMLR 2024.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memoptax import _check, _flax_metadata, _momentum, _parameters
from memoptax._bases import precision, pytorch
from memoptax._buffer import algorithm
from memoptax._buffer import options as _options
from memoptax._tensors import storage

_REFERENCES = """\
References:
  Malviya et al, `Promoting Exploration in Memory-Augmented Adam using Critical Momenta
  <https://arxiv.org/abs/2307.09638>`_, TMLR 2024"""


class CriticalMomentaState(NamedTuple):
    """State of critical_momenta."""

    mu: Any  # like the params, in mu_dtype: the momentum m
    mu_scales: Any  # int8: per leaf (*shape[:-1], 1), float32; else None
    buffer: algorithm.Buffer  # of momenta; Buffer says what shapes and dtypes it has


class ScaleByAdamCmState(NamedTuple):
    """State of scale_by_adam_cm."""

    count: jax.Array  # (), int32: finite steps taken
    mu: Any  # like the params, in mu_dtype: the momentum m
    mu_scales: Any  # int8: per leaf (*shape[:-1], 1), float32; else None
    nu: Any  # like the params, float32 or better: second moment of the aggregate M
    nu_max: Any  # like nu: its maximum so far; None without AMSGrad
    buffer: algorithm.Buffer  # of momenta; Buffer says what shapes and dtypes it has


@_options.documented(_REFERENCES)
def critical_momenta(
    b1=0.9,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="sum",
    *,
    mu_dtype=None,
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformation:
    r"""Join the momentum to the C momenta of the most critical gradients before it.

    .. math::
      m_t = \beta_1 m_{t-1} + (1 - \beta_1)\,g_t, \qquad
      M_t = m_t + \frac{\kappa}{|B_t|} \sum_{b \in B_t} b, \qquad
      B_{t+1} = \mathrm{top}_C\big(B_t \cup \{m_t\}\big)

    Emits M. A momentum is kept by the key of its *gradient*, which starts as
    :math:`\lVert g_t \rVert` and is multiplied by ``decay`` at every step. M is not
    written back into m. There is no bias correction. On a step whose gradient is not
    finite M is not finite there either, and the whole state stays as it was.

    Memory: C + 2 copies of the parameters (2 for C = 1): the slots and m; less
    with ``buffer_dtype`` and ``mu_dtype``. What :func:`critical_gradients` says of its
    buffer holds here too.

    Args:
      b1: β₁ in [0, 1), the decay of the momentum.
      {mu_dtype}
      {buffer}

    {returns}

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

    {references}

    Differs from the authors' code (CMOptimizer) in:
      1. The first step stores the first momentum and is taken; theirs stores the bare
         gradient and moves nothing.
      2. ``aggr``, ``kappa``, FIFO draws: theirs ignores the first two, and its FIFO
         replaces one and the same slot.
      3. What :func:`critical_gradients` lists of the buffer.
    """
    b1 = _check.number("b1", b1, 0, 1, below=True)
    mu_dtype = _options.storage_dtype("mu_dtype", mu_dtype)
    options = _options.options(**_options.among(locals()))
    if options.keeps_nothing:
        average = optax.ema(b1, debias=False)
        return precision.in_float32(precision.stored_moment(average, "ema", mu_dtype))

    def init_fn(params):
        mu, mu_scales = _momentum.zeros(params, mu_dtype)
        return CriticalMomentaState(mu, mu_scales, algorithm.empty(options, params))

    def update_fn(updates, state, params=None):
        del params
        _check.state(state, CriticalMomentaState)
        _momentum.check(options, updates, state, mu_dtype)
        placed = _momentum.beside(state, updates)
        sound = _momentum.is_sound(options, placed, state.buffer.keys.dtype, b1)
        joined, momentum, buffer = _momentum.aggregate(
            options, placed, state, b1, sound
        )
        state = CriticalMomentaState(*momentum, buffer)
        return _momentum.or_nan(sound, joined, updates), state

    return _parameters.transformation(init_fn, _flax_metadata.on_arrays(update_fn))


@_options.documented(_REFERENCES)
def scale_by_adam_cm(
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    *,
    amsgrad=False,
    skip_first=False,
    mu_dtype=None,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="sum",
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformation:
    r"""Scale the aggregate of critical momenta by the root of its second moment.

    .. math::
      M_t &= m_t + \frac{\kappa}{|B_t|} \sum_{b \in B_t} b, \qquad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) M_t^2 \\
      u_t &= \frac{M_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with m and B of :func:`critical_momenta`. A κ or C of 0 is Adam, whose v is of the
    gradients. On a step whose gradient is not finite u is not finite there either, and
    the whole state stays as it was.

    Memory: C + 3 copies of the parameters (3 for C = 1): the slots, m and v; one more
    with AMSGrad. With C = 1 and int8 for ``buffer_dtype`` and ``mu_dtype`` it is 6
    bytes per float32 parameter, where Adam has 8.

    Args:
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      amsgrad: whether to divide by the maximum of the uncorrected v so far.
      skip_first: whether to repeat the first step of the authors' code: it stores the
        bare gradient, and leaves the moments at 0 and the parameters where they are.
        Costs one copy of the parameters in temporaries.
      {mu_dtype}
      {buffer}

    {returns}

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

    {references}

    Differs from the authors' Adam_CM in:
      1. What :func:`critical_momenta` lists; ``skip_first=True`` is their first step.
      2. A κ of 0 is Adam; theirs raises a KeyError.
      3. Weight decay is not part of it: :func:`adamw_cm` decouples it, as theirs does.
    """
    b1, b2, eps, eps_root = pytorch.check_adam(b1, b2, eps, eps_root)
    _check.flag("amsgrad", amsgrad)
    _check.flag("skip_first", skip_first)
    mu_dtype = _options.storage_dtype("mu_dtype", mu_dtype)
    options = _options.options(**_options.among(locals()))
    if options.keeps_nothing:
        adam = pytorch.scale_by_adam(b1, b2, eps, eps_root, amsgrad=amsgrad)
        return precision.in_float32(precision.stored_moment(adam, "mu", mu_dtype))

    def init_fn(params):
        def zeros():
            return jax.tree.map(storage.zero_sum, params)

        mu, mu_scales = _momentum.zeros(params, mu_dtype)
        return ScaleByAdamCmState(
            count=jnp.zeros((), jnp.int32),
            mu=mu,
            mu_scales=mu_scales,
            nu=zeros(),
            nu_max=zeros() if amsgrad else None,
            buffer=algorithm.empty(options, params),
        )

    def update_fn(updates, state, params=None):
        del params
        _check.state(state, ScaleByAdamCmState)
        _momentum.check(options, updates, state, mu_dtype)
        _check.same("amsgrad", amsgrad, state.nu_max is not None)
        placed = _momentum.beside(state, updates)
        sound = _momentum.is_sound(
            options, placed, state.buffer.keys.dtype, b1, b2, eps, squares=True
        )
        joined, momentum, buffer = _momentum.aggregate(
            options, placed, state, b1, sound, skip_first=skip_first
        )
        squared = _momentum.where(
            jnp.equal(kappa, 0), placed, joined
        )  # Adam's are of g
        count, nu, nu_max = _second_moment(squared, state, b2, sound)  # v_t
        scaled = pytorch.normalize(  # u_t
            joined,
            nu_max if amsgrad else nu,
            jnp.maximum(count, 1),
            b1,
            b2,
            eps,
            eps_root,
        )
        state = ScaleByAdamCmState(count, *momentum, nu, nu_max, buffer)
        return _momentum.or_nan(sound, scaled, updates), state

    return _parameters.transformation(init_fn, _flax_metadata.on_arrays(update_fn))


@_options.documented(_REFERENCES)
def sgd_cm(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    *,
    mu_dtype=None,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="sum",
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with critical momenta: :math:`\theta_{t+1} = \theta_t - \eta\,M_t`.

    :func:`critical_momenta` at a learning rate. m is (1 − β₁)-weighted and has no bias
    correction, so its first steps are short.

    Memory: C + 2 copies of the parameters (2 for C = 1).

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1), the decay of the momentum.
      {mu_dtype}
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.sgd_cm(0.1)
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

    {references}

    Differs from the authors' code in:
      1. It exists: theirs has SGD with critical gradients alone.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return optax.chain(
        critical_momenta(b1, mu_dtype=mu_dtype, **_options.among(locals())),
        precision.in_float32(optax.scale_by_learning_rate(learning_rate)),
    )


@_options.documented(_REFERENCES)
def adam_cm(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    mu_dtype=None,
    *,
    amsgrad=False,
    skip_first=False,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="sum",
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical momenta, which on surfaces leaves sharp basins for flat ones.

    :math:`\theta_{t+1} = \theta_t - \eta\,u_t` with the u of
    :func:`scale_by_adam_cm`, which has the equations and the sources. The effect needs
    a rate that is not small; with a ``decay`` of .99 it escapes and settles. On
    networks it was level with Adam or worse after full training (``docs/evidence.md``).

    Memory: C + 3 copies of the parameters (3 for C = 1), one more with AMSGrad.

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      {mu_dtype}
      amsgrad: as in :func:`scale_by_adam_cm`.
      skip_first: as in :func:`scale_by_adam_cm`.
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.adam_cm(0.03)
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

    {references}

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
            **_options.among(locals()),
        ),
        precision.in_float32(optax.scale_by_learning_rate(learning_rate)),
    )


@_options.documented(_REFERENCES)
def adamw_cm(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    mu_dtype=None,
    weight_decay=0.01,
    mask=None,
    *,
    amsgrad=False,
    skip_first=False,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="sum",
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical momenta and decoupled weight decay.

    :math:`\theta_{t+1} = \theta_t - \eta\,(u_t + \lambda\,\theta_t)` with the u of
    :func:`scale_by_adam_cm`, which has the equations and the sources.

    Memory: C + 3 copies of the parameters (3 for C = 1), one more with AMSGrad.

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      {mu_dtype}
      weight_decay: λ ≥ 0, per unit of learning rate.
      mask: a tree of booleans, or a function from parameters to one: which are decayed.
      amsgrad: as in :func:`scale_by_adam_cm`.
      skip_first: as in :func:`scale_by_adam_cm`; the first step then decays only.
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.adamw_cm(0.03, weight_decay=0.1)
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.06E+01
      8.54E+00
      7.22E+00
      6.27E+00
      5.53E+00

    {references}

    Differs from the authors' Adam_CM with weight decay in:
      1. What :func:`scale_by_adam_cm` lists.
      2. Parameters are decayed in one product with the step; theirs multiplies them by
         1 − η·λ, rounded, first.
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
            **_options.among(locals()),
        ),
        precision.in_float32(
            optax.chain(
                pytorch.weight_decay(weight_decay, mask),
                optax.scale_by_learning_rate(learning_rate),
            )
        ),
    )


def _second_moment(updates, state, b2, taken):
    """Steps taken, v and its maximum (None if the state has none) after this one."""
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    nu = _momentum.where(taken, nu, state.nu)
    amsgrad = state.nu_max is not None
    nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsgrad else None
    return jnp.where(taken, optax.safe_increment(state.count), state.count), nu, nu_max
