"""Faults of states, and the check of what is promised after each."""

import jax
import numpy as np
import optax
import pytest
from contract import gradients, steps_of

import memoptax

from training_loop import is_finite, loop, same, stream


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
