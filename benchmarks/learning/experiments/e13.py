"""E13: SM3 at equal bytes, where it has a model with twice the parameters."""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import characters
from benchmarks.learning.protocol import Size

STEPS, BATCH = 600, 8
SMALL, LARGE = 32, 48  # widths: 19,968 and 39,168 parameters with 103 characters


def plan():
    small = o.bases("adam", "sm3", "ademamix", "adafactor", "sm3 momentum, int8")
    small += o.bases("sm3, own schedule", "adam, own schedule", "sm3_cm")
    small += o.bases("adagrad", "adagrad, own schedule")
    large = o.bases("adam", "sm3", "sm3, own schedule", "sm3_cm")
    return [
        (characters.task("characters", STEPS, BATCH, SMALL), small),
        (
            characters.task("characters, twice the parameters", STEPS, BATCH, LARGE),
            large,
        ),
    ]


EXPERIMENT = Experiment(
    name="e13",
    question="Is SM3 better than Adam at equal bytes, or at equal parameters?",
    bounds=(
        "the next character of Python's help, a transformer of width 32 with one layer "
        "and a context of 32, batch 8, 600 steps, warm-up and cosine, or SM3's own "
        "schedule; twice the parameters at width 48; ten fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=10),
    not_run=(
        "width 64, two layers, context 64 (a smaller model was run)",
        "longer runs than 600 steps",
        "Muon, SM3 with a float32 momentum",
        "an int8 momentum and Adafactor at twice the parameters",
        "silent rows, then one spike",
        "β of .99 and .999",
        "without a warm-up",
    ),
    quick=("adam", "sm3"),
    against={"characters, twice the parameters": "characters"},
)
