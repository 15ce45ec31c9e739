"""Optimizers that spend memory on purpose, as optax transformations."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING

from memoptax import covers as covers
from memoptax._bases.precision import StoredMomentState as StoredMomentState
from memoptax._bases.pytorch import AmsgradState as AmsgradState
from memoptax._bases.pytorch import CenteredRmsState as CenteredRmsState
from memoptax._bases.pytorch import DampenedTraceState as DampenedTraceState
from memoptax._buffer.algorithm import Buffer as Buffer
from memoptax._buffer.options import BufferArguments as BufferArguments
from memoptax._buffer.sharded_norm import sharded_norm as sharded_norm
from memoptax._buffer_tools import buffer_stats as buffer_stats
from memoptax._buffer_tools import reset_buffer as reset_buffer
from memoptax._buffer_tools import resize_buffer as resize_buffer
from memoptax._bytes import MemoryReport as MemoryReport
from memoptax._bytes import largest_topc as largest_topc
from memoptax._bytes import memory_report as memory_report
from memoptax._bytes import state_bytes as state_bytes
from memoptax._check_state import check_state as check_state
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
from memoptax._sm3_momenta import ScaleBySM3CmState as ScaleBySM3CmState
from memoptax._sm3_momenta import scale_by_sm3_cm as scale_by_sm3_cm
from memoptax._sm3_momenta import sm3_cm as sm3_cm
from memoptax.covers import Cover as Cover

__version__ = _version("memoptax")

if _TYPE_CHECKING:
    from memoptax import sparse as sparse
else:

    def __getattr__(name: str) -> object:
        # Loaded on first use, because it imports jax.experimental.sparse.
        if name == "sparse":
            return _import_module("memoptax.sparse")
        raise AttributeError(f"module 'memoptax' has no attribute {name!r}")
