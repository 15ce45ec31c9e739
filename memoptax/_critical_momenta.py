"""Critical momenta: the buffer of critical gradients, holding momenta instead.

Malviya et al., Promoting Exploration in Memory-Augmented Adam using Critical Momenta,
TMLR 2024.
"""

from typing import Any, NamedTuple

import jax

from memoptax import _buffer

REFERENCES = """\
References:
  Malviya et al, `Promoting Exploration in Memory-Augmented Adam using Critical Momenta
  <https://arxiv.org/abs/2307.09638>`_, TMLR 2024"""


class CriticalMomentaState(NamedTuple):
    """State of critical_momenta."""

    mu: Any  # like the params, float32 or better: the momentum m
    buffer: _buffer.Buffer  # of momenta; Buffer says what shapes and dtypes it has


class ScaleByAdamCmState(NamedTuple):
    """State of scale_by_adam_cm."""

    count: jax.Array  # (), int32: finite steps taken
    mu: Any  # like the params, float32 or better: the momentum m
    nu: Any  # like the params, float32 or better: second moment of the aggregate
    nu_max: Any  # like nu: its maximum so far; None without AMSGrad
    buffer: _buffer.Buffer | None  # of momenta; None where none is kept
