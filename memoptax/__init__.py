"""Optimizers that spend memory on purpose, as optax transformations."""

import importlib.metadata

from memoptax._critical_gradients import (
    CriticalGradientsState as CriticalGradientsState,
)
from memoptax._critical_gradients import adam_c as adam_c
from memoptax._critical_gradients import adamw_c as adamw_c
from memoptax._critical_gradients import critical_gradients as critical_gradients
from memoptax._critical_gradients import rmsprop_c as rmsprop_c
from memoptax._critical_gradients import sgd_c as sgd_c

__version__ = importlib.metadata.version("memoptax")
