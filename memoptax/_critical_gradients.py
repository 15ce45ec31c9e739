"""Critical gradients: keep the C largest gradients seen, and join them to each new one.

McRae et al., Memory Augmented Optimizers for Deep Learning, ICLR 2022.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from memoptax import _check, _parameters
from memoptax._bases import guards, precision, pytorch
from memoptax._buffer import algorithm
from memoptax._buffer import options as _options
from memoptax._buffer.options import Aggregate, BufferArguments, Priority
from memoptax._tensors import flax_metadata, layout


class CriticalGradientsState(NamedTuple):
    """State of :func:`critical_gradients`."""

    buffer: algorithm.Buffer  # of gradients; see Buffer for shapes and dtypes


def critical_gradients(
    topc: int | None = None,
    decay: ArrayLike = 0.7,
    kappa: ArrayLike = 1.0,
    aggr: Aggregate = "sum",
    *,
    synced: bool = True,
    priority_fn: Priority | None = None,
    buffer_dtype: DTypeLike | None = None,
    fifo_probability: ArrayLike | None = None,
    seed: int | jax.Array = 0,
    holding: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Join each gradient to the C most critical ones seen before it.

    In front of any optax optimizer, this makes its C variant:

    .. math::
      u_t = g_t + \frac{\kappa}{|B_t|} \sum_{b \in B_t} b, \qquad
      B_{t+1} = \mathrm{top}_C\big(B_t \cup \{g_t\}\big)

    The key of a gradient starts as :math:`\lVert g \rVert` and is multiplied by
    ``decay`` at every step. The first update is the gradient itself. A full buffer
    refuses a gradient whose norm is not above the least key in the buffer. Among equal
    keys, the entry with the lowest index is replaced, and among keys that have decayed
    to 0 the oldest. If the gradient or its priority is not finite, the buffer does not
    change. The update is still returned, so that later transformations can see it.

    Memory: C + 1 copies of float32 parameters, or one copy for C = 1. A running sum
    (``holding='sum'``) takes one more. Donate the state
    (``jax.jit(step, donate_argnums=...)``). Otherwise XLA copies the buffer on every
    step.

    At the defaults nearly every gradient is accepted, so the buffer holds about the
    last C gradients. :func:`memoptax.buffer_stats` reports the acceptance. A larger
    ``decay`` or a smaller C makes the buffer selective.

    Under ``optax.partition`` each group has its own buffer and priority.
    ``optax.MultiSteps`` chooses between the old and the new inner state, buffer
    included, on every micro-batch. That passes over the whole buffer, so accumulate
    micro-batches in the training step instead.
    ``optax.inject_hyperparams`` casts numbers to the dtype of the parameters. In
    bfloat16 a decay of .999 becomes 1.

    Args:
      topc: the capacity C of the buffer, a static integer. None means 5. The papers'
        grid is 5, 10, 20. A concrete 0 keeps no buffer and gives the base optimizer,
        bit for bit in float32 unless XLA fuses the two programs differently.
      decay: the factor in [0, 1] that multiplies the buffer's keys at every step. It is
        not the decay of a moment. With a larger ``decay``, values may stay longer. The
        papers' grid is 0.7, 0.9, 0.99. The keys are multiplied in float32 or better.
      kappa: κ, the weight of the buffer's mean. A concrete 0 keeps no buffer.
      aggr: how an update u and the n values held are combined. ``'sum'`` is
        u + κ·mean(B), ``'mid'`` is half of that, and ``'mean'`` is
        (u + κ·ΣB)/(n + 1). A function ``(update, buffer_mean, fill) -> update`` is
        called for each leaf, with κ·mean(B) and n. ``'sum'`` roughly doubles the step,
        so compare it with the base at twice the learning rate. Tune the rate upwards
        from a tenth of the base's.
      synced: whether all leaves are kept or dropped together, by one priority. If
        False, each leaf has its own priority.
      priority_fn: a function that says how critical a gradient is. It maps the
        gradients in float32 or better (one leaf if not ``synced``) to a scalar of at
        least 0. None means the sum of the leaves' L2 norms, which is the authors' rule.
        ``optax.tree.norm`` is the global norm. Inside ``jax.shard_map`` any of these
        sees only the shards of one device. Use :func:`memoptax.sharded_norm` there, so
        that all devices agree. It also takes a rule of your own.
      buffer_dtype: dtype of the slots: None (that of the parameters), float64, float32,
        bfloat16, float16 or int8. Sums and keys stay in float32 or better. A leaf of a
        wider dtype is refused if its norm exceeds the range of the slots (65504 in
        float16). If ``synced``, all leaves are refused with it. int8 has one float32
        scale per row of the last axis, or one for a tensor of rank 0 or 1. The error of
        an element is then at most 1/254 of the largest magnitude in its row. Rows below
        1.5e-36 become 0. No derivative flows through int8.
        ``docs/low_precision.md`` has the measured effect on accuracy.
      fifo_probability: the probability that a step replaces the oldest entry of a full
        buffer without comparing keys, drawn once per step. None means never.
      seed: the seed of those draws.
      holding: how the C values are held. ``'select'`` is for C = 1: one slot with the
        shape of its parameter. ``'read'`` has C + 1 slots and reads C of them on every
        step. ``'sum'`` has C + 1 slots and their sum, and moves two slots for any C.
        So at C = 1 ``'read'`` takes one copy more than ``'select'``, and ``'sum'`` two.
        The error of that sum is at most 1e-5 of the summed norms of the leaf's values
        (2e-14 in float64). On a CPU, the mean that a function ``aggr`` gets has an
        error of up to 2.4e-7 of the new value's norm as well. None means
        ``'select'`` for C = 1, ``'read'`` if the C values take up to 20 bytes per
        parameter, and ``'sum'`` beyond that. On a CPU ``'sum'`` is faster from about
        C = 5 in float32 and C = 20 in int8.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. It ignores extra arguments, and its
      updates have the dtype of the gradients.

    Raises:
      ValueError: if an argument is out of its range, with its name and value; if
        ``topc`` is traced (under ``optax.inject_hyperparams`` pass
        ``static_args='topc'``, and likewise for ``aggr``, ``priority_fn``, ``seed`` and
        dtypes where they are given); in ``init``, if a parameter does not have a real
        floating-point dtype.

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

    References:
      McRae et al, `Memory Augmented Optimizers for Deep Learning
      <https://arxiv.org/abs/2106.10708>`_, ICLR 2022

    Differs from the authors' code (CGOptimizer) in:
      1. A new key is compared with the true minimum. Theirs may use another entry.
      2. ``kappa`` and ``aggr`` work in every variant, and a κ of 0 gives the base.
      3. The running sum has a bounded error. Theirs keeps the rounding errors of large
         values after they have left.
      4. Sums and keys are float32 or better for every ``buffer_dtype``.
      5. Gradients that are not finite are never stored, and arguments are checked.
      6. There are C + 1 slots instead of C where C > 1, so that nothing is copied.
    """
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
    tx = _recalling(options)
    if options.keeps_nothing:
        return tx

    def update_fn(updates, state, params=None, **extra_args):
        joined, state = tx.update(updates, state, params, **extra_args)
        return _in_dtypes_of(updates, joined), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _in_dtypes_of(gradients, updates):
    return jax.tree.map(lambda g, u: u.astype(jnp.result_type(g)), gradients, updates)


def _recalling(options, sound=True) -> optax.GradientTransformationExtraArgs:
    """Critical gradients in float32 or better, whose buffer takes only what is
    ``sound``.
    """
    if options.keeps_nothing:
        nothing = guards.expecting(
            optax.identity(), optax.EmptyState, topc=options.topc, kappa=options.kappa
        )
        return guards.without_buffer(nothing, CriticalGradientsState)

    def init_fn(params):
        state = CriticalGradientsState(algorithm.empty(options, params))
        return options.in_shards(state, params)

    def update_fn(updates, state, params=None):
        _check.state(state, CriticalGradientsState)
        updates, buffer = algorithm.recall_and_offer(  # u_t, B_{t+1}
            options, state.buffer, updates, updates, sound, params=params
        )
        return updates, CriticalGradientsState(buffer)

    return _parameters.transformation(init_fn, flax_metadata.on_arrays(update_fn))


@_options.flat
def sgd_c(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    dampening: ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    aggr: Aggregate = "sum",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with critical gradients.

    .. math::
      u_t &= \mathrm{aggr}(g_t, B_t) + \lambda\,\theta_t \\
      b_t &= \mu\,b_{t-1} + (1 - d)\,u_t, \qquad b_1 = u_1 \\
      \theta_{t+1} &= \theta_t - \eta\,b_t

    with momentum :math:`\mu`, dampening d and L2 decay :math:`\lambda`. This is
    :func:`critical_gradients` followed by ``optax.sgd``. The default ``aggr='sum'``
    roughly doubles the step, so compare it with SGD at twice the rate.

    Memory: C + 1 copies of float32 parameters, 1 for C = 1; one more each with momentum
    and with a running sum (``holding='sum'``); less with ``buffer_dtype``.

    Args:
      learning_rate: η, a number or an optax schedule.
      momentum: μ in [0, 1], or None for none.
      nesterov: whether to emit u + μ·b instead of b.
      accumulator_dtype: dtype of the momentum b. If d = 0 and μ is a Python number,
        μ·b has it too, as in optax. None means float32 or better.
      dampening: d in [0, 1]. The first step is undamped, as in PyTorch.
      weight_decay: λ ≥ 0, a number or a schedule, added after aggregation (L2). To
        store decayed gradients in the buffer, chain ``optax.add_decayed_weights`` in
        front of :func:`critical_gradients`.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.sgd_c(0.1, momentum=0.9, topc=10)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['-0.100', '-0.200', '-0.300']

    Differs from the authors' SGD_C in:
      1. What :func:`critical_gradients` lists.
      2. Weight decay comes after aggregation. Theirs is stored with the gradient.
      3. With a κ of 0, momentum still applies. Theirs drops it.
    """
    learning_rate = _check.learning_rate(learning_rate)
    base = optax.chain(
        pytorch.weight_decay(weight_decay),
        pytorch.trace(momentum, dampening, nesterov, accumulator_dtype),
        pytorch.learning_rate(learning_rate),
    )
    sound = _check.is_inside(momentum, 0, 1) & _check.is_inside(dampening, 0, 1)
    sound &= _check.is_inside(weight_decay)
    entering = {0: weight_decay}
    return _in_front_of(base, _options.options(aggr=aggr, **buffer), sound, entering)


@_options.flat
def rmsprop_c(
    learning_rate: optax.ScalarOrSchedule,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    centered: bool = False,
    initial_scale: ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    aggr: Aggregate = "mean",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""RMSprop with critical gradients.

    .. math::
      u_t &= \mathrm{aggr}(g_t, B_t) + \lambda\,\theta_t \\
      v_t &= \alpha\,v_{t-1} + (1 - \alpha)\,u_t^2 \\
      \theta_{t+1} &= \theta_t - \eta\,\frac{u_t}{\sqrt{v_t} + \epsilon}

    This is :func:`critical_gradients` followed by ``optax.rmsprop`` with
    ``eps_in_sqrt=False``. If centered, the square of the mean of u is subtracted from
    :math:`v_t`, and the difference is clamped at 0.

    Memory: C + 2 copies of float32 parameters, 2 for C = 1; one more each with
    momentum, if centered, and with a running sum (``holding='sum'``); less with
    ``buffer_dtype``.

    Args:
      learning_rate: η, a number or an optax schedule.
      alpha: the decay of the second moment, in [0, 1]. ``optax.rmsprop`` calls it
        ``decay``. Here ``decay`` is that of the buffer's keys.
      eps: ε ≥ 0, outside the root.
      momentum: the momentum of the scaled steps, in [0, 1], or None for none.
      nesterov: whether that momentum is Nesterov's.
      centered: whether to divide by the standard deviation instead of the root mean
        square.
      initial_scale: the initial value of the second moment. A traced one is not
        checked.
      weight_decay: λ ≥ 0, a number or a schedule, added after aggregation (L2).
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.rmsprop_c(0.01, topc=10)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['-0.100', '-0.100', '-0.100']

    Differs from the authors' RMSprop_C in:
      1. What :func:`critical_gradients` lists.
      2. The centered variance is clamped at 0. Theirs may be negative, and its root is
         then NaN.
      3. Momentum accumulates η times the step, as in ``optax.rmsprop``. For a constant
         rate the result is the same, but under a schedule it is not.
    """
    learning_rate = _check.learning_rate(learning_rate)
    base = optax.chain(
        pytorch.weight_decay(weight_decay),
        pytorch.scale_by_rms(alpha, eps, initial_scale, centered),
        pytorch.learning_rate(learning_rate),
        pytorch.trace(momentum, 0.0, nesterov, finite=centered),
    )
    sound = _check.is_inside(alpha, 0, 1) & _check.is_inside(eps, 0)
    sound &= _check.is_inside(momentum, 0, 1) & _check.is_inside(weight_decay)
    sound &= _check.is_inside(learning_rate)  # its steps enter the momentum
    entering = {0: weight_decay, 2: learning_rate}
    return _in_front_of(base, _options.options(aggr=aggr, **buffer), sound, entering)


@_options.flat
def adam_c(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
    aggr: Aggregate = "mean",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical gradients.

    .. math::
      u_t &= \mathrm{aggr}(g_t, B_t) + \lambda\,\theta_t \\
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,u_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,u_t^2 \\
      \theta_{t+1} &= \theta_t - \eta\,\frac{m_t / (1 - \beta_1^t)}
      {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    This is :func:`critical_gradients` followed by ``optax.adam``.

    Memory: C + 3 copies of float32 parameters, 3 for C = 1; one more each with AMSGrad
    and with a running sum (``holding='sum'``); less with ``buffer_dtype``.

    Args:
      learning_rate: η, a number or an optax schedule. The authors tune it again, from
        a tenth of the base's rate up to that rate.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      mu_dtype: dtype in which the first moment is stored: None (float32 or better),
        float64, float32, bfloat16, float16 or int8, as in :func:`critical_momenta`.
      nesterov: whether to use Nesterov momentum.
      weight_decay: λ ≥ 0, a number or a schedule, added after aggregation (L2).
        :func:`adamw_c` decouples it.
      amsgrad: whether to divide by the maximum of v so far. As in PyTorch, this is the
        maximum of the uncorrected v. It excludes ``nesterov``.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.adam_c(0.03, topc=10)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['-0.030', '-0.030', '-0.030']

    Differs from the authors' Adam_C in:
      1. What :func:`critical_gradients` lists.
      2. A κ of 0 is Adam. Theirs raises a KeyError.
    """
    learning_rate = _check.learning_rate(learning_rate)
    options = _options.options(aggr=aggr, **buffer)
    rows = options.check_rows
    adam = pytorch.scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype, nesterov, amsgrad, check_rows=rows
    )
    base = optax.chain(
        pytorch.weight_decay(weight_decay),
        adam,
        pytorch.learning_rate(learning_rate),
    )
    sound = pytorch.adam_is_sound(b1, b2, eps, eps_root)
    sound &= _check.is_inside(weight_decay)
    entering = {0: weight_decay}
    return _in_front_of(base, options, sound, entering)


@_options.flat
def adamw_c(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: optax.MaskOrFn = None,
    *,
    nesterov: bool = False,
    amsgrad: bool = False,
    aggr: Aggregate = "mean",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with critical gradients and decoupled weight decay.

    .. math::
      \theta_{t+1} = \theta_t - \eta\,\Big(\frac{m_t / (1 - \beta_1^t)}
      {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda\,\theta_t\Big)

    with the moments of :func:`adam_c` without its L2 term. This is
    :func:`critical_gradients` followed by ``optax.adamw``.

    Memory: C + 3 copies of float32 parameters, 3 for C = 1; one more each with AMSGrad
    and with a running sum (``holding='sum'``); less with ``buffer_dtype``.

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      eps_root: added inside the root.
      mu_dtype: as in :func:`adam_c`.
      weight_decay: λ ≥ 0, a number or a schedule, per unit of learning rate. The
        default is the authors' and PyTorch's .01. That of ``optax.adamw`` is 1e-4.
      mask: a tree of booleans that says which parameters decay, or a function from the
        parameters to such a tree. None decays all.
      nesterov: whether to use Nesterov momentum.
      amsgrad: as in :func:`adam_c`.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.adamw_c(0.03, weight_decay=0.1, topc=10)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [f"{u:.3f}" for u in updates]
      ['-0.033', '-0.036', '-0.039']

    Differs from the authors' AdamW_C in:
      1. What :func:`critical_gradients` lists.
      2. λ·θ is added to the step before η multiplies both, as in ``optax.adamw``.
         Theirs first multiplies the parameters by 1 − η·λ, which is rounded.
    """
    learning_rate = _check.learning_rate(learning_rate)
    options = _options.options(aggr=aggr, **buffer)
    rows = options.check_rows
    adam = pytorch.scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype, nesterov, amsgrad, check_rows=rows
    )
    base = optax.chain(
        adam,
        pytorch.weight_decay(weight_decay, mask),
        pytorch.learning_rate(learning_rate),
    )
    sound = pytorch.adam_is_sound(b1, b2, eps, eps_root)
    # Decoupled weight decay enters no state, so no schedule has to be finite for one.
    return _in_front_of(base, options, sound)


def _in_front_of(
    base, options, sound, entering: dict[int, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The buffer in front of ``base``, which computes in float32. The state of both
    stays as it was while traced numbers are not ``sound``. ``entering`` has the
    schedules whose values enter the state of ``base``, by their places in the chain.
    While one of them is not finite, that state stays too.

    The updates may be sharded over more mesh axes than the gradients. They stay sharded
    like that from the buffer to the end of ``base``, and are gathered once there.
    """
    # The buffer checks these itself. The base must not take what the buffer then emits.
    sound &= _check.is_inside(options.kappa)
    sound &= _check.is_inside(options.fifo_probability)
    base = guards.while_finite(base, entering or {})
    base = precision.in_float32(guards.while_sound(base, sound))
    tx = optax.chain(_recalling(options, sound), base)

    def update_fn(updates, state, params=None, **extra_args):
        updates = jax.tree.map(layout.as_placed, updates)
        new_updates, new_state = tx.update(updates, state, params, **extra_args)
        new_updates = _in_dtypes_of(updates, new_updates)
        return jax.tree.map(layout.like, new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
