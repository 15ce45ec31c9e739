"""Means, paired differences and their 95 % intervals, by Student's t."""

from typing import NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    mean: float
    half: float  # half the width of the 95 % interval

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def of_mean(values) -> Interval:
    """The mean of independent values."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        raise ValueError(f"values must be at least two, but are {n}.")
    quantile = scipy.stats.t.ppf(0.975, n - 1)
    return Interval(values.mean(), quantile * values.std(ddof=1) / np.sqrt(n))


def of_difference(ours: dict, theirs: dict) -> Interval:
    """The mean of ours − theirs over the seeds that both have, {seed: score}."""
    seeds = sorted(ours.keys() & theirs.keys())
    return of_mean([ours[seed] - theirs[seed] for seed in seeds])
