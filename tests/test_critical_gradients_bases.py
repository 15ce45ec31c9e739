"""The optimizers with critical gradients: their bases, PyTorch's semantics, bytes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memoptax import adam_c, adamw_c, critical_gradients, rmsprop_c, sgd_c

from compiled import train
from streams import PARAMS, close, equal, gradients, replay, trajectory
from untyped import untyped

pytestmark = pytest.mark.few(2)


NESTEROV = {"momentum": 0.9, "nesterov": True}


BASES = {
    "sgd": (sgd_c, {}, optax.sgd, {}),
    "momentum": (sgd_c, {"momentum": 0.9}, optax.sgd, {"momentum": 0.9}),
    "nesterov": (sgd_c, NESTEROV, optax.sgd, NESTEROV),
    "rmsprop": (
        rmsprop_c,
        {"alpha": 0.95, "momentum": 0.9},
        optax.rmsprop,
        {"decay": 0.95, "momentum": 0.9, "eps_in_sqrt": False},
    ),
    "adam": (adam_c, {"eps": 1e-6}, optax.adam, {"eps": 1e-6}),
    "nadam": (adam_c, {"nesterov": True}, optax.adam, {"nesterov": True}),
    "adamw": (adamw_c, {}, optax.adamw, {"weight_decay": 0.01}),
}


each_base = pytest.mark.parametrize("name", BASES)


def with_and_without(name, **buffer):
    ours, options, base, base_options = BASES[name]
    return ours(0.05, **options, **buffer), base(0.05, **base_options)


@functools.cache
def base_trajectory(name):
    return trajectory(with_and_without(name)[1])


def state_shapes(tx, params=PARAMS):
    state = jax.eval_shape(tx.init, params)
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]


@each_base
@pytest.mark.parametrize("off", [{"kappa": 0}, {"kappa": 0.0}, {"topc": 0}], ids=repr)
def test_switched_off_it_is_the_base_bit_for_bit(name, off):
    tx, base = with_and_without(name, **off)
    assert state_shapes(tx) == state_shapes(base)
    if off == {"topc": 0} or name == "momentum":
        equal(trajectory(tx), base_trajectory(name))


@pytest.mark.parametrize("name", ["momentum", "rmsprop", "adam", "adamw"])
def test_a_traced_kappa_of_zero_is_the_base(name):
    traced = jax.jit(
        lambda kappa: train(with_and_without(name, kappa=kappa)[0], PARAMS, gradients())
    )
    close(traced(0.0)[0], base_trajectory(name))


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_an_alias_is_a_chain(name):
    buffer = {"topc": 3, "decay": 0.9, "aggr": "mean"}
    tx, base = with_and_without(name, **buffer)
    chain = optax.chain(critical_gradients(**buffer), base)
    equal(trajectory(tx), trajectory(chain))


# PyTorch's semantics, where optax's differ


def along(tx, grads):
    """The parameter after each gradient of a list, starting from 0."""
    return trajectory(tx, jnp.zeros(()), np.float32(grads))


def test_the_first_step_is_undamped():
    # b = 1, .5 + .8, .65 + .8;  Nesterov's: 1 + b/2
    damped = {"momentum": 0.5, "dampening": 0.2, "kappa": 0}
    close(along(sgd_c(0.1, **damped), [1, 1, 1]), [-0.1, -0.23, -0.375])
    nesterov = sgd_c(0.1, nesterov=True, **damped)
    close(along(nesterov, [1, 1, 1]), [-0.15, -0.315, -0.4875])


def test_nesterov_by_hand():
    # b = 1, 1.5, 1.75;  1 + b/2
    tx = sgd_c(0.1, momentum=0.5, nesterov=True, topc=0)
    close(along(tx, [1, 1, 1]), [-0.15, -0.325, -0.5125])


def test_amsgrad_takes_the_maximum_of_the_uncorrected_moment():
    # v = .5, .375: the maximum .5 over 1 - b2^2 = .75, not the maximum of 1 and .5.
    tx = adam_c(1.0, b1=0.0, b2=0.5, eps=0.0, amsgrad=True, kappa=0)
    close(along(tx, [1, 0.5]), [-1, -1 - 0.5 / np.sqrt(0.5 / 0.75)])


def test_centered_variance_is_clamped():
    # The variance of a constant gradient tends to 0, and rounding makes it negative for
    # some.
    constants = np.linspace(0.1, 3, 100, dtype=np.float32)
    stream = np.broadcast_to(constants, (200, 100))
    for alpha in (0.5, 0.9):
        tx = rmsprop_c(1e-3, alpha, centered=True, topc=2)
        assert np.isfinite(trajectory(tx, jnp.zeros(100), stream)).all()


def test_weight_decay_by_hand():
    # From 10 with a gradient of 4: L2 makes it 4 + 10, decoupled decay is added to a
    # step of 1.
    start, stream = jnp.float32(10), np.array([4], np.float32)
    close(trajectory(sgd_c(0.1, weight_decay=1.0), start, stream), [8.6])
    tx = adamw_c(0.1, weight_decay=1.0, eps=0.0)
    close(trajectory(tx, start, stream), [8.9])


def test_a_mask_excludes_the_leaves_marked_false():
    params, stream = {"a": PARAMS["a"], "b": PARAMS["b"]}, gradients(5)
    stream = {"a": stream["a"], "b": stream["b"]}
    masked, decayed, plain = (
        trajectory(adamw_c(0.1, weight_decay=rate, mask=mask), params, stream)
        for rate, mask in [(0.5, {"a": False, "b": True}), (0.5, None), (0.0, None)]
    )
    close(masked, {"a": plain["a"], "b": decayed["b"]})
    assert not np.allclose(plain["a"], decayed["a"])


def test_weight_decay_never_enters_the_buffer():
    decayed, plain = (
        replay(tx, PARAMS, gradients())[1]
        for tx in (adam_c(0.1, weight_decay=0.1), adam_c(0.1))
    )
    equal(decayed[0].buffer, plain[0].buffer)


def test_amsgrad_and_nesterov_exclude_each_other():
    with pytest.raises(ValueError, match="amsgrad and nesterov"):
        adam_c(0.1, amsgrad=True, nesterov=True)


# Bytes


COPIES = [
    # what it keeps besides its slots, in copies of the parameters; its own counts
    (critical_gradients, {}, 0, 0),
    (sgd_c, {}, 0, 0),
    (sgd_c, {"momentum": 0.9}, 1, 0),
    (sgd_c, {"momentum": 0.9, "dampening": 0.5}, 1, 1),
    (rmsprop_c, {}, 1, 0),
    (rmsprop_c, {"momentum": 0.9, "centered": True}, 3, 0),
    (adam_c, {}, 2, 1),
    (adam_c, {"amsgrad": True}, 3, 1),
    (adamw_c, {}, 2, 1),
    (adamw_c, {"amsgrad": True}, 3, 1),
]


def state_bytes(tx, params):
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("factory, options, more, counts", COPIES)
def test_state_is_as_large_as_documented(factory, options, more, counts):
    params = {name: jnp.zeros((50, 7)) for name in "abc"}
    copy, leaves = 3 * 50 * 7 * 4, 3
    required = {} if factory is critical_gradients else {"learning_rate": 0.1}
    for topc, slots in [(1, 1), (5, 6), (20, 21)]:
        for rows, synced in [(1, True), (leaves, False)]:
            # Keys, ages and two counters per row. With several slots also the entry of
            # each.
            numbers = rows * (2 * topc + 2 + (slots if slots > 1 else 0)) + counts
            size = (slots + more) * copy + 4 * numbers
            if topc == 20:  # a sum; norms and a bound per leaf; the count of rebuilds
                size += copy + 4 * (leaves * (topc + 1) + 1)
            tx = factory(topc=topc, synced=synced, **required, **options)
            assert state_bytes(tx, params) == size
            drawing = factory(
                topc=topc, synced=synced, fifo_probability=0.1, **required, **options
            )
            assert state_bytes(drawing, params) == state_bytes(tx, params) + 8
    said = int(re.findall(r"C \+ (\d) copies", factory.__doc__)[0])
    assert said == 1 + min(m for f, _, m, _ in COPIES if f is factory)
    assert "running sum" in factory.__doc__.partition("Memory:")[2].partition("\n\n")[0]


@pytest.mark.parametrize("options", [{"topc": 1}, {"topc": 2}, {"holding": "sum"}])
def test_a_joined_gradient_in_float16_does_not_overflow(options):
    """It is added up in float32, and only the update is in float16."""
    tx, params = sgd_c(0.1, 0.5, **options), jnp.zeros(3, jnp.float16)
    state, gradient = tx.init(params), jnp.full(3, 4e4, jnp.float16)
    for want in (-4e3, -1e4):
        updates, state = jax.jit(tx.update)(gradient, state)
        assert updates.dtype == jnp.float16
        np.testing.assert_allclose(np.float32(updates), want, rtol=1e-3)
    joined = untyped(critical_gradients(**options))
    state = joined.init(params)
    for _ in range(2):
        updates, state = joined.update(gradient, state)
    assert updates.dtype == jnp.float16 and np.isinf(updates).all()


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}], ids=str)
@pytest.mark.few(9)
def test_the_momentum_of_sgd_takes_what_is_not_finite(options):
    """As in optax.sgd, and unlike a centered RMSprop."""
    tx, params = sgd_c(0.1, 0.9, **options), jnp.zeros(2)
    _, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(params), params)
    trace = np.asarray(optax.tree.get(state, "trace"))
    np.testing.assert_array_equal(trace, [jnp.nan, 1.0])


def test_slots_of_half_precision_are_half_as_large():
    params = jnp.zeros((50, 7))
    full, half = (
        state_bytes(critical_gradients(5, buffer_dtype=dtype), params)
        for dtype in (None, "bfloat16")
    )
    assert full - half == 6 * 50 * 7 * 2
