"""E12, more: large batches and clipped gradients."""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import characters
from benchmarks.learning.experiments.e12 import WIDTH
from benchmarks.learning.protocol import Size

BOTH = ((5, 0.7), (5, "FIFO"))


def plan():
    model = characters.of_width(WIDTH)
    few = [*o.bases("adam"), *o.adam_c(BOTH), *o.adam_cm(BOTH)]
    some = [
        *o.bases("adam", "ademamix", "sm3"),
        *o.adam_c(BOTH),
        *o.adam_cm(((1, 0.9), *BOTH)),
    ]
    clips = [*o.clip(few, 1.0), *o.clip(few, 0.25)]
    return [
        (characters.task("characters, batch 64", 125, 64, model), some),
        (characters.task("characters, clipped", 1000, 8, model), clips),
    ]


EXPERIMENT = Experiment(
    name="e12_more",
    question="Does memory help at large batches, or with a clip?",
    bounds=(
        "as E12, and batch 64 for 125 steps (as many characters); gradients clipped at "
        "1 and at .25; ten fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=10),
    not_run=(
        "batch 8 for 8,000 steps (E13 has it for other optimizers)",
        "an LSTM",
        "β2 by its half-life",
        "word-level text",
    ),
    quick=(),
)
