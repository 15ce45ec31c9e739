"""Critical momenta over the covers of SM3: a second moment in almost no memory."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from memoptax import _check, _momentum, _parameters, _sm3_rules, covers
from memoptax._bases import precision, pytorch
from memoptax._buffer import algorithm
from memoptax._buffer import options as _options
from memoptax._buffer.options import Aggregate, BufferArguments
from memoptax._tensors import dtypes, families, flax_metadata, layout


class ScaleBySM3CmState(NamedTuple):
    """State of :func:`scale_by_sm3_cm`.

    The accumulators are a tuple with one item per leaf of the parameters, in the order
    of ``jax.tree.leaves``, as in :class:`ScaleBySM3State`.
    """

    count: Any  # (), int32: finite steps taken
    mu: Any  # like the params, in mu_dtype: the momentum m
    mu_scales: Any  # int8: per leaf (*shape[:-1], 1), float32; else None
    accumulators: Any  # per leaf and family: ceil(shape / box), float32 or better
    buffer: algorithm.Buffer | None  # of momenta; None with a concrete κ or C of 0


@_options.flat
def scale_by_sm3_cm(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    cover: covers.Cover | Sequence[tuple[int, ...]] | None = None,
    skip_first: bool = False,
    mu_dtype: DTypeLike | None = None,
    aggr: Aggregate = "sum",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the aggregate of critical momenta by a second moment over boxes.

    .. math::
      M_t &= m_t + \frac{\kappa}{|B_t|} \sum_{b \in B_t} b, \qquad
      \nu_t(i) = \beta_2 \min_{r \ni i} A_{t-1}(r) + (1 - \beta_2)\,M_t(i)^2 \\
      A_t(r) &= \max_{i \in r} \nu_t(i), \qquad
      u_t = \frac{M_t / (1 - \beta_1^t)}{\sqrt{\nu_t / (1 - \beta_2^t)} + \epsilon}

    with m and B of :func:`critical_momenta`, and with boxes r and accumulators A as in
    SM3-II (:func:`scale_by_sm3`). ν is never below the v of :func:`scale_by_adam_cm`,
    and with :func:`memoptax.covers.full` it is v. It is computed where it is used, and
    never stored.

    A κ or C of 0 keeps no buffer, and M is m: momentum over the root of its own second
    moment. That is not Adam, whose second moment is that of the gradients. The first
    steps are about :math:`1 / (1 - \beta_1)` times as long as Adam's. If a gradient is
    not finite, the whole update is NaN and the state does not change, except for the
    spare slot, which holds no value.

    Memory: C + 2 copies of float32 parameters (2 for C = 1), for the slots and m, and
    one more with a running sum (``holding='sum'``); less with ``buffer_dtype`` and
    ``mu_dtype``. A tensor :math:`n_1 \times \dots \times n_k` adds
    :math:`\sum_i n_i` numbers in float32 (float64 for float64 parameters). With int8
    for both, a matrix of 1024² takes 2.02 bytes per parameter at C = 1, and 7.04 at
    C = 5.

    Args:
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      cover: the boxes, as in :func:`scale_by_sm3`.
      skip_first: whether to reproduce the authors' first step, as in
        :func:`scale_by_adam_cm`.
      mu_dtype: dtype in which m is stored, as in :func:`critical_momenta`. Without a
        buffer too, the update uses the rounded m, and needs no temporary copy.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. It ignores extra arguments, and its
      updates have the dtype of the gradients.

    Raises:
      ValueError: as :func:`critical_gradients` does.

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.scale_by_sm3_cm(topc=1, mu_dtype="int8", buffer_dtype="int8")
      >>> params = {"w": jnp.zeros((1024, 1024))}
      >>> [a.shape for a in tx.init(params).accumulators[0]]
      [(1024, 1), (1, 1024)]
      >>> print(f"{memoptax.state_bytes(tx, params) / 1024**2:.2f}")
      2.02

    References:
      Malviya et al, `Promoting Exploration in Memory-Augmented Adam using Critical
      Momenta <https://arxiv.org/abs/2307.09638>`_, TMLR 2024

      Anil et al, `Memory-Efficient Adaptive Optimization
      <https://arxiv.org/abs/1901.11150>`_, NeurIPS 2019

    Differs from the authors' code in:
      1. Neither paper has this optimizer. It combines the equations of both.
      2. What :func:`critical_momenta` lists of m and the buffer.
      3. The second moment is an average with bias correction, as in Adam. That of SM3
         is a sum.
      4. Row-sparse gradients are refused.
    """
    b1, b2, eps, _ = pytorch.check_adam(b1, b2, eps, 0.0)
    _check.flag("skip_first", skip_first)
    families.check_cover(cover)
    cover = covers.axes if cover is None else cover
    mu_dtype = _options.storage_dtype("mu_dtype", mu_dtype)
    options = _options.options(aggr=aggr, **buffer)
    in_range = pytorch.adam_is_sound(b1, b2, eps, 0.0)

    def init_fn(params):
        mu, mu_scales = _momentum.zeros(params, mu_dtype)
        state = ScaleBySM3CmState(
            count=jnp.zeros((), jnp.int32),
            mu=mu,
            mu_scales=mu_scales,
            accumulators=_sm3_rules.zero_accumulators(params, cover),
            buffer=None if options.keeps_nothing else algorithm.empty(options, params),
        )
        return options.in_shards(state, params)

    def check(updates, state, params):
        _check.state(state, ScaleBySM3CmState)
        _check.without_buffer(options.keeps_nothing and state.buffer is not None)
        _momentum.check(options, updates, state, mu_dtype, params)

    def update_fn(updates, state, params=None):
        check(updates, state, params)
        boxes = _boxes(cover, updates, state.accumulators)
        accumulators = jax.tree.leaves(state.accumulators)
        dtype = dtypes.widest(jnp.float32, *(a.dtype for a in accumulators))
        g = _momentum.beside(state, updates)
        squares = [one for one, *_ in state.accumulators] if boxes else None
        sound, norms = _momentum.is_sound(options, g, dtype, in_range, squares)
        parts = [None] * len(boxes)
        if options.keeps_nothing:
            M, _, mu = _momentum.average(g, state, b1, sound)  # M_t is m_t
            buffer = None
        elif skip_first:
            M, mu, buffer = _momentum.as_released(options, g, state, b1, sound, norms)
        else:
            m, stored, mu = _momentum.average(g, state, b1, sound)  # m_t
            M, buffer = algorithm.recall_and_offer(  # M_t, B_{t+1}
                options, state.buffer, m, g, sound, stored, norms=norms
            )
            parts = algorithm.parts(options, state.buffer, buffer, m)
        nu, accumulators = _second_moment(boxes, M, parts, state, b2, sound)  # ν_t, A_t
        count = jnp.where(sound, optax.safe_increment(state.count), state.count)
        u = pytorch.normalize(M, nu, jnp.maximum(count, 1), b1, b2, eps, 0.0)  # u_t
        state = ScaleBySM3CmState(count, *mu, accumulators, buffer)
        return _momentum.or_nan(sound, u, updates, M), state

    return _parameters.transformation(init_fn, flax_metadata.on_arrays(update_fn))


def _boxes(cover, updates, accumulators):
    """The boxes of every leaf, checked against the accumulators of the state."""
    leaves = jax.tree.leaves_with_path(updates)
    _sm3_rules.check_leaves(leaves, accumulators)
    boxes = [families.resolve(cover, path, leaf) for path, leaf in leaves]
    for one, leaf, own in zip(boxes, leaves, accumulators if leaves else ()):
        families.check_shapes(one, *leaf, own)
    return boxes


def _second_moment(boxes, joined, parts, state, b2, taken):
    """ν of every entry, and the accumulators after this step.

    ``parts`` has what each leaf of ``joined`` is computed from, or None.
    """
    leaves, treedef = jax.tree.flatten(joined)
    if not leaves:
        return joined, state.accumulators
    each = zip(boxes, leaves, parts, state.accumulators)
    done = [_leaf(*one, dtypes.weights(b2, one[-1][0].dtype), taken) for one in each]
    nu, accumulators = zip(*done)
    return treedef.unflatten(nu), accumulators


# Compiled once for all steps, so that an eager step dispatches one program per leaf.
@functools.partial(jax.jit, static_argnames="boxes")
def _leaf(boxes, x, parts, accumulators, weights, taken):
    if x.size == 0:
        return x, accumulators
    dtype = accumulators[0].dtype
    x = x.astype(dtype)
    found = families.Families(boxes, x.shape)
    parts = None if parts is None else algorithm.joining(parts, dtype)
    agreeing = layout.agreeing(accumulators, x)
    nu, floors, raised = _sm3_rules.sm3_ii(x, agreeing, found, weights, parts)
    raised = tuple(map(layout.like, raised, accumulators))
    # A number that overflows stays as it was. An infinite one would never come down.
    raised = tuple(
        layout.where(taken & jnp.isfinite(new), new, old)
        for new, old in zip(raised, accumulators)
    )
    if len(raised) == 1 and raised[0].shape == x.shape:
        # With a box per entry, ν is the accumulator. It is read from the new one, so
        # that XLA can overwrite the old one.
        return raised[0], raised
    return nu(x, *found.spread(floors)), raised


@_options.flat
def sm3_cm(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: optax.MaskOrFn = None,
    cover: covers.Cover | Sequence[tuple[int, ...]] | None = None,
    skip_first: bool = False,
    mu_dtype: DTypeLike | None = None,
    aggr: Aggregate = "sum",
    **buffer: Unpack[BufferArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Critical momenta over SM3's covers, in as little as one byte per parameter.

    :math:`\theta_{t+1} = \theta_t - \eta\,(u_t + \lambda\,\theta_t)` with the u of
    :func:`scale_by_sm3_cm`, which has the equations and the references.

    With ``topc=0`` and ``mu_dtype='int8'`` it keeps no buffer, and can replace Adam in
    about one byte per parameter. In sixteen tables of ``docs/evidence.md`` and
    ``docs/evidence_more.md`` it was better than Adam in six, level in six, and worse in
    four.

    Memory: that of :func:`scale_by_sm3_cm`. ``topc=1`` with int8 for ``mu_dtype`` and
    ``buffer_dtype`` takes 2.02 bytes per parameter of a matrix of 1024², and
    ``topc=0`` with ``mu_dtype='int8'`` 1.01.

    Args:
      learning_rate: η, a number or an optax schedule.
      b1: β₁ in [0, 1).
      b2: β₂ in [0, 1).
      eps: ε ≥ 0, outside the root.
      weight_decay: λ ≥ 0, a number or a schedule, per unit of learning rate. With a
        plain 0, ``update`` needs no parameters.
      mask: a tree of booleans that says which parameters decay, or a function from the
        parameters to such a tree. None decays all.
      cover: the boxes, as in :func:`scale_by_sm3`.
      skip_first: as in :func:`scale_by_sm3_cm`. The first step then
        only applies weight decay.
      mu_dtype: dtype in which m is stored, as in :func:`critical_momenta`. Without a
        buffer too, the update uses the rounded m, and needs no temporary copy.
      aggr: as in :func:`critical_gradients`.
      **buffer: the other arguments of :func:`critical_gradients`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> tx = memoptax.sm3_cm(0.03)
      >>> f = lambda x: jnp.sum(x**2)
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(f)(x), state, x)
      ...   x = optax.apply_updates(x, updates)
      ...   print(f"{f(x):.2E}")
      2.44E+01
      2.09E+01
      1.86E+01
      1.69E+01
      1.55E+01

    Differs from the authors' code in what :func:`scale_by_sm3_cm` lists.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return optax.chain(
        scale_by_sm3_cm(
            b1,
            b2,
            eps,
            cover=cover,
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
