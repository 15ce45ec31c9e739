"""The options of a buffer, in one record that is checked once.

:func:`memoptax.critical_gradients` explains the arguments.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from memoptax import _check
from memoptax._buffer import aggregation, sharded_norm
from memoptax._buffer import holding as holding_
from memoptax._tensors import layout, storage

Aggregate = str | Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Priority = Callable[[Any], ArrayLike]
Function = TypeVar("Function", bound=Callable[..., Any])


class BufferArguments(TypedDict, total=False):
    """The arguments of a buffer that have the same default everywhere.

    :func:`critical_gradients` explains them. The default of ``aggr`` depends on the
    optimizer, so ``aggr`` is not among them.
    """

    topc: int | None
    decay: ArrayLike
    kappa: ArrayLike
    synced: bool
    priority_fn: Priority | None
    buffer_dtype: DTypeLike | None
    fifo_probability: ArrayLike | None
    seed: int | jax.Array
    holding: str | None


class Options(NamedTuple):
    topc: int
    decay: Any
    kappa: Any
    aggr: Aggregate
    synced: bool
    priority_fn: Priority | None
    buffer_dtype: Any
    fifo_probability: Any
    seed: Any
    holding: str | None

    def way(self, slots) -> str:
        """The way to hold values in ``slots``. Only their dtypes matter."""
        return holding_.way(self.holding, self.topc, holding_.itemsize(slots))

    def in_shards(self, state, params):
        """The new ``state`` of an optimizer, with the types it has after an update.

        Inside ``shard_map`` each device decides for its own shards, so all arrays vary
        between devices, the keys too. With ``sharded_norm`` all devices decide alike.
        """
        if self.across is not None:
            return state
        return layout.vary_together(state, params)

    def is_sound(self):
        """Whether κ and the FIFO probability, which may be traced, are finite."""
        numbers = [self.kappa, self.fifo_probability]
        found = [jnp.all(jnp.isfinite(x)) for x in numbers if x is not None]
        return functools.reduce(jnp.logical_and, found)

    def priority_of(self, value, dtype):
        """What a priority_fn returned, once it has been checked."""
        _check.scalar("priority_fn", value)
        return jnp.asarray(value, dtype)

    def check_rows(self, gradients) -> None:
        """Refuse rows that are divided between devices, for values in int8.

        Only the specs that sharded_norm was given show this.
        """
        if isinstance(self.priority_fn, sharded_norm.ShardedNorm):
            self.priority_fn.check_rows(jax.tree.leaves(gradients))

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
    def rule(self) -> Priority | None:
        """The user's priority, which may be wrapped in sharded_norm, or None."""
        norm = self.priority_fn
        return norm.rule if isinstance(norm, sharded_norm.ShardedNorm) else norm


def options(
    topc: int | None = None,
    decay: ArrayLike = 0.7,
    kappa: ArrayLike = 1.0,
    aggr: Aggregate = "sum",
    synced: bool = True,
    priority_fn: Priority | None = None,
    buffer_dtype: DTypeLike | None = None,
    fifo_probability: ArrayLike | None = None,
    seed: int | jax.Array = 0,
    holding: str | None = None,
) -> Options:
    """The record of these arguments, once they have been checked."""
    topc = capacity(5 if topc is None else topc, 0)
    decay = _check.number("decay", decay, 0, 1)
    kappa = _check.number("kappa", kappa)
    if callable(aggr):
        _check.function("aggr", aggr, 3)
    else:
        _check.choice("aggr", aggr, aggregation.WEIGHTS)
    _check.flag("synced", synced)
    _check.function("priority_fn", priority_fn, 1)
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


def flat(function: Function) -> Function:
    """Show the arguments behind ``**buffer`` in the signature, and refuse all others.

    ``help`` and ``optax.inject_hyperparams`` read the signature.
    """
    own, of_buffer = map(inspect.signature, (function, options))
    parameters = {
        name: parameter
        for name, parameter in own.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    for name, parameter in of_buffer.parameters.items():
        parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
        parameters[name] = parameters.pop(name, parameter)  # in the order of options

    def call(*args, **kwargs):
        for name in kwargs:
            if name not in parameters:
                raise TypeError(
                    f"{call.__name__}() got an unexpected keyword argument {name!r}"
                )
        return function(*args, **kwargs)

    flattened: Any = functools.update_wrapper(call, function)
    flattened.__signature__ = own.replace(parameters=list(parameters.values()))
    return flattened


def capacity(topc, least: int) -> int:
    """``topc`` as an integer, once it has been checked."""
    if isinstance(topc, jax.Array):
        raise ValueError(
            f"topc must be a static integer, but is traced or an array ({topc!r}): it "
            "sets the shape of the state. Under optax.inject_hyperparams pass "
            "static_args='topc'."
        )
    return _check.size("topc", topc, least)


def storage_dtype(name: str, dtype):
    """A dtype that values can be stored in, or None, once it has been checked."""
    return _check.stored_dtype(name, dtype, storage.DTYPES)
