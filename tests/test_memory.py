"""Bytes before anything is allocated, in total and on each device."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

from untyped import untyped

PARAMS = {
    "w": jax.ShapeDtypeStruct((16, 6), jnp.float32),
    "b": jax.ShapeDtypeStruct((6,), jnp.bfloat16),
}
ADAM_C = functools.partial(memoptax.adam_c, 1e-3)


def spread_over(mesh, tx, params):
    """Shards the last two axes of every matrix and of its slots, and nothing else."""

    def sharding(leaf):
        wide = leaf.shape[-2:] == (16, 6)
        spec = (None,) * (len(leaf.shape) - 2) + ("data", "model")
        return NamedSharding(mesh, P(*spec) if wide else P())

    return jax.tree.map(sharding, jax.eval_shape(tx.init, params))


@pytest.mark.parametrize(
    "tx",
    [optax.adam(0.1), ADAM_C(topc=3), memoptax.sm3(0.1, 0.9, momentum_dtype="int8")],
    ids=["adam", "adam_c", "sm3"],
)
def test_each_device_holds_what_the_report_says(tx, mesh):
    shardings = spread_over(mesh, tx, PARAMS)
    report = memoptax.memory_report(tx, PARAMS, shardings)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), PARAMS)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    for device in mesh.devices.flat:
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert report.total_per_device == held
    assert report.total_per_device is not None
    assert report.total_per_device < report.total
    plain = memoptax.memory_report(tx, PARAMS)
    assert plain.per_device is plain.total_per_device is plain.whole is None
    assert dataclasses.replace(report, per_device=None, whole=None) == plain


def test_per_device_by_hand(mesh):
    place = functools.partial(spread_over, mesh)
    report = memoptax.memory_report(ADAM_C(topc=3), PARAMS, place)
    assert report.per_device is not None and report.whole is not None
    # Four slots of one eighth of the matrix in float32 and of all of b in bfloat16.
    assert report.per_device["slots"] == 4 * (12 * 4 + 6 * 2)
    assert report.per_device["mu"] == 12 * 4 + 6 * 4
    assert report.per_device["keys"] == report.fields["keys"] == 3 * 4
    assert report.whole["slots"] == 4 * 6 * 2
    assert report.whole["mu"] == 6 * 4
    assert report.whole["keys"] == 3 * 4


def test_the_table_has_a_column_per_device_where_it_is_known(mesh):
    tx = optax.adam(0.1)
    plain = str(memoptax.memory_report(tx, PARAMS))
    both = str(memoptax.memory_report(tx, PARAMS, functools.partial(spread_over, mesh)))
    assert plain.splitlines()[0].split("  ") != both.splitlines()[0].split("  ")
    assert "per device" in both and "per device" not in plain
    for table in (plain, both):
        assert len({len(line) for line in table.splitlines()}) == 1
    # Both moments: 384 bytes of w or an eighth of them, and 12 of b. And a count.
    assert both.splitlines()[-2].split()[2:4] == ["796", "124"]


def test_an_undonated_step_holds_the_state_twice():
    tx = ADAM_C(topc=3)
    shapes = [jax.eval_shape(lambda: PARAMS), jax.eval_shape(tx.init, PARAMS)]
    step = jax.jit(lambda params, state, g: tx.update(g, state, params))
    compiled = untyped(step.lower(*shapes, shapes[0]).compile())
    memory = compiled.memory_analysis()
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    of_parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(PARAMS))
    held = arrays - 2 * of_parameters  # gradients, updates; XLA drops unused params
    report = memoptax.memory_report(tx, PARAMS)
    assert 0 <= held - report.undonated <= of_parameters + 1000


def test_a_report_is_plain_data(mesh):
    place = functools.partial(spread_over, mesh)
    for shardings in (None, place):
        report = memoptax.memory_report(ADAM_C(topc=3), PARAMS, shardings)
        data = json.loads(json.dumps(dataclasses.asdict(report)))
        assert memoptax.MemoryReport(**data) == report


class Named(NamedTuple):
    """Parameters named like fields of states."""

    count: Any
    mu: Any


NAMED = Named(*(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3)))


@pytest.mark.parametrize("params", [NAMED, {"layer": NAMED}, [NAMED, NAMED]])
def test_names_of_parameters_are_no_names_of_fields(params):
    numbers = sum(x.size for x in jax.tree.leaves(params))
    labels = jax.tree.map(lambda x: x.size, params)
    for tx in (
        ADAM_C(topc=1),
        optax.MultiSteps(ADAM_C(topc=1), 2),
        optax.partition({n: ADAM_C(topc=1) for n in (2, 3)}, labels),
    ):
        fields = memoptax.memory_report(tx, params).fields
        assert "state" not in fields
        assert fields["slots"] == 4 * numbers
        assert fields["mu"] == fields["nu"] == 4 * numbers
        assert fields["count"] % 4 == 0 < fields["count"] <= 8


def test_shardings_unlike_the_state_are_refused(mesh):
    like_params = jax.tree.map(lambda _: NamedSharding(mesh, P()), PARAMS)
    with pytest.raises(ValueError, match="shardings must be a tree like the state"):
        memoptax.memory_report(optax.adam(0.1), PARAMS, like_params)


def test_a_function_of_other_arguments_makes_no_shardings():
    with pytest.raises(ValueError, match="shardings must be a function of 2 argum"):
        memoptax.memory_report(ADAM_C(), PARAMS, float)


def test_specs_are_no_shardings():
    specs = functools.partial(memoptax.state_partition_specs, specs=P())
    for call in (
        lambda: memoptax.memory_report(ADAM_C(), PARAMS, specs(ADAM_C(), PARAMS)),
        lambda: memoptax.memory_report(ADAM_C(), PARAMS, specs),
        lambda: memoptax.largest_topc(ADAM_C, PARAMS, 1e6, shardings=specs),
    ):
        with pytest.raises(ValueError, match=r"shardings.*must be a jax.sharding.Shar"):
            call()


@pytest.mark.parametrize("optimizer", [ADAM_C, functools.partial(memoptax.sgd_cm, 0.1)])
@pytest.mark.parametrize("budget", [2000, 3333, 5000, 8642])
def test_the_largest_topc_fits_and_one_more_would_not(optimizer, budget):
    fit = memoptax.largest_topc(optimizer, PARAMS, budget, at_most=1000)

    def size(topc, dtype):
        return memoptax.state_bytes(optimizer(topc=topc, buffer_dtype=dtype), PARAMS)

    assert fit.bytes == size(fit.topc, fit.buffer_dtype) <= budget
    assert size(fit.topc + 1, fit.buffer_dtype) > budget
    assert fit.buffer_dtype == "int8"  # which has the largest C


def test_slots_are_rounded_only_for_a_larger_topc():
    largest = functools.partial(memoptax.largest_topc, ADAM_C, PARAMS)
    tx = ADAM_C(topc=7, buffer_dtype=None)
    exact = memoptax.state_bytes(tx, PARAMS)
    assert largest(exact, at_most=7)[:2] == (7, None)
    assert largest(exact - 1, at_most=7)[:2] == (7, "bfloat16")
    assert largest(exact - 1, at_most=7, buffer_dtypes=[None])[:2] == (6, None)
    assert largest(exact, at_most=7, buffer_dtypes=["float16", None])[1] == "float16"


def test_a_budget_per_device(mesh):
    place = functools.partial(spread_over, mesh)
    largest = functools.partial(
        memoptax.largest_topc, ADAM_C, PARAMS, at_most=1000, buffer_dtypes=["bfloat16"]
    )
    fit, all_of_it = largest(700, shardings=place), largest(3000)
    tx = ADAM_C(topc=fit.topc, buffer_dtype=fit.buffer_dtype)
    report = memoptax.memory_report(tx, PARAMS, place)
    assert fit.bytes == report.total_per_device
    assert fit.bytes <= 700 < report.total
    assert fit.topc >= all_of_it.topc > 1


def test_a_budget_that_is_too_small_is_refused():
    least = memoptax.state_bytes(ADAM_C(topc=1, buffer_dtype="int8"), PARAMS)
    assert memoptax.largest_topc(ADAM_C, PARAMS, least).topc == 1
    with pytest.raises(ValueError, match=rf"budget is .* even topc=1 takes {least:,}"):
        memoptax.largest_topc(ADAM_C, PARAMS, least - 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("at_most", value) for value in (0, 2.5, True, "x", np.float32(3))]
    + [("buffer_dtypes", value) for value in ((), "int8", None)]
    + [("budget", value) for value in (float("nan"), -1, np.float32(-1), "x", None)]
    + [("optimizer", 3), ("shardings", "data")],
)
def test_what_cannot_be_searched_is_refused(name, value):
    good = {"optimizer": ADAM_C, "params": PARAMS, "budget": 1e6}
    with pytest.raises(ValueError) as error:
        memoptax.largest_topc(**{**good, name: value})
    assert str(error.value).startswith(f"{name} must ")
    assert repr(value) in str(error.value)


def test_what_makes_no_optimizer_is_refused():
    def nothing(topc, buffer_dtype):
        return None

    with pytest.raises(ValueError, match="what optimizer returns must be an optax"):
        memoptax.largest_topc(untyped(nothing), PARAMS, 1e6)


def test_numbers_of_numpy_are_searched():
    found = memoptax.largest_topc(ADAM_C, PARAMS, np.inf, at_most=untyped(np.int64(3)))
    assert found.topc == 3
