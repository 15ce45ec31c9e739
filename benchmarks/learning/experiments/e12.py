"""E12: does memory help on text, and more so at small batches and in longer runs?"""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import characters
from benchmarks.learning.protocol import Size

WIDTH = 32


def plan():
    rows = [
        *o.bases("adam", "ademamix"),
        *o.adam_c(((5, 0.7), (5, "FIFO"))),
        *o.adam_cm(((1, 0.9), (5, 0.7), (5, "FIFO"))),
    ]
    return [
        (characters.task("characters, batch 8", 600, 8, WIDTH), rows),
        (characters.task("characters, batch 1", 4800, 1, WIDTH), rows),
    ]


EXPERIMENT = Experiment(
    name="e12",
    question="Does memory help on text, and more so at small batches?",
    bounds=(
        "the next character of Python's help, a transformer of width 32 with one layer "
        "and a context of 32, warm-up and cosine; batch 8 for 600 steps and batch 1 "
        "for 4,800; ten fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=10),
    not_run=(
        "width 64, two layers, context 64 (a smaller model was run)",
        "1,000 and 8,000 steps of the larger model",
        "batch 64",
        "clipping at .25 and 1",
        "β2 by its half-life",
        "an LSTM",
        "SM3 at batch 1, decay .99, κ = 1e-6, an average of the weights",
    ),
)
