"""Refusals, and odd but good arguments, that the other fast tests do not cover."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import each_factory, each_optimizer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import memoptax

from untyped import untyped

SHAPES = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
ONES = {"w": jnp.ones((8, 8))}


def test_a_name_that_the_package_does_not_have():
    with pytest.raises(AttributeError, match="'memoptax' has no attribute 'adam_x'"):
        memoptax.adam_x  # noqa: B018


SWAPPED = np.ones((8, 8), np.dtype(np.float32).newbyteorder())
MASKED = np.ma.masked_array(np.ones((8, 8), np.float32))


@pytest.mark.parametrize("array", [SWAPPED, MASKED], ids=["swapped", "masked"])
@each_factory
def test_arrays_of_numpy_that_jax_does_not_take(opt, array):
    tx, message = opt.build(), r"\['w'\] is a NumPy array that JAX does not take"
    state = tx.init(ONES)
    with pytest.raises(ValueError, match=message):
        tx.update({"w": array}, state, ONES)
    if opt.memory == "buffer":
        with pytest.raises(ValueError, match=message):
            tx.init({"w": array})


@pytest.mark.parametrize("kind", ["swapped", "masked"])
@each_optimizer
@pytest.mark.few(8)
def test_states_of_numpy_that_jax_does_not_take(opt, kind):
    """JAX would compute with what is under a mask."""
    tx = opt.build()
    leaves, treedef = jax.tree.flatten(tx.init(ONES))
    for place, leaf in enumerate(leaves):
        wrong = np.asarray(leaf)
        swapped = wrong.astype(wrong.dtype.newbyteorder())
        if kind == "swapped" and swapped.dtype.isnative:  # int8
            continue
        wrong = swapped if kind == "swapped" else np.ma.masked_array(wrong)
        state = treedef.unflatten([*leaves[:place], wrong, *leaves[place + 1 :]])
        message = r"state\S* is a NumPy array that JAX does not take"
        with pytest.raises(ValueError, match=message):
            tx.update(ONES, state, ONES)


@pytest.mark.parametrize("array", [SWAPPED, MASKED], ids=["swapped", "masked"])
def test_updates_that_jax_does_not_take_are_named_by_buffer_stats(array):
    state = memoptax.sgd_c(0.1).init(ONES)
    with pytest.raises(ValueError, match=r"a leaf at \['w'\] that JAX does not take"):
        memoptax.buffer_stats(state, {"w": array})
    state = memoptax.sgd_c(0.1).init(jnp.ones(()))
    with pytest.raises(ValueError, match="at the root .* it is of type str"):
        memoptax.buffer_stats(state, "text")


@pytest.mark.parametrize("spec", [P("data"), P(None, None, None, "data")], ids=str)
def test_shardings_that_do_not_fit_are_named_by_memory_report(spec, mesh):
    tx, params = memoptax.sgd_c(0.1), {"w": jnp.ones((8, 8))}
    state = jax.eval_shape(tx.init, params)
    shardings = jax.tree.map(lambda _: jax.NamedSharding(mesh, spec), state)
    message = r"shardings\[0\].buffer.slots\['w'\] is .* does not fit .* \(6, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        memoptax.memory_report(tx, params, shardings)


NO_UPDATE = optax.GradientTransformation(lambda params: (), untyped(None))


@pytest.mark.parametrize("tx", [None, SHAPES, memoptax.sgd_c, NO_UPDATE])
def test_what_is_no_transformation_is_refused(tx):
    """As when ``tx`` and ``params`` are in the wrong order."""
    for call in (
        memoptax.state_bytes,
        memoptax.memory_report,
        memoptax.state_shardings,
        lambda tx, params: memoptax.state_partition_specs(tx, params, P()),
        lambda tx, params: memoptax.check_state(tx, params, ()),
    ):
        message = (
            "tx must be an optax.GradientTransformation, whose init and update are "
            f"functions, but is of type {type(tx).__name__}"
        )
        with pytest.raises(ValueError, match=message):
            call(tx, SHAPES)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"w": "data"}, r"must hold PartitionSpecs, but has 'data' for .*\['w'\]"),
        ({"w": P(None, None, "data")}, r"whose shape \(8, 8\) has only 2 axes"),
        ({"w": P(3)}, r"must name mesh axes, but has .*3,?\) for"),
    ],
)
def test_specs_that_do_not_fit(specs, message):
    with pytest.raises(ValueError, match=message):
        memoptax.state_partition_specs(memoptax.sgd_c(0.1), SHAPES, specs)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["data"], r"over must be a mesh axis name or a tuple .* is \['data'\]"),
        (("data", "data"), r"over is \('data', 'data'\), but must name each .* once"),
        (
            "dat",
            "over is 'dat', but the mesh has no axis 'dat': it has 'data', 'model'",
        ),
        ("data", r"over is .*, but parameter \['w'\] is divided over 'data'"),
    ],
)
def test_axes_that_cannot_be_divided_over(over, message, mesh):
    tx, specs = memoptax.sgd_c(0.1), {"w": P("data")}
    with pytest.raises(ValueError, match=message):
        memoptax.state_partition_specs(tx, SHAPES, specs, mesh, over=over)


def test_slots_in_host_memory_are_summed(mesh):
    params = {"w": jax.device_put(ONES["w"], jax.NamedSharding(mesh, P("data")))}
    for holding in ("read", "sum"):
        tx = memoptax.sgd_c(0.1, topc=3, holding=holding)

        def shardings(tx=tx):
            return memoptax.state_shardings(tx, params, slots_memory_kind="pinned_host")

        if holding == "sum":
            buffer = shardings()[0].buffer
            assert buffer.slots["w"].memory_kind == "pinned_host"
            assert buffer.total["w"].memory_kind != "pinned_host"
        else:
            with pytest.raises(ValueError, match="by 'read', .* pass holding='sum'"):
                shardings()


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_slots_of_an_ensemble_are_not_in_host_memory(mode):
    """Under jax.vmap the place of a slot differs by member, which is a gather."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(mode,))
    one = memoptax.sgd_c(0.1, topc=3, holding="sum")
    tx = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, P("data")))
        memoptax.state_shardings(tx, params, slots_memory_kind="device")
        with pytest.raises(ValueError, match="'pinned_host', .* of several members"):
            memoptax.state_shardings(tx, params, slots_memory_kind="pinned_host")


def test_one_slot_without_an_axis_is_for_one_value():
    with pytest.raises(ValueError, match="'select' is for topc=1, but topc is 3"):
        memoptax.sgd_c(0.1, topc=3, holding="select")
    state = memoptax.sgd_c(0.1, topc=1).init(ONES)
    with pytest.raises(ValueError, match="'select' is for topc=1, but topc is 3"):
        memoptax.resize_buffer(state, 3, holding="select")


@pytest.mark.parametrize("topc", [1, 3])
def test_one_slot_is_resized_and_emptied(topc):
    tx = untyped(memoptax.critical_gradients(topc=1))
    _, state = tx.update(ONES, tx.init(ONES))
    larger = memoptax.resize_buffer(state, topc)
    other = untyped(memoptax.critical_gradients(topc=topc))
    updates, _ = other.update(ONES, larger)
    np.testing.assert_array_equal(updates["w"], 2.0)
    updates, _ = tx.update(ONES, memoptax.reset_buffer(state))
    np.testing.assert_array_equal(updates["w"], 1.0)


def test_the_moment_of_another_optimizer():
    tx = memoptax.critical_momenta(kappa=0.0, mu_dtype="int8")
    state = untyped(tx.init(ONES))
    other = collections.namedtuple("OtherState", ["count"])(state.inner.count)
    with pytest.raises(ValueError, match="OtherState, which has no ema"):
        tx.update(ONES, state._replace(inner=other))


def test_a_norm_without_devices_is_the_rule():
    norm = memoptax.sharded_norm("data", rule=optax.tree.norm)
    np.testing.assert_allclose(norm(ONES), 8.0, rtol=1e-6)


def test_functions_without_a_signature_and_integers_without_a_float():
    memoptax.sgd_c(0.1, priority_fn=max)  # Python does not know what it takes
    with pytest.raises(ValueError, match="kappa must be finite|kappa must"):
        memoptax.sgd_c(0.1, kappa=10**400)


def test_a_dtype_of_another_library():
    class Foreign:
        shape, dtype = (2,), "a dtype of another library"

    with pytest.raises(ValueError, match="parameter"):
        memoptax.sm3(0.1).init({"w": untyped(Foreign())})


def test_sm3_of_nothing_counts():
    tx = untyped(memoptax.scale_by_sm3())
    _, state = tx.update({}, tx.init({}))
    assert state.count == 1


def test_accumulators_of_another_dtype():
    params = {"w": jnp.ones((4, 4))}
    wide = memoptax.scale_by_sm3(accumulator_dtype="float32")
    with jax.enable_x64(True):
        state = memoptax.scale_by_sm3(accumulator_dtype="float64").init(params)
        with pytest.raises(ValueError, match="accumulator_dtype is .*float32"):
            wide.update(params, state)


def test_ids_of_64_bits_and_tables_without_rows():
    def total(rows):
        return jnp.sum(rows)

    table, ids = jnp.zeros((4, 3)), np.array([2**63 + 5, 1], np.uint64)
    _, gradient = memoptax.sparse.row_value_and_grad(total, table, ids)
    moved = untyped(memoptax.sparse.apply_updates(table, gradient))
    np.testing.assert_array_equal(moved.sum(axis=1), [0, 3, 0, 0])
    empty = jnp.zeros((0, 3))
    _, nothing = memoptax.sparse.row_value_and_grad(total, empty, np.array([1]))
    moved = untyped(memoptax.sparse.apply_updates(empty, nothing))
    assert moved.shape == (0, 3)


def test_float64_needs_more_than_the_flag_for_explicit_dtypes():
    before = untyped(jax.config).jax_explicit_x64_dtypes
    jax.config.update("jax_explicit_x64_dtypes", "allow")
    try:
        wide = jnp.ones(3, jnp.float64)
        for tx in (memoptax.sgd_c(0.1), memoptax.sm3(0.1), memoptax.adam_cm(0.1)):
            with pytest.raises(ValueError, match="float64, which needs jax_enable_x64"):
                tx.init({"w": wide})
            state = tx.init({"w": np.ones(3)})  # JAX takes it as float32
            tx.update({"w": np.ones(3)}, state, {"w": np.ones(3)})
    finally:
        jax.config.update("jax_explicit_x64_dtypes", before.name.lower())
