"""Each fault of ``training_faults.py``: the run goes on as promised."""

import pytest

import training_faults
from training_faults import ROWS
from training_loop import NAMED

pytestmark = pytest.mark.slow


def cases(takes):
    """Rows vary fastest, so that each optimizer compiles once for all of them."""
    found = [
        (row, opt, wrap)
        for row in ROWS
        if row.takes == takes
        for opt, wrap in training_faults.cases(row)
    ]
    found.sort(key=lambda case: (case[1].name, case[2]))
    marked = [
        pytest.param(
            row,
            opt,
            wrap,
            id=f"{row.fault}: {opt.name}, {wrap or 'alone'}",
        )
        for row, opt, wrap in found
    ]
    return pytest.mark.parametrize(("row", "opt", "wrap"), marked)


@cases("wrap")
@pytest.mark.few(4)
def test_a_bad_gradient_passes(row, opt, wrap):
    row.check(opt, wrap)


@cases("opt")
@pytest.mark.few(4)
def test_a_fault_of_the_state_passes(row, opt, wrap):
    del wrap
    row.check(opt)


@pytest.mark.cpu_only("processes of their own")
# Orbax leaves coroutines behind when a save fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@cases("folder")
@pytest.mark.long
def test_a_fault_of_the_machine_passes(row, opt, wrap, tmp_path):
    del wrap
    row.check(opt, tmp_path)


GUARDED = [
    pytest.param(row, NAMED[name], id=f"{row.fault}: {name}")
    for row in ROWS
    for name in row.without
]


@pytest.mark.cpu_only("processes of their own")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("row", "opt"), GUARDED)
@pytest.mark.long
def test_without_its_guard_the_row_fails(row, opt, tmp_path):
    more = {"wrap": ["alone"], "opt": [], "folder": [tmp_path]}[row.takes]
    with training_faults.removed(row):
        with pytest.raises(
            (AssertionError, TypeError, ValueError, pytest.fail.Exception)
        ):
            row.check(opt, *more)
