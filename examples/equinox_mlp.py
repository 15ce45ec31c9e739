"""Critical momenta on an Equinox module, and scikit-learn's breast-cancer data."""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
import sklearn.preprocessing

import memoptax

BATCH = 32
OPTIMIZERS = {"adam": optax.adam(3e-3), "adam_cm": memoptax.adam_cm(1.5e-3, topc=1)}


def arrays(model):
    """The parameters: an activation function, for example, is not one."""
    return eqx.filter(model, eqx.is_inexact_array)


def make_step(tx):
    # Donated: the new state takes the memory of the old one.
    @eqx.filter_jit(donate="all")
    def step(model, state, cells, labels):
        def loss_fn(model):
            logits = jax.vmap(model)(cells)
            return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

        grads = eqx.filter_grad(loss_fn)(model)
        updates, state = tx.update(grads, state, arrays(model))
        return eqx.apply_updates(model, updates), state

    return step


def train(tx, cells, labels, steps):
    model = eqx.nn.MLP(cells.shape[1], "scalar", 32, 2, key=jax.random.key(0))
    step, state = make_step(tx), tx.init(arrays(model))
    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = random.integers(len(labels), size=BATCH)
        model, state = step(model, state, cells[rows], labels[rows])
    return model


def main(argv=None):
    """Test accuracies by optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=300, help="steps of each run (300)"
    )
    steps = parser.parse_args(argv).steps
    cells, labels = sklearn.datasets.load_breast_cancer(return_X_y=True)
    cells = sklearn.preprocessing.scale(cells).astype(np.float32)
    train_x, test_x, train_y, test_y = sklearn.model_selection.train_test_split(
        cells, labels.astype(np.float32), test_size=0.3, random_state=0
    )
    accuracies = {}
    for name, tx in OPTIMIZERS.items():
        model = train(tx, train_x, train_y, steps)
        predicted = jax.vmap(model)(jnp.asarray(test_x)) > 0
        accuracies[name] = float(np.mean(predicted == test_y))
        print(f"{name:<8} test accuracy {accuracies[name]:.2%}")
    return accuracies


if __name__ == "__main__":
    main()
