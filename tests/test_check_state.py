"""What check_state refuses, and what it takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import memoptax

from untyped import untyped

pytestmark = pytest.mark.few(1)


def test_an_infinity_in_a_new_state_of_optax_is_no_fault():
    tx = optax.chain(memoptax.sgd_c(0.1), optax.contrib.reduce_on_plateau())
    params = jnp.ones(3)
    memoptax.check_state(tx, params, tx.init(params))


class Named(NamedTuple):
    """Parameters named like fields of states that are never negative."""

    scales: Any
    count: Any
    nu: Any


@pytest.mark.parametrize(
    ("tx", "params"),
    [
        (memoptax.adam_c(0.1), Named(*[jnp.ones(3)] * 3)),
        (memoptax.adam_cm(0.1, mu_dtype="int8"), {"a": Named(*[jnp.ones(3)] * 3)}),
        (optax.adam(0.1), Named(*[jnp.ones(3)] * 3)),
        (optax.chain(memoptax.critical_gradients(2), optax.sm3(0.1)), jnp.ones((2, 3))),
    ],
    ids=["adam_c", "adam_cm", "optax.adam", "optax.sm3, whose nu is a momentum"],
)
@pytest.mark.few(4)
def test_a_name_of_a_field_may_mean_another_thing(tx, params):
    gradients = jax.tree.map(lambda x: -x, params)
    _, state = tx.update(gradients, tx.init(params), params)
    memoptax.check_state(tx, params, state)


def test_what_is_no_array_is_named():
    tx, params = memoptax.sgd_c(0.1), jnp.ones(3)
    state = untyped(tx.init(params))
    shape = jax.eval_shape(lambda: state[0].buffer.slots)
    swapped = np.dtype(np.float32).newbyteorder()
    for leaf, kind in (
        ("abc", "of type str"),
        (object(), "of type object"),
        (shape, "of type ShapeDtypeStruct"),
        (np.zeros(shape.shape, "V2"), "of void16"),  # bfloat16 from np.load
        (np.zeros(shape.shape, swapped), "in another byte order, '.f4'"),
        (np.ma.masked_array(np.zeros(shape.shape, np.float32)), "masked"),
    ):
        buffer = state[0].buffer._replace(slots=leaf)
        forged = (state[0]._replace(buffer=buffer), *state[1:])
        message = f"slots must be an array of numbers, but is {kind}"
        with pytest.raises(ValueError, match=message):
            memoptax.check_state(tx, params, forged)


def test_a_number_in_a_buffer_is_taken_as_in_update():
    tx, params = memoptax.sgd_c(0.1, holding="sum"), jnp.ones(3)
    state = optax.tree.set(tx.init(params), rebuilds=0)
    _, after = tx.update(params, state)
    memoptax.check_state(tx, params, state)
    memoptax.check_state(tx, params, after)
    with pytest.raises(
        ValueError,
        match="state has an object of type int in a buffer's rebuilds",
    ):
        memoptax.buffer_stats(state)


def test_a_traced_state_has_no_numbers_to_check():
    tx, params = memoptax.sgd_c(0.1), jnp.ones(3)
    with pytest.raises(ValueError, match="call it outside of jax.jit"):
        jax.jit(lambda state: memoptax.check_state(tx, params, state))(tx.init(params))


@pytest.mark.parametrize("options", [{}, {"topc": 1}, {"holding": "sum"}])
def test_a_scaled_buffer_that_became_empty_is_refused_and_resized_to_an_empty_one(
    options,
):
    """All integers are 0, but the slots are not."""
    tx = memoptax.critical_gradients(**options)
    params = jnp.ones(3)
    state = tx.init(params)
    for k in range(6):
        state = tx.update(params * (k + 1), state)[1]
    scaled = jax.tree.map(lambda x: (0.1 * x).astype(x.dtype), state)
    with pytest.raises(ValueError, match="slots of entries that are not held"):
        memoptax.check_state(tx, params, scaled)
    resized = memoptax.resize_buffer(scaled, 7)
    larger = memoptax.critical_gradients(7)
    memoptax.check_state(larger, params, resized)
    fresh = larger.init(params)
    for k in range(3):
        found, resized = larger.update(params * (k + 1), resized)
        wanted, fresh = larger.update(params * (k + 1), fresh)
        np.testing.assert_allclose(untyped(found), untyped(wanted), rtol=1e-6)


def test_a_count_of_rebuilds_below_0_or_an_age_above_the_offers_is_refused():
    tx = memoptax.critical_gradients(2, holding="sum")
    params = jnp.ones(3)
    state: Any = tx.update(params, tx.init(params))[1]
    buffer = state.buffer
    memoptax.check_state(tx, params, state)
    for change, words in (
        ({"rebuilds": buffer.rebuilds - 5}, "rebuilds are negative"),
        ({"ages": buffer.ages + jnp.array([[7, 0]])}, "contradict"),
        ({"keys": buffer.keys + 1}, "slots of entries that are not held"),
        ({"norms": buffer.norms + 1}, "slots of entries that are not held"),
        ({"norms": buffer.norms / 2}, "running sum .* is not that of its slots"),
        ({"error": buffer.error + 1}, "running sum .* is not that of its slots"),
        ({"total": 0 * buffer.total}, "running sum .* is not that of its slots"),
        ({"total": buffer.total + 1e-3}, "running sum .* is not that of its slots"),
    ):
        forged = state._replace(buffer=buffer._replace(**change))
        with pytest.raises(ValueError, match=words):
            memoptax.check_state(tx, params, forged)


def test_a_donated_state_is_refused():
    tx, params = memoptax.sgd_c(0.1), jnp.ones(3)
    state = tx.init(params)
    jax.jit(lambda state: tx.update(params, state)[1], donate_argnums=0)(state)
    for tool in (
        lambda: memoptax.check_state(tx, params, state),
        lambda: memoptax.buffer_stats(state),
        lambda: memoptax.resize_buffer(state, 3),
        lambda: memoptax.reset_buffer(state),
    ):
        with pytest.raises(ValueError, match="was deleted, as donated arrays are"):
            tool()


@pytest.mark.parametrize("topc", [1, 3])
def test_a_norm_at_the_end_of_the_range_is_held(topc):
    """int8 rounds a norm up, so its bound would be infinite."""
    tx = memoptax.critical_gradients(topc, holding="sum", buffer_dtype="int8")
    params = {"w": jnp.zeros(1)}
    state: Any = tx.init(params)
    for size in (3.395e38, 1.0):
        state = tx.update({"w": jnp.full(1, size)}, state)[1]
        memoptax.check_state(tx, params, state)
        memoptax.resize_buffer(state, 2)
    assert memoptax.buffer_stats(state)["fill"] == min(topc, 2)


def test_equal_ages_are_refused():
    tx = memoptax.critical_gradients(2)
    params = jnp.ones(3)
    state: Any = tx.init(params)
    for _ in range(2):
        state = tx.update(params, state)[1]
    memoptax.check_state(tx, params, state)
    buffer = state.buffer._replace(ages=jnp.ones_like(state.buffer.ages))
    with pytest.raises(ValueError, match="entries of equal ages"):
        memoptax.check_state(tx, params, state._replace(buffer=buffer))


@pytest.mark.parametrize("batch", [False, True])
def test_two_states_whose_floats_alone_were_averaged_are_refused_and_mended(batch):
    """As by a tool that averages weights and leaves counters alone."""
    tx: Any = memoptax.adam_c(0.1, topc=3, holding="sum")
    params, random = jnp.ones((2, 3)), np.random.default_rng(0)
    if batch:
        tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    states: Any = []
    for _ in range(2):
        state = tx.init(params)
        for _ in range(7):
            gradient = jnp.asarray(random.normal(size=(2, 3)), jnp.float32)
            state = tx.update(gradient, state, params)[1]
        memoptax.check_state(tx, params, state)
        states.append(state)

    def mean(a, b):
        return (a + b) / 2 if jnp.issubdtype(a.dtype, jnp.floating) else a

    mixed = jax.tree.map(mean, *states)
    with pytest.raises(ValueError, match="running sum .* is not that of its slots"):
        memoptax.check_state(tx, params, mixed)
    mended = memoptax.resize_buffer(mixed, 3, holding="sum")
    memoptax.check_state(tx, params, mended)


def filled(state, field, number):
    """The state with this number in all arrays of a field."""

    def changed(path, x):
        here = any(getattr(key, "name", "") == field for key in path)
        return jnp.full_like(x, number) if here else x

    return jax.tree_util.tree_map_with_path(changed, state)


@pytest.mark.parametrize(
    ("tx", "field"),
    [
        (memoptax.sgd_c(0.1, topc=2, buffer_dtype="int8"), "scales"),
        (memoptax.adam_c(0.1, topc=2, mu_dtype="int8"), "scales"),
        (memoptax.adam_cm(0.1, topc=2, mu_dtype="int8"), "mu_scales"),
        (memoptax.sm3(0.1, momentum=0.9, momentum_dtype="int8"), "scales"),
    ],
)
def test_int8_without_its_scales_is_refused(tx, field):
    params = {"w": jnp.ones((2, 3))}
    state = tx.update(params, tx.init(params), params)[1]
    memoptax.check_state(tx, params, state)

    lost = filled(state, field, 0)
    with pytest.raises(ValueError, match=r"\['w'\] has numbers in int8 whose scales"):
        memoptax.check_state(tx, params, lost)


@pytest.mark.parametrize(
    "inner",
    [
        memoptax.adam_c(0.1, topc=2),
        memoptax.sm3(0.1),
        memoptax.sgd_c(0.1, topc=0),
        optax.sgd(0.1),
    ],
    ids=["adam_c", "sm3", "sgd_c", "optax"],
)
def test_a_scalar_of_an_ensemble_may_be_infinite(inner):
    plain = optax.chain(inner, optax.contrib.reduce_on_plateau())
    tx = optax.GradientTransformation(jax.vmap(plain.init), jax.vmap(plain.update))
    params = jnp.ones((3, 2))
    memoptax.check_state(tx, params, tx.init(params))


def test_an_injected_number_may_be_infinite():
    tx = optax.inject_hyperparams(memoptax.sgd_c)(0.1)
    state = untyped(tx.init(jnp.ones(2)))
    memoptax.check_state(tx, jnp.ones(2), filled(state, "hyperparams", jnp.inf))


@pytest.mark.parametrize(
    ("tx", "field"),
    [
        (memoptax.adam_cm(0.1, topc=1), "nu"),
        (memoptax.adam_cm(0.1, topc=1), "mu"),
        (memoptax.adam_cm(0.1, mu_dtype="int8"), "mu_scales"),
        (memoptax.sm3(0.1), "accumulators"),
        (memoptax.sgd_c(0.1, topc=1), "slots"),
        (memoptax.sgd_c(0.1, topc=1, buffer_dtype="int8"), "scales"),
        (memoptax.adam_c(0.1), "nu"),
        (memoptax.rmsprop_c(0.1), "nu"),
        (memoptax.sgd_c(0.1, 0.9), "trace"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_infinity_of_a_scalar_parameter_is_refused(tx, field):
    params = jnp.ones(())
    _, state = tx.update(params, tx.init(params), params)

    wrong = filled(state, field, jnp.inf)
    with pytest.raises(ValueError, match=f"{field}.* has numbers that are not finite"):
        memoptax.check_state(tx, params, wrong)
