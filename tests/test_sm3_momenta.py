"""sm3_cm: adam_cm over single entries, an oracle over other boxes, and its memory."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax
from memoptax._buffer import algorithm
from memoptax._buffer.options import options as buffer_options

import goldens
import oracle_sm3_cm
from compiled import compile_step, step_of, temporaries
from streams import lognormal
from untyped import untyped

pytestmark = pytest.mark.few(1)

nan, inf = float("nan"), float("inf")
SHAPES = {"a": (), "b": (3,), "c": (4, 6)}
INT8: dict[str, Any] = {"mu_dtype": "int8", "buffer_dtype": "int8"}


def stream(steps=20, shapes=SHAPES):
    return lognormal(steps, shapes)


def at(grads, t):
    return jax.tree.map(lambda g: jnp.asarray(g[t]), grads)


def updates_of(tx, grads) -> Any:
    """The updates of every step, and the last state."""
    params = jax.tree.map(jnp.zeros_like, at(grads, 0))
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for t in range(len(next(iter(grads.values())))):
        updates, state = update(at(grads, t), state, params)
        out.append(updates)
    return jax.tree.map(lambda *u: np.stack(u), *out), state


# Over single entries it is adam_cm

OPTIONS = {
    "plain": {},
    "one slot": {"topc": 1, **INT8},
    "sum": {"topc": 3, "holding": "sum"},
    "unsynced": {"topc": 2, "synced": False, "aggr": "mean", "kappa": 0.5},
    "skip_first": {"topc": 2, "skip_first": True},
    "fifo": {"topc": 2, "fifo_probability": 0.5, "b1": 0.5, "b2": 0.9, "eps": 1e-3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_over_single_entries_it_is_adam_cm(name, x64):
    ours = memoptax.scale_by_sm3_cm(cover=memoptax.covers.full, **OPTIONS[name])
    grads = stream()
    got, state = updates_of(ours, grads)
    want, adam = updates_of(memoptax.scale_by_adam_cm(**OPTIONS[name]), grads)
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-12)
    nu = {k: a for k, (a,) in zip(sorted(SHAPES), state.accumulators)}
    chex.assert_trees_all_close(nu, adam.nu, rtol=1e-12)
    chex.assert_trees_all_equal(state.buffer, adam.buffer)


RECORDED = [
    case
    for case in goldens.cases("cm")
    if goldens.ours(case)[0] == "adam_cm" and not goldens.ours(case)[1]["amsgrad"]
]


def test_three_recorded_trajectories_have_no_amsgrad():
    assert len(RECORDED) == 3


@pytest.mark.parametrize("case", RECORDED, ids=repr)
def test_replays_the_recorded_trajectory(case):
    with jax.enable_x64(case.dtype == "float64"):
        arguments = {**goldens.ours(case)[1], "cover": memoptax.covers.full}
        del arguments["amsgrad"]
        tx = memoptax.sm3_cm(**arguments)
        params = jax.tree.map(jnp.asarray, case.params0)
        state, step, trajectory = tx.init(params), jax.jit(step_of(tx)), []
        for t in range(len(next(iter(case.grads.values())))):
            params, state = step(params, state, at(case.grads, t))
            trajectory.append(jax.tree.map(np.asarray, params))
        got = jax.tree.map(lambda *p: np.stack(p), *trajectory)
        assert goldens.deviation(case, got) < goldens.tolerance(case)


# The other boxes


def test_two_steps_by_hand(x64):
    # b1 = 0: m is g. topc 1: M = g, then g plus the first one.
    #   g:  [1 2]   [1 0]      M:  [1 2]   [2 2]
    #       [0 4]   [0 1]          [0 4]   [0 5]
    # With b2 = 1/2, nu_1 = M^2 / 2; rows A = 2, 8, columns A = 1/2, 8:
    #   nu_2 = [.25 1] + M^2 / 2
    #          [.25 4]
    grads = {"w": np.array([[[1.0, 2], [0, 4]], [[1, 0], [0, 1]]])}
    tx = memoptax.scale_by_sm3_cm(0.0, 0.5, 0.0, topc=1)
    got, state = updates_of(tx, grads)
    joined = np.array([[2.0, 2], [0, 5]])
    nu = np.array([[2.25, 3], [0.25, 16.5]])
    np.testing.assert_allclose(got["w"][1], joined / np.sqrt(nu / 0.75), rtol=1e-12)
    rows, columns = state.accumulators[0]
    np.testing.assert_allclose(rows, [[3], [16.5]], rtol=1e-12)
    np.testing.assert_allclose(columns, [[2.25, 16.5]], rtol=1e-12)


def both(path, leaf):
    """Slices and blocks."""
    blocks = memoptax.covers.blocks(2, 2)
    return memoptax.covers.axes(path, leaf) + blocks(path, leaf)


RULES = {
    "plain": {"topc": 3},
    "one slot in int8": {"topc": 1, "kappa": 0.5, **INT8},
    "unsynced": {"topc": 2, "synced": False, "aggr": "mean"},
    "skip_first": {"topc": 2, "skip_first": True},
    "int8": {"topc": 5, **INT8},
    "bfloat16": {"topc": 2, "mu_dtype": "bfloat16", "buffer_dtype": "bfloat16"},
    "no kappa": {"kappa": 0.0},
    "blocks": {"topc": 2, "cover": both},
    "whole": {"topc": 2, "cover": memoptax.covers.whole},
}


def agrees(options, grads, rtol=1e-11):
    """It agrees with the oracle on every step, finite or not."""
    options = dict(options)
    got, state = updates_of(memoptax.scale_by_sm3_cm(**options), grads)
    cover = options.pop("cover", memoptax.covers.axes)
    shapes = {name: g.shape[1:] for name, g in grads.items()}
    boxes = {
        name: [tuple(max(b, 1) for b in box) for box in cover((), g[0])]
        for name, g in grads.items()
    }
    alone = oracle_sm3_cm.SM3Cm(boxes, shapes, **options)
    for t in range(len(next(iter(grads.values())))):
        want = alone.step({name: np.float64(g[t]) for name, g in grads.items()})
        for name in grads:
            np.testing.assert_allclose(got[name][t], want[name], rtol, rtol)
    for numbers, name in zip(state.accumulators, sorted(shapes)):
        for mine, theirs in zip(numbers, alone.squares[name].numbers, strict=True):
            np.testing.assert_allclose(np.ravel(mine), theirs, rtol)


@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_oracle(rule, x64):
    grads = stream(24)
    grads["b"][5] = 0
    grads["c"][7, 1, 2] = nan
    grads["a"][8] = -inf
    for g in grads.values():
        g[11] = g[10]  # a tie
    agrees({"b2": 0.9, "eps": 1e-3, **RULES[rule]}, grads)


@pytest.mark.parametrize("shape", [(257, 200), (2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("options", [{"topc": 1}, {"topc": 2, **INT8}], ids=str)
def test_many_entries_and_many_axes(shape, options, x64):
    """The maxima of large tensors are computed in another way, with the same result."""
    agrees({"eps": 1e-3, **options}, stream(4, shapes={"w": shape}))


def test_no_step_is_longer_than_that_of_adam_cm(x64):
    """The least accumulator of an entry's boxes bounds its second moment from above."""
    grads = stream(30)
    ours, _ = updates_of(memoptax.scale_by_sm3_cm(topc=2), grads)
    adam, _ = updates_of(memoptax.scale_by_adam_cm(topc=2), grads)
    for name in SHAPES:
        assert np.all(np.abs(ours[name]) <= np.abs(adam[name]) * (1 + 1e-12))
    for name in "ab":  # these have a number for every entry
        np.testing.assert_allclose(ours[name], adam[name], rtol=1e-12)
    assert np.mean(np.abs(ours["c"]) < 0.99 * np.abs(adam["c"])) > 0.5


@pytest.mark.parametrize("off", [{"topc": 0}, {"kappa": 0.0}], ids=str)
def test_without_a_buffer_it_scales_the_momentum(off, x64):
    grads = stream(10)
    got, state = updates_of(memoptax.scale_by_sm3_cm(**off), grads)
    assert state.buffer is None
    traced = optax.inject_hyperparams(memoptax.scale_by_sm3_cm)(kappa=0.0)
    want, _ = updates_of(traced, grads)
    chex.assert_trees_all_close(got, want, rtol=1e-12)


def test_it_is_a_chain():
    grads = {k: np.float32(g) for k, g in stream(5).items()}
    mask = {name: name == "c" for name in SHAPES}
    options = {"topc": 2, "cover": memoptax.covers.rows}
    whole = memoptax.sm3_cm(0.1, 0.8, weight_decay=0.3, mask=mask, **options)
    parts = optax.chain(
        memoptax.scale_by_sm3_cm(0.8, **options),
        optax.add_decayed_weights(0.3, mask),
        optax.scale_by_learning_rate(0.1),
    )
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    got, want = (
        jax.jit(tx.update)(at(grads, 0), tx.init(params), params)[0]
        for tx in (whole, parts)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-6)


# Numbers that are not finite


@pytest.mark.parametrize("options", [{"topc": 1, **INT8}, {"topc": 0}], ids=str)
def test_a_step_that_is_not_finite_changes_nothing(options):
    tx = memoptax.scale_by_sm3_cm(**options)
    grads = {k: np.float32(g) for k, g in stream(4).items()}
    state, update = tx.init(at(grads, 0)), jax.jit(tx.update)
    for t in range(4):
        _, state = update(at(grads, t), state)
    for bad in (nan, inf, 1e30):
        spoiled = at(grads, 3)
        spoiled["b"] = spoiled["b"].at[1].set(bad)
        updates, after = update(spoiled, state)
        assert all(np.isnan(u).all() for u in updates.values())
        chex.assert_trees_all_equal(after, state)


# Memory

MATRIX = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}


@pytest.mark.parametrize(("topc", "most"), [(1, 2.2), (5, 7.2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_a_1024_matrix_in_int8(topc, most, dtype):
    params = jax.tree.map(lambda p: p.update(dtype=jnp.dtype(dtype)), MATRIX)
    tx = memoptax.sm3_cm(1e-3, topc=topc, **INT8)
    assert memoptax.state_bytes(tx, params) / 1024**2 <= most


def test_bytes_of_a_1024_matrix_by_field():
    """m, one slot, their scales, rows and columns."""
    tx = memoptax.scale_by_sm3_cm(topc=1, **INT8)
    fields = memoptax.memory_report(tx, MATRIX).fields
    assert fields["mu"] == fields["slots"] == 1024**2
    assert fields["accumulators"] == 4 * 2048
    assert sum(fields.values()) - 2 * 1024**2 - 4 * 2048 < 2 * 4 * 1024 + 100


@pytest.mark.parametrize(
    ("options", "most"),
    [({"topc": 0}, 0.1), ({"topc": 5}, 0.1), ({"topc": 1}, 1.1)],
    ids=str,
)
def test_a_step_stores_no_temporary_m_or_nu(options, most):
    """XLA's CPU backend copies a lone slot, and nothing else. Its GPU backend stores
    what is joined with five slots: reading them three times would take longer.
    """
    if jax.default_backend() != "cpu":
        most = 1.1 if options["topc"] == 5 else 0.1
    tx = memoptax.sm3_cm(1e-3, **options)
    params = [jnp.zeros((1024, 1024))] * 4
    compiled = compile_step(step_of(tx), params, tx.init(params), params)
    assert temporaries(compiled, params) <= most


def test_half_precision_is_widened_before_it_is_averaged():
    gradient = jnp.full((3, 4), 1.2345, jnp.bfloat16)
    tx = memoptax.scale_by_sm3_cm()
    update, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    assert update.dtype == jnp.bfloat16
    assert state.mu.dtype == state.accumulators[0][0].dtype == jnp.float32
    wide = np.float32(gradient[0, 0])
    np.testing.assert_allclose(state.mu, 0.1 * wide, rtol=1e-6)
    rows, _ = state.accumulators[0]
    np.testing.assert_allclose(rows, 0.001 * (0.1 * wide) ** 2, rtol=1e-4)


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be .* is -1.0"),
        ({"b1": 1.0}, "b1 must be .* is 1.0"),
        ({"b2": -0.1}, "b2 must be .* is -0.1"),
        ({"eps": -1e-8}, "eps must be .* is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be .* is -0.1"),
        ({"cover": 3}, "cover must be None, a function .* but is 3"),
        ({"skip_first": 1}, "skip_first must be True or False, but is 1"),
        ({"mu_dtype": "int4"}, "mu_dtype must be one of .* is 'int4'"),
        ({"topc": 2.5}, "topc must be an integer .* is 2.5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        memoptax.sm3_cm(**({"learning_rate": 0.1} | arguments))


def test_a_state_of_other_arguments_is_refused():
    params = {"w": jnp.zeros((3, 4))}
    state = memoptax.scale_by_sm3_cm().init(params)
    refused = [
        ({"cover": memoptax.covers.rows}, "cover of .*'w'.* asks for accumulators"),
        ({"topc": 0}, "topc or kappa is 0, .* but the state has one"),
        ({"mu_dtype": "int8"}, "mu_dtype is 'int8', but the state has"),
        ({"topc": 3}, "topc is 3, but the state was made with topc=5"),
    ]
    for options, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            memoptax.scale_by_sm3_cm(**options).update(params, state)
    none = memoptax.scale_by_sm3_cm(topc=0)
    with pytest.raises(ValueError, match="state holds no buffer where one is needed"):
        memoptax.scale_by_sm3_cm().update(params, none.init(params))
    with pytest.raises(ValueError, match="'w'"):
        none.update({"w": jnp.zeros((3, 5))}, none.init(params))


def test_a_function_joins_whole_leaves():
    shapes = set()

    def join(update, mean, fill):
        shapes.add(update.shape)
        return update + mean

    x = jnp.ones((256, 256))  # so large that its maxima are taken in sections
    by_name, by_function = (
        memoptax.sm3_cm(0.1, aggr=aggr, topc=5, **INT8) for aggr in ("sum", join)
    )
    states = [tx.init(x) for tx in (by_name, by_function)]
    for step in range(3):
        gradient = jax.random.normal(jax.random.key(step), x.shape)
        (a, first), (b, second) = (
            jax.jit(tx.update)(gradient, state, x)
            for tx, state in zip((by_name, by_function), states)
        )
        states = [first, second]
        chex.assert_trees_all_close((a, first), (b, second), rtol=1e-5)
    assert shapes == {x.shape}


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"topc": 5}, False),
        ({"topc": 5, "buffer_dtype": "int8"}, True),
        ({"topc": 5, "buffer_dtype": "bfloat16"}, True),
        ({"topc": 5, "buffer_dtype": "int8", "holding": "sum"}, False),
        ({"topc": 1, "buffer_dtype": "int8"}, False),
        ({"buffer_dtype": "int8", "aggr": lambda u, mean, fill: u + mean}, False),
    ],
    ids=["float32", "int8", "bfloat16", "sum", "one", "aggr"],
)
@pytest.mark.few(9)
def test_only_narrow_slots_that_are_all_read_are_read_again(options, again):
    """Maxima read them, or the result. Results in float32 move fewer bytes."""
    chosen, values = buffer_options(**options), {"a": jnp.ones((4, 3))}
    buffer = jax.eval_shape(lambda: algorithm.empty(chosen, values))
    found = []

    def parts(before, after):
        found[:] = algorithm.parts(chosen, before, after, values)

    jax.eval_shape(parts, buffer, buffer)
    assert [part is not None for part in found] == [again]


ZERO_MOMENTS = {
    "sm3_cm": memoptax.sm3_cm(0.1),
    "sm3_cm, skipped": memoptax.sm3_cm(0.1, skip_first=True),
    "adam_cm": memoptax.adam_cm(0.1),
    "adam_cm, skipped": memoptax.adam_cm(0.1, skip_first=True),
    "adam_c": memoptax.adam_c(0.1, eps_root=1e-16),
    "adamw_c": memoptax.adamw_c(0.1, weight_decay=0.0, eps_root=1e-16),
    "rmsprop_c": memoptax.rmsprop_c(0.1, initial_scale=1e-8),
    "adam_c, amsgrad": memoptax.adam_c(0.1, amsgrad=True),
    "sm3": memoptax.sm3(0.1),
    "sm3, traced eps": memoptax.sm3(0.1, eps=jnp.float32(1e-30)),
    "sm3, no eps": memoptax.sm3(0.1, 0.9, eps=0.0),
    "sm3, vectors": memoptax.sm3(0.1, cover=memoptax.covers.full),
}


@pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("name", ZERO_MOMENTS)
@pytest.mark.few(8)
def test_derivatives_through_a_zero_second_moment_are_finite(name, loop):
    """A dead unit: one entry of every gradient is 0."""
    tx = untyped(ZERO_MOMENTS[name])
    alive = jnp.array([[1.0, 0.0]])

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(x * x * alive, state, x)
        return (optax.apply_updates(x, updates), state), None

    def trained(x):
        carry = untyped((x, tx.init(x)))
        if loop:
            carry, _ = jax.lax.scan(step, carry, None, length=3)
        else:
            for _ in range(3):
                carry, _ = step(carry, None)
        return jnp.sum(untyped(carry)[0])

    found = jax.jit(jax.grad(trained))(jnp.ones((1, 2)))
    assert jnp.all(jnp.isfinite(found)) and found[0, 1] == 1
    second = jax.jit(jax.hessian(trained))(jnp.ones((1, 2)))
    assert jnp.all(jnp.isfinite(second)) and jnp.all(second[0, 1] == 0)
