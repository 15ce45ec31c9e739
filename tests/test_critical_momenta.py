"""Critical momenta: by hand, Adam in the limit, and steps that are not finite."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from slots import entries
from streams import SHAPES, at, lognormal, replay, zeros

pytestmark = pytest.mark.few(2)

nan, inf = float("nan"), float("inf")


# By hand


def updates_of(tx, gradients):
    """The updates of one float64 number."""
    state, got = tx.init(jnp.zeros(())), []
    for gradient in gradients:
        update, state = tx.update(jnp.asarray(gradient), state, jnp.zeros(()))
        got.append(float(update))
    return got


def test_sgd_by_hand(x64):
    # b1 = .5; keys: 4, decayed to 2.8; 2 < 2.8 is refused; 3 > 1.96 is taken.
    #   g:      4   -2    3     0
    #   m:      2    0    1.5   .75
    #   stored: -    2    2     1.5
    tx = memoptax.sgd_cm(0.1, b1=0.5, topc=1)
    got = updates_of(tx, [4.0, -2.0, 3.0, 0.0])
    np.testing.assert_allclose(got, [-0.2, -0.2, -0.35, -0.225], rtol=1e-14)


def test_adam_by_hand(x64):
    # m = .4, .16, .444; M = .4, .56, .844. The second is refused, because 2 < 2.8.
    v1 = 0.001 * 0.4**2
    v2 = 0.999 * v1 + 0.001 * 0.56**2
    v3 = 0.999 * v2 + 0.001 * 0.844**2
    want = [
        # v is of M, not of g: the first step is 1 / (1 - b1) times the rate.
        -10.0,
        -(0.56 / 0.19) / np.sqrt(v2 / 0.001999),
        -(0.844 / 0.271) / np.sqrt(v3 / (1 - 0.999**3)),
    ]
    tx = memoptax.adam_cm(1.0, eps=0.0, topc=1)
    np.testing.assert_allclose(updates_of(tx, [4.0, -2.0, 3.0]), want, rtol=1e-12)


@pytest.mark.parametrize(
    "make",
    [memoptax.adam_cm, functools.partial(memoptax.adam_c, amsgrad=True)],
    ids=["adam_cm", "amsgrad"],
)
@pytest.mark.few(9)
def test_eps_root_is_inside_the_root_and_eps_outside(make, x64):
    tx = make(1.0, b1=0.5, b2=0.75, eps=0.5, eps_root=0.09)
    # adam_cm: M = m = .2, v = .25 * .2^2. amsgrad: u = .4, m = .2, v = .25 * .4^2.
    root = 0.2 if make is memoptax.adam_cm else 0.4
    want = -0.4 / (np.sqrt(root**2 + 0.09) + 0.5)
    np.testing.assert_allclose(updates_of(tx, [0.4]), [want], rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1e-8, 0.4999, 0.5, 0.9])
@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize(
    "make",
    [
        memoptax.adam_cm,
        memoptax.sm3_cm,
        functools.partial(memoptax.adam_c, amsgrad=True),
    ],
    ids=["adam_cm", "sm3_cm", "amsgrad"],
)
@pytest.mark.few(9)
def test_decays_have_their_derivatives(make, name, decay, x64):
    @jax.jit
    def travelled(decay):
        tx = make(0.1, **{name: decay})
        state, total = tx.init(jnp.zeros(2)), 0.0
        for gradient in ([1.0, 3.0], [-2.0, 0.5], [0.25, -4.0]):
            update, state = tx.update(jnp.asarray(gradient), state)
            total += update @ jnp.array([1.0, 0.7])
        return total

    # One-sided differences of second order, because a decay is at least 0.
    step = 1e-6
    ahead = [travelled(decay + k * step) for k in range(3)]
    slope = (4 * ahead[1] - 3 * ahead[0] - ahead[2]) / (2 * step)
    found = jax.grad(travelled)(decay)
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-7)
    curve = jax.jit(jax.grad(jax.grad(travelled)))
    assert np.isfinite(curve(decay))


def test_the_released_first_step_by_hand(x64):
    # m = 0, -.2, and the bare gradient 4 is what is stored: M = 0, 3.8.
    want = [0.0, -(3.8 / 0.19) / np.sqrt(0.001 * 3.8**2 / 0.001999)]
    tx = memoptax.adam_cm(1.0, topc=1, skip_first=True, eps=1e-300)
    np.testing.assert_allclose(updates_of(tx, [4.0, -2.0]), want, rtol=1e-12)


# Two ways to the same numbers


def assert_same_run(one, other, **tolerance):
    grads = lognormal(shapes={"a": (3,)})
    got, _ = replay(one, zeros(grads), grads)
    want, _ = replay(other, zeros(grads), grads)
    if tolerance:
        chex.assert_trees_all_close(got, want, **tolerance)
    else:
        chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize(
    ("without", "skip_first"),
    [({"kappa": 0.0}, False), ({"kappa": 0}, True), ({"topc": 0}, True)],
)
def test_without_a_buffer_it_is_adam_bit_for_bit(without, skip_first):
    ours = memoptax.adam_cm(0.1, skip_first=skip_first, **without)
    assert_same_run(ours, optax.adam(0.1))
    decoupled = memoptax.adamw_cm(0.1, weight_decay=0.1, **without)
    assert_same_run(decoupled, optax.adamw(0.1, weight_decay=0.1))


def test_without_a_buffer_sgd_is_an_average_of_gradients():
    average = optax.chain(optax.ema(0.8, debias=False), optax.sgd(0.1))
    assert_same_run(memoptax.sgd_cm(0.1, 0.8, topc=0), average)


@pytest.mark.parametrize("skip_first", [False, True])
def test_a_traced_kappa_of_0_is_adam(skip_first, x64):
    # In float32 optax's bias corrections are 2e-5 off, and ours are not.
    traced = optax.inject_hyperparams(memoptax.adam_cm)(
        0.1, kappa=0.0, skip_first=skip_first
    )
    assert_same_run(traced, optax.adam(0.1), rtol=1e-12)


@pytest.mark.long
def test_optimizers_are_chains():
    scaled = memoptax.scale_by_adam_cm(0.8, 0.99, topc=2, amsgrad=True)
    rate = optax.scale_by_learning_rate(0.1)
    decayed = optax.chain(scaled, optax.add_decayed_weights(0.3), rate)
    ours = functools.partial(memoptax.adamw_cm, 0.1, 0.8, 0.99, topc=2, amsgrad=True)
    assert_same_run(ours(weight_decay=0.3), decayed)
    assert_same_run(ours(weight_decay=0.0), optax.chain(scaled, rate))
    adam_cm = memoptax.adam_cm(0.1, 0.8, 0.99, topc=2, amsgrad=True)
    assert_same_run(adam_cm, optax.chain(scaled, rate))
    momenta = memoptax.critical_momenta(0.8, topc=2, aggr="mid")
    sgd_cm = memoptax.sgd_cm(0.1, 0.8, topc=2, aggr="mid")
    assert_same_run(sgd_cm, optax.chain(momenta, optax.sgd(0.1)))


def test_decay_is_masked():
    mask = {"a": True, "b": False, "c": True}
    tx = memoptax.adamw_cm(0.1, weight_decay=0.5, mask=mask)
    params = {k: jnp.ones(shape) for k, shape in SHAPES.items()}
    still = optax.tree.zeros_like(params)
    updates, _ = jax.jit(tx.update)(still, tx.init(params), params)
    for k, decays in mask.items():
        np.testing.assert_allclose(updates[k], -0.05 * decays, rtol=1e-6)


@pytest.mark.parametrize("make", [memoptax.adam_cm, memoptax.sgd_cm])
def test_syncing_changes_nothing_for_one_leaf(make):
    grads = lognormal(shapes={"a": (3,)})
    runs = [
        replay(make(0.1, topc=2, synced=synced), zeros(grads), grads)[0]
        for synced in (True, False)
    ]
    chex.assert_trees_all_equal(*runs)


# Steps that are not finite


TRANSFORMS = {
    "momenta": memoptax.critical_momenta(topc=2),
    "adam": memoptax.scale_by_adam_cm(topc=2, amsgrad=True),
    "unsynced": memoptax.scale_by_adam_cm(topc=2, synced=False),
    "released": memoptax.scale_by_adam_cm(topc=2, skip_first=True),
    "fifo": memoptax.scale_by_adam_cm(topc=2, fifo_probability=0.5),
    "int8": memoptax.scale_by_adam_cm(topc=2, buffer_dtype="int8", mu_dtype="int8"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_step_that_is_not_finite_changes_nothing(name):
    update = jax.jit(TRANSFORMS[name].update)
    for steps in (0, 1, 6):
        for bad in (nan, -inf):
            changes_nothing(name, update, steps, bad)


def changes_nothing(name, update, steps, bad):
    grads = jax.tree.map(jnp.asarray, lognormal(steps + 1))
    state = TRANSFORMS[name].init(zeros(grads))
    for t in range(steps):
        _, state = update(at(grads, t), state)
    gradient = at(grads, steps)
    spoiled = {**gradient, "b": gradient["b"].at[1].set(bad)}
    updates, after = update(spoiled, state)
    assert all(np.isnan(u).all() for u in updates.values())
    assert_same_state(after, state)


def assert_same_state(one, other):
    """Equal except for the spare slots, which may hold anything finite."""
    buffers = [state.buffer for state in (one, other)]
    for leaf in range(len(SHAPES)):
        row = leaf if buffers[0].keys.shape[0] > 1 else 0
        held, wanted = (entries(buffer, row, leaf) for buffer in buffers)
        np.testing.assert_array_equal(held, wanted)
    chex.assert_trees_all_equal(
        *(
            state._replace(buffer=state.buffer._replace(slots=None, scales=None))
            for state in (one, other)
        )
    )
