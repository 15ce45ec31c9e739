"""What a user chooses of a buffer: one record, checked once and documented once."""

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memoptax import _check
from memoptax._buffer import aggregation, sharded_norm
from memoptax._buffer import holding as holding_
from memoptax._tensors import storage

_ARGS = """\
topc: the capacity C of the buffer, a static integer; None means 5. The papers' grid is
  5, 10, 20. A concrete 0 keeps no buffer: the base optimizer, bit for bit.
decay: what the buffer's priorities are multiplied by at every step, in [0, 1]; not a
  moment's decay. The papers' grid is 0.7, 0.9, 0.99: the larger, the longer a value may
  stay. Computed in float32 at least.
kappa: κ, the weight of the buffer's term. A concrete 0 keeps no buffer.
aggr: ``'sum'`` u + κ·mean(B), ``'mid'`` half of that, ``'mean'`` (u + κ·ΣB)/(n + 1),
  or a function ``(update, buffer_mean, fill) -> update`` of one leaf, whose
  ``buffer_mean`` is κ·mean(B). n is the number of filled slots. ``'sum'`` roughly
  doubles the step: compare it with its base at twice the learning rate, and tune from a
  tenth of the base's rate up.
synced: if True, all leaves are kept or dropped together, by one priority; else each
  leaf has its own.
priority_fn: what makes a gradient critical, a function from the gradients (from one
  leaf if not ``synced``) to a scalar of at least 0. None means the sum of the leaves'
  L2 norms, the authors' rule; ``optax.tree.norm`` is the global norm. Inside
  ``jax.shard_map`` it sees the shards of one device, and each would decide for itself:
  there take :func:`memoptax.sharded_norm`, with a rule of your own if you have one.
buffer_dtype: dtype of the slots: None (the parameters'), float64, float32, bfloat16,
  float16, int8. Sum and priorities stay in float32 or better, and a leaf is refused
  if its norm is beyond the dtype's range (65504 in float16). int8 is stored
  with one float32 scale per row of the last axis (one for a tensor
  of rank 0 or 1), by which an entry is off by at most 1/254 of its row's largest (rows
  below 1.5e-36 become 0); no derivative flows through it. On digits (300 steps,
  one rate, 96 seeds) int8 changed the test accuracy of ``adam_c`` by -.03 ± .09 points
  (mean and its standard error; bfloat16: .04 ± .05), of ``sgd_c`` by .01 ± .02, of
  ``adam_cm`` by .17 ± .12.
fifo_probability: None, or the probability with which a step replaces the oldest entry
  instead of asking for the priority; drawn once per step.
seed: of those draws.
holding: how the C values are held. ``'select'`` is for C = 1: one slot shaped like its
  parameter. ``'read'`` has C + 1 slots and reads C of them on every step. ``'sum'`` has
  C + 1 slots and their sum, and reads two slots whatever C is; the sum is kept to 1e-5
  of the summed norms of its leaf's values (in float64 to 2e-14). None takes the first
  for C = 1, the second for up to 20 bytes of slots per parameter, and else the third.
  On a CPU ``'sum'`` is faster from about C = 5 in float32 and C = 20 in int8."""

_RETURNS = """\
Returns:
  An ``optax.GradientTransformation``; updates return in the dtype in which they came.

Raises:
  ValueError: if an argument is out of its range, naming it and its value; if ``topc``
    is traced (under ``optax.inject_hyperparams`` pass ``static_args='topc'``, likewise
    for ``aggr``, ``priority_fn``, ``seed`` and dtypes where they are given); in
    ``init``, if a parameter is not of a real floating-point dtype."""

_MU_DTYPE = """\
mu_dtype: dtype in which m is stored between steps: None (float32 or better), float64,
  float32, bfloat16, float16, int8 (with scales like those of ``buffer_dtype``). The
  arithmetic stays in float32 or better; m is rounded to nearest, ends at the largest
  number of the dtype, and what is joined and remembered is m as stored. Rounding
  stalls: with b1 = .9 a constant gradient is met up to 2.6 % in bfloat16 and .3 % in
  float16, and in int8 an entry whose gradients stay below 4 % of its row's largest m
  never leaves 0 (with noise m was off by 4.5 %). ``adam_cm`` on digits lost nothing
  that 96 seeds would show (int8: .02 ± .14 points, bfloat16: .01 ± .07). Without a
  buffer (a concrete κ or C of 0) Adam or the average keeps m so too; then the update
  is from m before it is rounded, and in int8 takes a copy of the parameters as a
  temporary. No derivative flows through int8."""


class Options(NamedTuple):
    topc: int
    decay: Any
    kappa: Any
    aggr: str | Callable[..., Any]
    synced: bool
    priority_fn: Callable | None
    buffer_dtype: Any
    fifo_probability: Any
    seed: Any
    holding: str | None

    def way(self, slots) -> str:
        """The way to hold values in ``slots``, of which only the dtypes count."""
        return holding_.way(self.holding, self.topc, holding_.itemsize(slots))

    def is_sound(self):
        """Whether the numbers that may be traced are finite, but for the decay."""
        numbers = [self.kappa, self.fifo_probability]
        found = [jnp.all(jnp.isfinite(x)) for x in numbers if x is not None]
        return functools.reduce(jnp.logical_and, found)

    def priority_of(self, value, dtype):
        """What a priority_fn returned, once it has been checked."""
        _check.scalar("priority_fn", value)
        return jnp.asarray(value, dtype)

    @property
    def keeps_nothing(self) -> bool:
        """A concrete C or κ of 0: no buffer exists, and updates pass through."""
        return self.topc == 0 or _check.is_zero(self.kappa)

    @property
    def across(self) -> Callable | None:
        """What adds up squares over devices, if priorities are sharded_norm's."""
        norm = self.priority_fn
        return norm.across if isinstance(norm, sharded_norm.ShardedNorm) else None

    @property
    def rule(self) -> Callable | None:
        """The priority, or None for the default one; sharded_norm has one inside it."""
        norm = self.priority_fn
        return norm.rule if isinstance(norm, sharded_norm.ShardedNorm) else norm


def options(
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
) -> Options:
    """The record of these arguments, once they have been checked."""
    topc = capacity(topc)
    decay = _check.number("decay", decay, 0, 1)
    kappa = _check.number("kappa", kappa)
    if not callable(aggr):
        _check.choice("aggr", aggr, aggregation.WEIGHTS)
    _check.flag("synced", synced)
    _check.function("priority_fn", priority_fn)
    buffer_dtype = storage_dtype("buffer_dtype", buffer_dtype)
    fifo_probability = _check.number(
        "fifo_probability", fifo_probability, 0, 1, optional=True
    )
    seed = _check.integer("seed", seed, -(2**63), 2**63 - 1, traced=True)
    _check.choice("holding", holding, (None, *holding_.WAYS))
    if holding == "select" and topc != 1:
        raise ValueError(f"holding='select' is for topc=1, but topc is {topc}.")
    return Options(
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


def check_scales(options: Options, gradients, scales) -> None:
    """Refuse ``scales`` of rows that do not lie whole on a device, where it is known.

    Those that it is known of are sharded_norm's specs.
    """
    norm = options.priority_fn
    if isinstance(norm, sharded_norm.ShardedNorm) and scales is not None:
        norm.check_scales(jax.tree.leaves(gradients))


def among(arguments: dict) -> dict:
    """Of the ``arguments`` of an optimizer, those that are the buffer's."""
    return {name: arguments[name] for name in Options._fields}


def documented(references: str):
    """Fill the marks in a docstring with what all optimizers have in common."""
    parts = {
        "{buffer}": _ARGS,
        "{mu_dtype}": _MU_DTYPE,
        "{returns}": _RETURNS,
        "{references}": references,
    }

    def fill(function):
        if function.__doc__ is None:  # python -OO
            return function
        lines = inspect.cleandoc(function.__doc__).splitlines()
        for i, line in enumerate(lines):
            if part := parts.get(line.strip()):
                indent = line[: len(line) - len(line.lstrip())]
                lines[i] = textwrap.indent(part, indent)
        function.__doc__ = "\n".join(lines)
        return function

    return fill


def capacity(topc) -> int:
    """``topc`` as an integer, once it has been checked."""
    if topc is None:
        return 5
    if isinstance(topc, jax.Array):
        raise ValueError(
            f"topc must be a static integer, but is traced or an array ({topc!r}): it "
            "sets the shape of the state. Under optax.inject_hyperparams pass "
            "static_args='topc'."
        )
    return _check.integer("topc", topc, 0)


def storage_dtype(name: str, dtype):
    """A dtype that values can be stored in, or None, once it has been checked."""
    return _check.stored_dtype(name, dtype, storage.DTYPES)
