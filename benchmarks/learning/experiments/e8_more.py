"""E8, more: a constant rate, and a small convolutional network."""

from benchmarks.learning import optimizers as o
from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import mnist
from benchmarks.learning.experiments.e8 import STEPS
from benchmarks.learning.models import convolutional
from benchmarks.learning.protocol import Size


def plan():
    rows = [
        *o.bases("adam", "sgd", "ademamix", "adam, averaged", "sgd, averaged"),
        *o.bases("adagrad", "adafactor", "sm3", "sm3_cm"),
        *o.sm3_cm(),
        *o.adam_c(),
        *o.adam_cm((*o.ONE, *o.SHORT)),
        *o.sgd_c(),
    ]
    flat = mnist.task("MNIST-1D, constant rate", STEPS, schedule=tasks.constant)
    net = convolutional(25, 10)
    return [(flat, rows), (mnist.task("MNIST-1D, CNN", STEPS, model=net), rows)]


EXPERIMENT = Experiment(
    name="e8_more",
    question="Does a buffer help at a constant rate, or in a convolutional network?",
    bounds=(
        "as E8, but at a constant rate; or as E8, but with a network of three "
        "convolutions with 25 channels; twenty fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=20),
    quick=(),
)
