"""Recorded trajectories of the authors' optimizers; see goldens/README.md."""

import dataclasses
import functools
import json
import math
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).with_name("goldens")
FAMILIES = {"CG": "cg", "CM": "cm", "PyTorch-SM3": "sm3", "TF-SM3-numpy": "sm3"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One optimizer on one stream of gradients. `grads[t]` leads to `params[t]`."""

    id: str
    reference: str
    hyperparameters: dict  # as the original's constructor takes them
    dtype: str
    params0: dict  # leaf -> array
    grads: dict  # leaf -> (T, ...)
    params: dict  # leaf -> (T, ...)
    corrected: bool  # whether one known bug of the original is removed
    stream: str
    quirks: tuple  # of the original that this stream meets (or, if corrected, removes)
    sparse_rows: dict | None  # leaf -> (T, rows) bool, the rows present in the gradient
    decisions: np.ndarray | None  # (T, 2) accepted and rejected so far, if comparable

    def __repr__(self):
        return self.id

    @property
    def family(self):
        return FAMILIES[self.id[3:].split(".")[0]]


@functools.cache
def _index():
    entries = json.loads((FOLDER / "index.json").read_text())
    return {entry["id"]: entry for entry in entries}


@functools.cache
def load(case_id):
    """The case with this id, or with this leading number ("07")."""
    (entry,) = (e for key, e in _index().items() if case_id in (key, key[:2]))
    shapes, number = entry["shapes"], entry["id"][:2]
    fields = {key: value for key, value in entry.items() if key != "shapes"}
    with np.load(FOLDER / "trajectories.npz") as archive:
        grads = _split(archive[f"{number}/grads"], shapes)
        params = _split(archive[f"{number}/params"], shapes)
        decisions = rows = None
        if f"{number}/decisions" in archive:
            decisions = archive[f"{number}/decisions"]
        if f"{number}/rows/a" in archive:
            rows = {leaf: archive[f"{number}/rows/{leaf}"] for leaf in shapes}
    return Case(
        **{**fields, "quirks": tuple(fields["quirks"])},
        params0={leaf: p[0] for leaf, p in params.items()},
        grads=grads,
        params={leaf: p[1:] for leaf, p in params.items()},
        sparse_rows=rows,
        decisions=decisions,
    )


def cases(*families):
    """All cases of these families ("cg", "cm", "sm3"), or of all if none is given."""
    loaded = [load(case_id) for case_id in _index()]
    return [case for case in loaded if not families or case.family in families]


def _split(flat, shapes):
    """Cut a (T, n) array of concatenated leaves into a dict of (T, *shape)."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    leaves = np.split(flat, ends[:-1], axis=1)
    return {
        name: leaf.reshape(len(flat), *shape)
        for (name, shape), leaf in zip(shapes.items(), leaves, strict=True)
    }


def deviation(case, params):
    """The largest error of a replay over the distance travelled, for the worst leaf."""
    worst = 0.0
    for leaf, want in case.params.items():
        path = np.concatenate([case.params0[leaf][None], want]).astype(np.float64)
        steps = np.abs(np.diff(path, axis=0)).reshape(len(want), -1)
        error = np.abs(np.asarray(params[leaf], np.float64) - want)
        assert np.isfinite(error).all()
        worst = max(worst, error.max() / steps.max(axis=1).sum())
    return worst


def tolerance(case):
    """The largest `deviation` allowed."""
    if case.dtype == "float64":
        return 1e-12
    # The originals round 1 - learning_rate * weight_decay to float32 at every step.
    decoupled = ours(case)[0].startswith("adamw") and ours(case)[1]["weight_decay"]
    return 4e-5 if decoupled else 1e-5


def buffer_mean_only(update, buffer_mean, fill):
    """An `aggr` that drops the gradient, as CMOptimizer's RMSprop_C does."""
    del update, fill
    return buffer_mean


def ours(case):
    """The alias of this package that should reproduce the case, and its arguments."""
    package, optimizer = case.reference.split()
    recorded = dict(case.hyperparameters)
    kwargs = {"learning_rate": recorded["lr"]}
    if case.family == "sm3":
        # The originals write 0 for "no momentum" and "accumulate".
        for key in ("momentum", "beta"):
            kwargs[key] = recorded.get(key) or None
        return "sm3", {**kwargs, "eps": recorded["eps"]}

    optimizer = optimizer.split(".")[1].removesuffix("_eff")
    renamed = {"topC": "topc"}
    for key in ("topC", "decay", "kappa", "synced", "buffer_dtype", "weight_decay"):
        if key in recorded:
            kwargs[renamed.get(key, key)] = recorded[key]
    kwargs["aggr"] = _aggr(case)
    if optimizer == "SGD_C":
        kwargs |= {
            "momentum": recorded["momentum"] or None,
            "dampening": recorded["dampening"],
        }
        return "sgd_c", kwargs
    if optimizer == "RMSprop_C":
        kwargs |= {
            "alpha": recorded["alpha"],
            "eps": recorded["eps"],
            "momentum": recorded["momentum"] or None,
            "centered": recorded["centered"],
        }
        return "rmsprop_c", kwargs

    b1, b2 = recorded["betas"]
    kwargs |= {"b1": b1, "b2": b2, "eps": recorded["eps"]}
    kwargs["amsgrad"] = recorded["amsgrad"]
    if optimizer == "Adam_CM":
        kwargs["skip_first"] = True
        if recorded["weight_decay"]:
            return "adamw_cm", kwargs
        del kwargs["weight_decay"]
        return "adam_cm", kwargs
    return {"Adam_C": "adam_c", "AdamW_C": "adamw_c"}[optimizer], kwargs


def in_every_way(cases):
    """Each case with each way to hold values, as parameters of a test."""
    return [
        pytest.param(case, way, id=f"{case}-{way}")
        for case in cases
        for way in ("select", "read", "sum")
        if way != "select" or ours(case)[1].get("topc") == 1
    ]


def _aggr(case):
    """Only CGOptimizer's heap classes honour `aggr`. The others always add the mean."""
    if "cm_rmsprop_drops_gradient" in case.quirks:
        return buffer_mean_only
    heap = case.reference.startswith("CGOptimizer optim.")
    return case.hyperparameters["aggr"] if heap else "sum"
