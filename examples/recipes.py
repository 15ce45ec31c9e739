"""Recipes on scikit-learn's digits: adapters, a sweep, a change of task, an average.

    python examples/recipes.py              # all of them
    python examples/recipes.py lora sweep   # these two

Each is a function that prints what it shows and returns it.
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import memoptax

BATCH, RANK = 64, 4


@functools.cache
def digits():
    """Pixels (n, 64) in [0, 1] and labels (n,)."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    return jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)


def create_params():
    create = jax.nn.initializers.he_normal()
    first, second = jax.random.split(jax.random.key(0))
    return {"hidden": create(first, (64, 32)), "out": create(second, (32, 10))}


def loss_fn(params, pixels, labels):
    logits = jax.nn.relu(pixels @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, params, state, data, steps, loss_fn=loss_fn):
    """Parameters and state after these steps, and the loss before each of them."""

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(data[1]))
        batch = [x[rows] for x in data]
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(jax.random.key(1), steps)
    (params, state), losses = jax.lax.scan(step, (params, state), keys)
    return params, state, losses


def lora(steps=200):
    """Low-rank adapters on a frozen network: the buffer is for the adapters only."""
    data, tx, params = digits(), optax.adam(3e-3), create_params()
    frozen, _, _ = train(tx, params, tx.init(params), data, steps)
    create = jax.nn.initializers.lecun_normal()
    params = {
        "frozen": frozen,
        "down": jax.tree.map(
            lambda w: create(jax.random.key(0), w[:, :RANK].shape), frozen
        ),
        "up": jax.tree.map(lambda w: jnp.zeros_like(w[:RANK]), frozen),
    }

    def adapted_loss(params, pixels, labels):
        def adapt(w, down, up):
            return w + down @ up

        parts = params["frozen"], params["down"], params["up"]
        return loss_fn(jax.tree.map(adapt, *parts), pixels, labels)

    tx = optax.partition(
        {"adapter": memoptax.adam_c(1e-2), "frozen": optax.set_to_zero()},
        {"frozen": "frozen", "down": "adapter", "up": "adapter"},
    )
    upside_down = (data[0].reshape(-1, 8, 8)[:, ::-1].reshape(-1, 64), data[1])
    after, _, losses = train(
        tx, params, tx.init(params), upside_down, steps, adapted_loss
    )
    memory = memoptax.memory_report(tx, params)
    of_all = memoptax.state_bytes(memoptax.adam_c(1e-2), params)
    print(
        f"LoRA: loss on digits upside down {losses[0]:.2f} -> {losses[-1]:.2f}; "
        f"{memory.total:,} bytes of state instead of {of_all:,}"
    )
    return params, after, losses, memory


def sweep(steps=100, capacities=(1, 5)):
    """Every rate, decay and κ in one program for each C, because C sets shapes."""
    data, params = digits(), create_params()
    grid = list(itertools.product((1e-3, 3e-3), (0.7, 0.99), (0.5, 1.0)))

    def final_loss(topc, rate, decay, kappa):
        tx = memoptax.adam_c(rate, topc=topc, decay=decay, kappa=kappa)
        trained, _, _ = train(tx, params, tx.init(params), data, steps)
        return loss_fn(trained, *data)

    losses = {}
    for topc in capacities:
        every = jax.jit(jax.vmap(functools.partial(final_loss, topc)))
        for setting, loss in zip(grid, every(*jnp.array(grid).T)):
            losses[topc, *setting] = float(loss)
    best = min(losses, key=losses.get)
    print(f"Sweep: loss {losses[best]:.3f} at (C, rate, decay, κ) = {best}")
    return losses


def change_of_task(steps=200):
    """A buffer holds gradients of the old task: empty it, and keep the moments."""
    data, params = digits(), create_params()
    tx = memoptax.adam_c(1e-3, topc=20, decay=0.999)
    trained = jax.jit(functools.partial(train, tx, steps=steps))
    params, state, _ = trained(params, tx.init(params), data)
    shuffled = np.random.default_rng(0).permutation(64)
    task = (data[0][:, shuffled], data[1])
    losses = {}
    for name, start in (("kept", state), ("reset", memoptax.reset_buffer(state))):
        _, _, after = trained(params, start, task)
        losses[name] = after
        print(f"Change of task, buffer {name}: mean loss {after.mean():.3f} afterwards")
    return losses


def polyak_average(steps=400, rate=1.0):
    """An average, by ``optax.ema``, of parameters that may never settle."""
    data, params = digits(), create_params()
    tx, average = memoptax.sgd_c(rate), optax.ema(0.98)

    def step(carry, key):
        params, state, average_state, _ = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(data[1]))
        grads = jax.grad(loss_fn)(params, *(x[rows] for x in data))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        smooth, average_state = average.update(params, average_state)
        return (params, state, average_state, smooth), None

    carry = params, tx.init(params), average.init(params), params
    keys = jax.random.split(jax.random.key(1), steps)
    (params, _, _, smooth), _ = jax.lax.scan(step, carry, keys)
    last, averaged = (float(loss_fn(x, *data)) for x in (params, smooth))
    print(f"Polyak: loss {last:.3f}, of the averaged parameters {averaged:.3f}")
    return last, averaged


RECIPES = {
    "lora": lora,
    "sweep": sweep,
    "change_of_task": change_of_task,
    "polyak_average": polyak_average,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes", nargs="*", metavar="recipe", help=f"{', '.join(RECIPES)} (all)"
    )
    names = parser.parse_args(argv).recipes or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        parser.error(f"there is no recipe {', '.join(sorted(unknown))}")
    for name in names:
        RECIPES[name]()


if __name__ == "__main__":
    main()
