"""Numbers that leave their range in a run: the update shows it, the state stays.

The table of optimizers is in ``contract.py``.
"""

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
    each_optimizer,
    gradients,
    params_like,
)
from jax.experimental.sparse import BCOO

import memoptax

from untyped import untyped

nan, inf = np.nan, np.inf
GRADIENTS = [at(gradients(), t) for t in (0, 1, 2, 4, 5)]
BAD = {
    "b1": [nan, inf, -0.5, 1.0, 1e30],
    "b2": [nan, inf, -0.5, 1.0, 1e30],
    "eps": [nan, inf, -0.001],
    "eps_root": [nan, inf, -0.001],
    "alpha": [nan, inf, -0.5, 1e30],
    "beta": [nan, inf, 0.0, 1.0, 1e30],
    "dampening": [nan, inf, -0.5, 1.5],
    "kappa": [nan, inf],
    "fifo_probability": [nan, inf],
    "momentum": [nan, inf, -0.5, 1.5],
}
# Numbers that enter the state and not only the update.
ENTERING = {
    "weight_decay": (memoptax.sgd_c, memoptax.rmsprop_c, memoptax.adam_c),
    "learning_rate": (memoptax.rmsprop_c,),
}


def numbers_of(opt):
    """The numbers that this optimizer takes, and bad values of each."""
    for name in inspect.signature(opt.factory).parameters:
        bad = BAD.get(name, [])
        if opt.factory in ENTERING.get(name, ()):
            bad = [nan, inf]
        if bad:
            yield name, bad


def injected(opt):
    """With all of its numbers traced, including those that may be None."""
    given = {"kappa": 1.0, "momentum": 0.9, "beta": 0.95, "fifo_probability": 0.5}
    given = {k: x for k, x in given.items() if opt.accepts(k)}
    options = {**given, **opt.options}
    static = [k for k, x in options.items() if not isinstance(x, float)]
    return opt.build(
        lambda factory: optax.inject_hyperparams(factory, static_args=static), **options
    )


def kept(opt, state):
    """The part of an injected state that is memory.

    Slots are left out, because the spare one may hold anything finite. SM3's count is
    left out, because it counts all steps.
    """
    parts = jax.tree.leaves_with_path(state.inner_state)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in parts}
    sm3 = opt.factory in (memoptax.sm3, memoptax.scale_by_sm3)
    skip = ("count",) if sm3 else (".buffer.slots", ".buffer.scales")
    return {k: leaf for k, leaf in named.items() if not any(x in k for x in skip)}


def shows(updates):
    return all(np.isnan(u).all() for u in jax.tree.leaves(updates))


@each_optimizer
@pytest.mark.few(3)
def test_a_traced_number_out_of_range_shows_and_does_not_change_the_state(opt):
    tx, params = injected(opt), params_like(SHAPES)
    update, state = jax.jit(tx.update), tx.init(params)
    *before, during, after = GRADIENTS
    for gradient in before:
        _, state = update(gradient, state, params)
    names = {name: bad for name, bad in numbers_of(opt) if name in state.hyperparams}
    for name, bad in names.items():
        for value in bad:
            number = jnp.full_like(state.hyperparams[name], value)
            spoilt = state._replace(hyperparams=state.hyperparams | {name: number})
            updates, new = update(during, spoilt, params)
            assert shows(updates), (name, value)
            close(kept(opt, new), kept(opt, state), rtol=0, atol=0)
            new = new._replace(hyperparams=state.hyperparams)
            updates, _ = update(after, new, params)
            wanted, _ = update(after, state, params)
            assert np.isfinite(jax.tree.leaves(wanted)[0]).all()
            close(updates, wanted)


def test_every_number_is_tried():
    tried = {name for opt in OPTIMIZERS for name, _ in numbers_of(opt)}
    assert tried == {*BAD, *ENTERING}


@pytest.mark.parametrize(
    ("factory", "options", "name"),
    [
        (memoptax.rmsprop_c, {"momentum": 0.9}, "learning_rate"),
        (memoptax.rmsprop_c, {"centered": True}, "weight_decay"),
        (memoptax.sgd_c, {"momentum": 0.9, "dampening": 0.1}, "weight_decay"),
        (memoptax.adam_c, {}, "weight_decay"),
        (memoptax.adam_c, {"mu_dtype": "int8", "topc": 0}, "weight_decay"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.few(3)
def test_a_schedule_that_is_not_finite_once_shows_and_does_not_change_the_moments(
    factory, options, name, value
):
    def bad(count):
        return jnp.where(count == 2, value, 0.1)

    tx = factory(**{"learning_rate": 0.1, **options, name: bad})
    params = params_like(SHAPES)
    update, state, moments = jax.jit(tx.update), tx.init(params), []
    for turn, gradient in enumerate(GRADIENTS):
        updates, state = update(gradient, state, params)
        finite = [bool(np.isfinite(u).all()) for u in jax.tree.leaves(updates)]
        assert all(finite) if turn != 2 else shows(updates)
        moments.append([x for x in jax.tree.leaves(state[1]) if x.shape])
    close(moments[2], moments[1], rtol=0, atol=0)
    assert not np.array_equal(moments[3][-1], moments[2][-1])
    memoptax.check_state(tx, params, state)


# An aggregate, or a κ, that makes M so large that its square overflows


SQUARING = [memoptax.adam_cm, memoptax.adamw_cm, memoptax.sm3_cm]
each_squaring = pytest.mark.parametrize("factory", SQUARING, ids=lambda f: f.__name__)


def assert_it_recovers(make, spoil):
    """A step of ``spoil`` shows, and the steps after it are finite and not 0."""
    params = {"w": jnp.full((3, 4), 0.5), "b": jnp.ones(3)}
    good, bad = make(), spoil()
    state = good.init(params)
    for size in (1.0, 2.0):
        gradient = jax.tree.map(lambda p, s=size: s * p, params)
        _, state = good.update(gradient, state, params)
    before = state
    updates, state = bad.update(params, state, params)
    assert all(not np.isfinite(u).any() for u in jax.tree.leaves(updates))
    for name in ("nu", "accumulators"):
        close(*(optax.tree.get(s, name) for s in (state, before)), rtol=0, atol=0)
    for _ in range(3):
        updates, state = good.update(params, state, params)
        for u in jax.tree.leaves(updates):
            assert np.isfinite(u).all() and np.all(np.abs(u) > 1e-3)
    memoptax.check_state(good, params, state)


@each_squaring
def test_a_gradient_beside_a_wider_one_is_refused_by_its_own_range(factory, x64):
    """3e20 has a square in float64 and none in float32."""
    params = {"a": jnp.zeros((2, 2), jnp.float32), "b": jnp.zeros((2, 2))}
    tx = factory(0.1, topc=1)
    state = tx.init(params)
    gradients = {"a": jnp.full((2, 2), 3e20, jnp.float32), "b": jnp.ones((2, 2))}
    updates, new = tx.update(gradients, state, params)
    assert shows(updates)
    jax.tree.map(np.testing.assert_array_equal, new, state)
    gradients = {"a": jnp.ones((2, 2), jnp.float32), "b": jnp.full((2, 2), 3e20)}
    updates, _ = tx.update(gradients, state, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@each_squaring
@pytest.mark.parametrize("value", [1e25, 1e38, nan, inf])
def test_an_aggregate_whose_square_overflows_shows(factory, value):
    def aggr(update, mean, fill):
        return update + mean

    assert_it_recovers(
        lambda: factory(0.1, aggr=aggr),
        lambda: factory(0.1, aggr=lambda u, mean, fill: jnp.full_like(u, value)),
    )


@each_squaring
def test_a_kappa_that_grows_shows_where_the_square_overflows(factory):
    """The values held were within the range of an earlier κ."""
    params = {"w": jnp.full((3, 4), 1e15), "b": jnp.full(3, 1e15)}
    small, large = factory(0.1), factory(0.1, kappa=1e6)
    state = small.init(params)
    for _ in range(3):
        _, state = small.update(params, state, params)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, state = large.update(gradient, state, params)
    assert all(not np.isfinite(u).any() for u in jax.tree.leaves(updates))
    updates, state = small.update(gradient, state, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves((updates, state)))
    assert all(np.all(u != 0) for u in jax.tree.leaves(updates))


@each_squaring
@pytest.mark.parametrize("kappa", [0.25, 1.0, 7.0])
def test_a_gradient_is_refused_from_the_norm_that_the_page_gives(factory, kappa):
    tx, params = factory(0.1, kappa=kappa, topc=1), jnp.zeros(4)
    limit = 9.2e18 / (1 + kappa) / 2  # the norm of four equal entries is twice one
    for size, moves in ((0.98, True), (1.02, False)):
        gradient = jnp.full(4, size * limit)
        updates, state = tx.update(gradient, tx.init(params), params)
        assert np.isfinite(updates).all() == moves
        assert (optax.tree.get(state, "ages")[0, 0] > 0) == moves


# Large finite gradients


LARGE = [1.9e19, 1e25, 3e38]
SM3 = [
    {"variant": variant, "cover": cover, **options}
    for variant in ("I", "II")
    for cover in (None, memoptax.covers.whole)
    for options in (
        {},
        {"beta": 0.9},
        {"momentum": 0.9},
        {"momentum": 0.9, "momentum_dtype": "int8"},
    )
]


def named(options):
    cover = options["cover"]
    return str(options | {"cover": cover and cover.__name__})


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("options", SM3, ids=named)
@pytest.mark.few(3)
def test_large_gradients_show_in_sm3_and_its_state_stays(options, size):
    tx = untyped(memoptax.sm3(0.1, **options))
    params = params_like({"w": (3, 4), "b": (3,)})
    _, before = tx.update(params, tx.init(params), params)
    every = jax.tree.map(lambda p: jnp.full_like(p, size), params)
    one = jax.tree.map(lambda p: p.at[(1,) * p.ndim].set(size), params)
    for large in (every, one):
        updates, after = tx.update(large, before, params)
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(large)):
            assert not np.isfinite(u[g == jnp.float32(size)]).any()
            rest = np.abs(u[np.isfinite(u)])
            assert np.all(rest <= 0.1 * (4 if "beta" in options else 1.001))
    updates, after = tx.update(every, before, params)
    close(after[0].accumulators, before[0].accumulators, rtol=0, atol=0)
    if before[0].momentum is not None:
        close(after[0].momentum, before[0].momentum, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_large_rows_show_in_sm3(variant, momentum):
    rows_alone = memoptax.covers.rows
    tx = untyped(memoptax.sm3(0.1, momentum, variant=variant, cover=rows_alone))
    params, rows = jnp.ones((6, 3)), jnp.array([[1], [4]])
    _, state = tx.update(params, tx.init(params))
    large = BCOO((jnp.full((2, 3), 1e25), rows), shape=(6, 3))
    updates, after = tx.update(large, state)
    assert not np.isfinite(updates.data).any()
    close(after[0]._replace(count=0), state[0]._replace(count=0), rtol=0, atol=0)


CG = (memoptax.adam_c, memoptax.adamw_c, memoptax.rmsprop_c)
OWN = [
    (memoptax.adam_c, {"amsgrad": True}),
    (memoptax.adamw_c, {"amsgrad": True, "mu_dtype": "int8"}),
    (memoptax.rmsprop_c, {"centered": True}),
    (memoptax.rmsprop_c, {"centered": True, "momentum": 0.9}),
    (memoptax.adam_cm, {}),
    (memoptax.adam_cm, {"topc": 0, "amsgrad": True}),
    (memoptax.adamw_cm, {"amsgrad": True}),
    (memoptax.sm3_cm, {}),
    (memoptax.sm3_cm, {"topc": 0}),
]


@pytest.mark.few(2)
@pytest.mark.parametrize("size", [1e20, 1e25, 1e38])
@pytest.mark.parametrize("factory, options", OWN)
def test_large_gradients_freeze_no_second_moment_of_ours(factory, options, size):
    """Those of optax do freeze, and the documentation says so."""
    tx, params = factory(0.1, decay=0.0, **options), {"w": jnp.ones((3, 4))}
    _, state = tx.update(params, tx.init(params), params)
    updates, state = tx.update({"w": jnp.full((3, 4), size)}, state, params)
    assert not np.isfinite(updates["w"]).any()
    moments = jax.tree.leaves(state[1] if factory in CG else state)
    assert all(np.isfinite(np.float64(x)).all() for x in moments)
    assert all(np.all(np.abs(np.float64(x)) < 1e3) for x in moments[:3])
