"""Which optimizer leaves a sharp minimum, and why: Adam, and Adam with buffers.

A soft minimum joins a well of sharpness k at -1 with a flat one at 1.5. A hundred runs
start in the sharp well. A run has escaped if it ends at x > 0, and settled if it ends
within .1 of the flat minimum. Every claim has a control: twice the rate, longer
momentum, an average of the parameters, a first-in-first-out buffer, a buffer with
almost no weight, and a warm-up that makes the first steps small.
"""

import argparse
import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm

import memoptax

SHARPNESS = (2, 5, 10, 20, 50)
FLAT_MINIMUM = 1.5
SMOOTHING = 0.05
EMA_DECAY = 0.99
WARMUP = 100
WEIGHTLESS = 1e-6  # a κ so small that the buffer does nothing; κ = 0 is Adam


class Outcome(NamedTuple):
    """Shares of the runs, one for each sharpness."""

    escaped: np.ndarray
    settled: np.ndarray


def double_well(x, k):
    """-τ log(exp(-A/τ) + exp(-B/τ)), A = k/2 (x + 1)², B = ¼ (x - 1.5)²."""
    sharp, flat = k / 2 * (x + 1) ** 2, (x - FLAT_MINIMUM) ** 2 / 4
    return -SMOOTHING * jnp.logaddexp(-sharp / SMOOTHING, -flat / SMOOTHING)


def run(make, steps, setting, k, start):
    """Where one run ends, and where the average of its parameters ends."""
    tx = make(*setting)

    def step(carry, _):
        x, average, state = carry
        updates, state = tx.update(jax.grad(double_well)(x, k), state, x)
        x = optax.apply_updates(x, updates)
        average = EMA_DECAY * average + (1 - EMA_DECAY) * x
        return (x, average, state), None

    carry = (start, start, tx.init(start))
    (x, average, _), _ = jax.lax.scan(step, carry, length=steps)
    return x, average


def outcomes(make, settings, steps=2000, starts=100):
    """All starts and sharpnesses of one optimizer, in one program.

    Args:
      make: builds the optimizer from the numbers of a setting, which are traced.
      settings: a list of tuples of numbers.

    Returns:
      For each setting an Outcome, and one of the EMA of the parameters.
    """
    k = jnp.asarray(SHARPNESS, jnp.float32)
    x = np.random.default_rng(0).uniform(-1.6, -0.8, starts)
    every = functools.partial(run, make, steps)
    every = jax.vmap(every, (None, None, 0))
    every = jax.vmap(every, (None, 0, None))
    every = jax.jit(jax.vmap(every, (0, None, None)))
    settings = jnp.asarray(settings, jnp.float32)
    ends, averages = every(settings, k, jnp.asarray(x, jnp.float32))
    return [(_shares(x), _shares(mean)) for x, mean in zip(ends, averages)]


def _shares(x):
    x = np.asarray(x)
    settled = np.abs(x - FLAT_MINIMUM) < 0.1
    return Outcome(np.mean(x > 0, axis=-1), np.mean(settled, axis=-1))


def warm(rate, steps):
    """A linear warm-up to ``rate`` over this number of steps (1: at once)."""
    return lambda count: rate * jnp.minimum(1, (count + 1) / steps)


# The optimizers compared. The numbers of a setting are traced, so that one program runs
# them all. Static arguments (C, the first step, FIFO) need another program.


def adam(rate, b1=0.9, warmup=1):
    return optax.adam(warm(rate, warmup), b1)


def adam_cg(rate, warmup=1):
    """The released code always adds the buffer's mean, so this uses 'sum'."""
    return memoptax.adam_c(warm(rate, warmup), aggr="sum")


def adam_cm(topc, skip_first, fifo_probability=None):
    def make(rate, decay=0.7, kappa=1.0, warmup=1):
        return memoptax.adam_cm(
            warm(rate, warmup),
            topc=topc,
            decay=decay,
            kappa=kappa,
            skip_first=skip_first,
            fifo_probability=fifo_probability,
        )

    return make


def sgd(rate):
    return optax.chain(optax.ema(0.9, debias=False), optax.sgd(rate))


def sgd_cg(rate):
    return optax.chain(memoptax.critical_gradients(), sgd(rate))


def sgd_cm(topc, decay):
    return lambda rate: memoptax.sgd_cm(rate, topc=topc, decay=decay)


BASE = "Adam, and what is usually tried instead"
RELEASED = "Adam+CM with the released code's first step"
DEFAULT = "Adam+CM as memoptax takes the first step"
WARM = f"After a warm-up of {WARMUP} steps"
SMALL = "All at a tenth of the rate (.01)"
SGD = "SGD with momentum, at rate .1 and at the best of six rates"
WITHOUT = "Adam+CM, buffer of weight 0"
AVERAGED = ("Adam", "Adam+CM C=5 decay .7")
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def adam_programs():
    """(optimizer, {(section, row): setting}) for every program with Adam in it."""
    yield (
        adam,
        {
            (BASE, "Adam"): (0.1, 0.9, 1),
            (BASE, "Adam, 2 times the rate"): (0.2, 0.9, 1),
            (BASE, "Adam, 4 times the rate"): (0.4, 0.9, 1),
            (BASE, "Adam, 16 times the rate"): (1.6, 0.9, 1),
            (BASE, "Adam, b1 .95"): (0.1, 0.95, 1),
            (BASE, "Adam, b1 .98"): (0.1, 0.98, 1),
            (BASE, "Adam, b1 .99"): (0.1, 0.99, 1),
            (WARM, "Adam"): (0.1, 0.9, WARMUP),
            (SMALL, "Adam"): (0.01, 0.9, 1),
        },
    )
    yield (
        adam_cg,
        {
            (BASE, "Adam+CG"): (0.1, 1),
            (BASE, "Adam+CG, 2 times the rate"): (0.2, 1),
            (WARM, "Adam+CG"): (0.1, WARMUP),
            (SMALL, "Adam+CG"): (0.01, 1),
        },
    )
    for (section, skip_first), topc in itertools.product(
        ((RELEASED, True), (DEFAULT, False)), (1, 5, 20)
    ):
        name = f"Adam+CM C={topc}"
        small = name + (", released first step" if skip_first else "")
        rows = {
            (section, f"{name} decay .7"): (0.1, 0.7, 1, 1),
            (section, f"{name} decay .99"): (0.1, 0.99, 1, 1),
            (SMALL, f"{small} decay .7"): (0.01, 0.7, 1, 1),
            (SMALL, f"{small} decay .99"): (0.01, 0.99, 1, 1),
        }
        if topc == 5:
            rows[section, WITHOUT] = (0.1, 0.7, WEIGHTLESS, 1)
        if not skip_first:
            rows[WARM, f"{name} decay .7"] = (0.1, 0.7, 1, WARMUP)
            rows[WARM, f"{name} decay .99"] = (0.1, 0.99, 1, WARMUP)
        if not skip_first and topc == 5:
            rows[WARM, WITHOUT] = (0.1, 0.7, WEIGHTLESS, WARMUP)
        yield adam_cm(topc, skip_first), rows
        if skip_first or topc == 5:
            fifo = {(section, f"{name} FIFO"): (0.1, 0.7)}
            yield adam_cm(topc, skip_first, fifo_probability=1.0), fifo


def sgd_programs():
    """(optimizer, row) for the optimizers that run at every rate."""
    yield sgd, "SGD"
    yield sgd_cg, "SGD+CG C=5 decay .7"
    for topc, decay in ((1, 0.7), (5, 0.7), (5, 0.99)):
        yield sgd_cm(topc, decay), f"SGD+CM C={topc} decay {decay}".replace(" 0.", " .")


def measure(steps, starts) -> dict:
    """section -> row -> Outcome."""
    results = {section: {} for section in (BASE, RELEASED, DEFAULT, WARM, SMALL, SGD)}
    programs = [*adam_programs(), *sgd_programs()]
    for make, rows in tqdm.tqdm(programs, "programs", leave=False, disable=None):
        if isinstance(rows, str):
            _add_tuned(results[SGD], rows, make, steps, starts)
            continue
        every = outcomes(make, list(rows.values()), steps, starts)
        for (section, name), (outcome, averaged) in zip(rows, every):
            results[section][name] = outcome
            if name in AVERAGED and section in (BASE, RELEASED):
                results[section][f"{name}, EMA of the parameters"] = averaged
    return results


def _add_tuned(rows, name, make, steps, starts):
    every = outcomes(make, [(rate,) for rate in RATES], steps, starts)
    best = max(range(len(RATES)), key=lambda i: every[i][0].settled.mean())
    rows[name] = every[0][0]
    rows[f"{name}, best rate ({RATES[best]:g})"] = every[best][0]


def print_table(results):
    print(f"\n{'Share of runs':44s}  escaped at k =" + " " * 15 + "settled")
    print(" " * 45 + "".join(f"{k:6d}" for k in SHARPNESS) + "   k >= 5")
    for section, rows in results.items():
        print(section)
        if section == SMALL:
            escaped = np.max([row.escaped for row in rows.values()], axis=0)
            settled = np.concatenate([row.settled[1:] for row in rows.values()])
            rows = {f"largest of {len(rows)} rows": Outcome(escaped, settled)}
        for name, row in rows.items():
            shares = "".join(f"{share:6.2f}" for share in row.escaped)
            low, high = min(row.settled[1:]), max(row.settled[1:])
            print(f"  {name:43s}{shares}   {low:.2f}-{high:.2f}")


# Okabe and Ito's colours, which the colour-blind can tell apart.
ORANGE, GREEN, BLUE = "#E69F00", "#009E73", "#0072B2"
VERMILION, PURPLE, GREY = "#D55E00", "#CC79A7", "#999999"
LINES = (
    ("Adam+CM C=5 decay .7", "Adam+CM, C = 5, decay .7", VERMILION, "o-"),
    ("Adam+CM C=5 decay .99", "Adam+CM, C = 5, decay .99", ORANGE, "s-"),
    ("Adam+CM C=1 decay .7", "Adam+CM, C = 1, decay .7", PURPLE, "^-"),
    (WITHOUT, "Adam+CM, buffer of weight 0", GREY, "D--"),
    ("Adam+CG", "Adam+CG", GREEN, "v-"),
    ("Adam", "Adam", BLUE, "X-"),
)
SGD_LINES = (
    ("SGD+CM C=5 decay .7", "SGD+CM, C = 5, decay .7", VERMILION, "o-"),
    ("SGD+CM C=1 decay .7", "SGD+CM, C = 1, decay .7", PURPLE, "^-"),
    ("SGD+CG C=5 decay .7", "SGD+CG, C = 5, decay .7", GREEN, "v--"),
    ("SGD", "SGD", BLUE, "X-"),
)


def draw(results, starts=100):
    """The escape ratios as a figure of three panels."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    panels = (
        (
            "Rate .1, the released first step",
            {**results[BASE], **results[RELEASED]},
            LINES,
        ),
        (f"Rate .1, after {WARMUP} steps of warm-up", results[WARM], LINES),
        ("SGD with momentum .9, rate .1", results[SGD], SGD_LINES),
    )
    for ax, (title, rows, lines) in zip(axes, panels):
        for i, (name, label, colour, style) in enumerate(lines):
            # Shifted sideways, so that lines that coincide can all be seen.
            x = np.arange(len(SHARPNESS)) + 0.06 * (i - (len(lines) - 1) / 2)
            ax.plot(x, rows[name].escaped, style, color=colour, label=label, alpha=0.9)
        ax.set_title(title, fontsize=11)
        ax.set_xticks(range(len(SHARPNESS)), [str(k) for k in SHARPNESS])
        ax.set_xlabel("sharpness k of the well where runs start")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of runs that escaped")
    axes[0].set_ylim(-0.04, 1.06)
    legends = ((axes[1], 0.35), (axes[2], 0.83))
    for ax, x in legends:
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="upper center",
            bbox_to_anchor=(x, 0.02),
            ncols=3 if ax is axes[1] else 2,
            fontsize=9,
            frameon=False,
        )
    figure.suptitle(f"Escape from a sharp minimum, {starts} starts each")
    figure.tight_layout()
    return figure


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of each run (2000)"
    )
    parser.add_argument(
        "--starts", type=int, default=100, help="runs of each row (100)"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("escape.png"),
        help="the figure (escape.png)",
    )
    arguments = parser.parse_args(argv)
    results = measure(arguments.steps, arguments.starts)
    print_table(results)
    figure = draw(results, arguments.starts)
    figure.savefig(arguments.output, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"\nThe figure is in {arguments.output}")
    return results


if __name__ == "__main__":
    main()
