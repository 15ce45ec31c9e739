"""Shapes of parameters, placed on devices that need not be present.

``PARAMETERS`` maps names to functions of the optimizer, the target, the dtype, and a
flag for small shapes.
"""

import jax
import numpy as np
from absent_devices import TARGETS, devices
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from measuring import nbytes

# Llama-7B, its equal layers stacked, and how it is divided over 64 x 4 devices.
LAYERS, WIDTH, HIDDEN, VOCABULARY = 32, 4096, 11008, 32000
SQUARE = (LAYERS, WIDTH, WIDTH)
IN, OUT = P(None, "data", "model"), P(None, "model", "data")
LLAMA = {
    "embedding": ((VOCABULARY, WIDTH), P("model", "data")),
    "query": (SQUARE, IN),
    "key": (SQUARE, IN),
    "value": (SQUARE, IN),
    "output": (SQUARE, OUT),
    "gate": ((LAYERS, WIDTH, HIDDEN), IN),
    "up": ((LAYERS, WIDTH, HIDDEN), IN),
    "down": ((LAYERS, HIDDEN, WIDTH), OUT),
    "norm": ((LAYERS, WIDTH), P()),
    "head": ((WIDTH, VOCABULARY), P("data", "model")),
}


def _side(target, quick):
    return 64 if quick else TARGETS[target].leaf


def _equal(shape, count, dtype, sharding):
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return {f"w{i}": leaf for i in range(count)}


def _one(target):
    return SingleDeviceSharding(devices(target)[0])


def matrices(tx, target, dtype, quick):
    """Four matrices, or one if a device cannot hold the state of four."""
    side = _side(target, quick)
    four = _equal((side, side), 4, dtype, _one(target))
    held = nbytes(jax.eval_shape(tx.init, four)) + 2 * nbytes(four)
    if held < 0.9 * TARGETS[target].memory:
        return four
    return {"w0": four["w0"]}


def two_matrices(tx, target, dtype, quick):
    side = min(_side(target, quick), 4096)
    return _equal((side, side), 2, dtype, _one(target))


def vectors(tx, target, dtype, quick):
    return _equal((_side(target, quick) ** 2 // 4,), 4, dtype, _one(target))


def shared_matrices(tx, target, dtype, quick):
    """Each of eight devices holds an eighth of the rows."""
    mesh = Mesh(np.array(devices(target, 8)), ("data",))
    side = _side(target, quick)
    return _equal((side, side), 4, dtype, NamedSharding(mesh, P("data")))


def llama(tx, target, dtype, quick, without=()):
    mesh = Mesh(np.array(devices(target, 256)).reshape(64, 4), ("data", "model"))

    def place(spec):
        names = (None if name in without else name for name in spec)
        return NamedSharding(mesh, P(*names))

    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place(spec))
        for name, (shape, spec) in LLAMA.items()
    }


def data_parallel_llama(tx, target, dtype, quick):
    """Each group of 64 devices holds the same parameters."""
    return llama(tx, target, dtype, quick, without=("data",))


PARAMETERS = {
    "matrices": matrices,
    "two matrices": two_matrices,
    "vectors": vectors,
    "shared matrices": shared_matrices,
    "7B": llama,
    "7B, data-parallel": data_parallel_llama,
}
