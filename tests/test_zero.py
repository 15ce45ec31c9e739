"""ZeRO-1 on eight devices: the state is divided, and the parameters are whole."""

import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from hlo import Program
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

from compiled import step_of, train, whole_buffer_operations
from meshes import trimmed
from untyped import untyped

pytestmark = [
    pytest.mark.cpu_only("a mesh of eight devices"),
    pytest.mark.slow,
    pytest.mark.few(1),
]

# Neither two nor eight devices divide an axis of the second.
SHAPES = {"matrix": (16, 40), "odd": (3, 7)}
STEPS = 4
EIGHT = {"data": 8}
# Parameters divided over "model", and their state over "data" as well.
TWO_BY_FOUR = {"data": 2, "model": 4}
SPECS = {"matrix": P(None, "model"), "odd": P()}

BUFFER: dict[str, Any] = {"decay": 0.9}
INT8: dict[str, Any] = {"mu_dtype": "int8", "buffer_dtype": "int8"}
OPTIMIZERS = {
    "sgd_c, 1": lambda: memoptax.sgd_c(0.01, momentum=0.9, topc=1, **BUFFER),
    "sgd_c, 5": lambda: memoptax.sgd_c(0.01, topc=5, **BUFFER),
    "adam_c, 1": lambda: memoptax.adam_c(0.01, topc=1, **BUFFER),
    "adam_c, 5": lambda: memoptax.adam_c(0.01, topc=5, **BUFFER),
    "adam_cm, int8": lambda: memoptax.adam_cm(0.01, topc=5, **INT8, **BUFFER),
    "sm3_cm": lambda: memoptax.sm3_cm(0.01, topc=1, **INT8, **BUFFER),
    "sm3": lambda: memoptax.sm3(0.1, momentum=0.9, momentum_dtype="int8"),
    "chain": lambda: optax.chain(
        memoptax.critical_gradients(5, holding="sum", **BUFFER), optax.adam(0.01)
    ),
}
# Meshes and modes take turns. Three optimizers have both in a row, so that one worker
# of pytest-xdist gets both.
MESHES = ((EIGHT, AxisType.Auto), (TWO_BY_FOUR, AxisType.Explicit))
CASES = [
    (name, *case)
    for k, name in enumerate(OPTIMIZERS)
    for case in (MESHES if name in ("adam_c, 5", "sm3", "chain") else [MESHES[k % 2]])
]


def values(seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def abstract(shapes=SHAPES):
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


def mesh_of(sizes, kind=AxisType.Auto):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )


def specs_on(mesh):
    return SPECS if "model" in mesh.shape else dict.fromkeys(SPECS, P())


def placed(tree, mesh):
    specs = specs_on(mesh)
    return {
        k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()
    }


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_lies_as(shardings, tree):
    for (path, x), wanted in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings), strict=True
    ):
        same = x.sharding.is_equivalent_to(wanted, x.ndim)
        assert same, (jax.tree_util.keystr(path), x.sharding, wanted)


# --- which axis -----------------------------------------------------------------------


def specs_of(tx, shapes, specs=None, sizes=EIGHT, over="data"):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return memoptax.state_partition_specs(tx, abstract(shapes), specs, mesh, over=over)


@pytest.mark.parametrize(
    ("shape", "spec", "over", "expected"),
    [
        ((16, 40), P(), "data", P("data")),
        ((3, 40), P(), "data", P(None, "data")),
        ((16, 40), P("model"), "data", P("model", "data")),
        ((2, 40), P(), ("data", "model"), P(None, ("data", "model"))),
        ((16, 6), P("model", None), ("data",), P("model", "data")),
        ((16, 7), P("model"), "data", P("model")),  # no free axis is even
        ((0, 40), P(), "data", P(None, "data")),
        ((3, 7), P(), "data", P()),
        ((), P(), "data", P()),
        ((16, 40), P("model"), (), P("model")),
    ],
)
def test_the_first_free_axis_that_divides_is_divided(shape, spec, over, expected):
    tx = optax.adam(0.1)
    found = specs_of(tx, {"x": shape}, {"x": spec}, TWO_BY_FOUR, over)
    assert found[0].mu["x"] == found[0].nu["x"] == expected


def test_the_axis_of_slots_is_never_divided():
    tx = memoptax.adam_c(0.1, topc=7, buffer_dtype="int8", holding="sum")
    # There are eight slots, which eight devices would divide evenly.
    buffer = specs_of(tx, SHAPES)[0].buffer
    assert buffer.slots == {"matrix": P(None, "data"), "odd": P()}
    assert buffer.total == {"matrix": P("data"), "odd": P()}
    assert buffer.scales == (P(None, "data"), P())
    assert set(jax.tree.leaves(buffer._replace(slots=0, total=0, scales=0))) == {0, P()}


def test_accumulators_and_wrappers_follow():
    shapes = {**SHAPES, "vector": (24,)}
    accumulators = specs_of(memoptax.scale_by_sm3(), shapes).accumulators
    assert accumulators == ((P("data"), P()), (P(), P()), (P("data"),))
    # Six blocks, which eight devices do not divide.
    blocks = memoptax.scale_by_sm3(cover=memoptax.covers.blocks(3, None))
    assert specs_of(blocks, {"x": (16, 40)}).accumulators == ((P(),),)
    tx = optax.MultiSteps(optax.masked(optax.trace(0.9), {"matrix": True}), 2)
    state = specs_of(tx, {"matrix": (16, 40)})
    assert state.acc_grads["matrix"] == P("data")
    assert state.inner_opt_state.inner_state.trace["matrix"] == P("data")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("dat", r"over is 'dat', but the mesh has no axis 'dat': it has 'data', 'm"),
        (["data"], r"over must be a mesh axis name or a tuple .* is \['data'\]"),
        (("data", 3), r"over must be .*, but is \('data', 3\)"),
        (None, "over must be .*, but is None"),
        (("data", "data"), r"over is \('data', 'data'\), but must name each .* once"),
        (
            ("data", "model"),
            r"over is .*'model'\), but parameter \['matrix'\] is divided over 'model'",
        ),
    ],
)
def test_what_cannot_be_divided_over_is_refused(over, message):
    params = placed(values(0), mesh_of(TWO_BY_FOUR))
    with pytest.raises(ValueError, match=message):
        memoptax.state_shardings(optax.adam(0.1), params, over=over)


def test_sizes_must_be_known():
    with pytest.raises(ValueError, match="over is 'data', .* pass mesh"):
        memoptax.state_partition_specs(optax.adam(1), abstract(), None, over="data")


# --- what a step does -----------------------------------------------------------------


@functools.cache
def alone(name):
    stream = jax.tree.map(lambda *x: np.stack(x), *map(values, range(STEPS)))
    run = jax.jit(functools.partial(train, OPTIMIZERS[name]()))
    return jax.tree.map(np.asarray, run(values(99), stream)[0])


@pytest.mark.parametrize(("name", "sizes", "kind"), CASES)
def test_an_eighth_each_and_one_gather(name, sizes, kind):
    tx, mesh, expected = OPTIMIZERS[name](), mesh_of(sizes, kind), alone(name)
    with jax.set_mesh(mesh):
        params = placed(values(99), mesh)
        shardings = memoptax.state_shardings(tx, params, over="data")
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        targets = shardings_of(params), shardings
        told = {"out_shardings": targets}
        if kind is AxisType.Explicit and name != "chain":
            told = {}  # ours return updates with the sharding of the gradients
        step = functools.partial(jax.jit, donate_argnums=(0, 1), **told)(step_of(tx))
        compiled = step.lower(params, state, placed(values(0), mesh)).compile()
        for i in range(STEPS):
            before = jax.tree.leaves((params, state))
            params, state = compiled(params, state, placed(values(i), mesh))
            assert all(x.is_deleted() for x in before)
            for key, one in expected.items():
                # A copy, because an array that NumPy looks at cannot be donated.
                seen = jnp.copy(params[key])
                np.testing.assert_allclose(seen, one[i], atol=2e-5, rtol=1e-5)
    assert_lies_as(targets, (params, state))
    program = Program(compiled.as_text())
    assert program.unaliased() == []
    assert_holds_an_eighth(state)
    assert_sends_only_updates(program, params, name)
    stacks = {
        math.prod(x.addressable_shards[0].data.shape)
        for x in jax.tree.leaves(state)
        if x.ndim == 3 and x.shape[-1] == SHAPES["matrix"][-1]
    }
    assert len(stacks) == ("5" in name or name in ("adam_cm, int8", "chain"))
    assert whole_buffer_operations(compiled, stacks) == []


def assert_holds_an_eighth(state):
    """Of all arrays with the shape of the matrix, with or without an axis of slots."""
    found = [x for x in jax.tree.leaves(state) if x.shape[-2:] == SHAPES["matrix"]]
    for x in found:
        assert x.addressable_shards[0].data.size == x.size / 8
    assert sum(x.nbytes for x in found) >= math.prod(SHAPES["matrix"])


def assert_sends_only_updates(program, params, name):
    """The update of the divided leaf (once), scalars, and maxima of rows or boxes."""
    sent = program.collectives()
    assert {i.opcode for i in sent} <= {"all-gather", "all-reduce"}
    gathered = [a for i in sent if i.opcode == "all-gather" for a in i.arrays]
    expected = params["matrix"].sharding.shard_shape(SHAPES["matrix"])
    assert [a.shape for a in gathered] == [expected]
    largest = 1
    if name.startswith("sm3"):
        largest = SHAPES["matrix"][1]
    elif "int8" in name:
        largest = SHAPES["matrix"][0]
    reduced = [a.size for i in sent if i.opcode == "all-reduce" for a in i.arrays]
    assert max(reduced, default=0) <= largest, reduced


def clipped(tx):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.apply_if_finite(tx, 3))


OTHERS = {
    "amsgrad": lambda: clipped(memoptax.adam_c(0.1, amsgrad=True, synced=False)),
    "nesterov": lambda: memoptax.adamw_c(0.1, nesterov=True, aggr=lambda u, m, n: u),
    "centered": lambda: memoptax.rmsprop_c(0.1, centered=True, weight_decay=0.1),
    "centered momentum": lambda: memoptax.rmsprop_c(
        0.1, momentum=0.9, centered=True, weight_decay=0.1
    ),
    "dampened": lambda: memoptax.sgd_c(0.1, 0.9, dampening=0.5, fifo_probability=0.5),
    "skip_first": lambda: memoptax.adamw_cm(0.1, amsgrad=True, skip_first=True),
    "sgd_cm": lambda: memoptax.sgd_cm(0.1, mu_dtype="bfloat16"),
    "no buffer": lambda: memoptax.adam_cm(0.1, kappa=0.0),
    "no buffer, amsgrad": lambda: memoptax.adam_c(0.1, topc=0, amsgrad=True),
    "no buffer in int8": lambda: memoptax.adam_c(0.1, kappa=0.0, mu_dtype="int8"),
    "no buffer, sm3_cm": lambda: memoptax.sm3_cm(0.1, kappa=0.0, skip_first=True),
    "SM3-I": lambda: memoptax.sm3(0.1, beta=0.9, variant="I", weight_decay=0.1),
    "SM3-II": lambda: memoptax.sm3(0.1),
    "full": lambda: memoptax.sm3(0.1, 0.9, cover=memoptax.covers.full),
    "blocks": lambda: memoptax.sm3(0.1, cover=memoptax.covers.blocks(4, None)),
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(name, (EIGHT, TWO_BY_FOUR)[k % 2]) for k, name in enumerate(OTHERS)],
)
@pytest.mark.parametrize("entered", [True, False])
@pytest.mark.few(20)
def test_types_stay_in_explicit_mode(name, sizes, entered):
    """Updates have the sharding of the gradients, and a state its own. Nothing runs.

    ``jax.set_mesh`` need not have been called: arrays know their mesh.
    """
    tx, mesh = OTHERS[name](), mesh_of(sizes, AxisType.Explicit)

    def typed(shapes, shardings):
        return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)

    def sharding(x):
        return NamedSharding(mesh, trimmed(jax.typeof(x).sharding.spec))

    def update(gradients, state, params):
        new = tx.update(gradients, state, params)
        assert jax.tree.map(sharding, new) == (of_params, of_state)
        return new

    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        of_params = {k: NamedSharding(mesh, s) for k, s in specs_on(mesh).items()}
        # So large that a single device would take maxima from slices.
        params = typed(abstract({**SHAPES, "matrix": (512, 640)}), of_params)
        of_state = memoptax.state_shardings(tx, params, over="data")
        assert any("data" in s.spec for s in jax.tree.leaves(of_state))
        state = typed(jax.eval_shape(tx.init, params), of_state)
        jax.eval_shape(update, params, state, params)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("entered", [True, False])
@pytest.mark.few(6)
def test_gradients_on_no_mesh_are_taken_beside_the_state(name, entered):
    """As when they were summed on the host. Nothing runs."""
    tx, mesh = OTHERS[name](), mesh_of(TWO_BY_FOUR, AxisType.Explicit)

    def spec(x):
        return trimmed(jax.typeof(x).sharding.spec)

    def update(gradients, state, params):
        new = tx.update(gradients, state, params)
        assert jax.tree.map(spec, new[1]) == jax.tree.map(spec, state)
        return new

    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        homes = {k: NamedSharding(mesh, s) for k, s in SPECS.items()}
        params = {k: x.update(sharding=homes[k]) for k, x in abstract().items()}
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(update, abstract(), state, params)


@pytest.mark.parametrize("topc", [1, 5])
def test_gradients_that_lie_like_their_slots_stay_where_they_are(topc):
    """In explicit mode. Nothing runs."""
    tx, mesh = memoptax.sgd_c(0.1, topc=topc), mesh_of(TWO_BY_FOUR, AxisType.Explicit)
    homes = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    with jax.set_mesh(mesh):
        params = {k: x.update(sharding=homes[k]) for k, x in abstract().items()}
        state = jax.eval_shape(tx.init, params)
        program = jax.make_jaxpr(tx.update)(params, state, params)
    assert "reshard" not in str(program)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.few(6)
def test_a_state_on_every_device_is_taken_beside_divided_gradients(name):
    """As after a restore. Nothing runs."""
    tx, mesh = OTHERS[name](), mesh_of(TWO_BY_FOUR, AxisType.Explicit)

    def typed(specs):
        return {
            k: x.update(sharding=NamedSharding(mesh, specs[k]))
            for k, x in abstract().items()
        }

    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, typed(dict.fromkeys(SHAPES, P())))
        gradients = typed(SPECS)
        updates, _ = jax.eval_shape(tx.update, gradients, state, gradients)
    for k, update in updates.items():
        assert trimmed(update.sharding.spec) == SPECS[k]


# --- Flax, Orbax ----------------------------------------------------------------------

X = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
INT8_CM = OPTIMIZERS["adam_cm, int8"]


def linen_state(tx):
    names = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Dense(40, kernel_init=names)
    params = model.init(jax.random.key(0), X)["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def linen_step(state):
    def loss(params):
        return jnp.mean(state.apply_fn({"params": params}, X) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


@pytest.mark.long
def test_linen(mesh):
    """Logical names place the parameters, and state_shardings places the state."""
    init, rules = functools.partial(linen_state, INT8_CM()), [("out", "model")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        shapes = jax.eval_shape(init)
        # Flax does not mark it as exported.
        shardings = untyped(nn).logical_to_mesh_sharding(
            nn.get_partition_spec(shapes), mesh, rules
        )
        params = jax.tree.map(
            lambda s, box: jax.tree.map(lambda x: x.update(sharding=s), box),
            shardings.params,
            shapes.params,
        )
        divided = memoptax.state_shardings(shapes.tx, params, over="data")
        shardings = shardings.replace(opt_state=divided)
        state = jax.jit(init, out_shardings=shardings)()
        step = jax.jit(linen_step, donate_argnums=0, out_shardings=(shardings, None))
        losses = []
        for _ in range(3):
            state, loss = step(state)
            losses.append(float(loss))
    single, expected = init(), []
    for _ in range(3):
        single, loss = jax.jit(linen_step)(single)
        expected.append(float(loss))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    kernel = state.opt_state[0].buffer.slots["kernel"].value
    assert kernel.sharding.spec == P(None, "data", "model")
    assert kernel.addressable_shards[0].data.shape == (6, 4, 20)
    assert state.params["kernel"].value.sharding.spec == P(None, "model")


class Model(nnx.Module):
    def __init__(self, where=None):
        metadata = {} if where is None else {"optimizer_sharding": where}
        self.linear = nnx.Linear(
            16, 40, rngs=nnx.Rngs(0), kernel_metadata=metadata, use_bias=False
        )

    def __call__(self, x):
        return self.linear(x)


@nnx.jit
def nnx_step(model, optimizer):
    value, grads = nnx.value_and_grad(lambda model: jnp.mean(model(X) ** 2))(model)
    optimizer.update(model, grads)
    return value


def nnx_run(where=None):
    model = Model(where)
    optimizer = nnx.Optimizer(model, OPTIMIZERS["adam_c, 5"](), wrt=nnx.Param)
    return model, optimizer, [float(nnx_step(model, optimizer)) for _ in range(3)]


@pytest.mark.long
def test_nnx():
    """The names that nnx keeps for optimizers divide the state, on an explicit mesh."""
    with jax.set_mesh(mesh_of(EIGHT, AxisType.Explicit)):
        model, optimizer, losses = nnx_run(("data", None))
        slots = optimizer.opt_state[0].buffer.slots["linear"]["kernel"].get_value()
        nu = optimizer.opt_state[1][1].nu["linear"]["kernel"].get_value()
    assert [x.addressable_shards[0].data.shape for x in (slots, nu)] == [
        (6, 2, 40),
        (2, 40),
    ]
    assert model.linear.kernel.get_value().sharding.is_fully_replicated
    np.testing.assert_allclose(losses, nnx_run()[2], rtol=1e-4)


def test_orbax_takes_a_divided_state_to_another_division(tmp_path):
    tx, params = INT8_CM(), values(99)

    def target(sizes):
        shardings = memoptax.state_shardings(
            tx, placed(params, mesh_of(sizes)), over="data"
        )
        shapes = jax.eval_shape(tx.init, params)
        return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)

    def filled(x):
        numbers = np.random.default_rng(x.size).integers(0, 100, x.shape)
        return jax.device_put(numbers.astype(x.dtype), x.sharding)

    state = jax.tree.map(filled, target(EIGHT))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    for sizes in (EIGHT, TWO_BY_FOUR):
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(tmp_path / "state", target(sizes))
        jax.tree.map(np.testing.assert_array_equal, found, state)
        assert_lies_as(shardings_of(target(sizes)), found)
