"""Specs and shardings of a state, before it is allocated."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

from meshes import INT8, LAYOUTS, OPTIMIZERS, abstract, mesh_of

pytestmark = [pytest.mark.cpu_only("a mesh of eight devices"), pytest.mark.few(1)]


def test_the_specs_of_a_buffer():
    tx = memoptax.adam_cm(0.1, fifo_probability=0.5)
    specs = LAYOUTS["mixed"]
    state, _ = memoptax.state_partition_specs(tx, abstract(), specs)
    assert state.mu == state.nu == specs
    assert state.buffer.slots == {
        "matrix": P(None, "data", "model"),
        "vector": P(None, "model"),
        "kernel": P(None, None, None, "model", "data"),
        "scalar": P(),
    }
    rest = state.buffer._replace(slots=None)
    assert set(jax.tree.leaves((rest, state.count))) == {P()}
    tx = memoptax.adam_cm(0.1, holding="sum")
    state, _ = memoptax.state_partition_specs(tx, abstract(), specs)
    assert state.buffer.total == specs
    tx = memoptax.adam_cm(0.1, topc=1)
    state, _ = memoptax.state_partition_specs(tx, abstract(), specs)
    assert state.buffer.slots == specs


def test_the_specs_of_int8():
    specs = LAYOUTS["mixed"]
    tx = memoptax.adam_cm(0.1, buffer_dtype="int8", mu_dtype="int8")
    state, _ = memoptax.state_partition_specs(tx, abstract(), specs)
    assert state.mu == specs
    assert state.mu_scales == (P(None, None, "model"), P("data"), P(), P())
    assert state.buffer.slots["matrix"] == P(None, "data", "model")
    assert state.buffer.scales[:2] == (P(None, None, None, "model"), P(None, "data"))
    assert state.buffer.scales[2:] == (P(), P())


def test_the_specs_of_sm3():
    specs = LAYOUTS["mixed"]
    tx = memoptax.sm3(0.1, **INT8)
    state = memoptax.state_partition_specs(tx, abstract(), specs)[0]
    kernel, matrix, scalar, vector = state.accumulators
    assert matrix == (P("data"), P(None, "model"))
    assert kernel == (P(), P(), P(None, None, "model"), P(None, None, None, "data"))
    assert (scalar, vector) == ((P(),), (P("model"),))
    assert state.momentum == specs
    assert state.scales == (P(None, None, "model"), P("data"), P(), P())
    blocks = memoptax.scale_by_sm3(cover=memoptax.covers.blocks(4, None))
    state = memoptax.state_partition_specs(blocks, abstract(), specs)
    assert state.accumulators[1] == (P("data"),)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_specs_have_the_structure_of_any_state(name):
    tx = OPTIMIZERS[name]()
    specs = memoptax.state_partition_specs(tx, abstract(), LAYOUTS["mixed"])
    state = jax.eval_shape(tx.init, abstract())
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    jax.tree.map(lambda x, spec: len(spec) <= x.ndim or pytest.fail(), state, specs)
    # Every large array is sharded, in the state of any transformation.
    for x, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs)):
        assert spec != P() or x.size <= 12, (x, spec)


def test_specs_of_optax_and_of_leaves_that_are_none():
    params = {"w": jnp.zeros((8, 4)), "none": None, "masked": optax.MaskedNode()}
    tx = optax.chain(optax.adam(0.1), memoptax.critical_gradients())
    (adam, _), ours = memoptax.state_partition_specs(tx, params, P("data"))
    assert adam.mu["w"] == adam.nu["w"] == P("data")
    assert ours.buffer.slots["w"] == P(None, "data")
    empty = memoptax.state_partition_specs(tx, {}, P("data"))
    assert empty[1].buffer.slots == {}
    replicated = memoptax.state_partition_specs(tx, params, None)
    assert set(jax.tree.leaves(replicated)) == {P()}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_specs_may_be_asked_for_on_a_mesh_and_while_tracing(kind):
    tx, expected = memoptax.sgd_c(0.1), P(None, "data")

    @jax.jit
    def traced(x):
        spec = memoptax.state_partition_specs(tx, x, P("data"))[0].buffer.slots
        assert spec == expected
        return x

    with jax.set_mesh(mesh_of(kind)):
        x = jnp.zeros((8, 4))
        spec = memoptax.state_partition_specs(tx, x, P("data"))[0].buffer.slots
        traced(x)
    assert spec == expected


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            P("data", None),
            r"P.*for parameter \['vector'\], whose shape \(16,\) has onl",
        ),
        (LAYOUTS["mixed"] | {"matrix": "data"}, r"has 'data' for parameter \['matrix'"),
        ({}, r"must be a tree like params, or a prefix of it, but is PyTreeDef\({}\)"),
        ([], r"must be a tree like params, or a prefix of it, but is PyTreeDef\(\[\]"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(specs, message):
    params = {k: v for k, v in abstract().items() if k != "scalar"}
    if isinstance(specs, dict):
        specs = {k: v for k, v in specs.items() if k != "scalar"}
    with pytest.raises(ValueError, match=message):
        memoptax.state_partition_specs(memoptax.sgd_c(0.1), params, specs)


def test_shardings_need_one_mesh(mesh):
    tx = memoptax.sgd_c(0.1)
    with pytest.raises(ValueError, match="params must be on one mesh, but are on 0"):
        memoptax.state_shardings(tx, jnp.zeros(8))
    other = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
    two = [
        jax.device_put(jnp.zeros(8), NamedSharding(m, P(m.axis_names[0])))
        for m in (mesh, other)
    ]
    with pytest.raises(ValueError, match="are on 2"):
        memoptax.state_shardings(tx, two)
    mixed = [two[0], jnp.zeros(3)]
    slots = memoptax.state_shardings(tx, mixed)[0].buffer.slots
    assert [s.spec for s in slots] == [P(None, "data"), P()]
    assert memoptax.state_shardings(tx, jnp.zeros(3), mesh)[0].buffer.keys.mesh == mesh


def test_what_the_mesh_does_not_divide_is_not_sharded(mesh):
    tx = memoptax.scale_by_sm3(cover=memoptax.covers.blocks(3, 1))
    x = jax.device_put(jnp.zeros((16, 4)), NamedSharding(mesh, P("data", "model")))
    ((sharding,),) = memoptax.state_shardings(tx, x).accumulators
    assert sharding.spec == P(None, "model")  # six blocks on four devices
    state = jax.jit(tx.init, out_shardings=memoptax.state_shardings(tx, x))(x)
    assert state.accumulators[0][0].sharding == sharding
