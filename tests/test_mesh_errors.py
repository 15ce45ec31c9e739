"""Meshes that do not fit: missing names, and boxes across devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

SMALLER = AbstractMesh((4,), ("data",))
MAKERS = [memoptax.sgd_c, memoptax.adam_cm, memoptax.sm3, memoptax.sm3_cm]
each_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)


@each_maker
@pytest.mark.parametrize("spec", [P("model"), P(None, ("data", "model"))], ids=str)
def test_an_axis_that_the_mesh_does_not_have_is_named(make, spec, mesh):
    tx, params = make(0.1), {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    sentence = r"specs has .* for parameter \['w'\], but the mesh has no axis 'model'"
    with pytest.raises(ValueError, match=sentence):
        memoptax.state_partition_specs(tx, params, {"w": spec}, SMALLER)
    with pytest.raises(ValueError, match=sentence):
        memoptax.state_partition_specs(tx, params, {"w": spec}, SMALLER, over="data")
    there = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec))}
    with pytest.raises(ValueError, match=sentence):
        memoptax.state_shardings(tx, there, SMALLER)


def test_what_is_no_mesh_is_refused():
    tx, params = memoptax.sgd_c(0.1), jnp.ones((8, 8))
    for wrong in ("data", 3, (4, 2), {"data": 4}):
        for call in (
            lambda m: memoptax.state_partition_specs(tx, params, P(), m),
            lambda m: memoptax.state_shardings(tx, params, m),
        ):
            with pytest.raises(ValueError, match="mesh must be None, a Mesh or an"):
                call(wrong)
    with pytest.raises(ValueError, match="slots_memory_kind .* a mesh of devices"):
        memoptax.state_shardings(tx, params, SMALLER, slots_memory_kind="pinned_host")
    with pytest.raises(ValueError, match="specs must name mesh axes"):
        memoptax.state_partition_specs(tx, params, P(P.UNCONSTRAINED))


def test_a_norm_over_an_axis_that_is_not_there_is_refused(mesh):
    tx = memoptax.critical_gradients(priority_fn=memoptax.sharded_norm("dta"))

    def step(x):
        return tx.update(x, tx.init(x))[0]

    for tracked in (True, False):
        specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": tracked}
        with pytest.raises(ValueError, match="sharded_norm was given the axes .*'dta'"):
            jax.eval_shape(jax.shard_map(step, mesh=mesh, **specs), jnp.ones((8, 8)))
    for axes in (3, {"w": 1.0}, [("data", 2)]):
        with pytest.raises(ValueError, match="axes must be 'auto', names of mesh axes"):
            memoptax.sharded_norm(axes)


# Boxes that lie across devices, in explicit mode

COVERS = {
    "3": memoptax.covers.blocks(3, 5),
    "rest": memoptax.covers.blocks(None, 6),
    "both": lambda path, leaf: [
        *memoptax.covers.axes(path, leaf),
        *memoptax.covers.blocks(3)(path, leaf),
    ],
    "aligned": memoptax.covers.blocks(2, 4),
}


@pytest.mark.parametrize("cover", COVERS)
@pytest.mark.parametrize("make", [memoptax.sm3, memoptax.sm3_cm])
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, ("data", "model"))])
@pytest.mark.few(2)
def test_boxes_across_devices_are_those_of_one_device(make, cover, spec, mesh):
    """The types of a state stay the same, and are those of its specs."""
    tx, shape = make(0.1, cover=COVERS[cover]), (16, 32)
    random = np.random.default_rng(0)
    x, g = (np.float32(random.normal(size=shape)) for _ in range(2))

    def step(x, g, state):
        updates, state = tx.update(g, state, x)
        return x + updates, state

    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    want, state = x, tx.init(x)
    for _ in range(2):
        want, state = jax.jit(step)(want, g, state)
    with jax.set_mesh(mesh):
        got, there = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, g))
        state = tx.init(got)
        types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(got)) == types
        for _ in range(2):
            got, state = jax.jit(step)(got, there, state)
        assert jax.tree.map(jax.typeof, state) == types
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    specs = memoptax.state_partition_specs(tx, x, spec, mesh)
    for a, b in zip(jax.tree.leaves(types), jax.tree.leaves(specs)):
        assert trimmed(a.sharding.spec) == trimmed(b)


def trimmed(spec):
    entries = [None if e == () else e for e in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)
