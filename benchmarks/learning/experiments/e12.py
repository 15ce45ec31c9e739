"""E12: does memory help on text, and more so at small batches?"""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import characters
from benchmarks.learning.protocol import Size

WIDTH = 64


def rows():
    return [
        *o.bases("adam", "adam, averaged", "ademamix", "sm3"),
        *o.adam_c(),
        *o.adam_cm((*o.ONE, *o.SHORT)),
    ]


def plan():
    model = characters.of_width(WIDTH)
    return [
        (characters.task("characters, batch 8", 1000, 8, model), rows()),
        (characters.task("characters, batch 1", 8000, 1, model), rows()),
    ]


EXPERIMENT = Experiment(
    name="e12",
    question="Does memory help on text, and more so at small batches?",
    bounds=(
        "the next character of Python's help, a transformer of width 64 with two "
        "layers and a context of 64, warm-up and cosine; batch 8 for 1,000 steps and "
        "batch 1 for 8,000; twenty fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=20),
)
