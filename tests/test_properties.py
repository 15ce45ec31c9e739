"""Adversarial streams against the oracles: few examples here, 5,000 in the long form.

``property_configs.py`` has the configurations, ``property_streams.py`` the streams, and
``error_bars.py`` the bounds. ``python benchmarks/trust.py --properties`` keeps the
results of the long form.
"""

import collections

import hypothesis
import numpy as np
import pytest

import error_bars
import error_bars_sm3
import oracle
import oracle_sm3
import properties
import property_configs

pytestmark = pytest.mark.cpu_only("bounds of numbers that a CPU takes for 0")

each_family = pytest.mark.parametrize("family", property_configs.FAMILIES)


@each_family
def test_any_stream_agrees_with_the_oracle(family):
    found = properties.search(family, 40, property_configs.short(family))
    assert found["examples"] >= 40
    assert found["to the end"] >= 20
    assert found["configurations"] == len(property_configs.short(family))


@each_family
@pytest.mark.long
@pytest.mark.exhaustive
def test_five_thousand_streams_agree_with_the_oracle(family):
    found = properties.search(family, 5000, property_configs.table(family))
    assert found["examples"] >= 5000
    assert found["to the end"] >= 2500
    assert found["configurations"] == len(property_configs.table(family))


# What the tables have

BUFFER = {
    "topc": {1, 2, 3, 4, 5, 7},
    "holding": {None, "select", "read", "sum"},
    "synced": {True, False},
    "aggr": {"sum", "mid", "mean", "halved", "dropped"},
    "buffer_dtype": {None, "float32", "bfloat16", "float16", "int8"},
    "priority_fn": {None, "largest"},
    "fifo_probability": {None, 0.0, 1.0},
    "amsgrad": {True, False},
}
COVERS = {"cover": set(property_configs.COVERS)}
OPTIONS = {
    "critical gradients": {
        **BUFFER,
        "mu_dtype": {None, "bfloat16", "int8"},
        "nesterov": {True, False},
        "centered": {True, False},
    },
    "critical momenta": {
        **BUFFER,
        **COVERS,
        "mu_dtype": {None, "bfloat16", "float16", "int8"},
        "skip_first": {True, False},
    },
    "SM3": {
        **COVERS,
        "variant": {"I", "II"},
        "accumulator_dtype": {None, "float32"},
        "momentum_dtype": {None, "bfloat16", "float16", "int8"},
    },
}
NAMES = {
    "critical gradients": "critical_gradients sgd_c rmsprop_c adam_c adamw_c",
    "critical momenta": "critical_momenta sgd_cm adam_cm adamw_cm sm3_cm",
    "SM3": "sm3 scale_by_sm3",
}


@each_family
def test_a_table_has_every_option(family):
    configs = property_configs.table(family)
    assert 60 <= len(configs) <= 100
    seen = collections.defaultdict(set)
    for config in configs:
        for key, value in config.static.items():
            seen[key].add(value)
    assert seen == OPTIONS[family]
    assert {config.name for config in configs} == set(NAMES[family].split())
    assert {config.tree for config in configs} == set(property_configs.TREES)
    dtypes = {config.dtype for config in configs}
    assert dtypes == {"float32", "float64", "bfloat16", "float16"}
    assert any(config.sparse for config in configs) == (family == "SM3")


# A search sees a small fault. Here it is in the oracle, which need not be compiled.


def accepts_ties(self, key, fifo):
    slot = SLOT_FOR(self, key, fifo)
    tie = slot is None and key == min(self.keys)
    return self.keys.index(min(self.keys)) if tie else slot


def evicts_the_last(self, key, fifo):
    slot = SLOT_FOR(self, key, fifo)
    full = slot is not None and slot < len(self.keys) == self.topc
    return self.topc - 1 if full else slot


def slightly_more(aggregate):
    def joined(x, entries, kappa=1.0, aggr="sum"):
        return aggregate(x, entries, kappa * (1 + 1e-4), aggr)

    return joined


def blends_too_much(self, old, new):
    if self.beta is None:
        return old + new * (1 + 1e-4)
    return self.beta * old + new


SLOT_FOR = oracle.Buffer._slot_for
FAULTS = [
    ("critical gradients", oracle.Buffer, "_slot_for", accepts_ties),
    ("critical momenta", oracle.Buffer, "_slot_for", accepts_ties),
    ("critical gradients", oracle.Buffer, "_slot_for", evicts_the_last),
    ("critical momenta", oracle.Buffer, "_slot_for", evicts_the_last),
    ("critical gradients", oracle, "aggregate", slightly_more(oracle.aggregate)),
    ("critical momenta", oracle, "aggregate", slightly_more(oracle.aggregate)),
    ("critical momenta", oracle.Adam, "direction", lambda self, m: m),
    ("SM3", oracle_sm3.SM3, "blend", blends_too_much),
]


@pytest.mark.parametrize("family, owner, name, fault", FAULTS)
def test_a_search_sees_a_small_fault(family, owner, name, fault, monkeypatch):
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError):
        configs = property_configs.short(family)
        properties.search(family, 60, configs, [hypothesis.Phase.generate])


# The bounds


def test_a_bound_is_small_where_nothing_cancels():
    """A bound that is far too large would let everything pass."""
    p, shape = error_bars.Precision.of("float32"), (3,)
    rng = np.random.default_rng(0)
    adam = error_bars.Adam(p, 0.9, 0.999, 1e-8)
    sm3 = error_bars_sm3.SM3(p, shape, [(1,)])
    for _ in range(16):
        g = rng.normal(size=shape)
        for bars in (lambda g: adam(g, np.zeros(shape)), sm3):
            out, error = bars(g)
            assert np.all(error > 0)
            assert np.all(error < 1e-3 * np.abs(out) + 1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_storage_moves_a_number_only_near_a_boundary(dtype):
    x = np.random.default_rng(0).normal(size=(50, 20))
    error = error_bars.stored_error(x, 2e-5 * np.abs(x), dtype)
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    moved = error > (0.5 * step if dtype == "int8" else 1e-5 * np.abs(x))
    assert 0 < moved.mean() < 0.2
