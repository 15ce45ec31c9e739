"""What every public optimizer promises to tools that treat a state as plain numbers.

They average it, scale it, cast it, restore it, and step without ``jax.jit``. The table
of optimizers is in ``contract.py``.
"""

import dataclasses
import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    HALVES,
    SHAPES,
    Donating,
    at,
    close,
    donating,
    each_capacity,
    each_factory,
    each_optimizer,
    expected,
    gradients,
    params_like,
    signature,
    steps_of,
    trained,
)

import memoptax

from untyped import untyped

pytestmark = pytest.mark.few(2)

CAPACITY = 3  # the largest C, so that few steps fill a buffer


def is_finite(tree):
    return all(np.isfinite(np.asarray(x, float)).all() for x in jax.tree.leaves(tree))


def after(opt, steps=5):
    """A state that has seen a few gradients."""
    return donating(opt).run(steps_of(gradients())[:steps])[1]


def fill(state):
    return {name: float(x) for name, x in memoptax.buffer_stats(state).items()}["fill"]


COMPILED = []  # a duration for each program that XLA compiles


def listen(event, duration_secs, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration_secs)


# jax 0.8 cannot unregister a listener, so there is one for all tests.
jax.monitoring.register_event_duration_secs_listener(listen)


# Steps without jax.jit


@each_optimizer
def test_an_eager_step_compiles_nothing_after_the_second(opt):
    tx, params = opt.build(), params_like(SHAPES)
    state, stream = tx.init(params), steps_of(gradients())
    for gradient in stream[:2]:
        _, state = tx.update(gradient, state, params)
    before = len(COMPILED)
    for gradient in stream[2:5]:
        updates, state = tx.update(gradient, state, params)
        assert is_finite(updates)
    assert len(COMPILED) == before


NUMBERS = [
    (memoptax.adam_cm, "b1"),
    (memoptax.adam_cm, "b2"),
    (memoptax.sm3_cm, "b1"),
    (memoptax.sm3_cm, "b2"),
    (memoptax.adam_c, "decay"),
    (memoptax.sgd_c, "kappa"),
    (memoptax.rmsprop_c, "alpha"),
    (memoptax.sm3, "momentum"),
    (memoptax.sm3, "beta"),
]


@pytest.mark.parametrize(("make", "name"), NUMBERS)
def test_an_optimizer_built_again_with_another_number_compiles_nothing(make, name):
    params = params_like(SHAPES)
    state, counts = make(0.1, **{name: 0.5}).init(params), []
    for k in range(5):
        tx = make(0.1, **{name: 0.5 + k / 16})
        _, state = tx.update(params, state, params)
        counts.append(len(COMPILED))
    assert counts[1] == counts[-1]


@each_optimizer
def test_an_eager_step_makes_nothing_that_is_not_finite(opt):
    tx, params = opt.build(), params_like(SHAPES)
    with jax.debug_infs(True), jax.debug_nans(True):
        updates, _ = tx.update(steps_of(gradients())[0], tx.init(params), params)
    assert is_finite(updates)


@pytest.mark.parametrize("topc", [1, 5, 20])
def test_a_sharded_norm_compiles_nothing_more(topc):
    norm = memoptax.sharded_norm("auto")
    tx = memoptax.adam_c(0.1, topc=topc, priority_fn=norm)
    params, counts = params_like(SHAPES), []
    state = tx.init(params)
    for gradient in steps_of(gradients())[:5]:
        _, state = tx.update(gradient, state, params)
        counts.append(len(COMPILED))
    assert counts[1] == counts[-1]


def test_a_state_resized_again_compiles_nothing_more():
    state = memoptax.sgd_c(0.1).init(params_like(SHAPES))
    for way in ("sum", "read"):
        memoptax.resize_buffer(state, 3, holding=way)
        before = len(COMPILED)
        memoptax.resize_buffer(state, 3, holding=way)
        assert len(COMPILED) == before


def test_compilations_are_seen():
    before = len(COMPILED)
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert len(COMPILED) > before


@each_factory
def test_eager_steps_equal_jitted_ones(opt):
    tx, params = opt.build(), params_like(SHAPES)
    state = tx.init(params)
    for gradient in steps_of(gradients())[:4]:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    close(params, at(expected(opt)[0], 3))


# Arithmetic on a state


@each_optimizer
def test_a_state_never_holds_what_is_not_finite(opt):
    # Its own step, because a step compiled in these modes does not donate.
    with jax.debug_infs(True), jax.debug_nans(True):
        params, state = Donating(opt.build()).run(steps_of(gradients())[:3])
    assert is_finite((params, state))


@each_optimizer
def test_a_state_of_zeros_is_a_new_one(opt):
    params, stream = params_like(SHAPES), steps_of(gradients())
    zeros = jax.tree.map(lambda x: 0 * x, after(opt))
    new = opt.build().init(params)
    if opt.options.get("fifo_probability"):  # its draws differ, and are as good
        draws = jnp.copy(optax.tree.get(new, "draws"))
        zeros = optax.tree.set(zeros, draws=draws)
    step = donating(opt).step
    runs = []
    for state in (zeros, new):
        carry = params_like(SHAPES), state
        for gradient in stream[:CAPACITY]:
            carry = step(*carry, gradient)
        runs.append(carry)
    close(runs[0][0], runs[1][0])


@each_capacity
def test_a_buffer_that_lookahead_resets_fills_again(opt):
    """Every third step it multiplies the state by 0."""
    tx = optax.lookahead(opt.build(), 3, 0.5, reset_state=True)
    params = optax.LookaheadParams.init_synced(params_like(SHAPES))

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for gradient in steps_of(gradients()):
        params, state = step(params, state, gradient)
    assert is_finite((params, state))
    assert 0 < fill(state)  # two steps after the last reset


@each_capacity
def test_a_mean_of_states_is_a_state(opt):
    """As of members of an ensemble. Integers are truncated."""
    states = [after(opt), after(opt, 8)]
    mean = jax.tree.map(lambda a, b: ((a + b) / 2).astype(a.dtype), *states)
    assert fill(mean) > 0
    params = params_like(SHAPES)
    memoptax.check_state(opt.build(), params, memoptax.reset_buffer(mean))
    carry = donating(opt).step(params, mean, at(gradients(), 5))
    assert is_finite(carry)
    assert fill(carry[1]) > 0


@each_optimizer
def test_a_state_cast_to_half_precision_and_back_goes_on(opt):
    def half(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.bfloat16).astype(x.dtype) if floating else x

    params, gradient = params_like(SHAPES), at(gradients(), 5)
    want, _ = donating(opt).step(params, after(opt), gradient)
    params = params_like(SHAPES)
    got, state = donating(opt).step(params, jax.tree.map(half, after(opt)), gradient)
    assert is_finite(state)
    # Relative to the length of one step, which is about a rate.
    close(got, want, rtol=0, atol=0.05 * max(1.0, 10 * opt.rate))


@each_factory
def test_lists_may_replace_tuples(opt):
    """As some checkpoints restore them."""

    def listed(node):
        if isinstance(node, tuple) and not hasattr(node, "_fields"):
            return [listed(child) for child in node]
        if isinstance(node, tuple):
            return type(node)(*map(listed, node))
        return node

    tx, params, gradient = opt.build(), params_like(SHAPES), at(gradients(), 5)
    state = after(opt)
    want, _ = tx.update(gradient, state, params)
    got, _ = tx.update(gradient, listed(state), params)
    close(got, want)


@each_factory
@pytest.mark.few(20)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_count_may_be_set_to_a_number(opt, scheduled):
    """optax's optimizers take such a state too."""
    if scheduled:
        if not opt.rated:
            return
        rate = {"learning_rate": lambda count: 0.1 + 0 * count}
        opt = dataclasses.replace(opt, options=opt.options | rate)
    tx, params = opt.build(), params_like(SHAPES)
    state = tx.init(params)
    if not optax.tree.get_all_with_path(state, "count"):
        return
    numbered = optax.tree.set(state, count=0)

    def step(**options):
        return opt.build(**options).update(params, numbered, params)[1]

    assert signature(jax.eval_shape(step)) == signature(state)
    if opt.accepts("b2"):
        traced = jax.eval_shape(lambda b2: step(b2=b2), 0.9)
        assert signature(traced) == signature(state)


def number(array):
    """A scalar of 32 bits as a Python number. Python has none of fewer bits."""
    return array.item() if array.shape == () and array.itemsize == 4 else array


def double(array):
    """As text files restore it."""
    wide = {"float32": np.float64, "int32": np.int64}.get(array.dtype.name)
    return np.asarray(array, wide)


@each_optimizer
@pytest.mark.parametrize("restored", [number, double])
def test_an_eager_step_takes_numbers_and_arrays_of_numpy(opt, restored):
    tx, params, gradient = opt.build(), params_like(SHAPES), at(gradients(), 5)
    state = after(opt)
    want = tx.update(gradient, state, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = tx.update(gradient, jax.tree.map(restored, state), params)
    close(got, want, rtol=0, atol=0)
    assert signature(got[1]) == signature(want[1])


def test_sharpness_aware_minimization_keeps_the_memory():
    """It resets or keeps the state of the optimizer inside it."""
    tx = optax.contrib.sam(
        memoptax.adam_c(0.01, topc=CAPACITY),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        sync_period=2,
        reset_state=True,
    )
    # optax.contrib.normalize divides by the norm, so none is 0.
    stream = jax.tree.map(lambda g: g[4:], gradients(steps=10))
    trajectory, state = trained(tx, stream=stream)
    assert is_finite((trajectory, state))
    assert fill(state) > 0


# JAX's modes


def trace_all(opt, of_params, of_gradients):
    """Trace ``init`` and ``update``, and what the package does with a buffer."""
    params, tx = params_like(SHAPES, of_params), opt.build()
    gradient = params_like(SHAPES, of_gradients)
    state = jax.eval_shape(tx.init, params)
    _, state = jax.eval_shape(tx.update, gradient, state, params)
    if opt.memory == "buffer":
        jax.eval_shape(memoptax.buffer_stats, state, gradient)
        for topc in (1, 3, 20):
            memoptax.resize_buffer(state, topc)


@each_optimizer
@pytest.mark.few(5)
def test_strict_promotion_of_dtypes_is_no_error(opt):
    if opt.factory in (memoptax.adam_c, memoptax.adamw_c):
        pytest.skip("optax.adam itself mixes dtypes")
    with jax.numpy_dtype_promotion("strict"):
        trace_all(opt, "float32", "float32")
        for dtypes in HALVES:
            trace_all(opt, *dtypes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (memoptax.sgd_c, {"momentum": 0.875, "dampening": 0.1}),
        (memoptax.rmsprop_c, {"alpha": 0.1}),
        (memoptax.adam_c, {"b1": 0.9, "b2": 0.99}),
        (functools.partial(memoptax.adam_c, amsgrad=True), {"b1": 0.1, "b2": 0.1}),
        (memoptax.sgd_cm, {"b1": 0.1}),
        (memoptax.adam_cm, {"b1": 0.1, "b2": 0.1}),
        (memoptax.sm3_cm, {"b1": 0.1, "b2": 0.1}),
        (memoptax.sm3, {"momentum": 0.1, "beta": 0.1}),
    ],
    ids=["sgd_c", "rmsprop_c", "adam_c", "amsgrad"]
    + ["sgd_cm", "adam_cm", "sm3_cm", "sm3"],
)
@pytest.mark.few(8)
@pytest.mark.parametrize("traced", [False, True])
def test_numbers_of_half_precision_are_computed_with_in_float32(
    make, numbers, dtype, traced
):
    """``optax.inject_hyperparams`` has such numbers if the parameters have."""
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=5), jnp.float32)
    half = {name: jnp.asarray(x, dtype) for name, x in numbers.items()}
    exact = {name: float(x) for name, x in half.items()}

    def updates(numbers):
        tx, found = make(0.1, **numbers), []
        state = tx.init(gradient)
        for scale in (1.0, -2.0, 0.5):
            update, state = tx.update(scale * gradient, state)
            found.append(update)
        return found

    found = (jax.jit(updates) if traced else updates)(half)
    np.testing.assert_allclose(found, updates(exact), rtol=2e-6)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (memoptax.sgd_cm, "b1"),
        (memoptax.adam_cm, "b1"),
        (memoptax.sm3_cm, "b2"),
        (memoptax.sm3, "momentum"),
        (memoptax.sm3, "beta"),
    ],
)
def test_a_float64_decay_keeps_its_digits_beside_float32(make, name, x64):
    """1 - decay would lose four of them."""

    def update(decay):
        tx, gradient = make(0.1, **{name: decay}), jnp.ones(5, jnp.float32)
        return tx.update(gradient, tx.init(gradient))[0]

    expected = update(0.999)
    np.testing.assert_allclose(jax.jit(update)(0.999), expected, rtol=1e-6)
    np.testing.assert_allclose(update(jnp.float64(0.999)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        *(memoptax.sgd_c, memoptax.rmsprop_c, memoptax.sgd_cm, memoptax.sm3),
        # .999 would be 1 in bfloat16.
        functools.partial(memoptax.adam_cm, b2=0.99),
        functools.partial(memoptax.sm3_cm, b2=0.99),
        functools.partial(memoptax.adam_c, b2=0.99, amsgrad=True),
    ],
    ids=["sgd_c", "rmsprop_c", "sgd_cm", "sm3", "adam_cm", "sm3_cm", "amsgrad"],
)
def test_rates_of_half_precision_are_no_error_under_strict_promotion(make):
    params = jnp.ones(3, jnp.bfloat16)
    injected = optax.inject_hyperparams(make)
    half = jnp.asarray(0.1, jnp.bfloat16)
    txs = [injected(0.1), make(lambda count: half), make(half)]
    if "weight_decay" in inspect.signature(make).parameters:
        txs += [make(0.1, weight_decay=x) for x in (half, lambda count: half)]
    with jax.numpy_dtype_promotion("strict"):
        for tx in txs:
            updates, _ = tx.update(params, tx.init(params), params)
            assert untyped(updates).dtype == jnp.bfloat16 and is_finite(updates)


@pytest.mark.parametrize("kappa", [jnp.bfloat16(0.5), jnp.int32(1)], ids=repr)
@pytest.mark.parametrize("factory", [memoptax.sgd_c, memoptax.adam_cm, memoptax.sm3_cm])
def test_kappa_may_have_any_dtype_under_strict_promotion(factory, kappa):
    params = {"w": jnp.ones((2, 2))}
    with jax.numpy_dtype_promotion("strict"):
        tx = factory(0.1, kappa=kappa)
        jax.eval_shape(tx.update, params, tx.init(params), params)


@each_optimizer
@pytest.mark.few(5)
def test_promotion_of_ranks_may_be_an_error(opt):
    with jax.numpy_rank_promotion("raise"):
        trace_all(opt, "float32", "float32")


@each_factory
def test_float64_of_numpy_gives_no_warning(opt):
    """JAX has 32 bits here. A warning is an error in these tests."""
    params = {name: np.ones(shape) for name, shape in SHAPES.items()}
    tx = opt.build()
    tx.update(params, tx.init(params), params)


# Numbers that leave their range during a run


@each_capacity
def test_a_traced_decay_out_of_range_spoils_nothing(opt):
    static = tuple(opt.options)
    tx = opt.build(lambda f: optax.inject_hyperparams(f, static_args=static))
    if "decay" in static:
        pytest.skip("static here")
    params, stream = params_like(SHAPES), steps_of(gradients())
    update = jax.jit(tx.update)
    for bad in (np.nan, np.inf, -1e10):
        state = tx.init(params)
        for turn, gradient in enumerate(stream):
            good = state.hyperparams["decay"]
            if turn == 3:
                spoilt = state.hyperparams | {"decay": jnp.full_like(good, bad)}
                _, state = update(gradient, state._replace(hyperparams=spoilt), params)
                state.hyperparams["decay"] = good
            else:
                updates, state = update(gradient, state, params)
                assert is_finite((updates, state)), bad
        assert fill(state) > 0, bad


@pytest.mark.parametrize(
    "factory",
    [memoptax.adam_cm, memoptax.sm3_cm, memoptax.sgd_cm],
    ids=lambda f: f.__name__,
)
def test_a_traced_number_that_is_not_finite_does_not_change_the_state(factory):
    tx = optax.inject_hyperparams(factory)(0.1, kappa=1.0, fifo_probability=0.5)
    params, stream = params_like(SHAPES), steps_of(gradients())
    update, state = jax.jit(tx.update), untyped(tx.init(params))
    for gradient in stream[:3]:
        _, state = update(gradient, state, params)
    for name in ("kappa", "fifo_probability"):
        for bad in (np.nan, np.inf):
            number = jnp.full_like(state.hyperparams[name], bad)
            spoilt = state._replace(hyperparams=state.hyperparams | {name: number})
            updates, after = update(stream[4], spoilt, params)
            assert all(np.isnan(u).all() for u in jax.tree.leaves(updates))
            close(after.inner_state[0], state.inner_state[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["eps", "beta"])
def test_a_traced_number_that_is_not_finite_shows_in_sm3(name):
    tx = optax.inject_hyperparams(memoptax.sm3)(1.0, beta=0.9, eps=1e-8)
    params = {"w": jnp.full((3, 4), 1e3)}
    state = untyped(tx.init(params))
    spoilt = state.hyperparams | {name: jnp.full_like(state.hyperparams[name], np.nan)}
    updates, _ = jax.jit(tx.update)(params, state._replace(hyperparams=spoilt), params)
    assert np.isnan(updates["w"]).all()
