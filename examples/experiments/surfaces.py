"""Walk over three classic surfaces with and without critical gradients.

It prints the loss after 50, 100, 200 and 999 steps, and that of the authors' PyTorch
code where it was recorded. It draws the paths. Aggregation by 'sum' about doubles the
step. So compare the C variants with the controls at twice the learning rate.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import memoptax

TIMES = (50, 100, 200, 999)


def beale(x, y):
    return (
        (1.5 - x + x * y) ** 2
        + (2.25 - x + x * y**2) ** 2
        + (2.625 - x + x * y**3) ** 2
    )


def goldstein_price(x, y):
    left = 19 - 14 * x + 3 * x**2 - 14 * y + 6 * x * y + 3 * y**2
    right = 18 - 32 * x + 12 * x**2 + 48 * y - 36 * x * y + 27 * y**2
    return (1 + (x + y + 1) ** 2 * left) * (30 + (2 * x - 3 * y) ** 2 * right)


def six_hump_camel(x, y):
    return (4 - 2.1 * x**2 + x**4 / 3) * x**2 + x * y + (-4 + 4 * y**2) * y**2


class Problem(NamedTuple):
    surface: object
    start: tuple
    rate: float
    minima: list  # the global minima
    window: tuple  # of the plot: x from, x to, y from, y to


PROBLEMS = {
    "Beale": Problem(beale, (0.75, 1.0), 1e-3, [(3, 0.5)], (0.4, 3.4, -1.25, 1.2)),
    "Goldstein-Price": Problem(
        goldstein_price, (-1.0, 0.0), 1e-5, [(0, -1)], (-1.25, 0.5, -1.3, 0.3)
    ),
    "Six-hump camel": Problem(
        six_hump_camel,
        (3.0, 2.5),
        1e-4,
        [(0.0898, -0.7126), (-0.0898, 0.7126)],
        (-2.1, 3.2, -2.1, 2.7),
    ),
}

# Functions of the problem's learning rate. Buffers have C = 5, decay .7 and 'sum'.
OPTIMIZERS = {
    "SGD": lambda rate: optax.sgd(rate),
    "SGD, 2 × rate": lambda rate: optax.sgd(2 * rate),
    "SGD_C": lambda rate: memoptax.sgd_c(rate),
    "SGDM": lambda rate: optax.sgd(rate, momentum=0.9),
    "SGDM, 2 × rate": lambda rate: optax.sgd(2 * rate, momentum=0.9),
    "SGDM_C": lambda rate: memoptax.sgd_c(rate, momentum=0.9),
}

# Colour (Okabe-Ito), line and width: the base, its control at twice the rate, the C
# variant.
STYLES = [("#0072B2", "-", 3.5), ("#E69F00", "--", 2.0), ("#D55E00", "-", 2.0)]

# The losses of the authors' PyTorch code (CGOptimizer) in float32 at TIMES. The
# controls on Beale are PyTorch's SGD.
RECORDED = {
    ("Beale", "SGD"): (5.88612, 3.0341, 1.17394, 0.0889518),
    ("Beale", "SGD, 2 × rate"): (3.03202, 1.17374, 0.435968, 0.020786),
    ("Beale", "SGD_C"): (3.05704, 1.18138, 0.43728, 0.0206507),
    ("Beale", "SGDM"): (0.511622, 0.085624, 0.0175865, 4.0105e-5),
    ("Beale", "SGDM_C"): (0.944707, 0.531911, 0.23822, 0.32267),
    ("Goldstein-Price", "SGD"): (59.891, 39.0544, 31.7603, 30.0006),
    ("Goldstein-Price", "SGD_C"): (37.7498, 31.5011, 30.1402, 30.0),
    ("Goldstein-Price", "SGDM"): (33.6194, 30.6784, 30.0, 30.0),
    ("Goldstein-Price", "SGDM_C"): (11.8359, 3.28724, 3.00015, 3.0),
}


def walk(problem, tx, steps):
    """The positions, (steps + 1, 2), and losses, (steps + 1,), of a walk."""
    loss_and_slope = jax.value_and_grad(lambda at: problem.surface(**at))

    def step(carry, _):
        at, state = carry
        loss, slope = loss_and_slope(at)
        updates, state = tx.update(slope, state, at)
        return (optax.apply_updates(at, updates), state), (at["x"], at["y"], loss)

    @jax.jit
    def run(at):
        return jax.lax.scan(step, (at, tx.init(at)), length=steps + 1)[1]

    # Each coordinate is a leaf: the priority is the sum of the two slopes' sizes.
    x, y, loss = run({"x": jnp.array(problem.start[0]), "y": problem.start[1] + 0.0})
    return np.stack([x, y], axis=1), np.asarray(loss)


def draw(paths, output):
    """Draw the paths over contour lines: plain above, with momentum below."""
    figure = Figure(figsize=(13, 8.6))
    axes = figure.subplots(2, len(PROBLEMS), squeeze=False)
    for column, (name, problem) in enumerate(PROBLEMS.items()):
        lines = list(paths[name].items())
        for axis, some in zip(axes[:, column], (lines[:3], lines[3:])):
            _draw_surface(axis, problem)
            for (label, path), (colour, style, width) in zip(some, STYLES):
                axis.plot(*path.T, style, color=colour, linewidth=width, label=label)
                axis.plot(*path[-1], "o", color=colour, markersize=8, mec="black")
        axes[0, column].set_title(f"{name}, learning rate {problem.rate:g}")
        axes[-1, column].set_xlabel("x")
    for axis in axes[:, 0]:
        axis.set_ylabel("y")
        axis.legend(loc="lower right", framealpha=0.95)
    figure.suptitle(
        f"{max(TIMES)} steps with and without critical gradients: "
        "from the square to the dots; stars are global minima"
    )
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def _draw_surface(axis, problem):
    left, right, low, high = problem.window
    x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(low, high, 300))
    height = problem.surface(x, y)
    depth = np.log10(height - height.min() + 0.05)
    axis.contourf(x, y, depth, 20, cmap="Greys", alpha=0.3)
    axis.contour(x, y, depth, 20, colors="0.65", linewidths=0.4)
    axis.plot(*problem.start, "ks", markersize=8)
    axis.plot(*np.transpose(problem.minima), "k*", markersize=16, mfc="white")
    axis.set(xlim=(left, right), ylim=(low, high))


def main(argv=None):
    """Losses at TIMES, by (problem, optimizer)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("surfaces.png"),
        help="the figure (surfaces.png)",
    )
    args = parser.parse_args(argv)

    losses, paths = {}, {}
    times = "".join(f"{f't = {t}':>12}" for t in TIMES)
    print(f"{'problem':<17}{'optimizer':<17}{times}   recorded")
    for name, problem in PROBLEMS.items():
        paths[name] = {}
        for label, optimizer in OPTIMIZERS.items():
            path, loss = walk(problem, optimizer(problem.rate), max(TIMES))
            paths[name][label] = path
            losses[name, label] = tuple(float(loss[t]) for t in TIMES)
            row = "".join(f"{value:>12.6g}" for value in losses[name, label])
            recorded = " / ".join(f"{v:g}" for v in RECORDED.get((name, label), ()))
            print(f"{name:<17}{label:<17}{row}   {recorded or '-'}")
        print()
    draw(paths, args.output)
    print(f"Paths: {args.output}")
    return losses


if __name__ == "__main__":
    main()
