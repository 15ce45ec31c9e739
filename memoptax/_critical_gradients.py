"""Critical gradients: keep the C largest gradients seen, and join them to each new one.

McRae et al., Memory Augmented Optimizers for Deep Learning, ICLR 2022.
"""

from typing import NamedTuple

import jax
import optax

from memoptax import _check, _flax_metadata, _parameters
from memoptax._bases import precision, pytorch
from memoptax._buffer import algorithm
from memoptax._buffer import options as _options
from memoptax._tensors import layout

_REFERENCES = """\
References:
  McRae et al, `Memory Augmented Optimizers for Deep Learning
  <https://arxiv.org/abs/2106.10708>`_, ICLR 2022"""


class CriticalGradientsState(NamedTuple):
    """State of critical_gradients."""

    buffer: algorithm.Buffer  # of gradients; Buffer says what shapes and dtypes it has


@_options.documented(_REFERENCES)
def critical_gradients(
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="sum",
    *,
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformation:
    r"""Join each gradient to the C most critical ones seen before it.

    Stands in front of any optax optimizer and turns it into its C variant:

    .. math::
      u_t = g_t + \frac{\kappa}{|B_t|} \sum_{b \in B_t} b, \qquad
      B_{t+1} = \mathrm{top}_C\big(B_t \cup \{g_t\}\big)

    by keys that start as :math:`\lVert g \rVert` and are multiplied by ``decay`` at
    every step. The first update is the gradient itself. A gradient that is only as
    critical as the least one of a full buffer is refused; among equally critical ones
    the lowest entry leaves. A step whose gradient or priority is not finite leaves the
    buffer, its keys and its ages as they were; its update is made as ever, so that
    ``optax.apply_if_finite`` can see it.

    Memory: one copy of the parameters for C = 1, else C + 1 copies, and one more where
    a sum is kept (``holding``). Donate the state
    (``jax.jit(step, donate_argnums=...)``): otherwise XLA copies the buffer on every
    step.

    At the defaults nearly every gradient is accepted, so the buffer is about the last
    C gradients; :func:`memoptax.buffer_stats` reports the acceptance. A larger
    ``decay`` or a smaller C makes it choose.

    Under ``optax.partition`` each group has its own buffer and priority.
    ``optax.MultiSteps`` selects over the whole of its inner state, buffer included:
    accumulate micro-batches in the training step instead. ``optax.inject_hyperparams``
    casts numbers to the parameters' dtype: in bfloat16 a decay of .999 becomes 1.

    Args:
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = optax.chain(memoptax.critical_gradients(topc=5), optax.adam(0.03))
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.36E+01
      1.33E+01
      1.30E+01
      1.26E+01
      1.23E+01

    {references}

    Differs from the authors' code (CGOptimizer) in:
      1. The gate is the true minimum of the keys; theirs may be another entry.
      2. ``kappa`` and ``aggr`` work in every variant, and a κ of 0 is the base.
      3. The running sum has a bounded error; theirs keeps what outliers leave behind.
      4. Sum and keys are float32 or better whatever ``buffer_dtype`` is.
      5. Gradients that are not finite are never stored, and arguments are checked.
      6. C + 1 slots instead of C where C > 1, so that nothing is copied.
    """
    options = _options.options(**_options.among(locals()))
    if options.keeps_nothing:
        return optax.with_extra_args_support(optax.identity())

    def init_fn(params):
        return CriticalGradientsState(algorithm.empty(options, params))

    def update_fn(updates, state, params=None):
        del params
        _check.state(state, CriticalGradientsState)
        updates, buffer = algorithm.recall_and_offer(
            options, state.buffer, updates, updates
        )
        return updates, CriticalGradientsState(buffer)

    return _parameters.transformation(init_fn, _flax_metadata.on_arrays(update_fn))


@_options.documented(_REFERENCES)
def sgd_c(
    learning_rate: optax.ScalarOrSchedule,
    momentum=None,
    nesterov=False,
    accumulator_dtype=None,
    *,
    dampening=0.0,
    weight_decay=0.0,
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
    r"""SGD with critical gradients.

    .. math::
      u_t &= \mathrm{aggr}(g_t, B_t) + \lambda\,\theta_t \\
      b_t &= \mu\,b_{t-1} + (1 - d)\,u_t, \qquad b_1 = u_1 \\
      \theta_{t+1} &= \theta_t - \eta\,b_t

    with momentum :math:`\mu`, dampening d and L2 decay :math:`\lambda`:
    :func:`critical_gradients` followed by ``optax.sgd``. The default ``aggr='sum'``
    roughly doubles the step, so compare it with SGD at twice the rate.

    Memory: C + 1 copies of the parameters (1 for C = 1), one more with momentum.

    Args:
      learning_rate: η, a number or an optax schedule.
      momentum: μ in [0, 1], or None for none.
      nesterov: whether to emit u + μ·b instead of b.
      accumulator_dtype: dtype of the momentum; None means float32 or better.
      dampening: d in [0, 1]; the first step is undamped, as in PyTorch.
      weight_decay: λ ≥ 0, added after aggregation (L2). To let it enter the buffer,
        chain ``optax.add_decayed_weights`` in front of :func:`critical_gradients`.
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.sgd_c(0.003, momentum=0.9)
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.38E+01
      1.34E+01
      1.26E+01
      1.17E+01
      1.06E+01

    {references}

    Differs from the authors' SGD_C in:
      1. What :func:`critical_gradients` lists.
      2. Weight decay comes after aggregation; theirs is stored with the gradient.
      3. A κ of 0 keeps the momentum.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return _in_front_of(
        optax.chain(
            pytorch.weight_decay(weight_decay),
            pytorch.trace(momentum, dampening, nesterov, accumulator_dtype),
            optax.scale_by_learning_rate(learning_rate),
        ),
        _options.among(locals()),
    )


@_options.documented(_REFERENCES)
def rmsprop_c(
    learning_rate: optax.ScalarOrSchedule,
    alpha=0.99,
    eps=1e-8,
    *,
    momentum=None,
    nesterov=False,
    centered=False,
    initial_scale=0.0,
    weight_decay=0.0,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="mean",
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformationExtraArgs:
    r"""RMSprop with critical gradients.

    .. math::
      u_t &= \mathrm{aggr}(g_t, B_t) + \lambda\,\theta_t \\
      v_t &= \alpha\,v_{t-1} + (1 - \alpha)\,u_t^2 \\
      \theta_{t+1} &= \theta_t - \eta\,\frac{u_t}{\sqrt{v_t} + \epsilon}

    :func:`critical_gradients` followed by ``optax.rmsprop`` with ``eps_in_sqrt=False``.
    Centered, :math:`v_t` loses the square of the mean of u, and is clamped at 0.

    Memory: C + 2 copies of the parameters (2 for C = 1), one more with momentum and one
    if centered.

    Args:
      learning_rate: η, a number or an optax schedule.
      alpha: the decay of the second moment, in [0, 1]: what ``optax.rmsprop`` calls
        ``decay``, which here is the buffer's.
      eps: ε ≥ 0, outside the root.
      momentum: of the scaled steps, in [0, 1], or None for none.
      nesterov: whether that momentum is Nesterov's.
      centered: whether to divide by the deviation instead of the root mean square.
      initial_scale: what the second moment starts from.
      weight_decay: λ ≥ 0, added after aggregation (L2).
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.rmsprop_c(0.01)
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.28E+01
      1.20E+01
      1.14E+01
      1.09E+01
      1.05E+01

    {references}

    Differs from the authors' RMSprop_C in:
      1. What :func:`critical_gradients` lists.
      2. The centered variance is clamped at 0; theirs may be negative, its root NaN.
      3. Momentum is taken of η times the step, as in ``optax.rmsprop``: the same for a
         constant rate, not under a schedule.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return _in_front_of(
        optax.chain(
            pytorch.weight_decay(weight_decay),
            pytorch.scale_by_rms(alpha, eps, initial_scale, centered),
            optax.scale_by_learning_rate(learning_rate),
            pytorch.trace(momentum, 0.0, nesterov),
        ),
        _options.among(locals()),
    )


@_options.documented(_REFERENCES)
def adam_c(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    mu_dtype=None,
    *,
    nesterov=False,
    weight_decay=0.0,
    amsgrad=False,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="mean",
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical gradients.

    .. math::
      u_t &= \mathrm{aggr}(g_t, B_t) + \lambda\,\theta_t \\
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,u_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,u_t^2 \\
      \theta_{t+1} &= \theta_t - \eta\,\frac{m_t / (1 - \beta_1^t)}
      {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    :func:`critical_gradients` followed by ``optax.adam``.

    Memory: C + 3 copies of the parameters (3 for C = 1), one more with AMSGrad; less
    with ``buffer_dtype``.

    Args:
      learning_rate: η, a number or an optax schedule. The authors tune it anew, from
        the base's rate to a tenth of it.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      mu_dtype: dtype in which the first moment is stored: None (float32 or better),
        float64, float32, bfloat16, float16 or int8, as in :func:`adam_cm`.
      nesterov: whether to use Nesterov momentum.
      weight_decay: λ ≥ 0, added after aggregation (L2); :func:`adamw_c` decouples it.
      amsgrad: whether to divide by the maximum of v so far, as PyTorch takes it: of
        the uncorrected v. Not together with ``nesterov``.
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.adam_c(0.03)
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.36E+01
      1.33E+01
      1.29E+01
      1.26E+01
      1.23E+01

    {references}

    Differs from the authors' Adam_C in:
      1. What :func:`critical_gradients` lists.
      2. A κ of 0 is Adam; theirs raises a KeyError.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return _in_front_of(
        optax.chain(
            pytorch.weight_decay(weight_decay),
            pytorch.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov, amsgrad),
            optax.scale_by_learning_rate(learning_rate),
        ),
        _options.among(locals()),
    )


@_options.documented(_REFERENCES)
def adamw_c(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    mu_dtype=None,
    weight_decay=0.01,
    mask=None,
    *,
    nesterov=False,
    amsgrad=False,
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="mean",
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
    holding=None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical gradients and decoupled weight decay.

    .. math::
      \theta_{t+1} = \theta_t - \eta\,\Big(\frac{m_t / (1 - \beta_1^t)}
      {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda\,\theta_t\Big)

    with the moments of :func:`adam_c` without its L2 term: :func:`critical_gradients`
    followed by ``optax.adamw``.

    Memory: C + 3 copies of the parameters (3 for C = 1), one more with AMSGrad; less
    with ``buffer_dtype``.

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      mu_dtype: dtype in which the first moment is stored: None (float32 or better),
        float64, float32, bfloat16, float16 or int8, as in :func:`adam_cm`.
      weight_decay: λ ≥ 0, per unit of learning rate. The default is the authors' and
        PyTorch's .01, where ``optax.adamw`` has 1e-4.
      mask: a tree of booleans, or a function from parameters to one: which are decayed.
      nesterov: whether to use Nesterov momentum.
      amsgrad: as in :func:`adam_c`.
      {buffer}

    {returns}

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.adamw_c(0.03, weight_decay=0.1)
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      1.36E+01
      1.31E+01
      1.27E+01
      1.23E+01
      1.19E+01

    {references}

    Differs from the authors' AdamW_C in:
      1. What :func:`critical_gradients` lists.
      2. Parameters are decayed in one product with the step, as in ``optax.adamw``;
         theirs multiplies them by 1 − η·λ, rounded, first.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return _in_front_of(
        optax.chain(
            pytorch.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov, amsgrad),
            pytorch.weight_decay(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        ),
        _options.among(locals()),
    )


def _in_front_of(base, buffer_arguments):
    """Critical gradients in front of ``base``, which computes in float32.

    What a mesh divides further than the gradients stays so from one to the other, and
    is gathered once, as the last update.
    """
    tx = optax.chain(critical_gradients(**buffer_arguments), precision.in_float32(base))

    def update_fn(updates, state, params=None, **extra_args):
        new_updates, new_state = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(layout.like, new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
