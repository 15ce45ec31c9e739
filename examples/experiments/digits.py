"""Train a small Flax classifier on scikit-learn's digits, with and without memory.

Every optimizer trains at each learning rate of a grid, with several seeds at once. It
keeps the rate with the best validation accuracy, and only then meets the test set. The
controls are the base optimizers at twice the rate that their C variant chose, a buffer
of the latest instead of the largest gradients (FIFO), and AdEMAMix, which spends memory
on a second, slower momentum.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from tqdm import tqdm

import memoptax

BATCH = 32
CHUNK = 20  # steps of one jitted scan, after which the progress bar moves

ADAM_RATES = tuple(1.25e-4 * 2**k for k in range(9))
SGD_RATES = tuple(2e-3 * 2**k for k in range(8))

# For each: a function of the learning rate, and the rates to choose from.
OPTIMIZERS = {
    "adam": (optax.adam, ADAM_RATES),
    "adam_c": (memoptax.adam_c, ADAM_RATES),
    "adam_c, int8 slots": (
        functools.partial(memoptax.adam_c, buffer_dtype="int8"),
        ADAM_RATES,
    ),
    "adam_c, FIFO": (
        functools.partial(memoptax.adam_c, fifo_probability=1.0),
        ADAM_RATES,
    ),
    "ademamix": (
        # Its default b3 of .9999 averages over more steps than are taken here.
        functools.partial(optax.contrib.ademamix, b3=0.99),
        ADAM_RATES,
    ),
    "sgd": (functools.partial(optax.sgd, momentum=0.9), SGD_RATES),
    "sgd_c": (functools.partial(memoptax.sgd_c, momentum=0.9), SGD_RATES),
    "sgd_c, FIFO": (
        functools.partial(memoptax.sgd_c, momentum=0.9, fifo_probability=1.0),
        SGD_RATES,
    ),
}
# Control: the base, and the optimizer whose chosen rate is doubled for it.
DOUBLED = {
    "adam, 2 × adam_c's": ("adam", "adam_c"),
    "sgd, 2 × sgd_c's": ("sgd", "sgd_c"),
}


class Classifier(nn.Module):
    """64 pixels to ten digits."""

    @nn.compact
    def __call__(self, pixels):
        x = nn.relu(nn.Dense(64)(pixels))
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


def load_digits(seed):
    """Pixels in [0, 1] and labels of 50 % training, 20 % validation, 30 % test."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    split = functools.partial(
        sklearn.model_selection.train_test_split, random_state=seed
    )
    train_x, rest_x, train_y, rest_y = split(
        pixels, labels, train_size=0.5, stratify=labels
    )
    valid_x, test_x, valid_y, test_y = split(
        rest_x, rest_y, train_size=0.4, stratify=rest_y
    )
    return (train_x, train_y), (valid_x, valid_y), (test_x, test_y)


def create_params(seed):
    return Classifier().init(jax.random.key(seed), jnp.zeros((1, 64)))


def create_state(tx, params, rate=None):
    """A new TrainState. ``rate`` sets the rate of ``inject_hyperparams``."""
    state = TrainState.create(apply_fn=Classifier().apply, params=params, tx=tx)
    if rate is None:
        return state
    return state.replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rate))


def loss_and_accuracy(apply_fn, params, data):
    pixels, labels = data
    logits = apply_fn(params, pixels)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()


def train_step(state, batch):
    grads = jax.grad(lambda p: loss_and_accuracy(state.apply_fn, p, batch)[0])(
        state.params
    )
    return state.apply_gradients(grads=grads)


def draw_batches(seed, steps, size):
    """Rows of the training set, (steps, BATCH), in one shuffled epoch after another."""
    shuffle = np.random.default_rng(seed).permutation
    per_epoch = size // BATCH
    epochs = [shuffle(size)[: per_epoch * BATCH] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, BATCH)[:steps]


def train(optimizer, rates, starts, batches, data, bar):
    """Train every rate from every start (the parameters of each seed) at once.

    Returns the states at the end, and the validation losses and accuracies every CHUNK
    steps, whose axes are (rates, seeds, chunks).
    """
    training, validation, _ = data
    tx = optax.inject_hyperparams(lambda learning_rate: optimizer(learning_rate))(0.0)
    seeds = len(batches)

    @jax.jit
    @jax.vmap
    def create(seed, rate):
        return create_state(tx, jax.tree.map(lambda x: x[seed], starts), rate)

    # Donated: the new state takes the memory of the old one. Otherwise XLA copies every
    # slot of the buffer at each call: 1 M floats at C = 20 took 22 ms a step, not .5.
    @functools.partial(jax.jit, donate_argnums=0)
    @jax.vmap
    def run_chunk(state, rows):
        def step(state, rows):
            return train_step(state, jax.tree.map(lambda x: x[rows], training)), None

        state, _ = jax.lax.scan(step, state, rows)
        return state, loss_and_accuracy(state.apply_fn, state.params, validation)

    # One axis for all runs: rate by rate, and seed by seed in each rate.
    state = create(np.tile(np.arange(seeds), len(rates)), np.repeat(rates, seeds))
    scores = []
    for rows in np.split(batches, batches.shape[1] // CHUNK, axis=1):
        # Every optimizer and rate gets the same batches, and every seed its own.
        state, score = run_chunk(state, np.tile(rows, (len(rates), 1, 1)))
        scores.append(jax.device_get(score))
        bar.update(CHUNK)
    shape = (len(rates), seeds, len(scores))
    losses, accuracies = (np.stack(s, axis=-1).reshape(shape) for s in zip(*scores))
    return state, losses, accuracies


def choose_rate(rates, losses, accuracies):
    """The index of the best validation accuracy over seeds. The loss breaks ties."""
    accuracy = np.nan_to_num(accuracies[..., -1].mean(axis=1))
    loss = np.nan_to_num(losses[..., -1].mean(axis=1), nan=np.inf)
    return max(range(len(rates)), key=lambda i: (accuracy[i], -loss[i]))


def experiment(seeds, steps, data):
    """The record of every optimizer and control, by name."""
    size = len(data[0][1])
    starts = jax.jit(jax.vmap(create_params))(jnp.asarray(seeds))
    batches = np.stack([draw_batches(seed, steps, size) for seed in seeds])
    records = {}
    with tqdm(total=(len(OPTIMIZERS) + len(DOUBLED)) * steps, unit="step") as bar:

        def run(name, optimizer, rates):
            bar.set_description(f"{name:<18}")
            outcome = train(optimizer, rates, starts, batches, data, bar)
            records[name] = record(optimizer, rates, *outcome, data[2])

        for name, (optimizer, rates) in OPTIMIZERS.items():
            run(name, optimizer, rates)
        for name, (base, rival) in DOUBLED.items():
            run(name, OPTIMIZERS[base][0], (2 * records[rival]["rate"],))
    return records


def record(optimizer, rates, state, losses, accuracies, test):
    """The record of one optimizer: its best rate, and its scores at that rate."""
    best = choose_rate(rates, losses, accuracies)
    seeds = losses.shape[1]
    chosen = slice(best * seeds, (best + 1) * seeds)
    score = jax.vmap(lambda params: loss_and_accuracy(state.apply_fn, params, test))
    _, test_accuracy = score(jax.tree.map(lambda x: x[chosen], state.params))
    return {
        "optimizer": optimizer,
        "rate": rates[best],
        "at_edge": len(rates) > 1 and best in (0, len(rates) - 1),
        "sweep": dict(zip(rates, accuracies[..., -1].mean(axis=1).tolist())),
        "loss_curves": losses[best],
        "validation_accuracy": accuracies[best, :, -1],
        "test_accuracy": np.asarray(test_accuracy),
    }


def time_steps(results, batch, rounds, steps=25):
    """Median seconds of one donated step of one seed. The optimizers take turns."""
    step = jax.jit(train_step, donate_argnums=0)
    params = jax.jit(create_params)(0)
    states = {
        name: create_state(r["optimizer"](r["rate"]), jax.tree.map(jnp.copy, params))
        for name, r in results.items()
    }
    times = {name: [] for name in results}
    for turn in range(rounds + 1):
        for name, state in states.items():
            begin = time.perf_counter()
            for _ in range(steps):
                state = step(state, batch)
            jax.block_until_ready(state)
            if turn > 0:  # the first turn compiles
                times[name].append((time.perf_counter() - begin) / steps)
            states[name] = state
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def state_bytes(optimizer):
    """Bytes of optimizer state per parameter, without allocating any."""
    state = jax.eval_shape(lambda: create_state(optimizer(1e-3), create_params(0)))
    size = sum(x.size for x in jax.tree.leaves(state.params))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))
    return held / size


def print_table(results):
    print(
        f"{'optimizer':<20}{'learning rate':>14}{'validation %':>14}"
        f"{'test accuracy %':>18}{'step / adam':>13}{'state bytes/param':>19}"
    )
    for name, r in results.items():
        test = 100 * r["test_accuracy"]
        mark = "*" if r["at_edge"] else " "
        print(
            f"{name:<20}{r['rate']:>13.4g}{mark}"
            f"{100 * r['validation_accuracy'].mean():>14.2f}"
            f"{test.mean():>11.2f} ± {test.std(ddof=1):.2f}"
            f"{r['step_over_adam']:>13.2f}{r['state_bytes']:>19.2f}"
        )
    if any(r["at_edge"] for r in results.values()):
        print("* at the edge of its grid")


def draw(results, output):
    """Plot the validation loss over steps: mean over seeds, ± one deviation."""
    panels = {
        "Adam family": [
            "adam",
            "adam, 2 × adam_c's",
            "adam_c",
            "adam_c, FIFO",
            "ademamix",
        ],
        "SGD family (momentum .9)": ["sgd", "sgd, 2 × sgd_c's", "sgd_c", "sgd_c, FIFO"],
    }
    styles = [
        ("#0072B2", "-"),
        ("#E69F00", "--"),
        ("#D55E00", "-"),
        ("#CC79A7", ":"),
        ("#009E73", "-."),
    ]
    figure = Figure(figsize=(12, 5))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, names) in zip(axes, panels.items()):
        for name, (colour, style) in zip(names, styles):
            curves = results[name]["loss_curves"]
            at = CHUNK * np.arange(1, curves.shape[1] + 1)
            # On a logarithmic axis: the geometric mean and the deviation of logarithms.
            mean, sd = np.log(curves).mean(axis=0), np.log(curves).std(axis=0, ddof=1)
            label = f"{name} (rate {results[name]['rate']:.2g})"
            axis.plot(at, np.exp(mean), style, color=colour, label=label)
            axis.fill_between(
                at, np.exp(mean - sd), np.exp(mean + sd), color=colour, alpha=0.15, lw=0
            )
        axis.set(title=title, yscale="log", xlabel=f"training steps of {BATCH} images")
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        axis.minorticks_off()
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per image (logarithmic)")
    seeds = len(next(iter(results.values()))["test_accuracy"])
    figure.suptitle(
        "Digits: each optimizer at its own best learning rate "
        f"(mean ± sd of {seeds} seeds)"
    )
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main(argv=None):
    """Rate, curves, accuracies, relative step time and state bytes by optimizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=600,
        help=f"steps of each run, a multiple of {CHUNK} (600)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs per rate (5)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the split and of the first run (0)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("digits.png"),
        help="the figure (digits.png)",
    )
    parser.add_argument(
        "--rates", action="store_true", help="print the accuracy at every rate too"
    )
    args = parser.parse_args(argv)
    if args.steps < CHUNK or args.seeds < 2:
        parser.error(f"at least {CHUNK} steps and 2 seeds are needed")

    data = jax.tree.map(jnp.asarray, load_digits(args.seed))
    seeds = range(args.seed, args.seed + args.seeds)
    results = experiment(seeds, args.steps // CHUNK * CHUNK, data)
    rounds = max(2, args.steps // 15)
    times = time_steps(results, jax.tree.map(lambda x: x[:BATCH], data[0]), rounds)
    for name, r in results.items():
        r["step_over_adam"] = times[name] / times["adam"]
        r["state_bytes"] = state_bytes(r["optimizer"])

    if args.rates:
        for name, r in results.items():
            swept = "  ".join(f"{k:g}: {100 * v:.2f}" for k, v in r["sweep"].items())
            print(f"{name:<20}{swept}")
    print_table(results)
    print(
        f"A step of adam took {1e3 * times['adam']:.3f} ms here, most of it overhead; "
        "benchmarks/steps.py measures larger models."
    )
    draw(results, args.output)
    print(f"Learning curves: {args.output}")
    return results


if __name__ == "__main__":
    main()
