"""States in few bits or of another kind, lone tables, and odd arguments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import each_optimizer
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

from untyped import untyped

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}


def narrow(state, names, dtype):
    """The state with its arrays of these names in another dtype."""

    def cast(path, leaf):
        here = any(getattr(key, "name", None) in names for key in path)
        return leaf.astype(dtype) if here else leaf

    return jax.tree_util.tree_map_with_path(cast, state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (memoptax.adam_cm(0.1, topc=1), "nu"),
        (memoptax.adam_cm(0.1, amsgrad=True), "nu_max"),
        (memoptax.sm3_cm(0.1), "accumulators"),
        (memoptax.sm3(0.1), "accumulators"),
        (memoptax.sm3(0.1, beta=0.999), "accumulators"),
        (memoptax.adam_c(0.1), "nu"),
        (memoptax.adam_c(0.1, topc=0), "nu"),
        (memoptax.adam_c(0.1, mu_dtype="int8"), "nu"),
        (memoptax.adamw_c(0.1, amsgrad=True), "nu_max"),
        (memoptax.rmsprop_c(0.1), "nu"),
        (memoptax.rmsprop_c(0.1, centered=True), "mu"),
        (memoptax.critical_gradients(2), "keys"),
        (memoptax.sgd_cm(0.1), "keys"),
        (memoptax.sgd_c(0.1, holding="sum"), "total"),
        (memoptax.sgd_c(0.1, holding="sum"), "norms"),
        (memoptax.sgd_c(0.1, buffer_dtype="int8"), "scales"),
        (memoptax.adam_c(0.1, topc=0, mu_dtype="int8"), "scales"),
        (memoptax.adam_cm(0.1, mu_dtype="int8"), "mu_scales"),
        (memoptax.sm3(0.1, 0.9, momentum_dtype="int8"), "scales"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sums_in_few_bits_are_refused(tx, name, dtype):
    state = narrow(tx.init(PARAMS), {name}, dtype)
    with pytest.raises(ValueError, match=f"state has .*{dtype}"):
        tx.update(PARAMS, state, PARAMS)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
@each_optimizer
def test_a_state_cast_as_a_whole_is_refused(opt, dtype):
    """With a buffer, and with the base alone."""

    def cast(leaf):
        return leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf

    for options in ({}, {"topc": 0}) if opt.accepts("topc") else ({},):
        tx = opt.build(**options)
        state = tx.init(PARAMS)
        if any(x.dtype == jnp.float32 for x in jax.tree.leaves(state)):
            with pytest.raises(ValueError, match=dtype):
                tx.update(PARAMS, jax.tree.map(cast, state), PARAMS)
            tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_draws_that_are_no_key_are_refused(dtype):
    tx = memoptax.sgd_c(0.1, topc=2, fifo_probability=0.5)
    state = narrow(tx.init(PARAMS), {"draws"}, dtype)
    with pytest.raises(ValueError, match=f"field draws has dtype {dtype}"):
        tx.update(PARAMS, state, PARAMS)


def test_draws_of_another_generator_are_refused():
    tx = memoptax.sgd_c(0.1, topc=2, fifo_probability=0.5)
    with jax.default_prng_impl("rbg"):
        state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="field draws has shape"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("kind", ["int32", "uint16", "V2"])
def test_slots_that_are_bits_are_refused(kind):
    """NumPy's files keep bfloat16 as the void dtype V2."""
    tx = memoptax.critical_gradients(2, buffer_dtype="bfloat16")
    state = untyped(tx.init(PARAMS))
    slots = jax.tree.map(lambda x: np.zeros(x.shape, kind), state.buffer.slots)
    state = state._replace(buffer=state.buffer._replace(slots=slots))
    other = memoptax.critical_gradients(2)
    for call in (
        memoptax.buffer_stats,
        memoptax.reset_buffer,
        lambda s: memoptax.resize_buffer(s, 3),
        lambda s: tx.update(PARAMS, s),
        lambda s: other.update(PARAMS, s),
    ):
        with pytest.raises(ValueError, match="state has a buffer whose slots are"):
            call(state)


@pytest.mark.parametrize("topc", [1, 2, 3, 5, 6, 10])
@pytest.mark.parametrize("make", [memoptax.sgd_c, memoptax.adam_cm, memoptax.sm3_cm])
def test_float64_slots_without_x64_are_float32(make, topc):
    tx = make(0.1, topc=topc, buffer_dtype="float64")
    state = jax.eval_shape(tx.init, PARAMS)
    jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert {s.dtype for s in jax.tree.leaves(optax.tree.get(state, "slots"))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize(
    "tx",
    [
        memoptax.adam_c(0.1, mu_dtype="float64"),
        memoptax.adam_cm(0.1, mu_dtype="float64"),
        memoptax.sm3(0.1, 0.9, momentum_dtype="float64"),
        memoptax.sm3(0.1, 0.9, accumulator_dtype="float64"),
    ],
    ids=["adam_c", "adam_cm", "momentum of sm3", "accumulators of sm3"],
)
def test_float64_without_x64_is_float32_without_a_warning(tx):
    state = jax.eval_shape(tx.init, PARAMS)
    jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert "float64" not in {x.dtype.name for x in jax.tree.leaves(state)}


def table(rows) -> Any:
    return BCOO((jnp.ones((1, 2)), jnp.array([[25]])), shape=(rows, 2))


@pytest.mark.parametrize("options", [{}, {"topc": 0}, {"kappa": 0.0}], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        memoptax.sgd_c,
        memoptax.rmsprop_c,
        memoptax.adam_c,
        memoptax.adamw_c,
        memoptax.sgd_cm,
        memoptax.adam_cm,
        memoptax.adamw_cm,
        memoptax.sm3_cm,
    ],
)
def test_row_sparse_gradients_are_refused_with_a_buffer_and_without(make, options):
    tx, params = untyped(make(0.1, **options)), jnp.zeros((30, 2))
    state = tx.init(params)
    with pytest.raises(ValueError, match="row-sparse: only sm3"):
        tx.update(table(30), state, params)
    with pytest.raises(ValueError, match=r"The gradient of \['x'\] is row-sparse"):
        tx.update({"x": table(30)}, tx.init({"x": params}), {"x": params})


@pytest.mark.parametrize("rate", [0.1, lambda count: 0.1], ids=["number", "schedule"])
def test_a_lone_row_sparse_table_is_not_decayed(rate):
    tx = memoptax.sm3(0.1, weight_decay=rate, cover=memoptax.covers.rows)
    params = jnp.ones((30, 2))
    updates, _ = tx.update(table(30), tx.init(params), params)
    params = untyped(memoptax.sparse.apply_updates(params, updates))
    np.testing.assert_allclose(params[25], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(params[:25], 1)


@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
def test_a_decay_of_0_makes_no_infinity(traced):
    def update(b1):
        tx = untyped(memoptax.adam_cm(0.1, b1=b1, topc=1))
        return tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2))[0]

    with jax.debug_infs(True):
        update = jax.jit(update) if traced else update
        np.testing.assert_allclose(update(0.0), -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        memoptax.adam_c(0.1, topc=0, amsgrad=True),
        memoptax.rmsprop_c(0.1, topc=0, centered=True),
        memoptax.adam_cm(0.1, kappa=0.0, amsgrad=True),
    ],
    ids=["adam_c", "rmsprop_c", "adam_cm"],
)
@pytest.mark.cpu_only("a mesh of eight devices")
def test_bases_follow_a_divided_state_in_explicit_mode(tx):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("x")))
        whole = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P()))
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(tx.update, whole, state, whole)
    assert updates.shape == (8, 16)


@pytest.mark.parametrize("array", [jnp.ones(3), np.float32(5), jnp.array(5.0)])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (memoptax.sgd_c, "buffer_dtype"),
        (memoptax.adam_cm, "mu_dtype"),
        (memoptax.sm3, "momentum_dtype"),
        (memoptax.sm3, "accumulator_dtype"),
        (memoptax.sgd_c, "accumulator_dtype"),
    ],
)
def test_an_array_is_no_dtype(make, name, array):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make(0.1, **{name: array})


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (memoptax.adam_cm(0.1), "nu"),
        (memoptax.sm3(0.1), "accumulators"),
        (memoptax.sm3_cm(0.1), "accumulators"),
        (memoptax.adam_c(0.1), "count"),
        (memoptax.adam_c(0.1, buffer_dtype="int8"), "scales"),
        (memoptax.adam_cm(0.1, mu_dtype="int8"), "mu_scales"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_negative_is_refused(tx, name):
    def spoil(path, leaf):
        here = any(getattr(key, "name", None) == name for key in path)
        return leaf - 1 if here else leaf

    state = tx.init(PARAMS)
    memoptax.check_state(tx, PARAMS, state)
    state = jax.tree_util.tree_map_with_path(spoil, state)
    with pytest.raises(ValueError, match="numbers below 0"):
        memoptax.check_state(tx, PARAMS, state)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "I", "beta": 0.9},
        {"momentum_dtype": "int8"},
        {"cover": memoptax.covers.full},
    ],
    ids=["II", "I", "int8", "an entry each"],
)
def test_sm3_takes_accumulators_below_0_for_0(shape, options):
    """They cannot make a momentum NaN that would stay so."""
    tx = memoptax.sm3(0.1, momentum=0.9, **options)
    gradient = jnp.ones(shape)
    _, state = tx.update(gradient, tx.init(gradient))
    sums = optax.tree.get(state, "accumulators")
    spoiled, emptied = (
        optax.tree.set(state, accumulators=jax.tree.map(function, sums))
        for function in (jnp.negative, jnp.zeros_like)
    )
    found, want = (tx.update(gradient, s) for s in (spoiled, emptied))
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_state_with_other_rows_is_refused_with_their_number():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    one, each = (memoptax.sgd_c(0.1, topc=4, synced=synced) for synced in (True, False))
    with pytest.raises(ValueError, match=r"\(2, C\) .* but the state has \(1, C\)"):
        each.update(params, one.init(params), params)
    with pytest.raises(ValueError, match=r"\(1, C\) .* but the state has \(2, C\)"):
        one.update(params, each.init(params), params)


def with_field(state, name, value):
    """The state with another value of the only field of this name."""

    def has_it(node):
        return name in getattr(node, "_fields", ())

    def changed(node):
        return node._replace(**{name: value(node)}) if has_it(node) else node

    return jax.tree.map(changed, state, is_leaf=has_it)


IN_INT8 = {
    "sm3": (memoptax.sm3(0.1, 0.9, momentum_dtype="int8"), "scales"),
    "adam_c": (memoptax.adam_c(0.1, topc=0, mu_dtype="int8"), "scales"),
    "adam_cm": (memoptax.adam_cm(0.1, mu_dtype="int8"), "mu_scales"),
    "sgd_cm": (memoptax.sgd_cm(0.1, topc=1, mu_dtype="int8"), "mu_scales"),
    "sm3_cm": (memoptax.sm3_cm(0.1, topc=0, mu_dtype="int8"), "mu_scales"),
}


@pytest.mark.parametrize("name", IN_INT8)
def test_int8_moments_without_their_scales_are_refused(name):
    tx, field = IN_INT8[name]
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones(5)}
    state = tx.init(params)
    changes = {
        "none": lambda node: None,
        "swapped": lambda node: getattr(node, field)[::-1],
        "one": lambda node: getattr(node, field)[:1],
    }
    for change in changes.values():
        wrong = with_field(state, field, change)
        with pytest.raises(ValueError, match=f"state has {field} of shapes"):
            tx.update(params, wrong, params)


@pytest.mark.parametrize(
    "tx",
    [memoptax.sgd_cm(0.1, topc=1), memoptax.adam_cm(0.1), memoptax.sm3_cm(0.1, topc=0)],
    ids=["sgd_cm", "adam_cm", "sm3_cm"],
)
def test_scales_where_there_are_none_are_refused(tx):
    params = jnp.ones((4, 3))
    wrong = with_field(tx.init(params), "mu_scales", lambda _: (jnp.ones((4, 1)),))
    with pytest.raises(ValueError, match="float32 and need None"):
        tx.update(params, wrong, params)


@pytest.mark.parametrize("make", [memoptax.sm3, memoptax.sm3_cm])
def test_a_state_without_accumulators_is_refused(make):
    tx, params = make(0.1), jnp.ones((4, 3))
    wrong = with_field(tx.init(params), "accumulators", lambda _: None)
    with pytest.raises(ValueError, match="the state was made for 0"):
        tx.update(params, wrong, params)


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32"])
@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (memoptax.sgd_c(0.1), "ages"),
        (memoptax.sgd_c(0.1), "entries"),
        (memoptax.sgd_c(0.1, holding="sum"), "rebuilds"),
        (memoptax.adam_cm(0.1), "count"),
        (memoptax.adam_cm(0.1, topc=0, amsgrad=True), "count"),
        (memoptax.adam_c(0.1), "count"),
        (memoptax.adam_c(0.1, amsgrad=True, mu_dtype="int8"), "count"),
        (memoptax.sgd_cm(0.1, topc=0), "count"),
        (memoptax.sm3(0.1), "count"),
        (memoptax.sm3_cm(0.1), "count"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_counts_in_few_bits_or_without_a_sign_are_refused(tx, name, dtype):
    """An age in int8 would stop at 127, and the oldest entry would not be known."""
    state = narrow(tx.init(PARAMS), {name}, dtype)
    with pytest.raises(ValueError, match=f"{name} in {dtype}, but needs int32"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("empty", [{}, [], ()], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"topc": 1}, {"topc": 3, "holding": "read"}, {"buffer_dtype": "int8"}],
    ids=str,
)
def test_an_empty_node_is_refused_where_none_is_needed(options, empty):
    """Some tools restore None as another node without leaves."""
    tx = memoptax.critical_gradients(**options)
    _, state = untyped(tx.update(PARAMS, tx.init(PARAMS)))
    fields = [name for name, x in state.buffer._asdict().items() if x is None]
    assert {"total", "error", "rebuilds"} <= set(fields)
    for name in fields:
        wrong = state._replace(buffer=state.buffer._replace(**{name: empty}))
        for use in (
            functools.partial(tx.update, PARAMS),
            functools.partial(memoptax.check_state, tx, PARAMS),
            memoptax.buffer_stats,
            memoptax.reset_buffer,
            functools.partial(memoptax.resize_buffer, topc=2),
        ):
            with pytest.raises(ValueError, match="state"):
                use(wrong)
