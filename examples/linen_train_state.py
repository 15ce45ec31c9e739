"""Critical gradients in a Flax Linen ``TrainState``, on scikit-learn's digits."""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
from flax import linen as nn
from flax.training.train_state import TrainState

import memoptax

BATCH = 64
OPTIMIZERS = {
    "sgd": optax.sgd(0.05, momentum=0.9),
    "sgd_c": memoptax.sgd_c(0.02, momentum=0.9, topc=5),
}


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, pixels):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(pixels)))


# Donated: the new state takes the memory of the old one.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, pixels, labels):
    def loss_fn(params):
        logits = state.apply_fn(params, pixels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def train(tx, pixels, labels, steps):
    model, random = Classifier(), np.random.default_rng(0)
    params = model.init(jax.random.key(0), pixels[:1])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for _ in range(steps):
        rows = random.integers(len(labels), size=BATCH)
        state = train_step(state, pixels[rows], labels[rows])
    return state


def main(argv=None):
    """Test accuracies by optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=600, help="steps of each run (600)"
    )
    steps = parser.parse_args(argv).steps
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = sklearn.model_selection.train_test_split(
        (pixels / 16).astype(np.float32), labels, test_size=0.3, random_state=0
    )
    accuracies = {}
    for name, tx in OPTIMIZERS.items():
        state = train(tx, train_x, train_y, steps)
        predicted = jnp.argmax(state.apply_fn(state.params, test_x), -1)
        accuracies[name] = float(np.mean(predicted == test_y))
        print(f"{name:<6} test accuracy {accuracies[name]:.2%}")
    return accuracies


if __name__ == "__main__":
    main()
