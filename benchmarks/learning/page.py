"""Tables in Markdown, and the pages of docs/ that have them, from results only."""

import math
import re
from pathlib import Path

from benchmarks.learning import pictures, summary
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.intervals import Interval

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "evidence.md", DOCS / "evidence_more.md")
# The columns of a run beside its score, with their titles.
EXTRAS = {
    "test_loss": "test loss",
    "rare": "five rarest, %",
    "share": "tagged share of slots",
    "top": "log10 top eigenvalue",
    "adaptive": "log10 adaptive",
    "trace": "log10 trace",
    "train_loss": "train loss",
    "moving": "share of steps taken",
}


def tables(experiment: Experiment, folder: Path, quick=False) -> str:
    """All tables of an experiment, and the notes below them."""
    made = [
        table(task, lines)
        for task, lines in summary.lines(experiment, folder, quick)
        if lines
    ]
    notes = [f"Bounds: {experiment.bounds}."]
    if not quick:
        notes += [
            "Their rates are chosen and their fresh seeds not run, so these are no "
            f"results (**{task.name}**, validation at the chosen rate, mean of the "
            "seeds that chose it): " + "; ".join(map(_waiting, waiting)) + "."
            for task, waiting in summary.pending(experiment, folder)
            if waiting
        ]
    if experiment.not_run:
        notes.append(f"Not run: {'; '.join(experiment.not_run)}.")
    return "\n\n".join([*made, *notes])


def _waiting(row) -> str:
    edge = "*" if row.choice.at_edge else ""
    return f"{row.name} {row.validation:.4g} (rate {row.choice.rate:.3g}{edge})"


def table(task, lines) -> str:
    """One table: a line for each optimizer and control."""
    extras = {
        name: title
        for name, title in EXTRAS.items()
        if any(math.isfinite(line.means.get(name, math.nan)) for line in lines)
    }
    heads = ["optimizer", "rate (tried)", task.unit, "− base", "− FIFO"]
    compared = [name for name in extras if any(name in x.differences for x in lines)]
    heads += ["accepted", "mean age", *extras.values()]
    heads += [*(f"{extras[name]}: − base" for name in compared), "bytes/param"]
    timed = any(line.time for line in lines)
    heads += ["ms/step (×)"] if timed else []
    rows = [
        [
            line.name,
            f"{line.rate:.3g}"
            + (f" ({line.tried})" if line.tried else "")
            + ("*" if line.at_edge else ""),
            interval(line.score)
            if line.score
            else f"diverged {line.lost}/{line.seeds}",
            difference(line.over_base),
            difference(line.over_fifo),
            number(line.means.get("acceptance", math.nan), 2),
            number(line.means.get("age", math.nan), 1),
            *(number(line.means.get(name, math.nan), 3) for name in extras),
            *(difference(line.differences.get(name)) for name in compared),
            number(line.bytes, 2),
            *([_time(line.time)] if timed else []),
        ]
        for line in lines
    ]
    title = f"**{task.name}** ({'higher' if task.largest else 'lower'} is better)"
    if any(line.at_edge for line in lines):
        title += "; * the best rate is at an edge of the grid"
    body = [heads, ["---"] * len(heads), *rows]
    return "\n".join([title, "", *("| " + " | ".join(row) + " |" for row in body)])


def interval(value: Interval) -> str:
    digits = _digits(value.half)
    return f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"


def difference(value: Interval | None) -> str:
    """With its sign, and bold where the interval excludes 0."""
    if value is None:
        return ""
    digits = _digits(value.half)
    text = f"{value.mean:+.{digits}f} ± {value.half:.{digits}f}".replace("-", "−")
    return f"**{text}**" if value.excludes_zero else text


def number(value: float, digits: int) -> str:
    # Round to nine digits first: Python 3.12 and 3.11 differ in the last one of a sum.
    return f"{round(value, 9):.{digits}f}" if math.isfinite(value) else ""


def _digits(half):
    """The decimals that give the half-width two significant digits, four at most."""
    if half <= 0:
        return 2
    return min(4, max(0, 1 - math.floor(math.log10(half))))


def _time(time):
    return f"{time['ms']:.2f} ({time['ratio']:.2f})" if time else ""


def fill(page: str, made: dict[str, str]) -> str:
    """``page`` with new text in its blocks ``<!-- evidence: name -->``."""

    def new(match):
        name = match[1]
        if name not in made:
            raise ValueError(f"page asks for {name!r}, which is not an experiment.")
        return f"<!-- evidence: {name} -->\n{made[name]}\n<!-- end -->"

    pattern = r"<!-- evidence: (\w+) -->\n.*?<!-- end -->"
    return re.sub(pattern, new, page, flags=re.S)


def write(experiments: list[Experiment], folder: Path, pages=PAGES) -> None:
    """Draw all tables and pictures of the pages again."""
    run = [each for each in experiments if (folder / f"{each.name}.csv").exists()]
    made = {each.name: tables(each, folder) for each in run}
    for path in pages:
        path.write_text(fill(path.read_text(), made))
    for each in run:
        pictures.draw(each, folder, DOCS / "evidence" / f"{each.name}.png")
