"""On eight devices: where the state lies, what a step sends, that nothing changes."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax
from memoptax import _sharding

from compiled import compile_step, step_of, train

pytestmark = [pytest.mark.cpu_only("a mesh of eight devices"), pytest.mark.few(1)]

SHAPES = {"matrix": (16, 32), "vector": (16,), "kernel": (2, 2, 16, 32), "scalar": ()}
BOTH = ("data", "model")
LAYOUTS = {
    "fsdp": {
        "matrix": P(BOTH),
        "vector": P(BOTH),
        "kernel": P(None, None, BOTH),
        "scalar": P(),
    },
    "tensor parallel": {
        "matrix": P(None, BOTH),
        "vector": P(BOTH),
        "kernel": P(None, None, None, BOTH),
        "scalar": P(),
    },
    "mixed": {
        "matrix": P("data", "model"),
        "vector": P("model"),
        "kernel": P(None, None, "model", "data"),
        "scalar": P(),
    },
}


def by_rank(params):
    return jax.tree.map(lambda p: "high" if p.ndim > 1 else "low", params)


def only_matrices(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


BUFFER = {"topc": 2, "decay": 0.9}
INT8 = {"momentum": 0.9, "momentum_dtype": "int8"}
OPTIMIZERS = {
    "sgd_c": lambda: memoptax.sgd_c(0.01, momentum=0.9, **BUFFER),
    "adam_c": lambda: memoptax.adam_c(0.01, amsgrad=True, synced=False, **BUFFER),
    "adam_cm": lambda: memoptax.adam_cm(0.01, **BUFFER),
    "sm3_cm": lambda: memoptax.sm3_cm(0.01, **BUFFER),
    "sm3": lambda: memoptax.sm3(0.1, **INT8),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        memoptax.adamw_c, static_args="topc"
    )(0.01, **BUFFER),
    "MultiSteps": lambda: optax.MultiSteps(memoptax.sgd_c(0.01, **BUFFER), 2),
    "masked": lambda: optax.chain(
        optax.masked(memoptax.critical_gradients(**BUFFER), only_matrices),
        optax.clip_by_global_norm(1.0),
        optax.adam(0.01),
    ),
    "partition": lambda: optax.partition(
        {"high": memoptax.sm3(0.1), "low": memoptax.adam_cm(0.01, **BUFFER)}, by_rank
    ),
}


def values(steps=None):
    rng = np.random.default_rng(0)
    lead = () if steps is None else (steps,)
    return {
        name: rng.standard_normal((*lead, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values())


def placed(tree, mesh, specs, *lead):
    return {
        name: jax.device_put(x, NamedSharding(mesh, P(*lead, *specs[name])))
        for name, x in tree.items()
    }


def mesh_of(kind):
    return jax.make_mesh((4, 2), BOTH, axis_types=(kind,) * 2)


def assert_lies_as(shardings, state):
    for (path, x), wanted in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(shardings), strict=True
    ):
        same = x.sharding.is_equivalent_to(wanted, x.ndim)
        assert same, (jax.tree_util.keystr(path), x.sharding, wanted)


# --- specs ----------------------------------------------------------------------------


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
    # What is large is sharded, whoever made it.
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
    with pytest.raises(ValueError, match="params must lie on one mesh, but lie on 0"):
        memoptax.state_shardings(tx, jnp.zeros(8))
    other = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
    two = [
        jax.device_put(jnp.zeros(8), NamedSharding(m, P(m.axis_names[0])))
        for m in (mesh, other)
    ]
    with pytest.raises(ValueError, match="lie on 2"):
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


# --- where the state lies -------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["sgd_c", "adam_cm", "sm3", "sm3_cm", "partition"])
def test_init_follows_the_parameters(name, kind):
    """Eagerly, and jitted in explicit mode; in automatic mode it must be told."""
    tx, mesh = OPTIMIZERS[name](), mesh_of(kind)
    with jax.set_mesh(mesh):
        params = placed(values(), mesh, LAYOUTS["mixed"])
        shardings = memoptax.state_shardings(tx, params)
        explicit = kind is AxisType.Explicit
        jitted = jax.jit(tx.init, out_shardings=None if explicit else shardings)
        assert_lies_as(shardings, jitted(params))
        eager = tx.init(params)
    alone, everywhere = jax.devices()[0], NamedSharding(mesh, P())
    # Eagerly, what has no parameter to follow lies on one device.
    assert_lies_as(
        shardings,
        jax.tree.map(
            lambda x: jax.device_put(x, everywhere) if x.devices() == {alone} else x,
            eager,
        ),
    )


@pytest.mark.parametrize(
    ("name", "layout"), [("sgd_c", "fsdp"), ("adam_cm", "tensor parallel")]
)
def test_a_device_holds_an_eighth(name, layout, mesh):
    tx = OPTIMIZERS[name]()
    params = placed(values(), mesh, LAYOUTS[layout])
    init = jax.jit(tx.init, out_shardings=memoptax.state_shardings(tx, params))
    large = small = held = 0
    for x in jax.tree.leaves(init(params)):
        held += x.addressable_shards[0].data.nbytes
        if x.nbytes >= 64:  # a moment of the vector is the least of the large
            large += x.nbytes
        else:
            small += x.nbytes
    of_params = 4 * sum(math.prod(s) for s in SHAPES.values() if s)
    copies = 3 + 1  # C and a spare, and a moment; adam_cm has one more
    assert large >= (copies if name == "sgd_c" else copies + 1) * of_params
    assert held == large / 8 + small
    assert small < 600


def test_nothing_else_is_on_every_device_with_sm3(mesh):
    tx = memoptax.sm3(0.1)
    x = jax.device_put(jnp.zeros((64, 32)), NamedSharding(mesh, P("data", "model")))
    state = tx.init(x)[0]
    held = [a.addressable_shards[0].data.size for a in state.accumulators[0]]
    assert held == [64 // 4, 32 // 2]


# --- what a step does -----------------------------------------------------------------

STEPS = [(name, "mixed") for name in OPTIMIZERS if name not in ("sgd_c", "adam_cm")]
STEPS += [("sgd_c", "fsdp"), ("adam_cm", "tensor parallel"), ("sm3", "fsdp")]
FEW = ("matrix", "vector", "scalar")


def few(tree):
    """Fewer leaves, which compile sooner."""
    return {name: tree[name] for name in FEW}


@functools.cache
def alone(name):
    tx = OPTIMIZERS[name]()
    trajectory, _ = jax.jit(functools.partial(train, tx))(few(values()), few(values(4)))
    return trajectory


@pytest.mark.parametrize(("name", "layout"), STEPS)
def test_a_mesh_changes_nothing_and_costs_scalars(name, layout, mesh):
    tx, specs = OPTIMIZERS[name](), LAYOUTS[layout]
    params, stream = placed(few(values()), mesh, specs), few(values(4))
    shardings = memoptax.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    gradients = placed(jax.tree.map(lambda x: x[0], stream), mesh, specs)
    compiled = compile_step(step_of(tx), params, state, gradients)
    for i in range(4):
        gradients = placed(jax.tree.map(lambda x, i=i: x[i], stream), mesh, specs)
        params, state = compiled(params, state, gradients)
        for key, expected in alone(name).items():
            np.testing.assert_allclose(params[key], expected[i], atol=2e-5, rtol=1e-5)
    assert_lies_as(shardings, state)
    text = compiled.as_text()
    for forbidden in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {forbidden}(" not in text, forbidden
    # Norms, one for each leaf; SM3's accumulators too, of up to 32 numbers.
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n)
        for line in re.findall(r"= (.*) all-reduce\(", text)
        for shape in re.findall(r"\[([\d,]*)\]", line)
    ]
    assert sizes and max(sizes) <= (
        128 if name in ("sm3", "sm3_cm", "partition") else len(SHAPES)
    )


# --- inside shard_map -----------------------------------------------------------------

SPECS = {"matrix": P("data", "model"), "vector": P("model"), "scalar": P()}


def momentum(**options):
    """A function from a ``priority_fn`` to an optimizer with a buffer."""
    return functools.partial(memoptax.sgd_c, 0.1, 0.9, **BUFFER, **options)


PLAIN = momentum()


def on_eight(
    make, axes, mesh, stream, check_vma=True, specs=SPECS, rule=None, of_state=None
):
    """Trajectory and state of a run inside shard_map."""
    tx, params = make(priority_fn=memoptax.sharded_norm(axes, rule)), few(values())
    of_state = of_state or memoptax.state_partition_specs
    along = {name: P(None, *spec) for name, spec in specs.items()}
    sharded = jax.shard_map(
        functools.partial(train, tx),
        mesh=mesh,
        in_specs=(specs, along),
        out_specs=(along, of_state(tx, params, specs)),
        check_vma=check_vma,
    )
    return jax.jit(sharded)(params, stream)


def on_one(make, stream):
    return jax.jit(functools.partial(train, make()))(few(values()), stream)


@functools.cache
def plain_on_one():
    return on_one(PLAIN, few(values(8)))


def assert_equal_everywhere(single, sharded):
    """The same numbers, and on all devices that hold a copy of them."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        single,
        sharded,
    )
    for path, array in jax.tree.leaves_with_path(sharded):
        copies = {}
        for shard in array.addressable_shards:
            data = np.asarray(shard.data)
            first = copies.setdefault(str(shard.index), data)
            np.testing.assert_array_equal(first, data, jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("axes", "check_vma"),
    [
        (SPECS, True),
        (SPECS, False),
        ("auto", True),
        (BOTH, True),  # over more than some leaves vary, which JAX knows
        ({"matrix": BOTH, "vector": "model", "scalar": None}, False),
    ],
)
def test_every_device_decides_as_one_would(axes, check_vma, mesh):
    sharded = on_eight(PLAIN, axes, mesh, few(values(8)), check_vma)
    assert_equal_everywhere(plain_on_one(), sharded)


def test_so_with_rows_of_keys_and_draws(mesh):
    make, stream = momentum(synced=False, fifo_probability=0.5), few(values(8))
    sharded = on_eight(make, SPECS, mesh, stream)
    assert_equal_everywhere(on_one(make, stream), sharded)


def spoiled(value):
    """A stream with this ``value`` in one place of two gradients, on one device."""
    stream = few(values(8))
    for step in (3, 5):
        stream["matrix"][step, 1, 2] = value
    return stream


@pytest.mark.parametrize(
    "factory", [memoptax.critical_gradients, memoptax.scale_by_adam_cm]
)
def test_what_is_not_finite_on_one_device_is_refused_on_all(factory, mesh):
    numbers = optax.stateless(lambda u, p: jax.tree.map(jnp.nan_to_num, u))

    def guarded(priority_fn=None):
        tx = factory(priority_fn=priority_fn, **BUFFER)
        return optax.chain(tx, numbers, optax.scale(-0.01))

    stream = spoiled(np.nan)
    sharded = on_eight(guarded, SPECS, mesh, stream)
    assert_equal_everywhere(on_one(guarded, stream), sharded)
    assert memoptax.buffer_stats(sharded[1])["fill"] == 2
    assert sharded[1][0].buffer.offered == 6


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_slots_of_few_bytes_are_bounded_as_one_device_would(dtype, check_vma, mesh):
    """The norms and the error of a sum, and so its rebuilds, are of whole leaves."""
    # Small, so that what float16 loses of every element shows in the norms.
    stream = jax.tree.map(lambda x: 1e-7 * x, few(values(8)))
    make = momentum(buffer_dtype=dtype)
    rows = {"matrix": P("data"), "vector": P(), "scalar": P()}
    sharded = on_eight(make, rows, mesh, stream, check_vma=check_vma, specs=rows)
    assert_equal_everywhere(on_one(make, stream), sharded)


def test_what_overflows_in_storage_on_one_device_is_refused_on_all(mesh):
    make, stream = momentum(buffer_dtype="float16"), spoiled(1e5)
    _, (state, _) = on_eight(make, SPECS, mesh, stream)
    assert state.buffer.offered == 6
    expected = on_one(make, stream)[1][0].buffer.keys
    np.testing.assert_allclose(state.buffer.keys, expected, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in state.buffer.slots.values())


def largest_entry(gradients):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in gradients.values()]))


def test_a_rule_of_ones_own_decides_alike_if_it_asks_all_devices(mesh):
    stream, make = few(values(8)), momentum(priority_fn=largest_entry)
    single = on_one(make, stream)

    def asks_all(gradients):
        return jax.lax.pmax(largest_entry(gradients), BOTH)

    for check_vma in (True, False):
        sharded = on_eight(PLAIN, SPECS, mesh, stream, check_vma, rule=asks_all)
        assert_equal_everywhere(single, sharded)
    # One that does not ask lets each device keep what it likes.
    sharded = on_eight(PLAIN, SPECS, mesh, stream, False, rule=largest_entry)
    with pytest.raises(AssertionError):
        assert_equal_everywhere(single, sharded)


# Rows of int8 that a device sees a part of:

SPLIT = {
    "buffer_dtype": momentum(buffer_dtype="int8"),
    "mu_dtype": functools.partial(memoptax.adam_cm, 0.1, mu_dtype="int8", **BUFFER),
    "mu_dtype of sgd": functools.partial(memoptax.sgd_cm, 0.1, mu_dtype="int8"),
}


@pytest.mark.parametrize("make", SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize(
    ("axes", "check_vma", "message"),
    [
        (SPECS, True, r"P.*for a leaf in int8, which divides its last axis over 2"),
        (SPECS, False, r"P.*for a leaf in int8, which divides its last axis over 2"),
        ("auto", True, r"scales\[0\] is P.* could not infer replication"),  # by JAX
    ],
)
def test_the_parts_of_a_row_in_int8_are_not_passed_for_it(
    make, axes, check_vma, message, mesh
):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        on_eight(make, axes, mesh, few(values(8)), check_vma)


def test_parts_of_a_row_in_int8_may_be_kept_as_what_they_are(mesh):
    """With scales of every device, in a state that says so."""
    names = {"matrix": BOTH, "vector": "model", "scalar": None}
    make, stream = SPLIT["buffer_dtype"], few(values(8))

    def of_state(*arguments):
        state, *rest = memoptax.state_partition_specs(*arguments)
        scales = (P(None, "data", "model"), P(), P(None, "model"))
        return state._replace(buffer=state.buffer._replace(scales=scales)), *rest

    trajectory, (state, _) = on_eight(
        make, names, mesh, stream, check_vma=False, of_state=of_state
    )
    assert [s.shape for s in state.buffer.scales] == [(3, 16, 2), (3,), (3, 2)]
    rows = np.asarray(state.buffer.slots["matrix"]).reshape(3, 16, 2, 16)
    assert np.all(np.abs(rows).max(axis=-1) == 127)
    exact, _ = plain_on_one()
    for name in FEW:
        np.testing.assert_allclose(trajectory[name], exact[name], atol=0.05)


def test_an_axis_of_one_device_divides_no_row():
    mesh = jax.make_mesh((8, 1), BOTH, axis_types=(AxisType.Auto,) * 2)
    specs = {"matrix": P("data", "model"), "vector": P("model"), "scalar": P()}
    make, stream = SPLIT["buffer_dtype"], few(values(8))
    sharded = on_eight(make, specs, mesh, stream, specs=specs, check_vma=False)
    assert_equal_everywhere(on_one(make, stream), sharded)


def test_an_axis_left_to_the_compiler_divides_no_row(mesh):
    specs = {"w": P("data", "model")}
    tx = memoptax.sgd_c(
        0.1, buffer_dtype="int8", priority_fn=memoptax.sharded_norm(specs)
    )
    g = {"w": jnp.asarray(values()["matrix"], jnp.float32)}

    def two_steps(g):
        state = tx.init(g)
        _, state = tx.update(g, state)
        return tx.update(g, state)[0]

    by_rows = {"w": P("data")}
    sharded = jax.shard_map(
        two_steps,
        mesh=mesh,
        in_specs=(by_rows,),
        out_specs=by_rows,
        axis_names={"data"},
    )
    np.testing.assert_allclose(jax.jit(sharded)(g)["w"], two_steps(g)["w"], rtol=1e-5)


def test_sharded_norm_is_the_norm(mesh):
    gradients = few(values())
    expected = sum(np.linalg.norm(g) for g in gradients.values())
    for axes, check_vma in ((SPECS, False), ("auto", True)):
        norm = jax.shard_map(
            memoptax.sharded_norm(axes),
            mesh=mesh,
            in_specs=(SPECS,),
            out_specs=P(),
            check_vma=check_vma,
        )
        np.testing.assert_allclose(norm(gradients), expected, rtol=1e-6)
    np.testing.assert_allclose(
        memoptax.sharded_norm("auto")(gradients), expected, rtol=1e-6
    )
    assert memoptax.sharded_norm("auto")({"none": None}) == 0


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("auto", "which it does not know under check_vma=False: name the axes"),
        ({"matrix": BOTH}, "axes for 1 leaves, but the gradients have 3"),
    ],
)
def test_axes_that_cannot_be_right_are_refused(axes, message, mesh):
    with pytest.raises(ValueError, match=message):
        on_eight(PLAIN, axes, mesh, few(values(8)), check_vma=False)


def test_a_rule_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match="rule must be a function, but is 'max'"):
        memoptax.sharded_norm("auto", "max")


# --- slots in the host's memory -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd_c", "adam_cm"])
@pytest.mark.long
def test_slots_may_lie_in_the_memory_of_the_host(name, mesh):
    """The numbers stay, and a step still copies no buffer, on the device or to it."""
    make = {"sgd_c": memoptax.sgd_c, "adam_cm": memoptax.adam_cm}[name]
    tx, specs = make(0.01, holding="sum", **BUFFER), LAYOUTS["mixed"]

    def run(**options):
        params = placed(few(values()), mesh, specs)
        with pytest.raises(ValueError, match="pass holding='sum'"):
            hosted = {"slots_memory_kind": "pinned_host"}
            memoptax.state_shardings(make(0.01, **BUFFER), params, **hosted)
        shardings = memoptax.state_shardings(tx, params, **options)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        compiled = compile_step(step_of(tx), params, state, params)
        for i in range(6):
            gradients = jax.tree.map(lambda x, i=i: x[i], few(values(6)))
            gradients = placed(gradients, mesh, specs)
            params, state = compiled(params, state, gradients)
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        return params, state[0].buffer, temporaries

    params, there, temporaries = run()
    hosted_params, here, hosted_temporaries = run(slots_memory_kind="pinned_host")
    jax.tree.map(np.testing.assert_array_equal, params, hosted_params)
    jax.tree.map(np.testing.assert_array_equal, there, here)
    assert hosted_temporaries == temporaries
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, here)
    assert set(kinds.slots.values()) == {"pinned_host"}
    assert "pinned_host" not in jax.tree.leaves(kinds._replace(slots=None))
    larger = memoptax.resize_buffer(here, 5, holding="sum")
    for buffer in (memoptax.reset_buffer(here), larger):
        for slots in buffer.slots.values():
            assert slots.sharding.memory_kind == "pinned_host"


def test_memory_that_is_not_there_is_refused(mesh):
    tx, x = memoptax.sgd_c(0.1), jax.ShapeDtypeStruct((8,), jnp.float32)
    # JAX itself takes 'unpinned_host' and leaves the slots where they are.
    for kind in ("disk", "unpinned_host"):
        message = f"slots_memory_kind must be one of 'pinned_host', .* is '{kind}'"
        with pytest.raises(ValueError, match=message):
            memoptax.state_shardings(tx, x, mesh, slots_memory_kind=kind)

    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return [types.SimpleNamespace(kind="device")]

    message = (
        r"is 'pinned_host', but the devices of the mesh \(abacus\) have only device"
    )
    with pytest.raises(ValueError, match=message):
        _sharding._check_memory("pinned_host", Device())
