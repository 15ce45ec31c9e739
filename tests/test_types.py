# pyright: strict, reportMissingTypeStubs=false, reportUnnecessaryTypeIgnoreComment=true
"""A user's code. It must type-check in pyright's strict mode, and run."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AbstractMesh, PartitionSpec

import memoptax

from arguments import BUFFERED

PARAMS = {"w": np.ones((4, 2), np.float32), "b": np.ones(2, np.float32)}
SHAPES = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
SCHEDULE = optax.cosine_decay_schedule(0.1, 10)
TRACED: Any = jax  # pyright does not know all types of jit and eval_shape


def run(tx: optax.GradientTransformation) -> None:
    """One step, traced but not computed."""

    def step(params: optax.Params) -> optax.Params:
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates)

    TRACED.eval_shape(step, PARAMS)


# Numbers and schedules


def test_numbers_are_those_of_python_numpy_and_jax():
    for number in (0.5, np.float32(0.5), jnp.float32(0.5)):
        run(memoptax.critical_gradients(decay=number, kappa=number))
        run(memoptax.critical_momenta(number, fifo_probability=number))
        run(memoptax.scale_by_adam_cm(number, number, number, number))
        run(memoptax.scale_by_sm3(number, number, number))


def test_rates_may_be_schedules():
    run(memoptax.sgd_c(SCHEDULE, momentum=0.9, weight_decay=SCHEDULE))
    run(memoptax.rmsprop_c(SCHEDULE, momentum=0.9, centered=True))
    run(memoptax.adam_c(memoptax.sm3_schedule(0.1, 5, 10), amsgrad=True))
    run(memoptax.adamw_c(0.1, weight_decay=lambda count: 0.1))
    run(memoptax.sgd_cm(jnp.float32(0.1), mu_dtype="int8"))
    run(memoptax.sm3(SCHEDULE, weight_decay=SCHEDULE, momentum_dtype=jnp.bfloat16))


def test_hyperparameters_may_be_injected():
    make = optax.inject_hyperparams(memoptax.adam_c, static_args="topc")
    run(make(learning_rate=SCHEDULE, topc=2, decay=0.9))


# The buffer's arguments


def halfway(update: jax.Array, mean: jax.Array, fill: jax.Array) -> jax.Array:
    return jnp.where(fill > 1, update + mean, 2 * update + mean) / 2


def largest(gradients: dict[str, jax.Array]) -> jax.Array:
    return jnp.max(jnp.abs(gradients["w"]))


def test_an_aggregate_may_be_a_function():
    run(memoptax.adam_c(0.1, aggr=halfway))
    run(memoptax.critical_momenta(aggr=lambda update, mean, fill: update + mean / fill))
    for name in ("sum", "mid", "mean"):
        run(memoptax.adam_cm(0.1, aggr=name))


def test_a_priority_may_be_a_function():
    run(memoptax.sgd_c(0.1, priority_fn=largest))
    run(memoptax.sgd_c(0.1, priority_fn=lambda gradients: 1.0))
    run(memoptax.sgd_c(0.1, priority_fn=optax.tree.norm))
    norm = memoptax.sharded_norm({"w": "data", "b": None}, rule=largest)
    memoptax.sgd_c(0.1, priority_fn=norm, synced=True)


def with_warmup(
    peak: float, **buffer: Unpack[memoptax.BufferArguments]
) -> optax.GradientTransformation:
    """A user's optimizer that passes the buffer's arguments on."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, 2, 10)
    return memoptax.adamw_cm(schedule, weight_decay=0.1, aggr="mid", **buffer)


def test_the_arguments_of_a_buffer_may_be_handed_on():
    run(
        with_warmup(0.1, topc=2, decay=0.9, buffer_dtype="int8", holding="read", seed=1)
    )


def test_an_unknown_argument_is_refused_under_the_name_of_the_optimizer():
    with pytest.raises(TypeError, match=r"^adam_c\(\) got an unexpected .* 'topC'$"):
        memoptax.adam_c(0.1, topC=5)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"^sm3_cm\(\) missing .* 'learning_rate'$"):
        memoptax.sm3_cm(topc=5)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("make", BUFFERED)
def test_the_signature_has_the_arguments_of_the_buffer(make: Callable[..., Any]):
    """With the types and defaults of the function that explains them."""
    explained = inspect.signature(memoptax.critical_gradients).parameters
    found = inspect.signature(make).parameters
    assert memoptax.BufferArguments.__annotations__.keys() == explained.keys() - {
        "aggr"
    }
    for name, parameter in explained.items():
        assert found[name].annotation == parameter.annotation
        assert name == "aggr" or found[name].default == parameter.default
    assert all(p.annotation is not p.empty for p in found.values())


# Masks and covers


def is_matrix(leaf: jax.Array) -> bool:
    return leaf.ndim > 1


def matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(is_matrix, params)


def test_a_mask_is_a_tree_or_a_function():
    run(memoptax.adamw_c(0.1, mask={"w": True, "b": False}))
    run(memoptax.adamw_cm(0.1, mask=matrices))
    run(memoptax.sm3(0.1, weight_decay=0.1, mask=matrices))
    run(memoptax.sm3_cm(0.1, weight_decay=0.1, mask=lambda params: matrices(params)))


def columns(path: Any, leaf: Any) -> list[tuple[int, ...]]:
    return memoptax.covers.axes(path, leaf)[-1:]


def both(path: Any, leaf: Any) -> list[tuple[int, ...]]:
    blocks = memoptax.covers.blocks(2, 2)
    return memoptax.covers.axes(path, leaf) + blocks(path, leaf)


def test_a_cover_is_a_function_or_a_list():
    chosen: list[memoptax.Cover] = [
        memoptax.covers.rows,
        memoptax.covers.blocks(None, 2),
        columns,
        both,
    ]
    for cover in chosen:
        run(memoptax.sm3(0.1, cover=cover))
        run(memoptax.sm3_cm(0.1, cover=cover, topc=1))
    memoptax.scale_by_sm3(cover=[(1, 2), (4, 1)])


# States and tools


def test_states_have_names_and_fields():
    tx = memoptax.critical_gradients(topc=3)
    state = tx.init(PARAMS)
    assert isinstance(state, memoptax.CriticalGradientsState)
    buffer: memoptax.Buffer = state.buffer
    keys: jax.Array = buffer.keys
    smaller: memoptax.CriticalGradientsState = memoptax.resize_buffer(state, 2)
    empty = memoptax.reset_buffer(smaller)
    assert keys.shape == (1, 3) and empty.buffer.keys.shape == (1, 2)
    stats: dict[str, jax.Array] = memoptax.buffer_stats(state, PARAMS)
    assert stats["fill"] == 0
    memoptax.check_state(tx, PARAMS, state)


def test_bytes_are_known_before_anything_is_allocated():
    adam_c = functools.partial(memoptax.adam_c, 1e-3)
    best = memoptax.largest_topc(adam_c, SHAPES, budget=1e3)
    tx = adam_c(topc=best.topc, buffer_dtype=best.buffer_dtype)
    report: memoptax.MemoryReport = memoptax.memory_report(tx, SHAPES)
    assert report.total == memoptax.state_bytes(tx, SHAPES) == best.bytes
    assert report.fields["mu"] == 32
    several = optax.MultiSteps(tx, 2)
    assert memoptax.state_bytes(several, SHAPES) > report.total


def test_specs_of_a_state():
    mesh = AbstractMesh((2,), ("data",))
    specs = memoptax.state_partition_specs(
        memoptax.critical_gradients(topc=1),
        SHAPES,
        {"w": PartitionSpec()},
        mesh,
        over="data",
    )
    assert specs.buffer.slots["w"] == PartitionSpec("data")


def loss(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.sum(rows * weight)


def test_row_sparse_gradients():
    tx = optax.chain(
        memoptax.sparse.on_values(optax.clip_by_global_norm(1.0)),
        memoptax.sm3(0.1, cover=memoptax.covers.rows),
    )
    ids = np.array([1, 3])

    def step(table: jax.Array, weight: jax.Array) -> optax.Params:
        value, gradients = memoptax.sparse.row_value_and_grad(loss, table, ids, weight)
        updates, _ = tx.update(gradients, tx.init((table, weight)), (table, weight))
        assert value.shape == ()
        rows: BCOO = gradients[0]
        memoptax.sparse.apply_updates({"table": table}, {"table": rows})
        return memoptax.sparse.apply_updates((table, weight), updates)

    table, _ = TRACED.eval_shape(step, np.ones((5, 2), np.float32), 2.0)
    assert table.shape == (5, 2)
