"""SM3: adaptive step sizes from one number per slice, in place of one per entry."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from memoptax import _check, _parameters, _sm3_rules, covers
from memoptax._bases import by_rows, pytorch
from memoptax._tensors import families, flax_metadata, row_sparse, storage

_VARIANTS = {"I": _sm3_rules.sm3_i, "II": _sm3_rules.sm3_ii}
_STEPS = {False: _sm3_rules.step, True: _sm3_rules.row_sparse_step}


class ScaleBySM3State(NamedTuple):
    """State of :func:`scale_by_sm3`.

    Accumulators and scales differ from the parameters in shape and sharding. So they
    are not trees like the parameters, but tuples with one item per leaf, in the order
    of ``jax.tree.leaves``. For a tree without leaves both are a scalar zero. So without
    momentum a state has no names, and fits other parameters of the same shapes.
    """

    count: Any  # shape=(), dtype=int32
    accumulators: Any  # per leaf and family: shape=ceil(shape / box), float32 or better
    momentum: Any  # None, or like the parameters, in the dtype of storage
    scales: Any  # None, or per leaf for int8: shape=(..., 1) of the leaf, float32


def scale_by_sm3(
    momentum: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: ArrayLike = 1e-30,
    *,
    variant: str = "II",
    cover: covers.Cover | Sequence[tuple[int, ...]] | None = None,
    accumulator_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide by the root of the least accumulator among the boxes of each entry.

    SM3 covers each tensor with families of boxes r, keeps one number per box, and
    bounds Adagrad's sum of squares from above by the least of them. SM3-II
    (the default) and SM3-I compute

    .. math::
      \text{II:}\quad \nu_t(i) &= \min_{r \ni i} A_{t-1}(r) + g_t(i)^2, &
        A_t(r) &= \max_{i \in r} \nu_t(i) \\
      \text{I:}\quad A_t(r) &= A_{t-1}(r) + \max_{i \in r} g_t(i)^2, &
        \nu_t(i) &= \min_{r \ni i} A_t(r)

    .. math::
      q_t = g_t / \sqrt{\nu_t + \epsilon}, \qquad m_t = \mu m_{t-1} + (1 - \mu) q_t

    The update is :math:`q_t`, or :math:`m_t` with momentum. Without ``beta``, an entry
    of :math:`q_t` is at most 1 in magnitude. With it, each sum x + y becomes an average
    :math:`\beta x + (1 - \beta) y`. The average starts at 0 without bias correction, so
    an entry may be up to :math:`1 / \sqrt{1 - \beta}` in the first steps.

    Memory: for a tensor :math:`n_1 \times \dots \times n_k` the accumulators hold
    :math:`\sum_i n_i` numbers in float32 (float64 for float64 parameters). For tensors
    of rank 0 and 1 this is exactly Adagrad. Momentum adds one copy of the parameters in
    float32, half of one in bfloat16 and a quarter in int8 (with one scale per row of
    the last axis).

    If the square of an entry in the gradient of a leaf is not finite, the accumulators
    and the momentum of the leaf do not change. Where every entry has its own
    accumulator (vectors and scalars, by default), this applies entry by entry. But an
    int8 momentum stays in the whole row, and the update there is the old momentum. The
    update is not finite where the gradient is not, so that later transformations see
    it.

    A gradient leaf may be row-sparse (``jax.experimental.sparse.BCOO`` with one sparse
    dimension, see :func:`memoptax.sparse.row_value_and_grad`). Its parameter needs the
    cover :func:`memoptax.covers.rows`. Only the rows touched cost work. Duplicate
    rows are summed first, and momentum is neither applied nor changed.

    Args:
      momentum: :math:`\mu` in [0, 1), or None or 0 for none. With a JAX number, even 0,
        the state has one.
      beta: :math:`\beta` in (0, 1) for a moving average, or None for the sum.
      eps: ε ≥ 0, inside the root. With 0, 0/0 is 0.
      variant: ``'I'`` or ``'II'``. The ν of II is never larger than that of I, so its
        steps are never smaller.
      cover: a function ``(path, leaf) -> list of box shapes``, or such a list for all
        parameters. None is :func:`memoptax.covers.axes`, and :mod:`memoptax.covers` has
        others. The function is called again whenever an update is traced, so it may
        depend only on the names in the path and on the shape.
      accumulator_dtype: float32 or float64. None is float64 for float64 parameters and
        float32 for all others.
      momentum_dtype: dtype in which the momentum is stored: None (that of the
        accumulators), float64, float32, bfloat16, float16 or int8. The momentum is
        rounded to nearest, and the update is the rounded momentum. Its error is at most
        :math:`1 / (1 - \mu)` times the rounding error (for int8, 1/254 of the largest
        in the row). No derivative flows through int8.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. It ignores extra arguments, and its
      updates have the dtype of the gradients.

    Raises:
      ValueError: if an argument is out of its range, with its name and value (under
        ``optax.inject_hyperparams`` name ``cover``, ``accumulator_dtype`` and
        ``momentum_dtype`` in ``static_args`` where they are given); in ``init``, if a
        parameter does not have a real floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, memoptax
      >>> tx = memoptax.scale_by_sm3()
      >>> params = {"w": jnp.zeros((1024, 1024))}
      >>> [a.shape for a in tx.init(params).accumulators[0]]
      [(1024, 1), (1, 1024)]

    References:
      Anil et al, `Memory-Efficient Adaptive Optimization
      <https://arxiv.org/abs/1901.11150>`_, NeurIPS 2019

    Differs from the authors' code in:
      1. Accumulators are float32 or better. Theirs have the gradient's dtype.
      2. It offers covers other than slices, SM3-I and int8 momentum.
      3. With ``beta`` the accumulators can decrease. In PyTorch-SM3 they cannot.
      4. Rows that a row-sparse gradient does not touch keep their accumulators, and
         duplicate rows are summed before they are squared.
      5. Gradients that are not finite leave no trace in the state.
    """
    momentum = _check.number("momentum", momentum, 0, 1, below=True, optional=True)
    beta = _check.number("beta", beta, 0, 1, above=True, below=True, optional=True)
    eps = _check.number("eps", eps, 0)
    _check.choice("variant", variant, _VARIANTS)
    families.check_cover(cover)
    wide = ("float32", "float64")
    accumulator_dtype = _check.stored_dtype(
        "accumulator_dtype", accumulator_dtype, wide
    )
    momentum_dtype = _check.stored_dtype(
        "momentum_dtype", momentum_dtype, storage.DTYPES
    )
    if _check.is_zero(momentum):
        momentum = None
    cover = covers.axes if cover is None else cover
    rule = _sm3_rules.Rule(momentum, beta, eps, _VARIANTS[variant])

    def init_fn(params):
        def moments(leaf):
            dtype = momentum_dtype or _sm3_rules.accumulator_dtype(
                leaf, accumulator_dtype
            )
            return storage.zeros(leaf, None, dtype)

        return ScaleBySM3State(
            count=jnp.zeros((), jnp.int32),
            accumulators=_sm3_rules.zero_accumulators(params, cover, accumulator_dtype),
            momentum=None if momentum is None else jax.tree.map(moments, params),
            scales=None
            if momentum is None
            else storage.zero_scales(params, None, momentum_dtype),
        )

    def update_fn(updates, state, params=None):
        _check.state(state, ScaleBySM3State)
        _check_options(momentum, momentum_dtype, accumulator_dtype, state)
        leaves, treedef = jax.tree.flatten_with_path(updates, row_sparse.is_row_sparse)
        count = optax.safe_increment(state.count)
        _sm3_rules.check_leaves(leaves, state.accumulators)
        if not leaves:
            return updates, state._replace(count=count)
        _check_tree(leaves, treedef, state, params)
        steps = []
        for (path, g), own, memory in zip(
            leaves, state.accumulators, _load(state, treedef)
        ):
            boxes = families.resolve(cover, path, g)
            families.check_shapes(boxes, path, g, own)
            step = _STEPS[row_sparse.is_row_sparse(g)]
            steps.append(step(rule, path, boxes, g, own, memory))
        directions, accumulators, memories = zip(*steps)
        state = _save(state, treedef, memories)._replace(
            count=count, accumulators=accumulators
        )
        return jax.tree.unflatten(treedef, directions), state

    return _parameters.transformation(
        init_fn, flax_metadata.on_arrays(update_fn), by_rows=True
    )


def _check_options(momentum, momentum_dtype, accumulator_dtype, state):
    """Refuse a state that was made with other arguments.

    A tree of None has no accumulators, and a momentum of None.
    """
    some = isinstance(state.accumulators, (tuple, list))
    if some and (momentum is None) != (state.momentum is None):
        found = "none" if state.momentum is None else "one"
        raise ValueError(
            f"momentum is {momentum!r}, but the state has {found}: pass the momentum "
            "that it was made with, or make a new state with init."
        )
    if some and momentum is None and state.scales is not None:
        raise ValueError(
            f"state has scales of type {type(state.scales).__name__}, but no momentum: "
            "they must be None."
        )
    _check.wide("accumulators", state.accumulators)
    wide = {leaf.dtype for leaf in jax.tree.leaves(state.accumulators)}
    if accumulator_dtype is not None and some:
        asked = accumulator_dtype
        _check.same_dtype("accumulator_dtype", asked, wide, [asked])
    moments = jax.tree.leaves(state.momentum)
    _check.arrays("momentum", moments)
    found = {leaf.dtype for leaf in moments}
    # With a momentum_dtype of None it is as wide as the accumulators.
    allowed = wide if momentum_dtype is None else [momentum_dtype]
    _check.same_dtype("momentum_dtype", momentum_dtype, found, allowed)
    storage.check_scales("scales", state.momentum, state.scales)


def _check_tree(leaves, treedef, state, params):
    """Refuse updates of other parameters.

    Without momentum the state has neither names nor shapes, and accumulators may fit
    several shapes. So those of ``params`` are used, if given.
    """
    known = jax.tree.leaves_with_path(flax_metadata.bare(params))
    shapes = {path: np.shape(param) for path, param in known}
    for path, _ in leaves if known else ():
        if path not in shapes:
            raise ValueError(
                f"updates have a leaf at {_check.leaf_name(path)}, but params have "
                "none."
            )
    if state.momentum is not None:
        kept, made_for = jax.tree.flatten(state.momentum)
        _check.same_leaves(leaves, treedef, made_for, [m.shape for m in kept])
        return
    for path, update in leaves if known else ():
        _check.same_shape(path, update.shape, shapes[path])


def _load(state, treedef):
    """The stored momentum of every leaf, or None for each."""
    if state.momentum is None:
        return [None] * len(state.accumulators)
    return storage.unpack(treedef, state.momentum, state.scales)


def _save(state, treedef, memories):
    """The state with the stored momentum of every leaf."""
    if state.momentum is None:
        return state
    momentum, scales = storage.pack(treedef, memories, state.scales)
    return state._replace(momentum=momentum, scales=scales)


def sm3(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: ArrayLike = 1e-30,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: optax.MaskOrFn = None,
    variant: str = "II",
    cover: covers.Cover | Sequence[tuple[int, ...]] | None = None,
    accumulator_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SM3, the memory-efficient adaptive optimizer.

    :math:`\theta_{t+1} = \theta_t - \eta\,(u_t + \lambda\,\theta_t)` with the update u
    of :func:`scale_by_sm3`, which has the equations and the reference. Weight
    decay skips parameters with row-sparse gradients, because it would touch every row.
    Apply row-sparse updates with :func:`memoptax.sparse.apply_updates`.

    Memory: that of :func:`scale_by_sm3`.

    Args:
      learning_rate: η, a number or an optax schedule such as
        :func:`memoptax.sm3_schedule`. Without ``beta`` and weight decay it is the
        largest change of an entry per step.
      momentum: as in :func:`scale_by_sm3`. The arguments that are not listed here are
        also as in that function.
      weight_decay: λ ≥ 0, a number or a schedule, per unit of learning rate. With a
        plain 0, ``update`` needs no parameters.
      mask: a tree of booleans that says which parameters decay, or a function from the
        parameters to such a tree. None decays all.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Examples:
      >>> import jax, jax.numpy as jnp, memoptax, optax
      >>> loss = lambda x: jnp.sum(x**2)
      >>> tx = memoptax.sm3(0.5)
      >>> params = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...   updates, state = tx.update(jax.grad(loss)(params), state)
      ...   params = optax.apply_updates(params, updates)
      ...   print(f"{loss(params):.2E}")
      2.10E+01
      1.64E+01
      1.33E+01
      1.10E+01
      9.31E+00

    Differs from the authors' code in what :func:`scale_by_sm3` lists.
    """
    learning_rate = _check.learning_rate(learning_rate)
    return optax.chain(
        scale_by_sm3(
            momentum,
            beta,
            eps,
            variant=variant,
            cover=cover,
            accumulator_dtype=accumulator_dtype,
            momentum_dtype=momentum_dtype,
        ),
        by_rows.weight_decay(weight_decay, mask),
        by_rows.on_values(pytorch.learning_rate(learning_rate, as_it_is=True)),
    )
