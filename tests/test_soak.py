"""Long runs: the mean of a buffer against the exact one, and growth in eager runs.

``benchmarks/soak.py`` takes 200,000 steps, and keeps its results for docs/trust.md.
"""

import pytest
import soak

pytestmark = [pytest.mark.slow, pytest.mark.cpu_only("bounds of sums on a CPU")]


def assert_exact(case, steps):
    row = soak.soak(case, steps)
    assert row["other decisions"] == 0
    assert 0 <= row["error / bound"] <= 1
    assert row["offered"] < steps  # NaN was among them
    if case.holding == "sum":
        assert row["rebuilds"] > 0
    if case.dtype != "float32":  # the bound is not far too large
        assert row["error / bound"] > 0.1


ONE_OF_EACH = [
    soak.Case("float32", 1, "select"),
    soak.Case("bfloat16", 5, "read"),
    soak.Case("int8", 20, "sum"),
]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_two_thousand_steps_stay_within_the_bound(case):
    assert_exact(case, 2000)


@pytest.mark.parametrize("case", soak.CASES, ids=str)
@pytest.mark.long
def test_ten_thousand_steps_stay_within_the_bound(case):
    assert_exact(case, 10_000)


def test_an_error_is_seen(monkeypatch):
    """An oracle that takes no value decides otherwise, and that is counted."""
    case = ONE_OF_EACH[0]
    monkeypatch.setattr(soak.Oracle, "offer", lambda self, key, fact: self)
    assert soak.soak(case, 300)["other decisions"] > 0


@pytest.mark.parametrize("name", soak.EAGER)
@pytest.mark.long
def test_two_hundred_eager_steps_grow_nothing(name):
    """The results kept are of two thousand."""
    row = soak.eager(name, 300, settled=100)
    assert row["compilations"] == 0
    assert row["arrays"] <= 0
    assert row["MiB"] < 8


def test_the_results_kept_are_within_the_bound():
    results = soak.kept()
    found = {
        soak.Case(*(row[f] for f in soak.Case._fields)) for row in results["jitted"]
    }
    assert found == set(soak.CASES)
    for row in results["jitted"]:
        assert row["steps"] >= 200_000
        assert row["error / bound"] <= 1 and row["other decisions"] == 0
    for row in results["eager"]:
        assert row["compilations"] == 0 and row["arrays"] <= 0
