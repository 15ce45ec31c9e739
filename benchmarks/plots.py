"""Draw the results: time of a step against C, and bytes of state against C.

    python benchmarks/plots.py [results.json ...]

The times are those that steps.py kept. The bytes are counted by ``memory_report``.
Beside them are those of the authors' code: C copies, one more for the classes with a
running sum (``_eff``), and the two moments of Adam.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import memoptax

CAPACITIES = (1, 5, 10, 20, 40, 60, 80, 100)
# Bytes per float32 parameter in the authors' code, which has only float32 slots.
PUBLISHED = {
    "authors' Adam_C (heap)": lambda c: 4 * (c + 2),
    "authors' Adam_C_eff, Adam_CM": lambda c: 4 * (c + 3),
}
OURS = {
    "adam_c, adam_cm": None,
    "the same, bfloat16 slots": "bfloat16",
    "the same, int8 slots": "int8",
}
# Colours of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def draw_times(axes, sections):
    """Plot the median time of an accepted step over adam's, by C. Returns the lines."""
    rows = [row for row in sections["steps"]["rows"] if row["topc"]]
    largest = max((row["size"], row["leaves"]) for row in rows)
    rows = [row for row in rows if (row["size"], row["leaves"]) == largest]
    lines = {}
    for row in rows:
        line = lines.setdefault((row["optimizer"], row["slots"]), [])
        line.append((row["topc"], row["accepted / adam"]))
    for colour, name in zip(COLOURS, ("sgd_c", "adam_c", "adam_cm", "rmsprop_c")):
        for dtype, style in (("float32", "o-"), ("int8", "s:")):
            if points := lines.get((name, dtype)):
                label = name if dtype == "float32" else f"{name}, int8"
                axes.plot(*zip(*points), style, color=colour, label=label)
    axes.axhline(1, color="black", lw=1, ls=":", label="optax.adam")
    axes.set(
        xscale="log",
        ylim=(0, 1.4 * max(max(line.get_ydata()) for line in axes.lines)),
        xlabel="C, slots (logarithmic)",
        ylabel="time of a step / optax.adam",
        title=f"Time: {largest[0] >> 20} · 2²⁰ float32 in {largest[1]} leaves",
    )
    axes.set_xticks(sorted({row["topc"] for row in rows}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=3, loc="upper center", fontsize=8)
    return lines


def draw_bytes(axes):
    """Plot the bytes of state per parameter of a 1024 x 1024 matrix, by C."""
    params = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    for (name, formula), style in zip(PUBLISHED.items(), ("--", ":")):
        points = [formula(c) for c in CAPACITIES]
        axes.plot(CAPACITIES, points, ls=style, color="black", label=name)
    for colour, (name, dtype) in zip(COLOURS, OURS.items()):
        points = [
            memoptax.memory_report(
                memoptax.adam_c(0.1, topc=c, buffer_dtype=dtype), params
            ).per_parameter
            for c in CAPACITIES
        ]
        axes.plot(CAPACITIES, points, "o-", color=colour, label=name)
    axes.set(
        xlabel="C, slots",
        ylabel="bytes of state per parameter",
        title="Memory: a 1024 × 1024 matrix of float32",
        ylim=(0, None),
    )
    axes.legend(frameon=False)


def draw(path):
    """Save the figure of one file of results beside it. Returns its path."""
    sections = json.loads(path.read_text())
    machine = sections["steps"]["machine"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_times(left, sections)
    draw_bytes(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"{machine['device']}, {machine['cores']} cores, jax {machine['jax']}",
        fontsize=9,
    )
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    return picture


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(__file__).parent / "results"
    kept = sorted(results.glob("*-cores-jax*.json"))
    parser.add_argument("results", type=Path, nargs="*", default=kept)
    for path in parser.parse_args(argv).results:
        print(draw(path))


if __name__ == "__main__":
    main()
