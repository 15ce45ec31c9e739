"""E9, more: other shares of wrong labels, and a larger batch."""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import e9
from benchmarks.learning.protocol import Size

EXAMPLES = e9.BATCH * e9.STEPS


def plan():
    rows = [
        *o.bases("adam", "adam, averaged", "ademamix", "sm3"),
        *o.bases("sm3_cm, C=0", "sm3_cm, C=0, int8"),
        *o.adam_c(),
        *o.adam_cm(),
    ]
    shares = {"no flips": 0.0, "flips of one in ten": 0.1, "flips of two in five": 0.4}
    large = e9.flips("flips of one in five, batch 64", 64, e9.FLIPS, EXAMPLES // 64)
    return [
        *((e9.flips(name, e9.BATCH, share), rows) for name, share in shares.items()),
        (large, rows),
    ]


EXPERIMENT = Experiment(
    name="e9_more",
    question="Does the answer depend on the share of wrong labels, or on the batch?",
    bounds=(
        "as E9, but with no label replaced, one in ten, or two in five; or with one in "
        "five at batch 64 for 375 steps; ten fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=10),
    not_run=("batch 1 for 24,000 steps",),
    quick=(),
)
