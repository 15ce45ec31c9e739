"""Small versions of public code that uses optimizers.

Linen, nnx, Equinox and nested dicts of Haiku are in ``test_flax.py``, checkpoints in
``test_checkpoint.py``.
"""

import pickle

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import optax.contrib
import pytest
from contract import OPTIMIZERS, SHAPES, gradients, params_like, trained

import memoptax

from compiled import step_of

pytestmark = [pytest.mark.slow, pytest.mark.long]

NAMED = {opt.name: opt for opt in OPTIMIZERS}
USED = ("adam_c", "adam_cm int8", "sm3", "sm3_cm int8", "sgd_c nesterov", "rmsprop_c")
each_used = pytest.mark.parametrize("name", USED)
# Code that needs only the optimizer's functions and a pytree.
some_used = pytest.mark.parametrize("name", ("adam_c", "sm3_cm int8", "sgd_c nesterov"))


def is_finite(tree):
    return all(np.isfinite(np.asarray(x, float)).all() for x in jax.tree.leaves(tree))


def least_squares(params, x, y):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) @ params["v"] - y))


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    x = np.float32(random.normal(size=(64, 4)))
    params = {
        "w": np.float32(random.normal(size=(4, 8))),
        "v": np.float32(random.normal(size=8) / 3),
    }
    return jax.tree.map(jnp.asarray, params), x, np.float32(np.sin(x).sum(1))


# Reinforcement learning


@some_used
def test_policies_train_in_scans_of_scans_under_vmap(name):
    """As in PPO: scans of updates, epochs and minibatches, with seeds under vmap."""
    tx = optax.chain(optax.clip_by_global_norm(0.5), NAMED[name].build())
    best = 1

    def loss(params, batch):
        actions, advantages, old = batch
        now = jax.nn.log_softmax(params["logits"])[actions]
        ratio = jnp.exp(now - old)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))

    def iteration(carry, key):
        params, state = carry
        logits = params["logits"]
        actions = jax.random.categorical(key, logits, shape=(32,))
        rewards = jnp.where(actions == best, 1.0, 0.0)
        data = (
            actions,
            rewards - rewards.mean(),
            jax.nn.log_softmax(logits)[actions],
        )

        def epoch(carry, key):
            order = jax.random.permutation(key, 32).reshape(4, 8)

            def minibatch(carry, rows):
                batch = jax.tree.map(lambda x: x[rows], data)
                return step_of(tx)(*carry, jax.grad(loss)(carry[0], batch)), None

            return jax.lax.scan(minibatch, carry, order)[0], None

        carry, _ = jax.lax.scan(epoch, carry, jax.random.split(key, 2))
        return carry, rewards.mean()

    def train(key):
        params = {"logits": jnp.zeros(3)}
        carry = params, tx.init(params)
        return jax.lax.scan(iteration, carry, jax.random.split(key, 40))[1]

    rewards = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    assert np.all(rewards[:, -5:].mean(1) > rewards[:, :5].mean(1) + 0.05)


@pytest.mark.cpu_only("several devices")
@some_used
def test_pmap_over_devices_is_a_mean_of_gradients(name, problem):
    tx, (params, x, y) = NAMED[name].build(), problem
    devices = jax.devices()[:4]

    def step(params, state, x, y):
        gradient = jax.grad(least_squares)(params, x, y)
        gradient = jax.lax.pmean(gradient, "devices")
        return step_of(tx)(params, state, gradient)

    def replicated(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * 4), tree)

    together = jax.pmap(step, "devices", devices=devices)
    alone = jax.jit(
        lambda params, state: step_of(tx)(
            params, state, jax.grad(least_squares)(params, x, y)
        )
    )
    many, one = replicated((params, tx.init(params))), (params, tx.init(params))
    for _ in range(5):
        many = together(*many, x.reshape(4, 16, 4), y.reshape(4, 16))
        one = alone(*one)
    for got, want in zip(jax.tree.leaves(many[0]), jax.tree.leaves(one[0])):
        for member in got:
            np.testing.assert_allclose(member, want, rtol=1e-3, atol=1e-5)


# Probabilistic programs


@some_used
def test_variational_inference_in_numpyro(name):
    infer = numpyro.infer
    data = np.float32(np.random.default_rng(0).normal(3, 1, 50))

    def model(data):
        mean = numpyro.sample("mean", numpyro.distributions.Normal(0, 10))
        numpyro.sample("data", numpyro.distributions.Normal(mean, 1), obs=data)

    def guide(data):
        del data
        loc = numpyro.param("loc", 0.0)
        numpyro.sample("mean", numpyro.distributions.Normal(loc, 0.1))

    svi = infer.SVI(model, guide, NAMED[name].build(), infer.Trace_ELBO())
    found = svi.run(jax.random.key(0), 300, data, progress_bar=False)
    assert is_finite(found.losses)
    assert 0.3 < found.params["loc"] < 4


# optax.contrib


def complex_parts(name):
    tx = optax.contrib.split_real_and_imaginary(NAMED[name].build())
    params = {"z": jnp.array([1 + 1j, 2 - 1j])}
    state = tx.init(params)
    for _ in range(5):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def scheduled_free(name):
    return trained(optax.contrib.schedule_free(NAMED[name].build(), 0.01))


def mechanized(name):
    return trained(optax.contrib.mechanize(NAMED[name].build()))


def reduced_on_plateau(name):
    tx = optax.chain(NAMED[name].build(), optax.contrib.reduce_on_plateau())
    params = params_like(SHAPES)
    state = tx.init(params)
    for value in (3.0, 2.0, 2.0):
        updates, state = jax.jit(tx.update)(params, state, params, value=value)
    return updates, state


def sharpness_aware(name):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    tx = optax.contrib.sam(NAMED[name].build(), adversary, sync_period=2)
    return trained(tx, stream=jax.tree.map(lambda g: g[4:], gradients(steps=10)))


CONTRIB = [
    *(complex_parts, scheduled_free, mechanized),
    *(reduced_on_plateau, sharpness_aware),
]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (run, USED[(k + turn) % len(USED)])
        for k, run in enumerate(CONTRIB)
        for turn in (0, 3)
    ],
)
def test_wrappers_of_optax_contrib_run(run, name):
    assert is_finite(jax.tree.map(jnp.abs, run(name)))


# Learning to learn


@pytest.mark.parametrize("name", ["adam_c", "sm3_cm", "sm3"])
def test_gradients_through_a_run_are_those_of_differences(name, problem, x64):
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), problem)
    opt = NAMED[name]

    def final(rate):
        tx = opt.build(learning_rate=rate)

        def step(carry, _):
            gradient = jax.grad(least_squares)(carry[0], x, y)
            return step_of(tx)(*carry, gradient), None

        carry, _ = jax.lax.scan(step, (params, tx.init(params)), length=4)
        return least_squares(carry[0], x, y)

    final = jax.jit(final)
    slope, h = jax.jit(jax.grad(final))(0.01), 1e-6
    assert slope == pytest.approx(
        float(final(0.01 + h) - final(0.01 - h)) / (2 * h), 1e-4
    )


# Bytes


@pytest.mark.parametrize(
    "tx",
    [
        memoptax.adam_cm(0.1, topc=2, buffer_dtype="int8", mu_dtype="int8"),
        memoptax.adam_c(0.1, topc=2, mu_dtype="int8"),
    ],
    ids=["adam_cm", "adam_c"],
)
def test_a_step_may_be_exported_for_any_number_of_rows(tx):
    def step(gradient):
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        return tx.update(gradient, state, gradient)[0]

    rows = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 4), jnp.float32)
    exported = jax.export.export(jax.jit(step))(rows)
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    np.testing.assert_allclose(exported.call(gradient), step(gradient), rtol=1e-5)


@each_used
def test_an_exported_step_comes_back_and_takes_the_same_step(name, problem):
    tx, (params, x, y) = NAMED[name].build(), problem
    leaves, treedef = jax.tree.flatten((params, tx.init(params)))

    def step(*leaves):
        params, state = treedef.unflatten(leaves)
        gradient = jax.grad(least_squares)(params, x, y)
        return jax.tree.leaves(step_of(tx)(params, state, gradient))

    kept = jax.export.export(jax.jit(step))(*leaves).serialize()
    restored = jax.export.deserialize(kept)
    for got, want in zip(restored.call(*leaves), jax.jit(step)(*leaves)):
        np.testing.assert_array_equal(got, want)


@each_used
def test_a_state_through_bytes_is_the_same(name):
    tx, params = NAMED[name].build(), params_like(SHAPES)
    state = trained(tx)[1]
    msgpack = flax.serialization.to_bytes(state)
    for back in (
        flax.serialization.from_bytes(tx.init(params), msgpack),
        pickle.loads(pickle.dumps(jax.device_get(state))),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, back, state)
        memoptax.check_state(tx, params, back)
