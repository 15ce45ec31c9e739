"""Optimizers that spend memory on purpose, as optax transformations."""

from importlib.metadata import version as _version

from memoptax._critical_gradients import (
    CriticalGradientsState as CriticalGradientsState,
)
from memoptax._critical_gradients import adam_c as adam_c
from memoptax._critical_gradients import adamw_c as adamw_c
from memoptax._critical_gradients import critical_gradients as critical_gradients
from memoptax._critical_gradients import rmsprop_c as rmsprop_c
from memoptax._critical_gradients import sgd_c as sgd_c
from memoptax._critical_momenta import CriticalMomentaState as CriticalMomentaState
from memoptax._critical_momenta import ScaleByAdamCmState as ScaleByAdamCmState
from memoptax._critical_momenta import adam_cm as adam_cm
from memoptax._critical_momenta import adamw_cm as adamw_cm
from memoptax._critical_momenta import critical_momenta as critical_momenta
from memoptax._critical_momenta import scale_by_adam_cm as scale_by_adam_cm
from memoptax._critical_momenta import sgd_cm as sgd_cm
from memoptax._inspect import buffer_stats as buffer_stats
from memoptax._inspect import reset_buffer as reset_buffer
from memoptax._inspect import resize_buffer as resize_buffer
from memoptax._memory import MemoryReport as MemoryReport
from memoptax._memory import memory_report as memory_report
from memoptax._memory import state_bytes as state_bytes

__version__ = _version("memoptax")
