"""A saved run goes on bitwise, in every optimizer and wrapper; a run is repeatable."""

import hashlib
import os
import pathlib
import subprocess
import sys

import flax.serialization
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract import (
    OPTIMIZERS,
    SHAPES,
    close,
    each_factory,
    gradients,
    params_like,
    steps_of,
)

import memoptax

from compiled import step_of
from training_loop import NAMED, STANDARD, is_finite, same

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


# How a state is saved and comes back


def by_orbax(tree, like, folder):
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


def by_msgpack(tree, like, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(like, (folder / "state").read_bytes())


def by_numpy(tree, like, folder):
    """NumPy keeps bfloat16 as two bytes without a name; ``like`` has the dtype."""
    np.savez(folder / "state.npz", *jax.tree.leaves(jax.device_get(tree)))
    leaves, treedef = jax.tree.flatten(like)
    with np.load(folder / "state.npz", allow_pickle=False) as kept:
        arrays = [kept[name] for name in kept.files]
    return treedef.unflatten([a.view(x.dtype) for a, x in zip(arrays, leaves)])


WAYS = {"orbax": by_orbax, "msgpack": by_msgpack, "numpy": by_numpy}


# Wrappers


def injected(opt):
    static = tuple(opt.options)
    return opt.build(lambda f: optax.inject_hyperparams(f, static_args=static))


def scheduled(opt):
    rate = optax.cosine_decay_schedule(opt.rate, 20)
    return opt.build(**({"learning_rate": rate} if opt.rated else {}))


def masked(opt):
    return optax.masked(opt.build(), {name: name != "vector" for name in SHAPES})


def partitioned(opt):
    labels = {name: "ours" if name != "vector" else "theirs" for name in SHAPES}
    return optax.partition({"ours": opt.build(), "theirs": optax.adam(0.1)}, labels)


WRAPPERS = {
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt.build(), 3),
    "MultiSteps": lambda opt: optax.MultiSteps(
        opt.build(), 2
    ).gradient_transformation(),
    "clipped": lambda opt: optax.chain(optax.clip_by_global_norm(1.0), opt.build()),
    "averaged": lambda opt: optax.chain(opt.build(), optax.ema(0.9)),
    "injected": injected,
    "scheduled": scheduled,
    "masked": masked,
    "partitioned": partitioned,
}

CASES = [
    pytest.param(way, opt, lambda opt: opt.build(), id=f"{opt.name}, {way}")
    for opt in OPTIMIZERS
    for way in WAYS
] + [
    pytest.param(way, opt, wrapper, id=f"{opt.name}, {name}, {way}")
    for k, opt in enumerate(STANDARD)
    for j, (name, wrapper) in enumerate(WRAPPERS.items())
    for way in [list(WAYS)[(j + k) % len(WAYS)]]  # each way in each wrapper
]


@pytest.mark.parametrize(("way", "opt", "wrapper"), CASES)
@pytest.mark.few(6)
def test_a_saved_run_goes_on_bitwise(way, opt, wrapper, tmp_path):
    tx, stream = wrapper(opt), steps_of(gradients())
    step = jax.jit(step_of(tx))
    params = params_like(SHAPES)
    carry = params, tx.init(params)
    for gradient in stream[:5]:  # in the middle of an accumulation over two
        carry = step(*carry, gradient)
    found = WAYS[way](carry, (params, tx.init(params)), tmp_path)
    same(found, carry)
    memoptax.check_state(tx, *found)
    for gradient in stream[5:]:
        found, carry = step(*found, gradient), step(*carry, gradient)
    same(found, carry)
    assert is_finite(carry)


# The same on every run

DIGESTS = """
import sys
import test_resume

for name in sys.argv[1:]:
    print(test_resume.digest(name))
"""


def digest(name):
    """The digest of the parameters and the state after a run, compiled each time."""
    tx, params = NAMED[name].build(), params_like(SHAPES)
    step = jax.jit(step_of(tx))
    carry = params, tx.init(params)
    for gradient in steps_of(gradients()):
        carry = step(*carry, gradient)
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(carry)):
        bits.update(np.asarray(leaf).tobytes())
    return bits.hexdigest()


@each_factory
@pytest.mark.few(2)
def test_a_run_compiled_twice_is_the_same_bitwise(opt):
    assert digest(opt.name) == digest(opt.name)


@pytest.mark.cpu_only("another process")
@pytest.mark.long
def test_another_process_has_the_same_bits():
    names = [opt.name for opt in STANDARD] + ["fifo", "sm3_cm int8", "summed"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, *names],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [digest(name) for name in names]


@pytest.mark.cpu_only("simulated devices")
@pytest.mark.parametrize("count", [1, 2, 8])
@each_factory
@pytest.mark.few(3)
def test_devices_change_nothing_but_rounding(opt, count):
    """Parameters sharded over 1, 2 and 8 devices. The vector of 3 entries is whole."""
    shapes = {"matrix": (8, 2), "vector": (3,)}
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh(
        (count,), ("data",), devices=jax.devices()[:count], axis_types=automatic
    )
    homes = {"matrix": jax.P("data"), "vector": jax.P()}
    homes = {name: jax.NamedSharding(mesh, spec) for name, spec in homes.items()}
    tx = opt.build()
    step = jax.jit(step_of(tx))
    alone = params_like(shapes)
    many = jax.device_put(alone, homes)
    one, many = (alone, tx.init(alone)), (many, tx.init(many))
    for gradient in steps_of(gradients(shapes=shapes)):
        one = step(*one, gradient)
        many = jax.block_until_ready(step(*many, jax.device_put(gradient, homes)))
    close(jax.device_get(many), jax.device_get(one))
