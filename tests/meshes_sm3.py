"""SM3 on eight devices. Run by test_sm3.py in a process of its own."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

SHAPES = {"kernel": (3, 3, 64, 128), "matrix": (512, 256), "vector": (256,)}
SPECS = {
    "kernel": P(None, None, "data", "model"),
    "matrix": P("data", "model"),
    "vector": P("model"),
}
VALUES = {
    k: np.random.default_rng(0).standard_normal(s).astype(np.float32)
    for k, s in SHAPES.items()
}


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def short(x):
    spec = x.sharding.spec
    return tuple(spec) + (None,) * (x.ndim - len(spec))


def check_mesh(kind, options):
    mesh, tx = make_mesh(kind), memoptax.sm3(0.1, **options)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    alone, _ = jax.jit(step)(VALUES, tx.init(VALUES))
    with jax.set_mesh(mesh):
        params = {
            k: jax.device_put(v, NamedSharding(mesh, SPECS[k]))
            for k, v in VALUES.items()
        }
        state = tx.init(params)
        compiled = jax.jit(step).lower(params, state).compile()
        params, state = compiled(params, state)
    kernel, matrix, vector = state[0].accumulators
    assert short(matrix[0]) == ("data", None), short(matrix[0])
    assert short(matrix[1]) == (None, "model")
    assert short(kernel[2]) == (None, None, "data", None)
    assert short(kernel[3]) == (None, None, None, "model")
    assert short(vector[0]) == ("model",)
    for k in SHAPES:
        np.testing.assert_allclose(params[k], alone[k], rtol=1e-6)
    text = compiled.as_text()
    for forbidden in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {forbidden}(" not in text, forbidden
    largest = max(
        math.prod(map(int, shape.split(",")))
        for line in re.findall(r"= (.*) all-reduce\(", text)
        for shape in re.findall(r"\[([\d,]+)\]", line)
    )
    assert largest <= 3 * 3 * 64, largest  # accumulators, never a gradient


def check_blocks_under_explicit_sharding():
    mesh, tx = (
        make_mesh(AxisType.Explicit),
        memoptax.sm3(0.1, cover=memoptax.covers.blocks(2, 16)),
    )
    with jax.set_mesh(mesh):
        g = jax.device_put(VALUES["matrix"], NamedSharding(mesh, P("data", "model")))
        updates, state = jax.jit(tx.update)(g, tx.init(g))
        assert short(state[0].accumulators[0][0]) == ("data", "model")
    np.testing.assert_array_equal(updates.shape, g.shape)


def check_shard_map(options):
    mesh, tx = jax.make_mesh((8,), ("d",)), memoptax.sm3(0.1, **options)

    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=2)[0][0]

    for spec in (P("d"), P()):
        x = jax.device_put(jnp.ones((2048, 256)), NamedSharding(mesh, spec))
        out = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec))(x)
        assert bool(jnp.isfinite(out).all())


if __name__ == "__main__":
    assert jax.device_count() == 8
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        for extra in ({}, {"momentum": 0.9, "momentum_dtype": "int8"}):
            check_mesh(axis_type, extra)
    check_blocks_under_explicit_sharding()
    check_shard_map({})
    check_shard_map({"momentum": 0.9, "momentum_dtype": "int8"})
    print("ok")
