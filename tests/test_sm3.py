"""SM3: trees of many dtypes, traced numbers, weight decay, other states."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO

import memoptax
from memoptax import covers, sm3, sm3_cm

from labels import named
from streams import normal, updates_of
from untyped import untyped

pytestmark = pytest.mark.few(2)


PARAMS = {
    "scalar": jnp.asarray(0.5, jnp.float32),
    "vector": jnp.arange(3.0),
    "matrix": jnp.ones((4, 3)),
    "kernel": jnp.ones((2, 3, 2, 2), jnp.bfloat16),
    "half": jnp.ones((2, 2), jnp.float16),
    "nothing": None,
    "empty": jnp.zeros((0, 3)),
}


def test_parameters_that_are_none_have_a_momentum_of_none():
    tx = untyped(memoptax.scale_by_sm3(0.9))
    state = tx.init(None)
    assert state.momentum is None
    assert tx.update(None, state)[0] is None


def test_a_tree_of_hundreds_of_leaves_is_taken():
    tx, params = untyped(memoptax.scale_by_sm3()), [jnp.zeros(())] * 300
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params))
    assert len(updates) == 300


OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "momentum_dtype": "int8", "beta": 0.99, "variant": "I"},
    {"momentum": 0.9, "momentum_dtype": "bfloat16", "weight_decay": 0.1},
    {"cover": memoptax.covers.rows},
]


def gradients_like(params):
    return jax.tree.map(lambda p: (p * 0.1 + 0.01).astype(p.dtype), params)


def same_types(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
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

    with jax.numpy_rank_promotion("raise"):
        for _ in range(3):
            params, new = step(params, jax.tree.map(jnp.copy, state))
            same_types(new, state)
            state = new
    assert len(traces) == 1
    leaves = jax.tree.leaves((params, state))
    assert all(np.isfinite(np.asarray(x, float)).all() for x in leaves)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=named)
def test_tensors_without_entries(shape):
    for options in OPTIONS:
        g = jnp.zeros(shape)
        tx = memoptax.sm3(0.1, **options)
        updates, _ = jax.jit(tx.update)(g, tx.init(g), g)
        assert updates.shape == shape


def test_hyperparameters_may_be_traced():
    make = optax.inject_hyperparams(
        memoptax.sm3, static_args=("cover", "variant", "mask")
    )
    tx = make(0.1, momentum=0.9, beta=0.99, weight_decay=0.01)
    plain = memoptax.sm3(0.1, momentum=0.9, beta=0.99, weight_decay=0.01)
    params = {"w": jnp.asarray(normal(0, (3, 4)), jnp.float32)}
    g = jax.tree.map(jnp.cos, params)
    ours = updates_of(tx, params, [g, g])
    for u, v in zip(ours, updates_of(plain, params, [g, g])):
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-4)


def test_weight_decay_is_decoupled_and_masked():
    params = {"w": jnp.full((2, 2), 2.0), "b": jnp.full(2, 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = memoptax.sm3(0.1, weight_decay=0.5, mask={"w": True, "b": False})
    (u,) = updates_of(tx, params, [zeros])
    np.testing.assert_allclose(u["w"], -0.1)
    np.testing.assert_allclose(u["b"], 0.0)
    with pytest.raises(ValueError, match="weight_decay=0.5 needs the parameters"):
        memoptax.sm3(0.1, weight_decay=0.5).update(zeros, tx.init(params), None)


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


@pytest.mark.few(8)
@pytest.mark.parametrize("cover", [covers.rows, covers.whole])
@pytest.mark.parametrize(
    "make, options",
    [
        (sm3, {}),
        (sm3, {"momentum": 0.9, "momentum_dtype": "int8"}),
        (sm3_cm, {}),
        (sm3_cm, {"kappa": 0}),
    ],
)
def test_a_gradient_of_another_shape_is_refused(cover, make, options):
    """Accumulators of these covers fit it, and it would be broadcast."""
    tx, params = make(0.1, cover=cover, **options), jnp.ones((4, 3))
    state = tx.init(params)
    narrow: list[Any] = [jnp.ones((4, 1))]
    if make is sm3 and cover is covers.rows:
        rows = jnp.ones((2, 2)), jnp.array([[0], [3]])
        narrow.append(BCOO(rows, shape=(4, 2)))
    for gradient in narrow:
        with pytest.raises(ValueError, match=r"shape \(4, [12]\).* \(4, 3\)"):
            jax.eval_shape(tx.update, gradient, state, params)


def test_the_state_of_another_optimizer_is_refused():
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match="must be a ScaleBySM3State, but is of type"):
        memoptax.scale_by_sm3().update(params, optax.scale_by_adam().init(params))


def test_another_momentum_is_refused_with_what_the_state_has():
    with_, without = sm3(0.1, 0.9), sm3(0.1)
    params = jnp.ones(3)
    with pytest.raises(ValueError, match="momentum is None, but the state has one"):
        without.update(params, with_.init(params), params)
    with pytest.raises(ValueError, match="momentum is 0.9, but the state has none"):
        with_.update(params, without.init(params), params)

    def step(momentum):
        return sm3(0.1, momentum).update(params, without.init(params), params)

    for one in (step, jax.jit(step)):
        with pytest.raises(ValueError, match="momentum is .* but the state has none"):
            one(jnp.float32(0.9))
