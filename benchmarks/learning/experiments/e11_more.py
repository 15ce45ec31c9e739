"""E11, more: without a warm-up."""

from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import e11
from benchmarks.learning.protocol import Size


def plan():
    return [(e11.task("no warm-up", tasks.constant), e11.rows())]


EXPERIMENT = Experiment(
    name="e11_more",
    question="Does flatness depend on the warm-up?",
    bounds="as E11, without a warm-up; ten fresh seeds",
    plan=plan,
    size=Size(seeds=10),
    not_run=("the convolutional network",),
    quick=(),
)
