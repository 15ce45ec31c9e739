"""Orbax keeps every state bitwise, on any mesh, and a killed run resumes exactly."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec

import memoptax

from slots import entries, exact_sums

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SLOTS = ["float32", "bfloat16", "int8"]
SPECS = {"w": PartitionSpec("data", "model"), "b": PartitionSpec("model")}
STEPS = 3  # of five slots, two stay empty


def values(step, shape=None):
    """A tree like the parameters, on a mesh of this ``shape`` if it is given."""
    random = np.random.default_rng(step)
    tree = {"w": random.normal(size=(8, 4)), "b": random.normal(size=4)}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    if shape is None:
        return tree
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=automatic)
    return jax.device_put(tree, {k: NamedSharding(mesh, s) for k, s in SPECS.items()})


@functools.cache
def jitted(tx):
    """One compiled step for all runs of an optimizer."""
    return jax.jit(tx.update)


def run(tx, params, state, steps, shape=None):
    for step in steps:
        updates, state = jitted(tx)(values(step, shape), state, params)
        params = optax.apply_updates(params, updates)
        jax.block_until_ready(state)  # simulated devices block one another
    return params, state


def trained(tx, shape=None):
    params = values(1000, shape)
    return run(tx, params, tx.init(params), range(STEPS), shape)


def everywhere(state, mesh):
    """The state, with counts and keys moved from one device to the whole mesh.

    Orbax would restore them to that one device, and a step could not use them.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if x.sharding.num_devices > 1 else jax.device_put(x, replicated),
        state,
    )


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, like):
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def assert_bitwise(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


OPTIMIZERS = {
    f"adam_c, {slots}": memoptax.adam_c(0.1, fifo_probability=0.5, buffer_dtype=slots)
    for slots in SLOTS
} | {
    "adam_cm, unsynced": memoptax.adam_cm(0.1, synced=False),
    "sm3_cm": memoptax.sm3_cm(0.1, topc=1, mu_dtype="int8", buffer_dtype="int8"),
    "sm3": memoptax.sm3(0.1, momentum=0.9, momentum_dtype="int8"),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.few(1)
def test_a_state_comes_back_bitwise_and_goes_on(tx, tmp_path):
    params, state = trained(tx)
    save(tmp_path / "state", (params, state))
    found_params, found = restore(tmp_path / "state", (params, tx.init(params)))
    assert_bitwise((found_params, found), (params, state))
    more = range(STEPS, STEPS + 4)
    assert_bitwise(run(tx, found_params, found, more), run(tx, params, state, more))


@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.long
def test_a_state_moves_to_another_mesh_and_another_capacity(slots, tmp_path):
    """A state saved on 4 × 2 devices with C = 5 runs on 2 × 4 with C = 2 or 8."""
    tx = optax.chain(memoptax.critical_gradients(5, buffer_dtype=slots), optax.sgd(0.1))
    params, state = trained(tx, (4, 2))
    save(tmp_path / "state", (params, state))
    elsewhere = values(1000, (2, 4))
    like = elsewhere, everywhere(tx.init(elsewhere), elsewhere["w"].sharding.mesh)
    found_params, found = restore(tmp_path / "state", like)
    assert_bitwise((found_params, found), (params, state))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like[1])):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    w = jax.tree.leaves(found[0].buffer.slots)[-1]
    assert w.addressable_shards[0].data.shape[1:] == (4, 1)

    old = found[0].buffer
    assert np.sum(old.ages == 0) == 2
    for topc in (2, 8):
        resized = jax.jit(memoptax.resize_buffer, static_argnums=1)(found, topc)
        new, kept = resized[0].buffer, min(topc, STEPS)
        most = np.sort(np.argsort(-np.asarray(old.keys[0]), stable=True)[:kept])
        np.testing.assert_array_equal(new.keys[0, :kept], old.keys[0, most])
        np.testing.assert_array_equal(new.ages[0, :kept], old.ages[0, most])
        assert np.all(new.ages[0, kept:] == 0)
        for leaf in range(len(jax.tree.leaves(new.slots))):
            np.testing.assert_array_equal(
                entries(new, 0, leaf), entries(old, 0, leaf)[most]
            )
        sums = zip(jax.tree.leaves(new.total), exact_sums(new))
        for total, exact in sums:  # if there is a sum
            np.testing.assert_allclose(total, exact, rtol=1e-6)
    larger = optax.chain(
        memoptax.critical_gradients(8, buffer_dtype=slots), optax.sgd(0.1)
    )
    _, after = run(larger, found_params, resized, range(STEPS, STEPS + 9), (2, 4))
    assert jax.jit(memoptax.buffer_stats)(after)["fill"] == 8


@pytest.mark.long
def test_an_nnx_optimizer_comes_back(tmp_path):
    def create():
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, memoptax.adam_c(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)

    def steps(nodes, numbers):
        model, optimizer = nodes
        for number in numbers:
            step(model, optimizer, values(number)["w"])
        return nnx.as_pure(nnx.state(nodes))

    nodes = create()
    saved = steps(nodes, range(STEPS))
    save(tmp_path / "state", saved)
    fresh = create()
    nnx.update(fresh, restore(tmp_path / "state", nnx.as_pure(nnx.state(fresh))))
    assert_bitwise(nnx.as_pure(nnx.state(fresh)), saved)
    assert_bitwise(steps(fresh, range(8, 12)), steps(nodes, range(8, 12)))


@pytest.mark.long
def test_a_linen_train_state_comes_back(tmp_path):
    model, tx = nn.Dense(2), memoptax.adam_cm(0.1)

    def create():
        params = model.init(jax.random.key(0), values(0)["w"])
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state, x):
        grads = jax.grad(lambda p: jnp.mean(state.apply_fn(p, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    def steps(state, numbers):
        for number in numbers:
            state = step(state, values(number)["w"])
        return state

    state = steps(create(), range(STEPS))
    save(tmp_path / "state", state)
    found = restore(tmp_path / "state", create())
    assert found.step == state.step
    assert_bitwise((found.params, found.opt_state), (state.params, state.opt_state))
    assert_bitwise(steps(found, range(8, 12)), steps(state, range(8, 12)))


# Six steps on eight devices, with a checkpoint after each. At a given event of Python
# for a given path the run is killed, as by a scheduler or for lack of memory.
TRAINING = """
import os, pathlib, signal, sys
import language_model

folder, event, path = sys.argv[1:]

def kill(name, arguments):
    if name == event and str(arguments[0]).endswith(path):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
settings = language_model.Settings(16, layers=0, context=16, batch=4, steps=6)
text = language_model.read_text()
text = text._replace(validation=text.validation[:500])
mesh = language_model.create_mesh((4, 2))
name = "adam_c:topc=2,fifo_probability=0.5"
language_model.train(name, settings, text, mesh, pathlib.Path(folder), every=1)
"""


@pytest.mark.cpu_only("processes of simulated devices")
@pytest.mark.long
@pytest.mark.minutes
def test_a_run_killed_while_it_saves_takes_the_same_steps(tmp_path):
    """Killed when it begins to write, and again when only the name is missing."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples/experiments")]),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def train(folder, event="", path=""):
        command = [sys.executable, "-c", TRAINING, str(folder), event, path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        (checkpoints,) = folder.iterdir()
        steps = sorted(int(x.name) for x in checkpoints.iterdir() if x.name.isdigit())
        assert done.returncode == (-signal.SIGKILL if event else 0), done.stderr
        unfinished = list(checkpoints.glob("*tmp*"))
        assert bool(unfinished) == bool(event), unfinished
        return checkpoints, steps

    whole, steps = train(tmp_path / "whole")
    assert steps == [5, 6]
    begin = ("os.mkdir", "3.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp")
    end = ("os.rename", "/5.orbax-checkpoint-tmp")
    killed = tmp_path / "killed"
    assert train(killed, *begin)[1] == [1, 2]
    assert train(killed, *end)[1] == [3, 4]
    resumed, steps = train(killed)
    assert steps == [5, 6]

    for step in ("5", "6"):
        with ocp.StandardCheckpointer() as checkpointer:
            expected, found = (
                checkpointer.restore(run / step / "state") for run in (whole, resumed)
            )
        assert_bitwise(found, expected)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(found)} == {8}
        records = [
            json.loads((run / step / "record" / "metadata").read_text())
            for run in (whole, resumed)
        ]
        assert records[0] == records[1]
        assert len(records[0]["losses"]) == int(step)
