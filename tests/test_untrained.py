"""Parameters without a gradient are not trained, and may be of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import each_factory
from jax.experimental.sparse import BCOO
from jax.sharding import PartitionSpec as P

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


@each_factory
@pytest.mark.parametrize(
    "fixed",
    [jax.nn.relu, "gelu", jax.random.key(0), np.array(["a", "b"]), jnp.arange(3)],
    ids=["function", "name", "key", "names", "integers"],
)
@pytest.mark.few(6)
def test_tools_take_what_a_mask_leaves_out(opt, fixed):
    trained = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    params, inner = {**trained, "fixed": fixed}, opt.build()
    tx = optax.masked(inner, {"w": True, "b": True, "fixed": False})
    state = tx.init(params)
    memoptax.check_state(tx, params, state)
    report, want = (
        memoptax.memory_report(*asked) for asked in ((tx, params), (inner, trained))
    )
    assert report.fields == want.fields
    more = fixed.size if isinstance(fixed, jax.Array) else 0
    assert report.parameters == want.parameters + more
    assert memoptax.state_bytes(tx, params) == want.total
    mesh = jax.make_mesh((1,), ("data",))
    over = {"w": P("data"), "b": P(), "fixed": None}
    specs = memoptax.state_partition_specs(tx, params, over)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    alone = {name: over[name] for name in trained}
    alone = memoptax.state_partition_specs(inner, trained, alone)
    assert jax.tree.leaves(specs) == jax.tree.leaves(alone)
    shardings = memoptax.state_shardings(tx, params, mesh, over="data")
    placed = jax.device_put(state, shardings)
    memoptax.check_state(tx, params, placed)


def test_tools_name_the_path_of_what_is_no_parameter():
    tx, params = memoptax.adam_c(0.1), {"w": jnp.ones(3), "act": jax.nn.relu}
    for tool in (
        memoptax.state_bytes,
        memoptax.memory_report,
        lambda tx, params: memoptax.check_state(tx, params, ()),
        lambda tx, params: memoptax.state_partition_specs(tx, params, P()),
        lambda tx, params: memoptax.largest_topc(lambda **_: tx, params, 1e3),
    ):
        with pytest.raises(ValueError, match=r"\['act'\] must be an array, but is"):
            tool(tx, params)


def test_sm3_with_weight_decay_leaves_it_alone():
    tx, weights = memoptax.sm3(0.1, weight_decay=0.1), {"w": PARAMS["w"]}
    found = untyped(tx.update(GRADIENTS, tx.init(TRAINED), PARAMS))[0]
    alone = untyped(tx.update({"w": jnp.ones(3)}, tx.init(weights), weights))[0]
    assert found["fixed"] is None
    np.testing.assert_array_equal(found["w"], alone["w"])


@pytest.mark.parametrize(
    "fixed",
    [jnp.ones(3), jnp.arange(3), lambda x: x, jax.random.key(0), {"x": "names"}],
    ids=["floats", "integers", "function", "key", "tree"],
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "row-sparse"])
def test_a_wrapper_for_row_sparse_gradients_leaves_it_alone(fixed, sparse):
    """The gradients have None there, and init saw None, as with equinox.filter."""
    tx = untyped(
        optax.chain(
            memoptax.sparse.on_values(optax.clip_by_global_norm(1.0)),
            memoptax.sparse.on_values(optax.add_decayed_weights(0.5)),
            memoptax.sm3(0.1, cover=memoptax.covers.rows),
        )
    )
    table, gradient = jnp.ones((4, 2)), jnp.zeros((4, 2)).at[:2].set(1.0)
    if sparse:
        gradient = BCOO((jnp.ones((2, 2)), jnp.array([[0], [1]])), shape=(4, 2))
    params, state = {"w": table, "fixed": fixed}, tx.init({"w": table, "fixed": None})
    updates, _ = tx.update({"w": gradient, "fixed": None}, state, params)
    assert updates["fixed"] is None
    moved = untyped(memoptax.sparse.apply_updates(params, updates))
    np.testing.assert_allclose(moved["w"][:2], 0.9, rtol=1e-6)
    assert moved["fixed"] is fixed


@pytest.mark.parametrize("missing", ["b", "bw"], ids=["one", "all"])
@pytest.mark.parametrize("options", [{"topc": 0}, {"kappa": 0}, {"topc": 1}], ids=str)
@each_factory
@pytest.mark.few(12)
def test_a_trained_parameter_needs_a_gradient(opt, options, missing):
    """optax.sgd returns a state without its momentum, and so of another structure."""
    options = options if opt.accepts("topc") else {}
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    tx = opt.build(**options)
    state, gradients = tx.init(params), params | dict.fromkeys(missing)
    if not jax.tree.leaves(state):  # optax.sgd without a momentum
        _, new = tx.update(gradients, state, params)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        return
    with pytest.raises(ValueError, match="(?s)updates have .* state was made for"):
        tx.update(gradients, state, params)
