"""E11, more: without a warm-up, and a convolutional network."""

from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import e11
from benchmarks.learning.models import convolutional
from benchmarks.learning.protocol import Size


def plan():
    net = convolutional(25, 10)
    return [
        (e11.task("no warm-up", tasks.constant), e11.rows()),
        (e11.task("CNN", tasks.warmup, net), e11.rows()),
    ]


EXPERIMENT = Experiment(
    name="e11_more",
    question="Does flatness depend on the warm-up, or on the network?",
    bounds="as E11, without a warm-up; and the convolutional network of E8; ten seeds",
    plan=plan,
    size=Size(seeds=10),
    quick=(),
)
