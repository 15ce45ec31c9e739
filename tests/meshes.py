"""Parameters of every rank, their shardings on a mesh of 4 × 2, and optimizers."""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

SHAPES = {"matrix": (16, 32), "vector": (16,), "kernel": (2, 2, 16, 32), "scalar": ()}


BOTH = ("data", "model")


LAYOUTS = {
    "fsdp": {
        "matrix": P(BOTH),
        "vector": P(BOTH),
        "kernel": P(None, None, BOTH),
        "scalar": P(),
    },
    "tensor parallel": {
        "matrix": P(None, BOTH),
        "vector": P(BOTH),
        "kernel": P(None, None, None, BOTH),
        "scalar": P(),
    },
    "mixed": {
        "matrix": P("data", "model"),
        "vector": P("model"),
        "kernel": P(None, None, "model", "data"),
        "scalar": P(),
    },
}


def by_rank(params):
    return jax.tree.map(lambda p: "high" if p.ndim > 1 else "low", params)


def only_matrices(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


BUFFER = {"topc": 2, "decay": 0.9}


INT8 = {"momentum": 0.9, "momentum_dtype": "int8"}


OPTIMIZERS = {
    "sgd_c": lambda: memoptax.sgd_c(0.01, momentum=0.9, **BUFFER),
    "adam_c": lambda: memoptax.adam_c(0.01, amsgrad=True, synced=False, **BUFFER),
    "adam_cm": lambda: memoptax.adam_cm(0.01, **BUFFER),
    "sm3_cm": lambda: memoptax.sm3_cm(0.01, **BUFFER),
    "sm3": lambda: memoptax.sm3(0.1, **INT8),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        memoptax.adamw_c, static_args="topc"
    )(0.01, **BUFFER),
    "MultiSteps": lambda: optax.MultiSteps(memoptax.sgd_c(0.01, **BUFFER), 2),
    "masked": lambda: optax.chain(
        optax.masked(memoptax.critical_gradients(**BUFFER), only_matrices),
        optax.clip_by_global_norm(1.0),
        optax.adam(0.01),
    ),
    "partition": lambda: optax.partition(
        {"high": memoptax.sm3(0.1), "low": memoptax.adam_cm(0.01, **BUFFER)}, by_rank
    ),
}


def values(steps=None):
    rng = np.random.default_rng(0)
    lead = () if steps is None else (steps,)
    return {
        name: rng.standard_normal((*lead, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


FEW = ("matrix", "vector", "scalar")


def few(tree):
    """Fewer leaves, which compile sooner."""
    return {name: tree[name] for name in FEW}


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values())


def placed(tree, mesh, specs, *lead):
    return {
        name: jax.device_put(x, NamedSharding(mesh, P(*lead, *specs[name])))
        for name, x in tree.items()
    }


def mesh_of(kind):
    return jax.make_mesh((4, 2), BOTH, axis_types=(kind,) * 2)


def assert_lies_as(shardings, state):
    for (path, x), wanted in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(shardings), strict=True
    ):
        same = x.sharding.is_equivalent_to(wanted, x.ndim)
        assert same, (jax.tree_util.keystr(path), x.sharding, wanted)


def trimmed(spec):
    """The spec without what changes nothing: empty entries, and None at the end."""
    entries = [None if e == () else e for e in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)
