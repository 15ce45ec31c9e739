"""E13: SM3 at equal bytes, where it has a model with twice the parameters."""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import characters
from benchmarks.learning.protocol import Size

STEPS, BATCH = 1000, 8
# Widths: 40,536, 115,072 and 227,240 parameters.
THIRD, SMALL, LARGE = 36, 64, 92
NAMES = (
    "characters",
    "characters, twice the parameters",
    "characters, a third of the parameters",
)


def plan():
    small = o.bases("adam", "sm3", "sm3_cm", "ademamix", "adafactor", "adagrad", "muon")
    small += o.bases("adam, averaged")
    small += o.sm3_cm()
    small += o.bases("sm3 momentum", "sm3 momentum, int8", "sm3_cm, C=1, int8")
    small += o.bases("sm3_cm, C=1, int8, FIFO")
    small += o.bases("adam, own schedule", "sm3, own schedule", "sm3_cm, own schedule")
    small += o.bases("ademamix, own schedule", "adafactor, own schedule")
    small += o.bases("adagrad, own schedule", "sm3 momentum, own schedule")
    large = o.bases("adam", "sm3", "sm3, own schedule", "adafactor")
    large += o.bases("adafactor, own schedule", "sm3 momentum, int8")
    large += o.bases("sm3_cm, C=1, int8", "sm3_cm, C=1, int8, FIFO")
    large += o.bases("sm3_cm, C=0, int8", "ademamix", "adam, averaged")
    third = [o.BASES["adam"]._replace(base="adam")]
    third += o.bases("ademamix", "adam, averaged", "adam, own schedule")
    models = map(characters.of_width, (SMALL, LARGE, THIRD))
    return [
        (characters.task(name, STEPS, BATCH, model), rows)
        for name, model, rows in zip(NAMES, models, (small, large, third))
    ]


EXPERIMENT = Experiment(
    name="e13",
    question="Is SM3 better than Adam at equal bytes, or at equal parameters?",
    bounds=(
        "the next character of Python's help, a transformer of width 64 with two "
        "layers and a context of 64, batch 8, 1,000 steps, warm-up and cosine, or "
        "SM3's own schedule; twice the parameters at width 92, a third at width 36; "
        "twenty fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=20),
    quick=("adam", "sm3"),
    against=dict.fromkeys(NAMES[1:], NAMES[0]),
)
