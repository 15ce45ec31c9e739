"""What every public optimizer promises to optax: schedules, injected numbers, wrappers.

The table of optimizers is in ``contract.py``.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    OPTIMIZERS,
    SHAPES,
    at,
    close,
    donating,
    each_capacity,
    each_factory,
    each_memory,
    each_optimizer,
    expected,
    gradients,
    params_like,
    signature,
    trained,
)

from untyped import untyped

pytestmark = pytest.mark.few(2)


def ending_at(step, rate):
    """A schedule: the rate up to this step, then 0."""
    return optax.piecewise_constant_schedule(rate, {step: 0.0})


@each_factory
@pytest.mark.parametrize("inject", [False, True], ids=["plain", "injected"])
def test_schedules_and_traced_hyperparameters(opt, inject):
    wrap = optax.inject_hyperparams if inject else lambda factory: factory
    options = {"learning_rate": ending_at(5, opt.rate)} if opt.rated else {}
    tx = opt.build(wrap, **options)
    if inject:
        traced = jax.eval_shape(tx.init, params_like(SHAPES)).hyperparams
        floats = {
            name
            for name, p in inspect.signature(opt.factory).parameters.items()
            if isinstance(p.default, float) or name == "learning_rate"
        }
        assert floats <= traced.keys()
    trajectory, _ = trained(tx)
    want = expected(opt)[0]
    if opt.rated:
        want = jax.tree.map(lambda p: np.asarray(p)[[0, 1, 2, 3, 4, 4, 4, 4]], want)
    close(trajectory, want)


def test_the_annotation_of_a_rate_is_the_type_of_optax():
    """optax's own tests look for this annotation, and skip others, and strings."""
    for factory in {opt.factory for opt in OPTIMIZERS if opt.rated}:
        rate = inspect.signature(factory).parameters["learning_rate"]
        assert rate.annotation is optax.ScalarOrSchedule, factory


OPTIONAL = ("fifo", "sgd_c nesterov", "rmsprop_c centered", "adam_c L2")


@pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.name in OPTIONAL], ids=repr
)
def test_numbers_that_may_be_none_may_be_traced(opt):
    """The type of their defaults does not say that these are numbers."""
    numbers = {k for k, value in opt.options.items() if isinstance(value, float)}
    static = opt.options.keys() - numbers
    tx = opt.build(lambda f: optax.inject_hyperparams(f, static_args=static))
    state = jax.eval_shape(tx.init, params_like(SHAPES))
    assert numbers and numbers <= state.hyperparams.keys()
    close(trained(tx)[0], expected(opt)[0])


@each_factory
def test_hyperparameters_in_half_precision_are_not_kept_in_it(opt):
    """Injected numbers have the dtype of the parameters, but the state does not."""
    params, tx = params_like(SHAPES, jnp.bfloat16), opt.build(optax.inject_hyperparams)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert signature(after) == signature(state)
    assert signature(updates) == signature(params)
    kept = jax.tree.leaves(optax.tree.get(state.inner_state, opt.memory))
    slots = optax.tree.get(state.inner_state, "slots", default={})
    names = [str(x.dtype) for x in kept]
    assert names.count("bfloat16") <= len(jax.tree.leaves(slots))


@each_factory
def test_counters_stop_at_their_end(opt):
    """They do not overflow to negative numbers, as if there had been no step yet."""
    runner, last = donating(opt), np.iinfo(np.int32).max

    def counted(path, x):
        counter = x.dtype == jnp.int32 and path[-1].name != "entries"
        return jnp.full_like(x, last) if counter else x

    params = params_like(SHAPES)
    state = jax.tree.map_with_path(counted, runner.tx.init(params))
    params, state = runner.step(params, state, at(gradients(), 0))
    counters = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert any(np.any(x == last) for x in counters)
    assert all(np.all(np.asarray(x) >= 0) for x in counters)
    assert all(np.isfinite(p).all() for p in params.values())


@each_capacity
def test_a_traced_capacity_is_refused_and_the_error_says_what_to_do(opt):
    static = tuple(opt.options)
    params = params_like(SHAPES)
    traced = opt.build(
        lambda factory: optax.inject_hyperparams(
            factory, static_args=tuple(set(static) - {"topc"})
        ),
        topc=3,
    )
    with pytest.raises(ValueError, match="topc must be a static.*static_args='topc'"):
        traced.init(params)
    cured = opt.build(
        lambda factory: optax.inject_hyperparams(
            factory, static_args=(*static, "topc")
        ),
        topc=3,
    )
    slots = optax.tree.get(jax.eval_shape(cured.init, params), "slots")
    assert slots["vector"].shape == (4, 3)


INSIDE = ("scalar", "rank 4")


def inside(tree):
    return {name: tree[name] for name in INSIDE}


def masked(tx):
    return optax.masked(tx, {name: name in INSIDE for name in SHAPES})


def partitioned(tx):
    labels = {name: "ours" if name in INSIDE else "theirs" for name in SHAPES}
    return optax.partition({"ours": tx, "theirs": optax.identity()}, labels)


@functools.cache
def trained_apart(opt):
    return trained(opt.build(), inside(params_like(SHAPES)), inside(gradients()))[0]


@each_factory
@pytest.mark.parametrize("wrap", [masked, partitioned])
def test_a_part_of_the_tree_trains_as_it_would_by_itself(opt, wrap):
    params, stream = params_like(SHAPES), gradients()
    trajectory, _ = trained(wrap(opt.build()))
    close(inside(trajectory), trained_apart(opt))
    for name in SHAPES.keys() - set(INSIDE):
        untouched = np.asarray(params[name]) + np.cumsum(stream[name], axis=0)
        np.testing.assert_allclose(trajectory[name], untouched, rtol=1e-5)


@each_factory
def test_multi_steps_sees_the_mean_of_its_micro_batches(opt):
    def micro(g):
        noise = np.array([0.5, -0.5], np.float32).reshape(-1, *[1] * (g.ndim - 1))
        return (g[:, None] * (1 + noise)).reshape(-1, *g.shape[1:])

    stream = jax.tree.map(micro, gradients())
    tx = optax.MultiSteps(opt.build(), 2).gradient_transformation()
    trajectory, _ = trained(tx, stream=stream)
    close(jax.tree.map(lambda p: p[1::2], trajectory), expected(opt)[0])


@each_factory
def test_apply_if_finite_skips_a_step_and_goes_on(opt):
    stream = jax.tree.map(
        lambda g: np.insert(g, 5, np.nan, axis=0).astype(g.dtype), gradients()
    )
    trajectory, state = trained(optax.apply_if_finite(opt.build(), 2), stream=stream)
    want, want_state = expected(opt)
    close(at(trajectory, 5), at(trajectory, 4), rtol=0, atol=0)
    close(jax.tree.map(lambda p: np.delete(p, 5, axis=0), trajectory), want)
    close(state.inner_state, want_state)
    assert int(state.total_notfinite) == 1


@pytest.mark.parametrize("gradient", ["bfloat16", "float32"])
@pytest.mark.parametrize("opt", [o for o in OPTIMIZERS if o.accepts("mask")], ids=repr)
def test_a_mask_sees_the_dtypes_of_the_parameters(opt, gradient):
    """Although most optimizers compute in float32."""
    params = {"half": jnp.ones((2, 3), jnp.bfloat16), "full": np.ones((2, 3)), "n": 1.0}
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, gradient), params)
    decays = {"half": False, "full": True, "n": True}

    def of_dtype(tree):
        return jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, tree)

    both = (opt.build(weight_decay=0.5, mask=mask) for mask in (of_dtype, decays))
    found, want = (tx.update(zeros, tx.init(params), params)[0] for tx in both)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert jnp.all(found["full"] != 0) and not jnp.any(found["half"])


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


@each_optimizer
@pytest.mark.parametrize("wrap", [lambda tx: tx, masked], ids=["plain", "masked"])
def test_map_params_tells_parameters_from_the_rest(opt, wrap):
    tx, params = wrap(opt.build()), params_like(SHAPES)
    state = jax.eval_shape(tx.init, params)
    specs = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else name,
        state,
        {name: name for name in SHAPES},
        transform_non_params=lambda leaf: None,
        is_leaf=is_masked,
    )

    def check(name, leaf):
        if name is not None and not is_masked(name):
            rank = len(SHAPES[name])
            assert leaf.shape[leaf.ndim - rank :] == SHAPES[name]

    jax.tree.map(check, specs, state, is_leaf=lambda x: x is None)
    assert set(jax.tree.leaves(specs)) <= set(SHAPES)


@each_memory
def test_tree_get_finds_the_memory(opt):
    state = jax.eval_shape(opt.build().init, params_like(SHAPES))
    assert jax.tree.leaves(optax.tree.get(state, opt.memory))


@each_optimizer
def test_extra_arguments_pass_through_a_chain(opt):
    def asks_for_value(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: u * value, updates), state

    consumer = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), untyped(asks_for_value)
    )
    params = params_like(SHAPES)
    for tx in (
        optax.chain(opt.build(), consumer),
        optax.apply_if_finite(optax.chain(opt.build(), consumer), 2),
    ):
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(tx.update, params, state, params, value=2.0)
        assert signature(updates) == signature(params)
