"""One picture for each experiment: differences to the base, each with its interval."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.learning import summary
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.results import Results

# Okabe and Ito's colours, which the colour-blind can tell apart. Marks differ too.
KINDS = {
    "keeps the critical": ("#D55E00", "o"),
    "FIFO": ("#0072B2", "s"),
    "random keys": ("#CC79A7", "^"),
    "κ = 1e-6": ("#999999", "v"),
    "no buffer": ("#009E73", "D"),
}

# Columns that have their own panel of differences, each with its label.
PANELS = {
    "rare": "accuracy on the five rarest, %: difference, better to the right",
    "top": "log10 of the top eigenvalue: difference, flatter to the left",
}


def kind(name: str) -> str:
    """Which of ``KINDS`` an optimizer is."""
    marks = {"FIFO": "FIFO", "random": "random keys", "κ=": "κ = 1e-6"}
    if "C=0" in name or not ("C=" in name or "_cm" in name):
        return "no buffer"
    return next((k for mark, k in marks.items() if mark in name), "keeps the critical")


def draw(experiment: Experiment, folder: Path, path: Path) -> None:
    """Save the picture of an experiment, as far as it was run.

    Its panels are stacked, so that it fits into the column of a page.
    """
    made = [(task, lines) for task, lines in summary.lines(experiment, folder) if lines]
    curved = made[0][0].curve is not None
    panels = [
        (task, lines, column)
        for task, lines in made
        for column in ["", *PANELS]
        if _shown(lines, column)
    ]
    heights = []
    for _, lines, column in panels:
        heights += [1.2 + 0.24 * len(_shown(lines, column))] + [3] * curved
    figure = Figure(figsize=(6.4, sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    axes = iter(grid[:, 0])
    for task, lines, column in panels:
        title = task.name
        if task.name in experiment.against:
            title += f",\ncompared with: {experiment.against[task.name]}"
        _forest(next(axes), task, lines, column, title)
        if curved:
            results = Results(folder / f"{experiment.name}.csv")
            _curves(next(axes), task, lines, results)
    names = {kind(x.name) for _, lines, column in panels for x in _shown(lines, column)}
    handles = [
        Line2D([], [], ls="", marker=mark, color=colour, ms=5, label=name)
        for name, (colour, mark) in KINDS.items()
        if name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _shown(lines, column):
    """The lines that have a difference, the last one first."""
    return [line for line in reversed(lines) if _difference(line, column)]


def _difference(line, column):
    return line.differences.get(column) if column else line.over_base


def _forest(axis, task, lines, column, title):
    shown = _shown(lines, column)
    found = [_difference(line, column) for line in shown]
    low, high = _limits(found)
    for place, (line, (mean, half)) in enumerate(zip(shown, found)):
        colour, mark = KINDS[kind(line.name)]
        if low < mean - half and mean + half < high:
            axis.errorbar(
                mean, place, xerr=half, fmt=mark, color=colour, ms=5, lw=1.2, capsize=2
            )
        else:
            _outside(axis, mean, place, (low, high), colour)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    names = [f"{line.name} − {line.base}" for line in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    better = "better to the right" if task.largest else "better to the left"
    label = PANELS.get(column, f"{task.unit}:\ndifference, {better}")
    axis.set_xlabel(label, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _outside(axis, mean, place, limits, colour):
    """A difference beyond the edge of the picture, as a number with an arrow."""
    left = mean < 0  # 0 is always inside
    text = f"{mean:+.3g}".replace("-", "−")
    axis.text(
        limits[0] if left else limits[1],
        place,
        f" ← {text}" if left else f"{text} → ",
        ha="left" if left else "right",
        va="center",
        fontsize=7,
        color=colour,
    )


def _limits(found):
    """Limits with room for most rows. What is far outside is a number at the edge."""
    far = 4 * np.quantile([abs(x.mean) for x in found], 0.75)
    low, high = _range([x for x in found if abs(x.mean) <= far])
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


def _range(found):
    low = min([0.0, *(mean - half for mean, half in found)])
    return low, max([0.0, *(mean + half for mean, half in found)])


CURVES = {
    "plain sgd": ("#009E73", "-"),
    "plain sgd, 2 × rate": ("#009E73", "--"),
    "sgd_c C=5 .7": ("#D55E00", "-"),
    "sgd_c C=5 FIFO": ("#0072B2", ":"),
}


def _curves(axis, task, lines, results):
    for line in lines:
        if line.name not in CURVES:
            continue
        colour, style = CURVES[line.name]
        name = line.name.split(",")[0]
        mean = summary.curves(task, name, line.rate, results).mean(axis=0)
        steps = [task.steps // len(mean) * (k + 1) for k in range(len(mean))]
        label = f"{line.name} (rate {line.rate:.2g})"
        axis.plot(steps, mean, style, color=colour, label=label)
    axis.set_xlabel("steps", fontsize=8)
    axis.set_ylabel("log10(F − F*)", fontsize=8)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
