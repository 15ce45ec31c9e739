"""E13, more: longer runs, and a spike."""

import jax.numpy as jnp

from benchmarks.learning import optimizers as o
from benchmarks.learning import task as tasks
from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments import characters
from benchmarks.learning.experiments.e13 import BATCH, SMALL, STEPS
from benchmarks.learning.protocol import Size

WINDOW = 20  # steps before and after a spike


def spiked(task: tasks.Task, factor: float) -> tasks.Task:
    """The task with one gradient, in the middle of the run, ``factor`` times as large.

    The score is the jump: the mean training loss of the steps after it, minus that of
    the steps before it. Rates are still chosen by the loss of the validation text.
    """
    middle, draw, batch, loss, score = (
        task.steps // 2,
        task.draw,
        task.batch,
        task.loss,
        task.score,
    )

    def drawn(data, key, count):
        return draw(data, key, count), count

    def with_count(data, both):
        return batch(data, both[0]), both[1]

    def scaled(params, both):
        return loss(params, both[0]) * jnp.where(both[1] == middle, factor, 1.0)

    def jump(data, params, losses, key):
        after = losses[middle + 1 : middle + 1 + WINDOW]
        before = losses[middle - WINDOW : middle]
        found = score(data, params, losses, key)
        return found | {"test": jnp.mean(after) - jnp.mean(before)}

    return task._replace(
        name=f"{task.name}, one gradient × {factor:g}",
        draw=drawn,
        batch=with_count,
        loss=scaled,
        score=jump,
        schedule=tasks.warmup,
        unit="jump of the training loss, nats",
    )


def plan():
    small = characters.of_width(SMALL)
    task = characters.task("characters", STEPS, BATCH, small)
    longer = {
        steps: characters.task(f"characters, {steps:,} steps", steps, BATCH, small)
        for steps in (2000, 4000, 8000)
    }
    scheduled = o.bases("adam, own schedule", "sm3, own schedule")
    rows = o.bases("adam", "sm3", "ademamix", "adafactor", "adagrad") + scheduled
    scheduled += o.bases("ademamix, own schedule")
    buffers = ((5, 0.7), (5, "FIFO"), (5, "random"), (5, "κ=1e-6"))
    spikes = o.bases("adam", "ademamix", "sm3", "adagrad")
    spikes += [*o.adam_cm(buffers), *o.adam_c(buffers)]
    return [
        (longer[2000], scheduled),
        (longer[4000], scheduled),
        (longer[8000], rows),
        (spiked(task, 10.0), spikes),
        (spiked(task, 1000.0), spikes),
    ]


EXPERIMENT = Experiment(
    name="e13_more",
    question="Does SM3 hold in longer runs, and after a spike?",
    bounds=(
        "as E13, but with 2,000 to 8,000 steps; or with one gradient multiplied by 10 "
        "or 1,000, at a constant rate after a warm-up; ten fresh seeds"
    ),
    plan=plan,
    size=Size(seeds=10),
    not_run=(
        "8,000 steps with twice the parameters",
        "sums replaced by averages (β of .99 and .999)",
        "without a warm-up",
        "wider models",
        "a spike after steps in which some rows have no gradient",
    ),
    quick=(),
)
