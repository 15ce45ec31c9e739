"""Faults of a training run: the promise after each, and its check.

``ROWS`` is the table. ``test_training_faults.py`` runs it, and ``benchmarks/trust.py``
writes its results into docs/trust.md. Every row says how to remove its guard, and a
test shows that the check fails then.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract import OPTIMIZERS

import memoptax
from memoptax import _check, _momentum, _sm3_rules
from memoptax._buffer import algorithm, eviction, matching
from memoptax._tensors import storage

import machine_faults
import training_loop
from gradient_faults import (
    check_gradient_dtype,
    check_huge,
    check_leaves,
    check_not_finite,
    check_one_entry,
    check_zero,
    none_for_vector,
    without_vector,
)
from machine_faults import check_full_disk, check_killed
from state_faults import check_dtype, check_mesh, check_stale, check_topc
from training_loop import NAMED, STANDARD, WRAPS, loop

# How guards are removed


class Without:
    """A module with some of its functions replaced."""

    def __init__(self, module, **replaced):
        self.__dict__.update(replaced, module=module)

    def __getattr__(self, name):
        return getattr(self.__dict__["module"], name)


def everything(x):
    return jnp.ones_like(x, dtype=bool)


def fits_all(norms, leaves, stacks):
    del leaves, stacks
    return everything(norms)


_decide = eviction.decide


def decide_on_all(buffer, priority, finite, fifo):
    return _decide(buffer, priority, everything(finite), fifo)


def sound(*arguments, **options):
    del arguments, options
    return jnp.asarray(True)


def nothing(*arguments, **options):
    del arguments, options


ANY_NORM = [
    (algorithm, "jnp", Without(jnp, isfinite=everything)),
    (storage, "fits", fits_all),
    (_momentum, "is_sound", sound),
    (_sm3_rules, "jnp", Without(jnp, isfinite=everything)),
    (eviction, "decide", decide_on_all),
]
UNCAST = [(storage, "_chosen", lambda rounded, like, wanted, other: rounded)]


def decayed(tx):
    """An optimizer whose memory depends on the parameters."""
    return optax.chain(optax.add_decayed_weights(0.1), tx)


def on_one_device(tx, params):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: one, jax.eval_shape(tx.init, params))


_restored = machine_faults.restored


def without_state(run, folder):
    """The parameters of a checkpoint, beside a new state."""
    step, (params, _) = _restored(run, folder)
    return step, (params, run.tx.init(params))


IN_PLACE = [(machine_faults, "save", machine_faults.save_in_place)]


# The table


@dataclasses.dataclass(frozen=True)
class Row:
    """A fault, the promise after it, and the code that keeps the promise."""

    fault: str
    promise: str
    guard: str
    check: Callable[..., Any]
    takes: str  # the argument of the check: "wrap", "opt" or "folder"
    optimizers: tuple = tuple(STANDARD)
    removed: tuple = ()  # how to remove the guard: (module, name, replacement)
    without: tuple = ()  # names of the optimizers that then fail, alone


BUFFERED = tuple(opt for opt in OPTIMIZERS if opt.accepts("topc"))
SAVING = tuple(NAMED[name] for name in ("adam_c", "sm3_cm int8", "fifo"))
BITWISE = (
    "The memory is bitwise that of a run without the step. In `apply_if_finite`, and "
    "in `MultiSteps` with `skip_not_finite`, so are parameters and moments."
)
OWN = "norms and priorities in `algorithm`, `_momentum.is_sound`, `_sm3_rules`"
LAST = "From the last complete checkpoint the run is bitwise that without the fault."

ROWS = [
    Row(
        "NaN in the gradient",
        BITWISE,
        OWN,
        functools.partial(check_not_finite, np.nan),
        "wrap",
        tuple(OPTIMIZERS),
        tuple(ANY_NORM),
        ("sgd_c", "adam_cm", "sm3", "sm3_cm"),
    ),
    Row(
        "infinity in the gradient",
        BITWISE,
        OWN,
        functools.partial(check_not_finite, -np.inf),
        "wrap",
        tuple(OPTIMIZERS),
        tuple(ANY_NORM),
        ("sgd_c", "adam_cm", "sm3", "sm3_cm"),
    ),
    Row(
        "one NaN or infinity among 4,096 entries",
        "The memory is bitwise that of a run without the step.",
        "sums of squares, and comparisons that let NaN win",
        check_one_entry,
        "opt",
        tuple(OPTIMIZERS),
        tuple(ANY_NORM),
        ("sgd_c", "sm3"),
    ),
    Row(
        "1e30 in the gradient",
        "Optimizers that square it (`adam_cm`, SM3) refuse the step: the run is "
        "bitwise that without it. Other buffers store it. Behind clipping they store "
        "what optax's clipping makes of it. "
        "The memory is finite at every step.",
        "`_momentum.is_sound`, `_sm3_rules`, norms over the whole range",
        check_huge,
        "wrap",
        tuple(OPTIMIZERS),
        tuple(ANY_NORM),
        ("adam_cm", "sm3", "sm3_cm"),
    ),
    Row(
        "gradients of zero",
        "No parameter moves before the first gradient that is not zero. A full buffer "
        "refuses zeros, and the run stays finite.",
        "the gate of the buffer is strict; 0/0 is 0 in SM3",
        check_zero,
        "wrap",
        tuple(OPTIMIZERS),
        ((eviction, "RULES", {"priority": (eviction.least, False)}),),
        ("sgd_c", "adam_cm", "sm3_cm"),
    ),
    Row(
        "a leaf of the gradient is missing",
        "An error during tracing. State and parameters stay as they were.",
        "`matching._check_leaves`, `_check.moments`, `_sm3_rules.check_leaves`",
        functools.partial(check_leaves, without_vector),
        "opt",
        tuple(OPTIMIZERS),
        (
            (matching, "_check_leaves", nothing),
            (_check, "moments", nothing),
            (_sm3_rules, "check_leaves", nothing),
        ),
        ("sgd_c", "adam_cm", "sm3"),
    ),
    Row(
        "a leaf of the gradient is None",
        "The same.",
        "the same",
        functools.partial(check_leaves, none_for_vector),
        "opt",
        tuple(OPTIMIZERS),
        (
            (matching, "_check_leaves", nothing),
            (_check, "moments", nothing),
            (_sm3_rules, "check_leaves", nothing),
        ),
        ("sgd_c", "adam_cm", "sm3"),
    ),
    Row(
        "gradients change to bfloat16 and back",
        "No array of the state changes its dtype. The run differs only by rounding.",
        "storage casts to the dtype of the state",
        check_gradient_dtype,
        "opt",
        removed=tuple(UNCAST),
        without=("sgd_c",),
    ),
    Row(
        "another `topc`",
        "An error that names `resize_buffer`, which keeps all entries.",
        "`matching._check_capacity`",
        check_topc,
        "opt",
        BUFFERED,
        ((matching, "_check_capacity", nothing),),
        ("sgd_c", "adam_cm", "sm3_cm"),
    ),
    Row(
        "another `buffer_dtype`",
        "An error that names it. With the old one the run is bitwise that "
        "without the fault.",
        "`matching._check_dtypes`",
        check_dtype,
        "opt",
        BUFFERED,
        ((matching, "_check_dtypes", nothing),),
        ("sgd_c", "adam_cm", "sm3_cm"),
    ),
    Row(
        "a stale state beside newer parameters",
        "The state is valid. Its memory continues bitwise from the step of the state.",
        "gradients alone decide what a memory holds",
        check_stale,
        "opt",
        tuple(OPTIMIZERS),
        ((training_loop, "WRAPS", {"alone": decayed}),),
        ("sgd_c", "adam_cm", "sm3"),
    ),
    Row(
        "other meshes: one device, 4 by 2, 2 by 4, one",
        "The run goes on as on one device, up to rounding.",
        "`state_shardings`",
        check_mesh,
        "opt",
        removed=((memoptax, "state_shardings", on_one_device),),
        without=("adam_c", "sm3"),
    ),
    Row(
        "SIGKILL between two saves",
        LAST,
        "the state holds everything that a run needs",
        functools.partial(check_killed, "step", "6", 4),
        "folder",
        SAVING,
        ((machine_faults, "restored", without_state),),
        ("adam_c",),
    ),
    Row(
        "SIGKILL as a save begins",
        LAST,
        "Orbax writes elsewhere, then renames",
        functools.partial(check_killed, "os.mkdir", "6.orbax-checkpoint-tmp", 4),
        "folder",
        SAVING,
        tuple(IN_PLACE),
        ("adam_c",),
    ),
    Row(
        "SIGKILL before a save gets its name",
        LAST,
        "Orbax writes elsewhere, then renames",
        functools.partial(check_killed, "os.rename", "/6.orbax-checkpoint-tmp", 4),
        "folder",
        SAVING,
        tuple(IN_PLACE),
        ("adam_c",),
    ),
    Row(
        "a full disk while saving",
        "Orbax raises, the checkpoint before stays whole, and the run in memory goes "
        "on. With room again it saves.",
        "Orbax writes elsewhere, then renames",
        check_full_disk,
        "folder",
        SAVING,
        tuple(IN_PLACE),
        ("adam_c",),
    ),
]


def cases(row):
    """The optimizer and the wrapper of each case ("" if the row takes none)."""
    for opt in row.optimizers:
        if row.takes != "wrap":
            yield opt, ""
            continue
        # Options of a factory are tried in the most common wrapper.
        for wrap in WRAPS if opt in STANDARD else ("alone", "apply_if_finite"):
            yield opt, wrap


@contextlib.contextmanager
def removed(row):
    """Without the guard of a row, and without programs compiled with it."""
    with contextlib.ExitStack() as stack:
        for module, name, replacement in row.removed:
            stack.enter_context(mock.patch.object(module, name, replacement))
        jax.clear_caches()
        loop.cache_clear()
        yield
    jax.clear_caches()
    loop.cache_clear()
