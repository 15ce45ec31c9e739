"""E12, more: a large batch."""

from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import characters, e12
from benchmarks.learning.protocol import Size


def plan():
    model = characters.of_width(e12.WIDTH)
    return [(characters.task("characters, batch 64", 125, 64, model), e12.rows())]


EXPERIMENT = Experiment(
    name="e12_more",
    question="Does memory help at a large batch?",
    bounds=(
        "as E12, but with batch 64 for 125 steps (as many characters); ten fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=10),
    not_run=(
        "batch 8 for 8,000 steps (E13 has it for other optimizers)",
        "clipping at .25 and 1",
        "an LSTM",
        "β2 by its half-life",
        "word-level text",
    ),
    quick=(),
)
