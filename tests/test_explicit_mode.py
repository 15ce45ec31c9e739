"""JAX's explicit mode, where the sharding of an array is part of its type."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax
from memoptax._tensors import layout

from meshes import trimmed
from untyped import untyped

pytestmark = pytest.mark.cpu_only("several devices")


# Boxes that lie across devices

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


# States that a helper has divided along any axis


def divided(state, mesh):
    """Every array over "data", along the first axis that it divides."""

    def place(x):
        axis = next((k for k, n in enumerate(x.shape) if n % 2 == 0), x.ndim)
        spec = P(*[None] * axis, "data") if axis < x.ndim else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def on_two(tree):
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,))
    return mesh, jax.device_put(tree, NamedSharding(mesh, P("data")))


BUFFERED = {
    "slots": lambda: memoptax.sgd_c(0.1, topc=3),
    "keys": lambda: memoptax.sgd_c(0.1, topc=2),
    "keys of a sum": lambda: memoptax.adam_cm(0.1, topc=2, holding="sum"),
    "scales": lambda: memoptax.adam_c(0.1, topc=3, buffer_dtype="int8"),
    "draws": lambda: memoptax.sgd_c(0.1, topc=1, fifo_probability=0.5),
    "rows": lambda: memoptax.sm3_cm(0.1, topc=1, synced=False),
}


@pytest.mark.parametrize("name", BUFFERED)
def test_a_buffer_divided_where_it_must_be_whole_is_refused(name):
    mesh, params = on_two({"w": jnp.ones((8, 8)), "b": jnp.ones(8)})
    tx = BUFFERED[name]()
    state = divided(tx.init(params), mesh)
    field = {"keys of a sum": "slots|keys", "scales": "slots", "rows": "keys"}
    message = (
        f"field ({field.get(name, name.split()[0])}) is divided over the mesh axis"
    )
    for use in (
        lambda: tx.update(params, state, params),
        lambda: jax.jit(tx.update)(params, state, params),
        lambda: memoptax.buffer_stats(state),
        lambda: memoptax.resize_buffer(state, 2),
        lambda: memoptax.reset_buffer(state),
        lambda: memoptax.check_state(tx, params, state),
    ):
        with pytest.raises(ValueError, match=message + ".*state_shardings"):
            use()
    whole = jax.device_put(state, memoptax.state_shardings(tx, params))
    jax.jit(tx.update)(params, whole, params)


@pytest.mark.parametrize(
    "tx",
    [
        memoptax.sm3(0.1),
        memoptax.sm3(0.1, variant="I", cover=memoptax.covers.blocks(2)),
        memoptax.sm3(0.1, momentum=0.9, momentum_dtype="int8"),
        memoptax.sm3_cm(0.1, topc=0),
    ],
)
@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P(), None], ids=str)
def test_accumulators_divided_along_any_axis_are_used_and_stay_there(tx, spec):
    """As the states of optax are. A mesh axis divides two axes of the leaf here.

    Without a spec the parameters and gradients are on no mesh.
    """
    values = np.float32(np.random.default_rng(0).normal(size=(8, 8)))
    mesh, _ = on_two({})
    params = values
    if spec is not None:
        params = jax.device_put(values, NamedSharding(mesh, spec))
    state = divided(tx.init(params), mesh)
    types = jax.tree.map(jax.typeof, state)
    want, plain = None, tx.init(values)
    for _ in range(2):
        got, state = jax.jit(tx.update)(params, state, params)
        want, plain = jax.jit(tx.update)(values, plain, values)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
        assert jax.tree.map(jax.typeof, state) == types
        assert spec is None or jax.typeof(got) == jax.typeof(params)


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("specs", [(P("data"), P()), (P(), P("data"))])
@pytest.mark.parametrize("shape", [(8,), (8, 8)])
def test_sums_of_entries_may_be_divided_unlike_their_momentum(
    shape, specs, momentum_dtype
):
    full = memoptax.covers.full
    tx = memoptax.scale_by_sm3(0.9, momentum_dtype=momentum_dtype, cover=full)
    values = np.float32(np.random.default_rng(0).normal(size=shape))
    mesh, params = on_two(values)
    sums, momentum, whole = (NamedSharding(mesh, spec) for spec in (*specs, P()))
    plain = untyped(tx.init(values))
    state = jax.device_put(plain, whole)
    state = state._replace(
        accumulators=jax.device_put(plain.accumulators, sums),
        momentum=jax.device_put(plain.momentum, momentum),
        scales=jax.device_put(plain.scales, momentum if shape[1:] else whole),
    )
    types = jax.tree.map(jax.typeof, state)
    for _ in range(2):
        got, state = jax.jit(tx.update)(params, state)
        want, plain = jax.jit(tx.update)(values, plain)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert jax.tree.map(jax.typeof, state) == types


MIXED = {
    "sgd_c": (functools.partial(memoptax.sgd_c, 0.1), ["slots", "total"]),
    "adam_c": (functools.partial(memoptax.adam_c, 0.1), []),
    "critical_momenta": (memoptax.critical_momenta, ["mu", "slots", "total"]),
    "adam_cm": (
        functools.partial(memoptax.scale_by_adam_cm, amsgrad=True),
        ["mu", "nu", "nu_max", "slots", "total"],
    ),
    "sm3_cm": (memoptax.scale_by_sm3_cm, ["mu", "accumulators", "slots", "total"]),
    "sm3": (functools.partial(memoptax.scale_by_sm3, 0.9), []),
}
INT8 = {"buffer_dtype": "int8", "mu_dtype": "int8"}
WAYS = [{"topc": 1}, {"topc": 2}, {"topc": 2, "holding": "sum"}]
MIXTURES = [
    (name, options, (field,))
    for name, (_, fields) in MIXED.items()
    for options in WAYS
    for field in fields
    if field != "total" or "holding" in options
]
# Numbers in int8 are divided along their last axis, and their scales along the first.
MIXTURES += [
    (name, options | INT8, fields)
    for name, own in {
        "adam_c": ("moment", "scales"),
        "adam_cm": ("mu", "mu_scales"),
        "sm3_cm": ("mu", "mu_scales"),
    }.items()
    for options in WAYS
    for first, scale in (own, ("slots", "scales"))
    for fields in ((first,), (scale,), (first, scale))
]
MIXTURES += [
    ("sm3", {"momentum_dtype": dtype, "cover": cover}, fields)
    for dtype in (None, "int8")
    for cover in (memoptax.covers.axes, memoptax.covers.rows)
    for fields in (
        ("momentum",),
        ("accumulators",),
        ("scales",),
        ("momentum", "scales"),
    )
    if dtype or "scales" not in fields
]


def with_divided(fields, state, mesh):
    """The state on a mesh, whole but for these fields."""

    def placed(path, x):
        names = {getattr(key, "name", None) for key in path}
        axes = [k for k, size in enumerate(x.shape) if size == 8]
        divided = axes and names & {*fields}
        spec = P(*[None] * axes[-1], "data") if divided else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, state)


@pytest.mark.parametrize(("name", "options", "fields"), MIXTURES)
@pytest.mark.few(12)
def test_some_fields_may_be_divided_unlike_the_others(name, options, fields):
    """As in optax.adam. Each field keeps its own sharding."""
    values = np.float32(np.random.default_rng(0).normal(size=(8, 8)))
    mesh, params = on_two(values)
    tx = MIXED[name][0](**options)
    plain = tx.init(values)
    state = with_divided(fields, plain, mesh)
    types = jax.tree.map(jax.typeof, state)
    for _ in range(2):
        got, state = jax.jit(tx.update)(params, state, params)
        want, plain = jax.jit(tx.update)(values, plain, values)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        now = jax.tree.map(jax.typeof, state)
        if name == "adam_c":  # optax gives its moments the sharding of the gradients
            assert now[0].buffer == types[0].buffer
        else:
            assert now == types
    memoptax.check_state(tx, params, state)
    if name != "sm3":
        stats = memoptax.buffer_stats(state)
        for name, value in memoptax.buffer_stats(plain).items():
            np.testing.assert_allclose(stats[name], value, rtol=1e-5)
        for topc in (1, 3):
            memoptax.resize_buffer(state, topc)


FIELDS_OF_SLOTS = [
    (topc, holding, field)
    for topc, holding in ((1, None), (2, None), (2, "sum"))
    for field in ("slots", "scales", "total", "slots and scales")
    if holding or field != "total"
]


@pytest.mark.parametrize(("topc", "holding", "field"), FIELDS_OF_SLOTS)
def test_one_field_of_a_buffer_may_be_on_no_mesh(topc, holding, field):
    """And so may the gradients, and a leaf may be empty."""
    values = np.float32(np.random.default_rng(0).normal(size=(8, 8)))
    params = {"matrix": values, "empty": np.zeros((0, 8), np.float32)}
    tx = memoptax.critical_gradients(topc, holding=holding, buffer_dtype="int8")
    mesh, _ = on_two({})

    def placed(path, x):
        axis = x.shape.index(8) if 8 in x.shape else None
        spec = P() if axis is None else P(*[None] * axis, "data")
        off = any(getattr(key, "name", "no name") in field for key in path)
        return np.asarray(x) if off else jax.device_put(x, NamedSharding(mesh, spec))

    plain = tx.init(params)
    state = jax.tree_util.tree_map_with_path(placed, plain)
    for _ in range(2):
        got, state = jax.jit(tx.update)(params, state)
        want, plain = jax.jit(tx.update)(params, plain)
        np.testing.assert_allclose(got["matrix"], want["matrix"], rtol=1e-5, atol=1e-6)


def spec_of(x):
    return jax.typeof(x).sharding.spec


IN_EACH_WAY = pytest.mark.parametrize(
    "make",
    [
        lambda: memoptax.sgd_c(0.1, topc=2),
        lambda: memoptax.adam_cm(0.1, topc=2, buffer_dtype="int8", mu_dtype="int8"),
        lambda: memoptax.adam_c(0.1, topc=2, holding="sum"),
        lambda: memoptax.sm3_cm(0.1, topc=1),
    ],
    ids=["read", "int8", "sum", "select"],
)


@IN_EACH_WAY
def test_a_state_restored_without_a_mesh_is_put_on_it(make):
    """As a state of optax is, in explicit mode."""
    values = np.float32(np.random.default_rng(0).normal(size=(8, 4)))
    mesh, params = on_two(values)
    tx = make()
    with jax.set_mesh(mesh):
        state = jax.tree.map(np.asarray, tx.init(params))
        plain = tx.init(values)
        for _ in range(3):
            got, state = jax.jit(tx.update)(params, state, params)
            want, plain = jax.jit(tx.update)(values, plain, values)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        memoptax.check_state(tx, params, state)
    # An eager step needs no jax.set_mesh.
    state = jax.tree.map(np.asarray, state)
    got, _ = tx.update(params, state, params)
    want, _ = jax.jit(tx.update)(params, state, params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@IN_EACH_WAY
def test_gradients_on_no_mesh_are_taken(make):
    """As optax takes them, in explicit mode."""
    values = np.float32(np.random.default_rng(0).normal(size=(8, 4)))
    (_, params), tx = on_two(values), make()
    states = dict.fromkeys((np.asarray, jnp.asarray), tx.init(params))
    plain = tx.init(values)
    for step in (tx.update, jax.jit(tx.update), tx.update):
        want, plain = jax.jit(tx.update)(values, plain, values)
        for kind, state in states.items():
            got, states[kind] = step(kind(values), state, params)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
            assert jax.tree.map(spec_of, states[kind]) == jax.tree.map(spec_of, state)


@pytest.mark.parametrize(
    "tx", [memoptax.sgd_c(0.1, topc=1), memoptax.sm3(0.1)], ids=["sgd_c", "sm3"]
)
def test_gradients_on_no_mesh_may_be_batched(tx):
    _, params = on_two(jnp.ones((8, 4)))
    state = tx.init(params)
    updates = jax.vmap(lambda g: tx.update(g, state, params)[0])(np.ones((3, 8, 4)))
    one, _ = tx.update(jnp.ones((8, 4)), state, params)
    np.testing.assert_allclose(updates, np.stack([one] * 3), rtol=1e-6)


@pytest.mark.parametrize("topc", [1, 2])
def test_a_state_is_checked_outside_of_its_mesh(topc):
    _, params = on_two({"w": jnp.ones((8, 8)), "b": jnp.ones(8)})
    tx = memoptax.sgd_c(0.1, topc=topc)
    state = tx.update(params, tx.init(params), params)[1]
    memoptax.check_state(tx, params, state)


@pytest.mark.parametrize(
    "tx",
    [
        memoptax.sgd_c(0.1, topc=1),
        memoptax.adam_c(0.1, topc=2, buffer_dtype="int8"),
        memoptax.sgd_cm(0.1, topc=2, holding="sum"),
        memoptax.sm3_cm(0.1, topc=2, holding="sum", buffer_dtype="int8"),
        memoptax.sgd_c(0.1, momentum=0.9, dampening=0.1, topc=2),
        memoptax.adam_cm(0.1, topc=2, synced=False, skip_first=True),
        memoptax.adam_c(0.1, topc=2, amsgrad=True),
    ],
    ids=[
        "one slot",
        "read",
        "sum",
        "sum in int8",
        "dampening",
        "skip_first",
        "amsgrad",
    ],
)
@pytest.mark.parametrize("spec", [P("data"), P("data", None, "model")], ids=repr)
def test_a_divided_ensemble_needs_no_set_mesh(tx, spec):
    """Its arrays know their mesh. So does one without numbers."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    over = NamedSharding(mesh, P("data"))
    params = {"w": jnp.arange(96.0).reshape(8, 3, 4), "empty": jnp.zeros((8, 0))}
    state, step = jax.vmap(tx.init)(params), jax.jit(jax.vmap(tx.update))
    place = {"w": NamedSharding(mesh, spec), "empty": over}
    divided_params = jax.device_put(params, place)
    with jax.set_mesh(mesh):
        divided = jax.vmap(tx.init)(divided_params)
    for _ in range(3):
        want, state = step(params, state, params)
        found, divided = step(divided_params, divided, divided_params)
        np.testing.assert_allclose(found["w"], want["w"], rtol=1e-6)
    eager, _ = jax.vmap(tx.update)(divided_params, divided, divided_params)
    want, _ = step(params, state, params)
    np.testing.assert_allclose(eager["w"], want["w"], rtol=1e-6)
    found, want = map(memoptax.buffer_stats, (divided, state))
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    empty = memoptax.reset_buffer(divided)
    assert not memoptax.buffer_stats(empty)["fill"].any()
    for holding in (None, "sum"):
        resized = memoptax.resize_buffer(divided, 3, holding=holding)
        assert (memoptax.buffer_stats(resized)["fill"] == want["fill"]).all()
    updates, _ = step(divided_params, empty, divided_params)
    assert updates["empty"].sharding.is_equivalent_to(over, 2)


def test_a_choice_among_arrays_on_a_mesh_of_one_device_and_off_it():
    """The type of one that was moved to the device still names the mesh."""
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Explicit,))

    def placed(x):
        there = jax.device_put(x, NamedSharding(mesh, P("data")))
        return jnp.asarray(x), there, jax.device_put(there, jax.devices()[0])

    one, two = np.arange(8.0, dtype=np.float32), np.ones(8, np.float32)
    for condition, new, old in itertools.product(*map(placed, (one > 3, one, two))):
        chosen = layout.where(condition, new, old)
        np.testing.assert_array_equal(chosen, np.where(one > 3, one, two))
