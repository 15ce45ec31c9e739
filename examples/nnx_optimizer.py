"""SM3 in a Flax nnx ``Optimizer``, on scikit-learn's digits."""

import argparse
import functools

import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
from flax import nnx

import memoptax

BATCH = 64


def optimizers(steps):
    warm = memoptax.sm3_schedule(0.3, steps // 20, steps)  # SM3 needs a warm-up
    return {"adam": optax.adam(3e-3), "sm3": memoptax.sm3(warm)}


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, pixels):
        return self.out(nnx.relu(self.hidden(pixels)))


# Donated: the new parameters and state take the memory of the old ones.
@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model, optimizer, pixels, labels):
    def loss_fn(model):
        logits = model(pixels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


def train(tx, pixels, labels, steps):
    model, random = Classifier(nnx.Rngs(0)), np.random.default_rng(0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(steps):
        rows = random.integers(len(labels), size=BATCH)
        train_step(model, optimizer, pixels[rows], labels[rows])
    return model


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
    for name, tx in optimizers(steps).items():
        model = train(tx, train_x, train_y, steps)
        accuracies[name] = float(np.mean(jnp.argmax(model(test_x), -1) == test_y))
        print(f"{name:<5} test accuracy {accuracies[name]:.2%}")
    return accuracies


if __name__ == "__main__":
    main()
