"""Flax, Equinox and Haiku: our optimizers take their parameters with metadata."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

from meshes import trimmed
from untyped import untyped

pytestmark = [pytest.mark.slow, pytest.mark.few(1)]

BUFFER = {"topc": 3, "decay": 0.9}
OPTIMIZERS = {
    "sgd_c": functools.partial(memoptax.sgd_c, 0.01, momentum=0.9, **BUFFER),
    "adam_c": functools.partial(memoptax.adam_c, 0.01, amsgrad=True, **BUFFER),
    "adam_cm": functools.partial(
        memoptax.adam_cm, 0.01, synced=False, buffer_dtype="int8", **BUFFER
    ),
    "sm3": functools.partial(memoptax.sm3, 0.1, momentum=0.9, momentum_dtype="int8"),
    # Three blocks of columns, which two devices do not divide.
    "blocks": functools.partial(memoptax.sm3, 0.1, cover=memoptax.covers.blocks(1, 3)),
}
one_of_each_kind = pytest.mark.parametrize("name", ["adam_cm", "sm3"])
X = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
Y = np.tanh(X @ np.ones((8, 4), np.float32))


# --- Linen ----------------------------------------------------------------------------


def linen_model(partition=None):
    def initializer(init, *names):
        return init if partition is None else partition(init, names)

    return nn.Sequential(
        [
            nn.Dense(
                8,
                kernel_init=initializer(nn.initializers.lecun_normal(), "in", "out"),
                bias_init=initializer(nn.initializers.zeros, "out"),
            ),
            nn.tanh,
            nn.Dense(4),
        ]
    )


RULES = (("in", "data"), ("out", "model"))


def on_mesh(init, names):
    return nn.with_partitioning(init, tuple(dict(RULES)[name] for name in names))


def linen_state(name, partition):
    model = linen_model(partition)
    return train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), X)["params"],
        tx=OPTIMIZERS[name](),
    )


@functools.cache
def linen_losses_alone(name):
    state, losses, step = linen_state(name, None), [], jax.jit(linen_step)
    for _ in range(4):
        state, loss = step(state)
        losses.append(float(loss))
    return losses


def linen_step(state):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


@pytest.mark.parametrize(
    ("name", "partition"),
    [
        ("sm3", on_mesh),
        ("adam_cm", nn.with_logical_partitioning),
    ],
)
def test_linen_boxes_lie_on_the_mesh_as_the_parameters_do(name, partition, mesh):
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        init = functools.partial(linen_state, name, partition)
        specs = nn.get_partition_spec(jax.eval_shape(init))
        if partition is not on_mesh:
            # Flax does not mark it as exported.
            specs = untyped(nn).logical_to_mesh(specs, RULES)
        to_mesh = functools.partial(NamedSharding, mesh)
        shardings = jax.tree.map(to_mesh, specs, is_leaf=lambda s: isinstance(s, P))
        state = jax.jit(init, out_shardings=shardings)()
        step = jax.jit(linen_step, donate_argnums=0, out_shardings=(shardings, None))
        for expected in linen_losses_alone(name):
            state, loss = step(state)
            np.testing.assert_allclose(loss, expected, rtol=2e-4)
    born = jax.tree.structure(jax.eval_shape(init).opt_state)
    assert jax.tree.structure(state.opt_state) == born
    jax.tree.map(
        lambda x, spec: np.testing.assert_equal(
            x.sharding.is_equivalent_to(to_mesh(spec), x.ndim), True
        ),
        nn.unbox(state),
        specs,
    )
    kernel = specs.params["layers_0"]["kernel"]
    assert kernel == P("data", "model")
    if name == "sm3":
        of_sm3 = specs.opt_state[0]
        assert of_sm3.accumulators[0] == (P("model"),)
        assert of_sm3.accumulators[1] == (P("data", None), P(None, "model"))
        assert of_sm3.scales[1] == P("data", None)
        assert of_sm3.momentum["layers_0"]["kernel"] == kernel
        return
    (buffer,) = buffers(specs.opt_state)
    assert buffer.slots["layers_0"]["kernel"] == P(None, "data", "model")
    assert buffer.keys == P()
    if name == "adam_cm":
        assert buffer.scales[1] == P(None, "data", None)
    stats = memoptax.buffer_stats(state.opt_state)
    assert stats["fill"] == 3
    larger = memoptax.resize_buffer(state.opt_state, 5)
    names = buffers(larger)[0].slots["layers_0"]["kernel"].names
    assert names[0] is None and len(names) == 3


def buffers(state):
    return [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "keys"))
        if type(node).__name__ == "Buffer"
    ]


# --- nnx ------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, named):
        def initializer(init, *names):
            return nnx.with_partitioning(init, names) if named else init

        self.hidden = nnx.Linear(
            8,
            8,
            rngs=nnx.Rngs(0),
            kernel_init=initializer(nnx.initializers.lecun_normal(), "data", "model"),
            bias_init=initializer(nnx.initializers.zeros, "model"),
        )
        self.out = nnx.Linear(8, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def nnx_step(model, optimizer):
    def loss(model):
        return jnp.mean((model(X) - Y) ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def nnx_made(name, named):
    model = Model(named)
    return model, nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)


@pytest.mark.skipif(not hasattr(nnx, "var_defaults"), reason="Flax has no hijax mode")
@one_of_each_kind
def test_init_takes_variables_that_are_their_own_leaves(name):
    """In nnx's hijax mode. They have the methods of a box, and hold no other array."""
    with nnx.var_defaults(hijax=True), jax.set_mesh(jax.make_mesh((8,), ("data",))):
        names = {"out_sharding": ("data", None)}
        kernel = nnx.Linear(8, 4, rngs=nnx.Rngs(0), kernel_metadata=names).kernel
        found = OPTIMIZERS[name]().init({"kernel": kernel})
    want = OPTIMIZERS[name]().init({"kernel": jnp.zeros((8, 4))})
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, want)


@functools.cache
def nnx_losses_alone(name):
    return nnx_losses(nnx_made(name, named=False))


def nnx_losses(made, steps=4):
    step = nnx.jit(nnx_step)
    return [float(step(*made)) for _ in range(steps)]


@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.parametrize(
    ("name", "kind", "jitted"),
    [
        ("adam_c", AxisType.Auto, False),
        ("sgd_c", AxisType.Explicit, False),
        ("adam_cm", AxisType.Explicit, True),
        ("sm3", AxisType.Auto, True),
    ],
)
def test_nnx_optimizers_take_the_names_of_the_variables(name, kind, jitted):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    make = nnx.jit(nnx_made, static_argnums=(0, 1)) if jitted else nnx_made
    with jax.set_mesh(mesh):
        model, optimizer = make(name, True)
        made = [trimmed(x.sharding.spec) for x in of_kernel(name, optimizer.opt_state)]
        losses = nnx_losses((model, optimizer))
    np.testing.assert_allclose(losses, nnx_losses_alone(name), rtol=2e-4)
    after = [trimmed(x.sharding.spec) for x in of_kernel(name, optimizer.opt_state)]
    assert trimmed(model.hidden.kernel.sharding.spec) == P("data", "model")
    if name == "sm3":
        expected = [P("data", "model"), P("data"), P(None, "model"), P("data")]
    else:
        expected = [P(None, "data", "model"), P()]
    assert made == expected
    assert after == expected


def only_kernels(params):
    def name_of(path, _):
        return "kernel" if "kernel" in jax.tree_util.keystr(path) else "other"

    return jax.tree.map_with_path(name_of, params)


@pytest.mark.parametrize("name", ["adam_c", "adam_cm", "sm3"])
def test_the_state_of_groups_in_nnx_is_checked(name):
    """Parameters of another group leave empty variables, of two types."""
    model, _ = nnx_made(name, named=False)
    parts = {"kernel": OPTIMIZERS[name](), "other": optax.sgd(0.1)}
    tx = optax.partition(untyped(parts), only_kernels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx_step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    memoptax.check_state(tx, params, optimizer.opt_state)
    if name != "sm3":
        memoptax.check_state(tx, params, memoptax.reset_buffer(optimizer.opt_state))


@pytest.mark.parametrize("name", ["sgd_c", "adam_cm"])
def test_a_boxed_axis_may_be_symbolic(name):
    shape = (*jax.export.symbolic_shape("b"), 4)
    params = nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), ("data", "model"))
    init = jax.jit(lambda params: jax.tree.leaves(OPTIMIZERS[name]().init(params)))
    jax.export.export(init)(untyped(params))


@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_axis_of_blocks_has_no_name(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        made = nnx_made("blocks", True)
        losses = nnx_losses(made)
    np.testing.assert_allclose(losses, nnx_losses_alone("blocks"), rtol=2e-4)
    (accumulators,) = made[1].opt_state[0].accumulators[1]
    assert trimmed(accumulators.get_value().sharding.spec) == P("data")
    params = linen_model(on_mesh).init(jax.random.key(0), X)
    init = OPTIMIZERS["blocks"]().init
    specs = nn.get_partition_spec(jax.eval_shape(init, params))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    jax.jit(init, out_shardings=shardings)(params)


def of_kernel(name, opt_state):
    """The state of the sharded kernel, and keys, which are not sharded."""
    if name == "sm3":
        state = opt_state[0]
        found = (
            state.momentum["hidden"]["kernel"],
            *state.accumulators[1],
            state.scales[1],
        )
    else:
        (buffer,) = buffers(opt_state)
        found = buffer.slots["hidden"]["kernel"], buffer.keys
    return [x.get_value() for x in found]


@pytest.mark.long
def test_the_names_of_an_nnx_model_stay_its_own(mesh):
    with jax.set_mesh(mesh):
        model, optimizer = nnx_made("adam_c", named=True)
        assert model.hidden.kernel.get_metadata("out_sharding") == ("data", "model")
        nnx_losses((model, optimizer), steps=1)
        assert memoptax.buffer_stats(optimizer.opt_state)["fill"] == 1
        larger = memoptax.resize_buffer(optimizer.opt_state, 5)
        assert buffers(larger)[0].slots["hidden"]["kernel"].shape == (6, 8, 8)


# --- Equinox, Haiku -------------------------------------------------------------------


@one_of_each_kind
def test_equinox_modules(name):
    model = eqx.nn.MLP(8, 4, 8, 1, key=jax.random.key(0))
    tx = OPTIMIZERS[name]()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def step(model, state):
        def loss(model):
            return jnp.mean((jax.vmap(model)(X) - Y) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, arrays)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(8):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


@one_of_each_kind
def test_nested_dicts_as_haiku_makes_them(name):
    params = {"mlp/~/linear_0": {"w": jnp.ones((8, 4)) / 8, "b": jnp.zeros(4)}}
    tx = OPTIMIZERS[name]()

    @jax.jit
    def step(params, state):
        def loss(params):
            layer = params["mlp/~/linear_0"]
            return jnp.mean((X @ layer["w"] + layer["b"] - Y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(8):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]


def by_the_last_name(path, leaf):
    named = jax.tree_util.keystr(path).endswith(("['e']", "['embedding']"))
    return (memoptax.covers.rows if named else memoptax.covers.axes)(path, leaf)


BOXED_TABLES = {
    "linen": lambda: {"e": nn.Partitioned(jnp.ones((6, 3)), ("rows", None))},
    "nnx": lambda: nnx.state(nnx.Embed(6, 3, rngs=nnx.Rngs(0)), nnx.Param),
}
BY_ROWS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "momentum in int8": {"momentum": 0.9, "momentum_dtype": "int8"},
    "weight decay": {"weight_decay": 0.1},
    "a cover by name": {"cover": by_the_last_name},
}


HALF_BOXED = {
    "linen": lambda: {
        "w": nn.Partitioned(jnp.ones((4, 3)), ("rows", None)),
        "b": nn.Partitioned(jnp.ones(3), (None,)),
    },
    "nnx": lambda: nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param),
}


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
@pytest.mark.parametrize("kind", HALF_BOXED)
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(memoptax.sgd_c, 0.1),
        functools.partial(memoptax.adam_c, 0.1, fifo_probability=0.5),
        functools.partial(
            memoptax.adam_cm, 0.1, synced=False, buffer_dtype="int8", holding="sum"
        ),
    ],
    ids=["sgd_c", "adam_c", "adam_cm"],
)
def test_boxes_that_a_mask_has_emptied_stay_in_the_buffer(make, kind, wrapper):
    params = HALF_BOXED[kind]()

    def matrices(tree):
        return jax.tree.map(lambda p: p.ndim > 1, tree)

    def wrapped(topc):
        if wrapper == "masked":
            return optax.masked(make(topc=topc), matrices)
        others = {True: make(topc=topc), False: optax.adam(0.1)}
        return optax.partition(untyped(others), matrices)

    for topc in (1, 4):
        tx = wrapped(topc)
        _, state = tx.update(params, tx.init(params), params)
        same = memoptax.reset_buffer(state)
        assert jax.tree.structure(same) == jax.tree.structure(state)
        assert jax.tree.structure(same) == jax.tree.structure(tx.init(params))
        for other in (1, 3, 5):
            asked, way = wrapped(other), make.keywords.get("holding")
            larger = memoptax.resize_buffer(state, other, holding=way)
            asked_for = jax.tree.structure(jax.eval_shape(asked.init, params))
            assert jax.tree.structure(larger) == asked_for
            memoptax.check_state(asked, params, larger)
            asked.update(params, larger, params)


@pytest.mark.parametrize("options", BY_ROWS)
@pytest.mark.parametrize("kind", BOXED_TABLES)
def test_row_sparse_gradients_may_be_in_boxes(kind, options):
    boxed = BOXED_TABLES[kind]()
    (table,) = jax.tree.leaves(boxed)

    def loss(rows):
        return jnp.sum(jax.tree.leaves(rows)[0] ** 3)

    tx = untyped(
        memoptax.sm3(0.1, **{"cover": memoptax.covers.rows} | BY_ROWS[options])
    )
    ids = jnp.array([1, 1, 4])
    found, expected = boxed, {"e": table}
    state, bare_state = tx.init(found), tx.init(expected)
    before = jax.tree.structure(state)
    for _ in range(2):
        look_up = memoptax.sparse.row_value_and_grad
        gradient = look_up(loss, found, jax.tree.map(lambda _: ids, found))[1]
        updates, state = tx.update(gradient, state, found)
        found = untyped(memoptax.sparse.apply_updates(found, updates))
        gradient = look_up(loss, expected, {"e": ids})[1]
        updates, bare_state = tx.update(gradient, bare_state, expected)
        expected = memoptax.sparse.apply_updates(expected, updates)
    assert jax.tree.structure(state) == before
    assert jax.tree.structure(found) == jax.tree.structure(boxed)
    np.testing.assert_array_equal(*jax.tree.leaves([found, expected]))
    moved = np.any(jax.tree.leaves(found)[0] != table, axis=1)
    np.testing.assert_array_equal(moved, [False, True, False, False, True, False])


@pytest.mark.parametrize(
    "tx",
    [
        memoptax.sm3(0.1),
        memoptax.sgd_c(0.1, topc=2, buffer_dtype="int8"),
        memoptax.adam_cm(0.1, mu_dtype="int8"),
    ],
    ids=["sm3", "sgd_c", "adam_cm"],
)
def test_a_report_has_the_names_of_fields_and_not_of_boxes(tx):
    boxed = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param)
    partitioned = {"w": nn.Partitioned(jnp.ones((6, 4)), (None, "d")), "b": jnp.ones(3)}
    for params, bare in (
        (boxed, nnx.to_pure_dict(boxed)),
        (partitioned, nn.unbox(partitioned)),
    ):
        found = memoptax.memory_report(tx, params).fields
        assert found == memoptax.memory_report(tx, bare).fields
