"""Faults of a training run: the promise after each, and its check.

``ROWS`` is the table. ``test_training_faults.py`` runs it, and ``benchmarks/trust.py``
writes its results into docs/trust.md. A row whose guard is in memoptax says how to
remove the guard, and a test shows that the check fails then.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import OPTIMIZERS, SHAPES, gradients, params_like, signature, steps_of

import memoptax
from memoptax import _momentum, _sm3_rules
from memoptax._buffer import algorithm, eviction, matching
from memoptax._tensors import storage

ROOT = pathlib.Path(__file__).parents[1]
NAMED = {opt.name: opt for opt in OPTIMIZERS}
STANDARD = [opt for opt in OPTIMIZERS if opt.name == opt.factory.__name__]

# The training loop

WRAPS = {
    "alone": lambda tx: tx,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "clipped": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "accumulated": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


class Loop:
    """A training loop that applies an update only if it is finite."""

    def __init__(self, opt, wrap):
        self.opt, self.tx = opt, WRAPS[wrap](opt.build())

        def step(params, state, gradient):
            updates, state = self.tx.update(gradient, state, params)
            leaves = [jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates)]
            sound = functools.reduce(jnp.logical_and, leaves)
            updates = jax.tree.map(lambda u: jnp.where(sound, u, 0), updates)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step)

    def start(self, shapes=SHAPES):
        params = params_like(shapes)
        return params, self.tx.init(params)

    def run(self, stream, carry=None):
        carry = self.start() if carry is None else carry
        for gradient in stream:
            carry = self.step(*carry, gradient)
        return carry

    def memory(self, carry):
        return optax.tree.get(carry[1], self.opt.memory)


@functools.cache
def loop(opt, wrap="alone"):
    """One loop for all rows, so that each optimizer compiles once per wrapper."""
    return Loop(opt, wrap)


def stream(steps=14):
    return steps_of(gradients(steps=steps))


def everywhere(value):
    """A gradient with this number in every entry."""
    return jax.tree.map(lambda g: np.full_like(g, value), stream(1)[0])


def same(got, want):
    """Bitwise."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, a in jax.tree.leaves_with_path(got):
        b = functools.reduce(_child, path, want)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def _child(node, key):
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    return node[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]


def is_finite(tree):
    return all(np.isfinite(np.asarray(x, float)).all() for x in jax.tree.leaves(tree))


# Faults of gradients. A bad gradient comes first, or when the buffer is full. It comes
# twice, which is one step if two gradients are accumulated.


def with_bad(good, bad, place):
    return [*good[:place], bad, bad, *good[place:]]


def check_not_finite(value, opt, wrap):
    run, good = loop(opt, wrap), stream()
    for place in (0, 10):
        got, want = run.run(with_bad(good, everywhere(value), place)), run.run(good)
        same(run.memory(got), run.memory(want))
        if wrap in ("apply_if_finite", "accumulated"):
            inner = {"apply_if_finite": "inner_state", "accumulated": "inner_opt_state"}
            same(got[0], want[0])
            same(getattr(got[1], inner[wrap]), getattr(want[1], inner[wrap]))


def check_one_entry(opt):
    """On a CPU, XLA's maximum of many entries overlooks NaN, so no guard may use it."""
    shapes = {"matrix": (64, 64)}
    run, good = loop(opt), steps_of(gradients(shapes=shapes, steps=8))
    for value in (np.nan, np.inf):
        bad = {"matrix": np.array(good[6]["matrix"])}
        bad["matrix"][3, 2] = value
        stained = [*good[:6], bad, *good[6:]]
        got = run.run(stained, run.start(shapes))
        same(run.memory(got), run.memory(run.run(good, run.start(shapes))))


def check_huge(opt, wrap):
    run, good, bad = loop(opt, wrap), stream(), everywhere(1e30)
    for place in (0, 10):
        carry = run.start()
        for gradient in with_bad(good, bad, place)[: place + 2]:
            carry = run.step(*carry, gradient)
            assert is_finite(run.memory(carry))
        after = run.run(good[place:], carry)
        assert is_finite((after[0], run.memory(after)))
        if wrap == "clipped":
            clip = optax.clip_by_global_norm(1.0)
            seen, _ = clip.update(bad, clip.init(bad))
            want = run.run(with_bad(good, seen, place))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), after, want
            )
        elif opt.squares:
            same(run.memory(after), run.memory(run.run(good)))
        else:
            assert np.max(run.memory(carry).keys) > 1e28


def check_zero(opt, wrap):
    run, zeros = loop(opt, wrap), [everywhere(0.0)] * 6
    start = run.start()
    rested = run.run(zeros, start)
    if not opt.needs_params and not opt.options.get("weight_decay"):
        same(rested[0], start[0])
    assert is_finite(rested)
    before = run.run(stream()[:10])
    after = run.run(zeros, before)
    assert is_finite(run.run(stream()[10:], after))
    if hasattr(run.memory(before), "accepted") and "fifo_probability" not in (
        opt.options
    ):
        same(run.memory(after).accepted, run.memory(before).accepted)
        same(run.memory(after).entries, run.memory(before).entries)


def check_leaves(lost, opt):
    """It is refused during tracing, so no state is changed or donated."""
    run, good = loop(opt), stream()
    before = run.run(good[:5])
    with pytest.raises(ValueError, match="state was made for"):
        step = jax.jit(run.tx.update)
        step(lost(good[5]), before[1], before[0])
    same(run.run(good[5:], before), run.run(good))


def without_vector(gradient):
    return {name: g for name, g in gradient.items() if name != "vector"}


def none_for_vector(gradient):
    return {**gradient, "vector": None}


def check_gradient_dtype(opt):
    """Three steps have gradients in bfloat16, as when a loss is cast."""
    run, good = loop(opt), stream()
    half = [jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), g) for g in good]
    carry = run.run(good[:4])
    born = signature(carry[1])
    carry = run.run(half[4:7], carry)
    assert signature(carry[1]) == born
    carry = run.run(good[7:], carry)
    rounded = [jax.tree.map(lambda g: np.asarray(g, np.float32), g) for g in half]
    want = run.run([*good[:4], *rounded[4:7], *good[7:]])
    for got, exact in zip(jax.tree.leaves(carry[0]), jax.tree.leaves(want[0])):
        np.testing.assert_allclose(got, exact, 0, 0.02 * max(1.0, 10 * opt.rate))


# Faults of states


def check_topc(opt):
    run, good = loop(opt), stream()
    params, state = run.run(good[:6])
    other = opt.build(topc=7)
    with pytest.raises(ValueError, match="topc is 7.*resize_buffer"):
        jax.eval_shape(other.update, good[6], state, params)
    with pytest.raises(ValueError, match="tx.init"):
        memoptax.check_state(other, params, state)
    resized = memoptax.resize_buffer(state, 7, holding=opt.options.get("holding"))
    memoptax.check_state(other, params, resized)
    kept, old = (np.asarray(optax.tree.get(s, "keys")) for s in (resized, state))
    # All are kept. Those of empty entries are 0.
    np.testing.assert_array_equal(np.sort(kept)[:, -old.shape[1] :], np.sort(old))
    update = jax.jit(other.update)
    for gradient in stream(20)[6:]:
        updates, resized = update(gradient, resized, params)
    assert is_finite((updates, resized))
    assert np.all(np.asarray(optax.tree.get(resized, "ages")) > 0)
    same(run.run(good[6:], (params, state)), run.run(good))


def check_dtype(opt):
    run, good = loop(opt), stream()
    params, state = run.run(good[:6])
    other = opt.build(buffer_dtype="float16")
    with pytest.raises(ValueError, match="buffer_dtype|tx.init"):
        jax.eval_shape(other.update, good[6], state, params)
    with pytest.raises(ValueError, match="tx.init"):
        memoptax.check_state(other, params, state)
    same(run.run(good[6:], (params, state)), run.run(good))


def check_stale(opt):
    """Parameters of step 10 with the state of step 5."""
    run, good = loop(opt), stream()
    old, new = run.run(good[:5]), run.run(good[:10])
    memoptax.check_state(run.tx, new[0], old[1])
    after = run.run(good[10:], (new[0], old[1]))
    assert is_finite(after[0])
    same(run.memory(after), run.memory(run.run([*good[:5], *good[10:]])))


def check_mesh(opt):
    """Four steps on one device, four on 4 × 2, four on 2 × 4, two on one device."""
    shapes = {"matrix": (8, 8), "vector": (8,)}
    good = steps_of(gradients(shapes=shapes, steps=14))
    run, specs = loop(opt), {"matrix": jax.P("data", "model"), "vector": jax.P("model")}
    carry = run.run(good[:4], run.start(shapes))
    for shape, part in (((4, 2), good[4:8]), ((2, 4), good[8:12])):
        automatic = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=automatic)
        homes = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
        params = jax.device_put(carry[0], homes)
        state = jax.device_put(carry[1], memoptax.state_shardings(run.tx, params))
        carry = params, state
        for gradient in part:
            carry = run.step(*carry, jax.device_put(gradient, homes))
            jax.block_until_ready(carry)  # simulated devices block one another
    carry = run.run(good[12:], jax.device_put(carry, jax.devices()[0]))
    want = run.run(good, run.start(shapes))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(b, float), 2e-4, 1e-5
        ),
        carry[0],
        want[0],
    )


# Faults of processes and disks. Every second step is saved with Orbax.

SAVED = {"matrix": (64, 64), "vector": (3,)}


def saved_steps():
    return steps_of(gradients(shapes=SAVED, steps=8))


def save(folder, step, carry):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / str(step), carry)


def restored(run, folder):
    """The last complete checkpoint, and its step."""
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    params = params_like(SAVED)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, run.tx.init(params)))
    with ocp.StandardCheckpointer() as checkpointer:
        return step, checkpointer.restore(folder / str(step), like)


def train_and_die(name, folder, event, ending):
    """Train in this process until it is killed, at a step or at an event of Python."""
    folder = pathlib.Path(folder)

    def kill(found, arguments):
        if found == event and str(arguments[0]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    run = loop(NAMED[name])
    carry = run.start(SAVED)
    for step, gradient in enumerate(saved_steps(), 1):
        sys.audit("step", str(step))
        carry = run.step(*carry, gradient)
        if step % 2 == 0:
            save(folder, step, carry)


def check_killed(event, ending, last, opt, folder):
    program = "import sys, training_faults as t; t.train_and_die(*sys.argv[1:])"
    command = [sys.executable, "-c", program, opt.name, str(folder), event, ending]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    goes_on(opt, folder, last)


def goes_on(opt, folder, last):
    """From the last complete checkpoint the run equals one without a fault, bitwise."""
    run, good = loop(opt), saved_steps()
    step, carry = restored(run, folder)
    assert step == last
    memoptax.check_state(run.tx, *carry)
    same(run.run(good[step:], carry), run.run(good, run.start(SAVED)))


def check_full_disk(opt, folder):
    """No file may exceed 2,000 bytes. The checkpoint before stays complete."""
    run, good = loop(opt), saved_steps()
    carry = run.run(good[:4], run.start(SAVED))
    save(folder, 4, carry)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    later = run.run(good[4:6], carry)
    try:
        with pytest.raises(Exception, match="(?i)too large|EFBIG|write"):
            save(folder, 6, later)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    same(run.run(good[6:], later), run.run(good, run.start(SAVED)))
    goes_on(opt, folder, 4)
    save(folder, 8, run.run(good[6:], later))  # with room again
    goes_on(opt, folder, 8)


# The table


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
LAST = "From the last whole checkpoint the run is bitwise that without the fault."

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
        "What squares it (`adam_cm`, SM3) refuses the step: bitwise as without it. "
        "Other buffers hold it. Clipped, it is what optax's clipping makes of it. "
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
        "No parameter moves before the first other gradient. A full buffer refuses "
        "them, and the run goes on finite.",
        "the gate of the buffer is strict; 0/0 is 0 in SM3",
        check_zero,
        "wrap",
        tuple(OPTIMIZERS),
        ((eviction, "RULES", {"priority": (eviction.least, False)}),),
        ("sgd_c", "adam_cm", "sm3_cm"),
    ),
    Row(
        "a leaf of the gradient is missing",
        "A sentence while it is traced. State and parameters are as they were.",
        "`matching._check_leaves`, `_sm3_rules.check_leaves`",
        functools.partial(check_leaves, without_vector),
        "opt",
        tuple(OPTIMIZERS),
        (
            (matching, "_check_leaves", nothing),
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
            (_sm3_rules, "check_leaves", nothing),
        ),
        ("sgd_c", "adam_cm", "sm3"),
    ),
    Row(
        "gradients change to bfloat16 and back",
        "No array of the state changes its dtype. The run differs by the rounding.",
        "storage casts to the dtype of the state",
        check_gradient_dtype,
        "opt",
        removed=tuple(UNCAST),
        without=("sgd_c",),
    ),
    Row(
        "another `topc`",
        "A sentence that names `resize_buffer`, which keeps all entries.",
        "`matching._check_capacity`",
        check_topc,
        "opt",
        BUFFERED,
        ((matching, "_check_capacity", nothing),),
        ("sgd_c", "adam_cm", "sm3_cm"),
    ),
    Row(
        "another `buffer_dtype`",
        "A sentence that names it. With the old one the run is bitwise as without.",
        "`matching._check_dtypes`",
        check_dtype,
        "opt",
        BUFFERED,
        ((matching, "_check_dtypes", nothing),),
        ("sgd_c", "adam_cm", "sm3_cm"),
    ),
    Row(
        "a stale state beside newer parameters",
        "It is a valid state. Its memory goes on bitwise from its own step.",
        "gradients alone decide what a memory holds",
        check_stale,
        "opt",
        tuple(OPTIMIZERS),
    ),
    Row(
        "other meshes: one device, 4 by 2, 2 by 4, one",
        "The run goes on as on one device, to rounding.",
        "`state_shardings`",
        check_mesh,
        "opt",
    ),
    Row(
        "SIGKILL between two saves",
        LAST,
        "the state is all there is",
        functools.partial(check_killed, "step", "6", 4),
        "folder",
        SAVING,
    ),
    Row(
        "SIGKILL as a save begins",
        LAST,
        "Orbax writes elsewhere, then renames",
        functools.partial(check_killed, "os.mkdir", "6.orbax-checkpoint-tmp", 4),
        "folder",
        SAVING,
    ),
    Row(
        "SIGKILL before a save gets its name",
        LAST,
        "Orbax writes elsewhere, then renames",
        functools.partial(check_killed, "os.rename", "/6.orbax-checkpoint-tmp", 4),
        "folder",
        SAVING,
    ),
    Row(
        "a full disk while saving",
        "Orbax raises, the checkpoint before stays whole, and the run in memory goes "
        "on. With room again it saves.",
        "Orbax writes elsewhere, then renames",
        check_full_disk,
        "folder",
        SAVING,
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
