"""SM3 on eight devices: accumulators follow their axes, and little is sent."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

from compiled import step_of, train
from meshes import INT8, mesh_of
from untyped import untyped

pytestmark = [
    pytest.mark.cpu_only("a mesh of eight devices"),
    pytest.mark.long,
]

SHAPES = {"kernel": (3, 3, 64, 128), "matrix": (512, 256), "vector": (256,)}
SPECS = {
    "kernel": P(None, None, "data", "model"),
    "matrix": P("data", "model"),
    "vector": P("model"),
}
VALUES = {
    name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for name, shape in SHAPES.items()
}


def axes_of(x):
    spec = x.sharding.spec
    return tuple(spec) + (None,) * (x.ndim - len(spec))


@pytest.mark.parametrize(
    ("kind", "options"), [(AxisType.Auto, {}), (AxisType.Explicit, INT8)]
)
def test_accumulators_follow_the_axes_they_index(kind, options):
    mesh, tx = mesh_of(kind), memoptax.sm3(0.1, **options)
    alone, _ = jax.jit(step_of(tx))(VALUES, tx.init(VALUES), VALUES)
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
            for name, x in VALUES.items()
        }
        state = tx.init(params)
        step = jax.jit(step_of(tx)).lower(params, state, params)
        compiled = untyped(step.compile())
        params, state = compiled(params, state, params)
    kernel, matrix, vector = state[0].accumulators
    assert axes_of(matrix[0]) == ("data", None)
    assert axes_of(matrix[1]) == (None, "model")
    assert axes_of(kernel[2]) == (None, None, "data", None)
    assert axes_of(kernel[3]) == (None, None, None, "model")
    assert axes_of(vector[0]) == ("model",)
    for name in SHAPES:
        np.testing.assert_allclose(params[name], alone[name], rtol=1e-6)
    text = compiled.as_text()
    for forbidden in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {forbidden}(" not in text, forbidden
    largest = max(
        math.prod(map(int, shape.split(",")))
        for line in re.findall(r"= (.*) all-reduce\(", text)
        for shape in re.findall(r"\[([\d,]+)\]", line)
    )
    assert largest <= 3 * 3 * 64  # accumulators, never a gradient


def test_blocks_have_the_axes_of_their_tensor():
    mesh = mesh_of(AxisType.Explicit)
    tx = memoptax.sm3(0.1, cover=memoptax.covers.blocks(2, 16))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, SPECS["matrix"])
        gradient = jax.device_put(VALUES["matrix"], sharding)
        updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    assert axes_of(state[0].accumulators[0][0]) == ("data", "model")
    assert updates.shape == gradient.shape


@pytest.mark.parametrize("options", [{}, INT8], ids=str)
def test_large_tensors_train_inside_shard_map(options):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    tx = memoptax.sm3(0.1, **options)

    def two_steps(params):
        return train(tx, params, jnp.stack([params] * 2))[0]

    for spec in (P("d"), P()):
        x = jax.device_put(jnp.ones((2048, 256)), NamedSharding(mesh, spec))
        sharded = jax.shard_map(
            two_steps, mesh=mesh, in_specs=spec, out_specs=P(None, *spec)
        )
        assert np.isfinite(jax.jit(sharded)(x)).all()
