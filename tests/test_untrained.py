"""Parameters without a gradient are not trained, and may be of any kind."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import each_factory

import memoptax

from untyped import untyped

PARAMS = {"w": jnp.arange(1.0, 4.0), "fixed": jnp.arange(2)}
TRAINED = {"w": PARAMS["w"], "fixed": None}
GRADIENTS = {"w": jnp.ones(3), "fixed": None}


@each_factory
@pytest.mark.few(6)
def test_an_integer_without_a_gradient_is_left_alone(opt):
    tx = opt.build()
    state = tx.init(TRAINED)
    found, new = untyped(tx.update(GRADIENTS, state, PARAMS))
    wanted, other = untyped(tx.update(GRADIENTS, state, TRAINED))
    assert found["fixed"] is None
    np.testing.assert_array_equal(found["w"], wanted["w"])
    optax.apply_updates(TRAINED, found)
    memoptax.check_state(tx, TRAINED, new)
    memoptax.check_state(tx, TRAINED, other)


def test_sm3_with_weight_decay_leaves_it_alone():
    tx, weights = memoptax.sm3(0.1, weight_decay=0.1), {"w": PARAMS["w"]}
    found = untyped(tx.update(GRADIENTS, tx.init(TRAINED), PARAMS))[0]
    alone = untyped(tx.update({"w": jnp.ones(3)}, tx.init(weights), weights))[0]
    assert found["fixed"] is None
    np.testing.assert_array_equal(found["w"], alone["w"])
