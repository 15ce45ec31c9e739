"""Optimizers that spend memory on purpose, as optax transformations."""

from importlib.metadata import version as _version

from memoptax._buffer.sharded_norm import sharded_norm as sharded_norm
from memoptax._buffer_tools import buffer_stats as buffer_stats
from memoptax._buffer_tools import reset_buffer as reset_buffer
from memoptax._buffer_tools import resize_buffer as resize_buffer
from memoptax._bytes import MemoryReport as MemoryReport
from memoptax._bytes import largest_topc as largest_topc
from memoptax._bytes import memory_report as memory_report
from memoptax._bytes import state_bytes as state_bytes
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
from memoptax._schedules import sm3_schedule as sm3_schedule
from memoptax._sharding import state_partition_specs as state_partition_specs
from memoptax._sharding import state_shardings as state_shardings
from memoptax._sm3 import ScaleBySM3State as ScaleBySM3State
from memoptax._sm3 import scale_by_sm3 as scale_by_sm3
from memoptax._sm3 import sm3 as sm3
from memoptax.covers import axes as axes
from memoptax.covers import blocks as blocks
from memoptax.covers import full as full
from memoptax.covers import rows as rows
from memoptax.covers import whole as whole
from memoptax.sparse import apply_updates as apply_updates
from memoptax.sparse import row_value_and_grad as row_value_and_grad

__version__ = _version("memoptax")
