"""SM3 against the recorded originals, an oracle, its neighbours and its promises."""

import functools
import os
import pathlib
import re
import subprocess
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO

import memoptax

import goldens
import oracle_sm3

pytestmark = pytest.mark.few(2)


def named(value):
    """A test's name, without the address of a function: workers must agree on it."""
    return re.sub(r"<function (\S+) at \w+>", r"\1", str(value))


few = hypothesis.settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def normal(seed, shape, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def steps_of(tx, params, gradients):
    """Yields the updates of a stream of gradients."""
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        yield updates


# --- the originals -------------------------------------------------------------------


def row_sparse(g, touched, slots):
    ids = np.flatnonzero(touched)
    padded = np.full(slots, g.shape[0])
    padded[: len(ids)] = ids
    data = np.zeros((slots, *g.shape[1:]), g.dtype)
    data[: len(ids)] = g[ids]
    return BCOO((jnp.array(data), jnp.array(padded[:, None])), shape=g.shape)


@pytest.mark.parametrize("case", goldens.cases("sm3"), ids=repr)
def test_golden_trajectory(case):
    name, options = goldens.ours(case)
    cover = memoptax.covers.rows if case.sparse_rows else None
    with jax.enable_x64(case.dtype == "float64"):
        tx = getattr(memoptax, name)(**options, cover=cover)
        params = jax.tree.map(jnp.asarray, case.params0)
        state = tx.init(params)

        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return memoptax.sparse.apply_updates(params, updates), state

        trajectory = []
        for t in range(40):
            grads = {n: g[t] for n, g in case.grads.items()}
            if case.sparse_rows:
                grads = {
                    n: row_sparse(g, case.sparse_rows[n][t], len(g))
                    for n, g in grads.items()
                }
            params, state = step(params, state, grads)
            trajectory.append(jax.tree.map(np.asarray, params))
    ours = jax.tree.map(lambda *steps: np.stack(steps), *trajectory)
    assert {str(p.dtype) for p in ours.values()} == {case.dtype}
    assert goldens.deviation(case, ours) < goldens.tolerance(case)


# --- the oracle ----------------------------------------------------------------------


@st.composite
def problems(draw, max_rank=4):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=max_rank)))
    box = st.tuples(*(st.integers(1, n + 1) for n in shape))
    boxes = draw(st.lists(box, min_size=1, max_size=3))
    if draw(st.booleans()):
        boxes += memoptax.covers.axes((), jax.ShapeDtypeStruct(shape, "float32"))
    seed = draw(st.integers(0, 2**31))
    scales = draw(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 30.0]), min_size=4))
    return shape, boxes, [normal(seed + t, shape, s) for t, s in enumerate(scales[:8])]


@few
@hypothesis.given(
    problems(),
    st.sampled_from(["I", "II"]),
    st.sampled_from([None, 0.9]),
    st.sampled_from([None, 0.5, 0.95]),
)
def test_oracle(problem, variant, momentum, beta):
    shape, boxes, gradients = problem
    oracle = oracle_sm3.SM3(shape, boxes, variant, momentum, beta)
    with jax.enable_x64(True):
        tx = memoptax.scale_by_sm3(momentum, beta, variant=variant, cover=boxes)
        updates = steps_of(tx, jnp.zeros(shape), map(jnp.asarray, gradients))
        for g, u in zip(gradients, updates):
            np.testing.assert_allclose(u, oracle.step(g), rtol=1e-12, atol=1e-14)


LARGE = [(520, 264), (264, 521), (3, 3, 128, 120), (64, 4096), (16, 12289)]


@pytest.mark.parametrize("shape", LARGE, ids=named)
@pytest.mark.parametrize("variant", ["I", "II"])
def test_large_tensors_take_another_road_to_the_same_numbers(shape, variant):
    """From some size on, the maxima are taken over recomputed slices."""
    axes = memoptax.covers.axes((), jax.ShapeDtypeStruct(shape, "float32"))
    tx = memoptax.scale_by_sm3(variant=variant)
    state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
    least = np.zeros(shape)
    for t in range(3):
        g = normal(t, shape).astype(np.float32)
        u, state = update(jnp.asarray(g), state)
        axis = lambda box: tuple(i for i, b in enumerate(box) if b > 1)  # noqa: E731
        square = np.square(g, dtype=np.float64)
        if variant == "II":
            nu = least + square
            numbers = [nu.max(axis(box), keepdims=True) for box in axes]
        else:
            old = numbers if t else [0.0] * len(axes)
            tops = [square.max(axis(box), keepdims=True) for box in axes]
            numbers = [a + b for a, b in zip(old, tops)]
            nu = functools.reduce(np.minimum, numbers)
        least = functools.reduce(np.minimum, numbers)
        np.testing.assert_allclose(u, g / np.sqrt(nu), rtol=1e-5)
    for ours, theirs in zip(state.accumulators[0], numbers):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_large_tensors_with_blocks_and_slices():
    shape = (1100, 130)
    cover = lambda path, leaf: [  # noqa: E731
        *memoptax.covers.axes(path, leaf),
        (7, 130),
        (32, 16),
    ]
    tx = memoptax.scale_by_sm3(cover=cover)
    oracle = oracle_sm3.SM3(shape, [(1, 130), (1100, 1), (7, 130), (32, 16)])
    gradients = [normal(t, shape).astype(np.float32) for t in range(3)]
    for g, u in zip(gradients, steps_of(tx, jnp.zeros(shape), gradients)):
        np.testing.assert_allclose(u, oracle.step(g), rtol=1e-5)


# --- neighbours ----------------------------------------------------------------------


def adagrad(gradients):
    total = 0.0
    for g in gradients:
        total = total + g * g
        yield g / jnp.sqrt(total + 1e-30)


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize(
    "shape, cover",
    [((4, 3, 2), memoptax.covers.full), ((7,), None), ((), None)],
    ids=named,
)
def test_singleton_boxes_and_low_ranks_are_adagrad(shape, cover, variant):
    gradients = [jnp.asarray(normal(t, shape), jnp.float32) for t in range(5)]
    tx = memoptax.scale_by_sm3(variant=variant, cover=cover)
    with jax.disable_jit():  # no fused multiply-add: the same bits
        state = tx.init(jnp.zeros(shape))
        for g, reference in zip(gradients, adagrad(gradients)):
            u, state = tx.update(g, state)
            np.testing.assert_array_equal(u, reference)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4), (2, 2, 3, 2)], ids=named)
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_equals_optax_with_the_same_eps(shape, momentum):
    gradients = [jnp.asarray(normal(t, shape), jnp.float32) for t in range(20)]
    theirs = optax.scale_by_sm3(b1=momentum or 0.0, eps=1e-30)
    params = jnp.zeros(shape)
    ours = steps_of(memoptax.scale_by_sm3(momentum), params, gradients)
    for u, v in zip(ours, steps_of(theirs, params, gradients)):
        np.testing.assert_allclose(u, v, rtol=2e-6, atol=1e-7)


@hypothesis.settings(few, max_examples=5)
@hypothesis.given(st.permutations(range(4)), st.sampled_from(["I", "II"]))
@pytest.mark.long
def test_permuting_axes_permutes_the_update(order, variant):
    gradients = [normal(t, (2, 3, 4, 5)).astype(np.float32) for t in range(2)]
    turned = [g.transpose(order) for g in gradients]
    tx = memoptax.scale_by_sm3(variant=variant)
    straight = steps_of(tx, jnp.zeros((2, 3, 4, 5)), gradients)
    for u, v in zip(straight, steps_of(tx, jnp.zeros(turned[0].shape), turned)):
        np.testing.assert_allclose(u.transpose(order), v, rtol=1e-6)


@few
@hypothesis.given(problems(max_rank=3))
@pytest.mark.long
def test_sandwich(problem):
    """Adagrad's sum <= nu of SM3-II <= nu of SM3-I, whatever the boxes."""
    shape, boxes, gradients = problem
    total = np.zeros(shape)
    with jax.enable_x64(True):
        params = jnp.zeros(shape)
        arrays = [jnp.asarray(g) for g in gradients]
        roads = [
            steps_of(memoptax.scale_by_sm3(variant=v, cover=boxes), params, arrays)
            for v in ("II", "I")
        ]
        for g, second, first in zip(gradients, *roads):
            total += g**2
            there = g != 0  # where g is not 0, |u| = |g| / sqrt(nu) shows nu
            u_ii, u_i = np.asarray(second)[there], np.asarray(first)[there]
            slack = 1 + 1e-12
            assert (total[there] * u_ii**2 <= g[there] ** 2 * slack).all()
            assert (np.abs(u_i) <= np.abs(u_ii) * slack).all()


def test_sandwich_is_strict_somewhere():
    """The property above would hold for three equal numbers too."""
    gradients = [normal(t, (4, 4)) for t in range(3)]
    roads = [
        list(steps_of(memoptax.scale_by_sm3(variant=v), jnp.zeros((4, 4)), gradients))
        for v in ("II", "I")
    ]
    adagrads = list(adagrad(gradients))
    assert (np.abs(roads[0][-1]) < np.abs(adagrads[-1]) * 0.99).any()
    assert (np.abs(roads[1][-1]) < np.abs(roads[0][-1]) * 0.99).any()


# --- numbers -------------------------------------------------------------------------


def test_fifty_thousand_bfloat16_steps_do_not_stall():
    tx = memoptax.scale_by_sm3(0.9)
    params = jnp.zeros((4, 8), jnp.bfloat16)

    def step(state, _):
        updates, state = tx.update(jnp.ones_like(params), state)
        return state, updates[0, 0]

    state, updates = jax.jit(
        lambda state: jax.lax.scan(step, state, None, length=50_000)
    )(tx.init(params))
    for accumulator in state.accumulators[0]:
        np.testing.assert_array_equal(accumulator, 50_000.0)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(updates[-1]), 50_000**-0.5, rtol=1e-2)


def test_beta_is_an_average_that_decreases():
    tx = memoptax.scale_by_sm3(beta=0.9)
    gradients = [jnp.full((3, 4), 10.0)] + [jnp.full((3, 4), 0.1)] * 200
    *_, last = steps_of(tx, jnp.zeros((3, 4)), gradients)
    np.testing.assert_allclose(last, 1.0, rtol=1e-3)


def test_small_gradients_keep_the_scale_of_their_step():
    for g in (1e-4, 1e-6, 1e-12):
        (u,) = steps_of(
            memoptax.scale_by_sm3(), jnp.zeros((2, 3)), [jnp.full((2, 3), g)]
        )
        np.testing.assert_allclose(u, 1.0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("eps", [1e-30, 0.0])
def test_zero_over_zero_is_zero(dtype, eps):
    zeros = jnp.zeros((3, 4), dtype)
    (u,) = steps_of(memoptax.scale_by_sm3(eps=eps), zeros, [zeros])
    np.testing.assert_array_equal(u, zeros)


def test_float16_gradients_above_300():
    g = jnp.full((2, 3), 6e4, jnp.float16)
    tx = memoptax.scale_by_sm3()
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, jnp.ones_like(g))
    np.testing.assert_allclose(state.accumulators[0][0], float(g[0, 0]) ** 2)


@functools.cache
def shared(momentum_dtype, variant):
    """One transformation for all bad entries: jit compiles it once for a shape."""
    tx = memoptax.scale_by_sm3(0.9, variant=variant, momentum_dtype=momentum_dtype)
    return tx.init, jax.jit(tx.update)


def one_bad_step(shape, bad, momentum_dtype, variant):
    """The update of a gradient with a bad entry among other leaves, and three states:
    before it, after it, and had the gradient been good.
    """
    init, update = shared(momentum_dtype, variant)
    good = {"a": jnp.asarray(normal(0, shape), jnp.float32), "b": jnp.ones((2, 2))}
    _, before = update(good, init(good))
    updates, after = update(
        dict(good, a=good["a"].at[(0,) * len(shape)].set(bad)), before
    )
    assert np.isfinite(np.asarray(updates["b"])).all()
    # The healthy leaf has moved on.
    assert after.accumulators[1][0][0, 0] > before.accumulators[1][0][0, 0]
    return updates["a"], before, after, update(good, before)[1]


def momentum_of_a(state):
    return state.momentum["a"], state.scales and state.scales[0]


each_storage = pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
# The square of the last is not finite.
each_bad = pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e25])


@each_bad
@pytest.mark.parametrize("shape", [(4, 3), (400, 128), (1030, 130)], ids=named)
@pytest.mark.parametrize("variant", ["I", "II"])
@each_storage
def test_what_is_not_finite_leaves_no_trace(bad, shape, variant, dtype):
    update, before, after, _ = one_bad_step(shape, bad, dtype, variant)
    assert np.isfinite(np.asarray(update)).all() == np.isfinite(bad)
    for of in (lambda s: s.accumulators[0], momentum_of_a):
        jax.tree.map(np.testing.assert_array_equal, of(before), of(after))


@each_bad
@pytest.mark.parametrize("shape", [(), (300,), (140_000,)], ids=named)
@pytest.mark.parametrize("variant", ["I", "II"])
@each_storage
def test_adagrad_refuses_entry_by_entry(bad, shape, variant, dtype):
    update, *states = one_bad_step(shape, bad, dtype, variant)
    assert np.isfinite(np.asarray(update)).all() == np.isfinite(bad)
    there = (0,) * len(shape)
    for of in (lambda s: s.accumulators[0][0], lambda s: s.momentum["a"]):
        before, after, healthy = (np.array(of(s)) for s in states)
        if before.dtype == np.int8:  # with one scale, the row rests whole
            np.testing.assert_array_equal(after, before)
            np.testing.assert_array_equal(states[1].scales[0], states[0].scales[0])
            continue
        assert not np.array_equal(before, healthy)
        healthy[there] = before[there]
        np.testing.assert_array_equal(after, healthy)


def test_an_accumulator_does_not_overflow():
    tx, g = memoptax.scale_by_sm3(), jnp.array([1.5e19, 1.0])
    state = tx.init(g)
    for _ in range(3):
        updates, state = tx.update(g, state)
    np.testing.assert_allclose(state.accumulators[0][0], [2.25e38, 3])
    np.testing.assert_allclose(updates, [1, 3**-0.5], rtol=1e-6)


def test_apply_if_finite_sees_what_is_not_finite():
    tx = optax.apply_if_finite(memoptax.sm3(0.1, 0.9), 5)
    params = {"w": jnp.ones((3, 4))}
    state = tx.init(params)
    bad = {"w": jnp.ones((3, 4)).at[1, 2].set(jnp.nan)}
    updates, state = tx.update(bad, state, params)
    assert int(state.notfinite_count) == 1
    np.testing.assert_array_equal(updates["w"], 0.0)
    updates, state = tx.update({"w": jnp.ones((3, 4))}, state, params)
    np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-6)


def test_derivatives_are_finite_where_the_gradient_is_zero():
    tx = memoptax.scale_by_sm3(0.9)

    def after_two_steps(g):
        state = tx.init(g)
        _, state = tx.update(g, state)
        updates, _ = tx.update(2 * g, state)
        return jnp.sum(updates**2)

    g = jnp.array([[0.0, 1.0], [0.0, 0.0], [2.0, 3.0]])
    assert np.isfinite(np.asarray(jax.grad(after_two_steps)(g))).all()


@pytest.mark.parametrize("shape", [(3, 4), (1030, 130)], ids=named)
@pytest.mark.long
def test_derivatives_follow_finite_differences(shape):
    with jax.enable_x64(True):
        tx = memoptax.scale_by_sm3()
        weights = jnp.asarray(normal(3, shape))
        first, second = (jnp.asarray(normal(t, shape)) for t in (1, 2))

        def f(scale):
            _, state = tx.update(scale * first, tx.init(first))
            return jnp.sum(weights * tx.update(second, state)[0])

        h = 1e-6
        slope = (f(1 + h) - f(1 - h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(f)(1.0), slope, rtol=1e-6)


# --- momentum in few bytes -----------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.03)]
)
def test_stored_momentum_stays_close(dtype, tolerance):
    params = jnp.zeros((6, 40))
    gradients = [jnp.asarray(normal(t, (6, 40)), jnp.float32) for t in range(100)]
    exact = steps_of(memoptax.scale_by_sm3(0.9), params, gradients)
    stored = steps_of(
        memoptax.scale_by_sm3(0.9, momentum_dtype=dtype), params, gradients
    )
    for u, v in zip(exact, stored):
        largest = np.abs(np.asarray(u)).max(1, keepdims=True)
        assert (np.abs(np.asarray(u - v)) <= tolerance * largest).all()


def test_int8_scales_keep_small_rows_apart_from_large_ones():
    tx = memoptax.scale_by_sm3(0.9, cover=memoptax.covers.whole, momentum_dtype="int8")
    state = tx.init(jnp.zeros((2, 8)))
    _, state = tx.update(jnp.zeros((2, 8)).at[0, 0].set(1.0), state)
    _, state = tx.update(jnp.zeros((2, 8)).at[1].set(1e-6), state)
    assert state.momentum.dtype == jnp.int8 and state.scales[0].shape == (2, 1)
    stored = state.momentum * state.scales[0]
    np.testing.assert_allclose(stored[0, 0], 0.9 * 0.1, rtol=1e-2)
    np.testing.assert_allclose(stored[1], 0.1e-6, rtol=1e-2)


# --- memory --------------------------------------------------------------------------


def state_bytes(tx, params):
    return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, 8192),
        ({"momentum": 0}, 8192),
        ({"momentum": 0.9}, 8192 + 4 * 1024**2),
        ({"momentum": 0.9, "momentum_dtype": "bfloat16"}, 8192 + 2 * 1024**2),
        ({"momentum": 0.9, "momentum_dtype": "int8"}, 8192 + 1024**2 + 4096),
        ({"cover": memoptax.covers.rows}, 4096),
        ({"cover": memoptax.covers.whole}, 4),
        ({"cover": memoptax.covers.full}, 4 * 1024**2),
        ({"cover": memoptax.covers.blocks(None, 128)}, 32),
    ],
    ids=named,
)
def test_state_bytes_of_a_1024_matrix(options, size):
    params = {"w": jnp.zeros((1024, 1024))}
    assert state_bytes(memoptax.sm3(1e-3, **options), params) == size + 4
    half = {"w": jnp.zeros((1024, 1024), jnp.bfloat16)}
    assert state_bytes(memoptax.sm3(1e-3, **options), half) == size + 4


def test_state_bytes_of_a_tree():
    params = {"a": jnp.zeros(()), "b": jnp.zeros(7), "c": jnp.zeros((3, 3, 5, 6))}
    assert state_bytes(memoptax.sm3(1e-3), params) == 4 * (1 + 7 + 17) + 4
    with jax.enable_x64(True):
        double = {"w": jnp.zeros((3, 4), jnp.float64)}
        assert state_bytes(memoptax.sm3(1e-3), double) == 8 * 7 + 4


SHAPES = {
    "square": [(1024, 1024)] * 4,
    "convolution": [(3, 3, 256, 256)] * 4,
    "vector": [(2**20,)] * 4,
    "tall": [(100_000, 64)],
    "wide": [(64, 100_000)],
    "small": [(256, 256)] * 16,
}


def temporaries(tx, shapes, dtype):
    """Temporaries of a donated step, in copies of the parameters in float32."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    size = sum(4 * p.size for p in params)
    return compiled.compile().memory_analysis().temp_size_in_bytes / size


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "I", "beta": 0.9},
        {"momentum": 0.9},
        {"momentum": 0.9, "momentum_dtype": "int8"},
    ],
    ids=named,
)
def test_no_temporary_of_the_size_of_the_parameters(kind, options):
    """What a few rows have in common: eight or ten of them where an axis is short."""
    tx = memoptax.sm3(1e-3, **options)
    least = 0.1 if kind in ("square", "vector", "small") else 0.25
    more = 0.13 if "momentum_dtype" in options else 0
    assert temporaries(tx, SHAPES[kind], jnp.float32) <= least + more


ODD = {
    "two sections": [(5025, 1100)],
    "long rows": [(777, 3001)],
    "few rows": [(20, 30011)],
    "short rows": [(100_003, 20)],
    "channels first": [(300, 301, 3, 3)],
}


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
@pytest.mark.parametrize("kind", [*SHAPES, *ODD])
def test_no_float32_copy_of_half_precision(kind):
    """bfloat16 is widened entry by entry, where it is read."""
    shapes = {**SHAPES, **ODD}[kind]
    assert temporaries(memoptax.sm3(1e-3), shapes, jnp.bfloat16) <= 0.25


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_no_temporary_behind_another_transformation():
    """What can be computed entry by entry is computed by each reader."""
    tx = optax.chain(optax.scale(0.5), memoptax.sm3(1e-3))
    assert temporaries(tx, SHAPES["square"], jnp.float32) <= 0.1


# --- the contract --------------------------------------------------------------------

PARAMS = {
    "scalar": jnp.asarray(0.5, jnp.float32),
    "vector": jnp.arange(3.0),
    "matrix": jnp.ones((4, 3)),
    "kernel": jnp.ones((2, 3, 2, 2), jnp.bfloat16),
    "half": jnp.ones((2, 2), jnp.float16),
    "nothing": None,
    "empty": jnp.zeros((0, 3)),
}
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "momentum_dtype": "int8", "beta": 0.99, "variant": "I"},
    {"momentum": 0.9, "momentum_dtype": "bfloat16", "weight_decay": 0.1},
    {"cover": memoptax.covers.rows},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=named)


def gradients_like(params):
    return jax.tree.map(lambda p: (p * 0.1 + 0.01).astype(p.dtype), params)


def same_types(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


@every_option
def test_mixed_tree_keeps_types_and_compiles_once(options):
    tx = memoptax.sm3(0.1, **options)
    params, state = PARAMS, tx.init(PARAMS)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(gradients_like(params), state, params)
        same_types(updates, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, new = step(params, jax.tree.map(jnp.copy, state))
        same_types(new, state)
        state = new
    assert len(traces) == 1
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))


@every_option
@pytest.mark.few(1)
def test_scan_and_loop_agree(options):
    tx = memoptax.sm3(0.1, **options)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients_like(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (PARAMS, tx.init(PARAMS))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=3))(carry)
    for _ in range(3):
        carry, _ = step(carry, None)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(carry)):
        np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(b, float), rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize("shape", [(4, 3), (1030, 130)], ids=named)
@pytest.mark.long
def test_vmap_equals_one_by_one(shape):
    tx = memoptax.scale_by_sm3(0.9)
    g = jnp.asarray(normal(0, (3, *shape)), jnp.float32)
    states = jax.vmap(tx.init)(g)
    together = jax.jit(jax.vmap(tx.update))(g, jax.vmap(tx.update)(g, states)[1])
    for i in range(3):
        alone = tx.update(g[i], tx.update(g[i], tx.init(g[i]))[1])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


@every_option
def test_init_from_shapes(options):
    tx = memoptax.sm3(0.1, **options)
    shapes = jax.eval_shape(lambda: PARAMS)
    state = tx.init(PARAMS)
    same_types(jax.eval_shape(tx.init, PARAMS), state)
    same_types(tx.init(shapes), state)
    same_types(jax.jit(tx.init)(PARAMS), state)


def test_hyperparameters_may_be_traced():
    make = optax.inject_hyperparams(
        memoptax.sm3, static_args=("cover", "variant", "mask")
    )
    tx = make(0.1, momentum=0.9, beta=0.99, weight_decay=0.01)
    plain = memoptax.sm3(0.1, momentum=0.9, beta=0.99, weight_decay=0.01)
    params = {"w": jnp.asarray(normal(0, (3, 4)), jnp.float32)}
    g = jax.tree.map(jnp.cos, params)
    ours = steps_of(tx, params, [g, g])
    for u, v in zip(ours, steps_of(plain, params, [g, g])):
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-4)


def test_learning_rate_may_be_a_schedule():
    tx = memoptax.sm3(optax.linear_schedule(0.0, 1.0, 10))
    g = jnp.ones((2, 2))
    sizes = [-float(u[0, 0]) for u in steps_of(tx, g, [g] * 3)]
    np.testing.assert_allclose(sizes, [0.0, 0.1 / 2**0.5, 0.2 / 3**0.5], rtol=1e-6)


def test_weight_decay_is_decoupled_and_masked():
    params = {"w": jnp.full((2, 2), 2.0), "b": jnp.full(2, 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = memoptax.sm3(0.1, weight_decay=0.5, mask={"w": True, "b": False})
    (u,) = steps_of(tx, params, [zeros])
    np.testing.assert_allclose(u["w"], -0.1)
    np.testing.assert_allclose(u["b"], 0.0)
    with pytest.raises(ValueError, match="weight_decay=0.5 needs the parameters"):
        memoptax.sm3(0.1, weight_decay=0.5).update(zeros, tx.init(params), None)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition(
            {"x": tx, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}
        ),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    ],
    ids=["masked", "partition", "MultiSteps", "apply_if_finite", "chain"],
)
@every_option
def test_wrappers(wrap, options):
    tx = wrap(memoptax.sm3(0.1, **options))
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    first, state = params, tx.init(params)
    for _ in range(4):
        updates, new = jax.jit(tx.update)(gradients_like(params), state, params)
        same_types(new, state)
        params, state = optax.apply_updates(params, updates), new
    assert (params["w"] < first["w"]).all()


@every_option
def test_map_params(options):
    """Specs of parameters must not land on accumulators."""
    tx = memoptax.sm3(0.1, **options)
    params = {"w": jnp.ones((4, 3)), "b": {"c": jnp.ones(3)}}
    spec = jax.sharding.PartitionSpec
    specs = {"w": spec("x", "y"), "b": {"c": spec("x")}}
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx, lambda _, s: s, state, specs, transform_non_params=lambda _: spec()
    )
    inner = mapped[0]
    assert inner.accumulators == spec() and inner.count == spec()
    assert inner.momentum == (specs if options.get("momentum") else None)
    doubled = optax.tree.map_params(tx, lambda x: x + x, state)
    same_types(doubled, state)


def test_tree_without_leaves():
    tx = memoptax.sm3(0.1, 0.9, momentum_dtype="int8")
    for params in ({}, {"a": None}, {"a": optax.MaskedNode()}):
        updates, state = tx.update(params, tx.init(params), params)
        assert updates == params
        same_types(state, tx.init(params))


def test_state_never_holds_one_array_twice():
    state = memoptax.sm3(0.1, 0.9, momentum_dtype="int8").init(PARAMS)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.long
def test_nothing_warns_and_ranks_are_never_promoted():
    with warnings.catch_warnings(), jax.numpy_rank_promotion("raise"):
        warnings.simplefilter("error")
        for options in OPTIONS:
            tx = memoptax.sm3(0.1, **options)
            jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.long
def test_eight_devices():
    script = pathlib.Path(__file__).parent / "meshes_sm3.py"
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "ok\n", done.stderr


# --- what optax.sm3 0.2.8 gets wrong -------------------------------------------------


def test_accumulators_have_no_dtype_of_the_gradients():
    """bfloat16 parameters with float32 gradients: the state stays as it was."""
    params = jnp.ones((2, 3), jnp.bfloat16)
    for options in OPTIONS[:3]:
        tx = memoptax.scale_by_sm3(**options)
        state = tx.init(params)
        updates, new = tx.update(jnp.ones((2, 3), jnp.float32), state)
        assert updates.dtype == jnp.float32
        same_types(new, state)
        assert new.accumulators[0][0].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_only_real_floating_tensors(dtype):
    tx = memoptax.sm3(0.1)
    bad = {"w": jnp.zeros((2, 2), dtype)}
    with pytest.raises(ValueError, match=rf"\['w'\] has dtype {jnp.dtype(dtype)}"):
        tx.init(bad)
    with pytest.raises(ValueError, match=r"\['w'\]"):
        tx.update(bad, tx.init({"w": jnp.zeros((2, 2))}))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=named)
def test_tensors_without_entries(shape):
    for options in OPTIONS:
        g = jnp.zeros(shape)
        tx = memoptax.sm3(0.1, **options)
        updates, _ = jax.jit(tx.update)(g, tx.init(g), g)
        assert updates.shape == shape


# --- sentences -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"beta": 0}, r"beta must lie in \(0, 1\), but is 0"),
        ({"beta": 1.0}, r"beta must lie in \(0, 1\), but is 1.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), but is 1.0"),
        ({"momentum": -0.1}, "momentum .* -0.1"),
        ({"eps": -1.0}, r"eps must lie in \[0, inf\), but is -1.0"),
        ({"variant": "III"}, "variant must be one of 'I', 'II', but is 'III'"),
        ({"cover": 3}, "cover must be None, a function .* but is 3"),
        ({"accumulator_dtype": "bfloat16"}, "accumulator_dtype must be .*bfloat16"),
        ({"momentum_dtype": "int4"}, "momentum_dtype must be one of None, .*int4"),
        ({"momentum_dtype": 3}, "momentum_dtype must be one of None, .*3"),
        ({"weight_decay": -1.0}, r"weight_decay must lie in \[0, inf\), but is -1.0"),
    ],
    ids=named,
)
def test_errors_are_sentences(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        memoptax.sm3(0.1, **options)


def test_a_cover_must_not_change():
    answers = iter([[(1, 3)], [(1, 1)]])
    tx = memoptax.sm3(0.1, cover=lambda path, leaf: next(answers))
    params = {"w": jnp.ones((4, 3))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['w'\].*state has \[\(4, 1\)\]"):
        tx.update(params, state)


@pytest.mark.parametrize(
    ("made", "used", "name"),
    [
        ({}, {"momentum": 0.9}, "momentum is 0.9"),
        ({"momentum": 0.9}, {}, "momentum is None"),
        (
            {"momentum": 0.9},
            {"momentum": 0.9, "momentum_dtype": "int8"},
            "momentum_dtype is 'int8'",
        ),
        (
            {"momentum": 0.9, "momentum_dtype": "int8"},
            {"momentum": 0.9},
            "momentum_dtype is None",
        ),
        (
            {"momentum": 0.9, "momentum_dtype": "bfloat16"},
            {"momentum": 0.9, "momentum_dtype": "float32"},
            "momentum_dtype is 'float32'",
        ),
    ],
)
def test_a_state_of_other_arguments_is_refused(made, used, name):
    params = {"w": jnp.ones((3, 4))}
    state = memoptax.scale_by_sm3(**made).init(params)
    with pytest.raises(ValueError, match=f"^{name}, but the state"):
        memoptax.scale_by_sm3(**used).update(params, state)


def test_the_state_of_another_optimizer_is_refused():
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match="must be a ScaleBySM3State, but is a"):
        memoptax.scale_by_sm3().update(params, optax.scale_by_adam().init(params))
