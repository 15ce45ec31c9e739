"""The bound on the error of a running sum."""

import jax.numpy as jnp
import numpy as np
import pytest

import memoptax
from memoptax._buffer import running_sum

from untyped import untyped

UNIT = 2.0**-24
SMALLEST = 2.0**-126


def bound(old, new, incoming, error=0.0):
    """The bound after a value of norm ``incoming`` replaced the first of ``old``."""
    tx = memoptax.critical_gradients(len(old), holding="sum")
    buffer = untyped(tx.init(jnp.zeros(()))).buffer._replace(
        ages=jnp.ones((1, len(old)), jnp.int32),
        norms=jnp.asarray([old], jnp.float32),
        error=jnp.asarray([error], jnp.float32),
    )
    totals = [jnp.zeros(())]
    new, incoming = jnp.asarray([new]), jnp.asarray([incoming], jnp.float32)
    norms, error, inexact = running_sum.bound(buffer, totals, new, incoming)
    return np.asarray(norms, np.float64)[0], float(error[0]), bool(inexact)


@pytest.mark.parametrize(
    ("old", "incoming"),
    [
        ([3.0, 2.0, 1.0], 4.0),
        ([3e-28, 2e-28, 1e-28], 4e-28),  # what products may lose counts
        ([0.0, 0.0, 0.0, 0.0], 3e-28),
        ([3e-28, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_a_change_costs_a_unit_of_each_norm_and_what_the_products_lose(old, incoming):
    norms, error, inexact = bound(old, [True] + [False] * (len(old) - 1), incoming)
    wanted = np.asarray([incoming, *old[1:]], np.float32)
    np.testing.assert_array_equal(norms, wanted)
    lost = (len(old) + 2) * SMALLEST
    exact = UNIT * (incoming + old[0] + norms.sum()) + lost
    # A sum whose error would be too large is rebuilt, and has another bound.
    assert inexact == (exact > running_sum._TOLERANCE * UNIT * norms.sum())
    if not inexact:
        assert error == pytest.approx(exact, rel=1e-4, abs=0)


def test_a_buffer_that_stays_keeps_its_bound():
    norms, error, inexact = bound([2.0, 1.0], [False, False], 9.0, error=1e-7)
    np.testing.assert_array_equal(norms, [2, 1])
    assert (error, inexact) == (pytest.approx(1e-7, rel=1e-6), False)


@pytest.mark.parametrize("size", [2e-38, 1e-37, 1e-36])
def test_a_sum_of_the_smallest_numbers_is_rebuilt_at_every_change(size):
    assert bound([size, size], [True, False], size)[2]
