"""A task says how a run begins, what it trains on and how it is scored."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp


class Task(NamedTuple):
    """Pure functions, shared by all runs, and their data.

    ``score`` returns a dict with at least ``validation`` (rates are chosen by it) and
    ``test`` (what is reported). ``losses`` are those of each batch before its step.
    """

    name: str
    data: Any  # handed to the functions below
    init: Callable  # key -> params
    draw: Callable  # data, key of the run, step -> the random part of its batch
    batch: Callable  # data, the random part -> batch
    loss: Callable  # params, batch -> the loss
    score: Callable  # data, params, losses, key of the run -> dict of scalars
    steps: int
    schedule: Callable  # steps -> (count -> factor of the rate)
    largest: bool = False  # whether a larger score is better
    unit: str = ""
    curve: Callable | None = None  # data, params -> a number, at each of `points`
    points: int = 1
    until: float | None = None  # the run stops at this running loss
    online: bool = False  # whether the score is made of the losses of the batches
    watch: Callable | None = None  # optimizer's state -> dict of scalars (averaged)
    lanes: int = 8  # runs trained at once
    python: tuple[int, int] | None = None  # the version whose text is the data


def constant(steps):
    """The same rate at every step."""
    del steps
    return lambda count: 1.0


def warmup(steps):
    """Linear over the first twentieth, then constant."""
    return lambda count: jnp.minimum((count + 1) / (0.05 * steps), 1)


def cosine(steps):
    """Linear over the first twentieth, then half a cosine down to 0."""
    start = warmup(steps)

    def factor(count):
        done = jnp.clip((count / steps - 0.05) / 0.95, 0, 1)
        return start(count) * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return factor


def cooldown(steps):
    """SM3's own: a quadratic warm-up over a twentieth, a cool-down over a tenth."""
    import memoptax

    return memoptax.sm3_schedule(1.0, max(1, steps // 20), steps)
