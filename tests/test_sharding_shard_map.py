"""Inside shard_map all devices decide as a single one would, or it is an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import memoptax

from compiled import train
from meshes import BOTH, BUFFER, FEW, few, values
from untyped import untyped

pytestmark = [pytest.mark.cpu_only("a mesh of eight devices"), pytest.mark.few(1)]


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
    """The same numbers as on one device, on all devices that hold a copy."""
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
        (BOTH, True),  # more axes than some leaves vary over, which JAX knows
        ({"matrix": BOTH, "vector": "model", "scalar": None}, False),
    ],
)
def test_every_device_decides_as_one_would(axes, check_vma, mesh):
    sharded = on_eight(PLAIN, axes, mesh, few(values(8)), check_vma)
    assert_equal_everywhere(plain_on_one(), sharded)


def test_every_device_decides_as_one_would_with_rows_of_keys_and_draws(mesh):
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


@pytest.mark.parametrize(("dtype", "check_vma"), [("float16", False), ("int8", True)])
def test_slots_of_few_bytes_are_bounded_as_on_one_device(dtype, check_vma, mesh):
    """The norms and the error of a sum, and so its rebuilds, belong to whole leaves."""
    # Small, so that the norms show what float16 loses of every element.
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


def test_a_custom_rule_that_asks_all_devices_decides_alike(mesh):
    stream, make = few(values(8)), momentum(priority_fn=largest_entry)
    single = on_one(make, stream)

    def asks_all(gradients):
        return jax.lax.pmax(largest_entry(gradients), BOTH)

    for check_vma in (True, False):
        sharded = on_eight(PLAIN, SPECS, mesh, stream, check_vma, rule=asks_all)
        assert_equal_everywhere(single, sharded)
    # Without communication each device makes its own choice.
    sharded = on_eight(PLAIN, SPECS, mesh, stream, False, rule=largest_entry)
    with pytest.raises(AssertionError):
        assert_equal_everywhere(single, sharded)


# Rows of int8 of which a device sees only a part


BLOCKS = {
    "critical_momenta": memoptax.critical_momenta,
    "scale_by_adam_cm": memoptax.scale_by_adam_cm,
    "scale_by_sm3_cm": memoptax.scale_by_sm3_cm,
}
FACTORIES = {
    factory.__name__: functools.partial(factory, 0.1)
    for factory in (
        *(memoptax.adam_c, memoptax.adamw_c, memoptax.adam_cm, memoptax.adamw_cm),
        *(memoptax.sgd_cm, memoptax.sm3_cm),
    )
}
SPLIT = {"buffer_dtype": momentum(buffer_dtype="int8")} | {
    f"mu_dtype of {name} {options}": functools.partial(
        make, mu_dtype="int8", **BUFFER | options
    )
    for name, make in (BLOCKS | FACTORIES).items()
    for options in ({}, {"topc": 1}, {"topc": 0}, {"kappa": 0.0})
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
@pytest.mark.few(12)
def test_int8_rows_across_devices_are_refused(make, axes, check_vma, message, mesh):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        on_eight(make, axes, mesh, few(values(8)), check_vma)


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("topc", [0, 2])
def test_a_missing_gradient_is_named_before_its_row(make, topc):
    params = {"w": jnp.ones((2, 8)), "b": jnp.ones(8)}
    norm = memoptax.sharded_norm({"w": P(None, "data"), "b": P("data")})
    tx = make(mu_dtype="int8", topc=topc, priority_fn=norm)
    gradients = params | {"b": None}
    with pytest.raises(ValueError, match="updates have the structure"):
        tx.update(gradients, tx.init(params), params)


def test_parts_of_an_int8_row_may_have_their_own_scales(mesh):
    """With scales for every device, in a state that says so."""
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
    got, want = jax.jit(sharded)(g), jax.jit(two_steps)(g)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)


# The norm


def norm_on(mesh, axes, check_vma):
    return jax.shard_map(
        memoptax.sharded_norm(axes),
        mesh=mesh,
        in_specs=(SPECS,),
        out_specs=P(),
        check_vma=check_vma,
    )


def test_sharded_norm_is_the_norm(mesh):
    gradients = few(values())
    expected = sum(np.linalg.norm(g) for g in gradients.values())
    for axes, check_vma in ((SPECS, False), ("auto", True)):
        norm = norm_on(mesh, axes, check_vma)
        np.testing.assert_allclose(norm(gradients), expected, rtol=1e-6)
    np.testing.assert_allclose(
        memoptax.sharded_norm("auto")(gradients), expected, rtol=1e-6
    )
    assert memoptax.sharded_norm("auto")({"none": None}) == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sharded_norm_needs_no_square_in_range(size, mesh):
    gradients = {k: jnp.full_like(g, size) for k, g in few(values()).items()}
    expected = sum(np.linalg.norm(np.float64(g)) for g in gradients.values())
    norm = norm_on(mesh, SPECS, False)
    for found in (norm(gradients), memoptax.sharded_norm("auto")(gradients)):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("auto", "does not track this with check_vma=False or in jax.pmap: name the"),
        ({"matrix": BOTH}, "axes for 1 leaves, but the gradients have 3"),
    ],
)
def test_axes_that_cannot_be_right_are_refused(axes, message, mesh):
    with pytest.raises(ValueError, match=message):
        on_eight(PLAIN, axes, mesh, few(values(8)), check_vma=False)


def test_a_rule_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match="rule must be a function, but is 'max'"):
        memoptax.sharded_norm("auto", untyped("max"))


# Without sharded_norm: each device decides about its own shards


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(memoptax.sgd_c, 0.1, 0.9, topc=1, buffer_dtype="int8"),
        functools.partial(memoptax.rmsprop_c, 0.1, topc=2),
        functools.partial(memoptax.adam_c, 0.1, topc=2, synced=False),
        functools.partial(memoptax.adam_cm, 0.1, topc=2, holding="sum"),
        functools.partial(memoptax.adam_cm, 0.1, mu_dtype="int8", skip_first=True),
        functools.partial(memoptax.sgd_cm, 0.1, topc=2, fifo_probability=0.5),
        functools.partial(memoptax.sm3_cm, 0.1, topc=2),
        functools.partial(memoptax.sm3_cm, 0.1, topc=0),
    ],
    ids=lambda make: make.func.__name__,
)
def test_a_state_from_init_is_the_carry_of_a_scan(make):
    """Each device trains as one alone does, on its own shard of the parameters."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    params = {"w": values()["matrix"], "b": values()["vector"]}
    tx, stream = make(), {"w": values(4)["matrix"], "b": values(4)["vector"]}

    def run(params, stream):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), stream)[0][0]

    specs = (P("data"), P(None, "data"))
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data")))(
        params, stream
    )

    def of_half(part, tree, axis):
        return jax.tree.map(lambda x: np.split(x, 2, axis)[part], tree)

    halves = [
        jax.jit(run)(of_half(part, params, 0), of_half(part, stream, 1))
        for part in range(2)
    ]
    want = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, want
    )


@pytest.mark.parametrize("holding", ["read", "sum"])
def test_an_emptied_or_resized_state_is_the_carry_of_a_scan(holding):
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    two, three = (memoptax.sgd_c(0.1, topc=c, holding=holding) for c in (2, 3))

    def run(gradients):
        found = []
        for new, tx in (
            (memoptax.reset_buffer, two),
            (lambda state: memoptax.resize_buffer(state, 3, holding=holding), three),
        ):

            def step(state, gradients, tx=tx):
                updates, state = tx.update(gradients, state)
                return state, updates

            state = new(two.init(gradients))
            twice = jnp.stack([gradients, gradients])
            _, updates = jax.lax.scan(step, state, twice)
            found.append(updates)
        return found

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=P("data"), out_specs=P(None, "data")
    )
    gradients = jnp.arange(4.0)
    for found, want in zip(sharded(gradients), run(gradients)):
        np.testing.assert_allclose(found, want, rtol=1e-6)
