"""E8: does CG generalise better than its base, than FIFO, than a doubled rate?"""

from benchmarks.learning import optimizers as o
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import mnist

STEPS = 1000
SETTINGS = ((5, 0.7), (5, 0.99), (5, "FIFO"), (5, "random"))


def plan():
    rows = [
        *o.bases("adam", "sgd", "ademamix", "adam, averaged", "sgd, averaged"),
        *o.bases("sm3", "sm3 momentum", "sm3_cm"),
        *o.bases("sm3, own schedule", "adam, own schedule"),
        *o.adam_c(SETTINGS),
        *o.adam_cm(SETTINGS),
        *o.sgd_c(SETTINGS),
        *o.int8_adam_cm(),
    ]
    return [(mnist.task("MNIST-1D", STEPS), rows)]


EXPERIMENT = Experiment(
    name="e8",
    question="Does a buffer of gradients or momenta generalise better?",
    bounds=(
        "MNIST-1D, a perceptron 40-100-100-10, batch 100, 1,000 steps, a linear "
        "warm-up over the first 5 % and then a cosine; ten fresh seeds"
    ),
    plan=plan,
    not_run=(
        "4,000 steps and 20 seeds (1,000 steps and 10 seeds were run)",
        "the constant schedule",
        "the small CNN",
        "C of 1 and 20, decay .9, κ = 1e-6",
    ),
)
