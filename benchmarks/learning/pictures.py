"""One picture for each experiment: differences to the base, each with its interval."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.learning import summary
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.results import Results

# Okabe and Ito's, which the colour-blind can tell apart; the mark differs as well.
KINDS = {
    "keeps the critical": ("#D55E00", "o"),
    "FIFO": ("#0072B2", "s"),
    "random keys": ("#CC79A7", "^"),
    "κ = 1e-6": ("#999999", "v"),
    "no buffer": ("#009E73", "D"),
}


def kind(name: str) -> str:
    """Which of ``KINDS`` an optimizer is."""
    marks = {"FIFO": "FIFO", "random": "random keys", "κ": "κ = 1e-6"}
    if "C=" not in name:
        return "no buffer"
    return next((k for mark, k in marks.items() if mark in name), "keeps the critical")


def draw(experiment: Experiment, folder: Path, path: Path) -> None:
    """Save the picture of an experiment as far as it was run."""
    made = [(task, lines) for task, lines in summary.lines(experiment, folder) if lines]
    curved = made[0][0].curve is not None
    most = max(sum(line.over_base is not None for line in lines) for _, lines in made)
    height = 1.2 + 0.24 * most
    figure = Figure(figsize=(6.4 * len(made), height + (3 if curved else 0)))
    grid = figure.subplots(
        2 if curved else 1,
        len(made),
        squeeze=False,
        height_ratios=[height, 3] if curved else None,
    )
    for column, (task, lines) in enumerate(made):
        _forest(grid[0, column], task, lines)
        if curved:
            results = Results(folder / f"{experiment.name}.csv")
            _curves(grid[1, column], task, lines, results)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _forest(axis, task, lines):
    shown = [line for line in lines if line.over_base is not None]
    for place, line in enumerate(reversed(shown)):
        colour, mark = KINDS[kind(line.name)]
        mean, half = line.over_base
        axis.errorbar(
            mean, place, xerr=half, fmt=mark, color=colour, ms=5, lw=1.2, capsize=2
        )
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlim(*_limits([line for line in shown if line.tried], shown))
    names = [f"{line.name} − {line.base}" for line in reversed(shown)]
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    better = "better to the right" if task.largest else "better to the left"
    axis.set_xlabel(f"{task.unit}: difference, {better}", fontsize=8)
    axis.set_title(task.name, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    for name in dict.fromkeys(kind(line.name) for line in shown):
        colour, mark = KINDS[name]
        axis.plot([], [], mark, color=colour, ms=5, label=name)
    axis.legend(fontsize=7, loc="best", framealpha=0.8)


def _limits(optimizers, shown):
    """Room for all optimizers; a base at a hopeless rate stands in the table alone."""
    found = [line.over_base for line in optimizers or shown]
    low = min([0.0, *(mean - half for mean, half in found)])
    high = max([0.0, *(mean + half for mean, half in found)])
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


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
