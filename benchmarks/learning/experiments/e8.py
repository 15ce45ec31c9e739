"""E8: does CG generalise better than its base, than FIFO, than a doubled rate?"""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import mnist
from benchmarks.learning.protocol import Size

STEPS = 4000


def plan():
    rows = [
        *o.bases("adam", "sgd", "ademamix", "adam, averaged", "sgd, averaged"),
        *o.bases("nadamw", "sm3", "sm3 momentum", "sm3_cm", "sm3_cm, C=1, int8"),
        *o.bases("sm3_cm, C=1, int8, FIFO"),
        *o.bases("sm3, own schedule", "sm3_cm, own schedule", "adam, own schedule"),
        *o.bases("sgd, own schedule", "adagrad", "adagrad, own schedule"),
        *o.bases("adafactor"),
        *o.adam_c(o.FULL),
        *o.adam_cm(o.FULL),
        *o.sm3_cm(),
        *o.sgd_c(),
        *o.int8_adam_cm((*o.ONE, (5, 0.7), (5, "FIFO"))),
        *o.int8_adam_c(((5, 0.7), (5, "FIFO"))),
        *o.variants(),
    ]
    return [(mnist.task("MNIST-1D", STEPS), rows)]


EXPERIMENT = Experiment(
    name="e8",
    question="Does a buffer of gradients or momenta generalise better?",
    bounds=(
        "MNIST-1D, a perceptron 40-100-100-10, batch 100, 4,000 steps, a linear "
        "warm-up over the first 5 % and then a cosine; twenty fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=20),
)
