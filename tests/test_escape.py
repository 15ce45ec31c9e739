"""The experiment of examples/experiments/escape.py: who leaves a sharp minimum."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples/experiments"))

import escape  # noqa: E402

# Shares of escaped runs at k = 2, 5, 10, 20, 50, recorded with the authors' code.


def escaped(make, *settings):
    return [outcome.escaped for outcome, _ in escape.outcomes(make, settings)]


def test_adam_stays_with_the_usual_remedies():
    tried = escaped(escape.adam, (0.1, 0.9), (0.2, 0.9), (0.1, 0.99), (0.01, 0.9))
    np.testing.assert_array_equal(tried, 0)


@pytest.mark.long
def test_critical_gradients_leave_only_very_sharp_minima():
    usual, small = escaped(escape.adam_cg, (0.1,), (0.01,))
    np.testing.assert_allclose(usual, [0, 0, 0, 0.24, 1], atol=0.05)
    np.testing.assert_array_equal(small, 0)


@pytest.mark.long
def test_critical_momenta_leave_sharp_minima_at_a_rate_that_is_not_small():
    make = escape.adam_cm(5, skip_first=True)
    every = escape.outcomes(make, [(0.1, 0.7), (0.1, 0.99), (0.01, 0.7)])
    usual, lasting, small = (outcome for outcome, _ in every)
    np.testing.assert_allclose(usual.escaped, [0, 1, 1, 1, 1], atol=0.05)
    # About half of 100 runs settle at k = 5, ± .05: rounding decides which.
    assert usual.settled[1] < 0.7 and usual.settled[4] > 0.9
    # With a decay of .99 it escapes and settles.
    np.testing.assert_allclose(lasting.settled[1:], 1, atol=0.05)
    np.testing.assert_array_equal(small.escaped, 0)


def test_one_slot_leaves_the_sharper_ones():
    (one,) = escaped(escape.adam_cm(1, skip_first=True), (0.1, 0.7))
    np.testing.assert_allclose(one, [0, 0.31, 0.76, 1, 1], atol=0.05)


@pytest.mark.long
def test_after_a_warm_up_it_is_the_buffer_that_leaves():
    with_buffer, without = escaped(
        escape.adam_cm(5, skip_first=False),
        (0.1, 0.7, 1.0, escape.WARMUP),
        (0.1, 0.7, escape.WEIGHTLESS, escape.WARMUP),
    )
    assert (with_buffer[1:] > 0.95).all()
    assert (without < 0.4).all()


@pytest.mark.long
def test_sgd_leaves_with_a_buffer_at_a_rate_at_which_it_stays_without():
    (plain,) = escaped(escape.sgd, (0.1,))
    (momenta,) = escaped(escape.sgd_cm(5, 0.7), (0.1,))
    np.testing.assert_allclose(momenta, [0, 1, 1, 1, 1], atol=0.05)
    assert (plain < 0.35).all()


@pytest.mark.long
def test_the_example_runs_and_draws(tmp_path, capsys):
    figure = tmp_path / "escape.png"
    results = escape.main(["--steps", "2", "--starts", "2", "--output", str(figure)])
    assert figure.stat().st_size > 10_000
    table = capsys.readouterr().out
    for section, rows in results.items():
        assert section in table
        assert all(0 <= share <= 1 for row in rows.values() for share in row.escaped)
