"""Row-sparse gradients against the oracle, the dense road and the bill for memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.experimental.sparse import BCOO

import memoptax

import oracle_sm3


def sparse(ids, values, rows):
    values = jnp.asarray(values)
    return BCOO((values, jnp.asarray(ids)[:, None]), shape=(rows, *values.shape[1:]))


def stream(steps, rows, shape=(3,), count=6):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield rng.integers(0, rows, count), rng.standard_normal((count, *shape))


@pytest.mark.parametrize("beta", [None, 0.9])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_oracle_with_duplicates(beta, shape):
    oracle = oracle_sm3.RowSparseSM3(9, beta)
    with jax.enable_x64(True):
        tx = memoptax.sm3(0.1, 0.9, beta, cover=memoptax.covers.rows)
        table = jnp.ones((9, *shape))
        expected, state = np.ones((9, *shape)), tx.init(table)

        @jax.jit
        def step(table, state, gradient):
            updates, state = tx.update(gradient, state, table)
            return memoptax.sparse.apply_updates(table, updates), state

        for ids, values in stream(10, 9, shape):
            table, state = step(table, state, sparse(ids, values, 9))
            distinct, update = oracle.step(ids, values)
            expected[distinct] -= 0.1 * update
            np.testing.assert_allclose(table, expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["I", "II"])
def test_equals_the_dense_road_with_rows(variant):
    """Rows whose gradient is zero do not move and keep their numbers, densely too."""
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows, variant=variant)
    roads = [(jnp.ones((9, 3)), tx.init(jnp.ones((9, 3))))] * 2
    for ids, values in stream(5, 9):
        gradient = sparse(ids, values, 9)
        pair = (gradient, gradient.todense())
        for i, ((table, state), g) in enumerate(zip(roads, pair)):
            updates, state = tx.update(g, state, table)
            roads[i] = memoptax.sparse.apply_updates(table, updates), state
        np.testing.assert_allclose(roads[0][0], roads[1][0], rtol=1e-5)
        a, b = (road[1][0].accumulators for road in roads)
        np.testing.assert_allclose(a[0][0], b[0][0], rtol=1e-5)


def test_rows_not_touched_rest():
    tx = memoptax.sm3(0.1, 0.9, cover=memoptax.covers.rows, weight_decay=0.1)
    params = {"table": jnp.ones((5, 2)), "w": jnp.ones((2, 2))}
    grads = {"table": sparse([3, 1], jnp.ones((2, 2)), 5), "w": jnp.ones((2, 2))}
    state = tx.init(params)
    updates, new = tx.update(grads, state, params)
    moved = memoptax.sparse.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["table"][np.array([0, 2, 4])], 1.0)
    # No momentum, which would make this 0.1 of it, and no decay.
    np.testing.assert_allclose(moved["table"][np.array([1, 3])], 0.9, rtol=1e-6)
    np.testing.assert_allclose(moved["w"], 1 - 0.1 * (0.1 + 0.1), rtol=1e-6)
    np.testing.assert_array_equal(new[0].accumulators[0][0][:, 0], [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(new[0].momentum["table"], 0.0)


def test_what_is_not_finite_leaves_no_trace():
    tx = memoptax.scale_by_sm3(cover=memoptax.covers.rows)
    state = tx.init(jnp.ones((5, 2)))
    bad = sparse([0, 1], jnp.array([[1.0, 1.0], [jnp.nan, 1.0]]), 5)
    updates, new = tx.update(bad, state)
    np.testing.assert_array_equal(new.accumulators[0][0], 0.0)
    assert np.isnan(np.asarray(updates.data)).any()


def test_bfloat16_table():
    table = jnp.ones((5, 2), jnp.bfloat16)
    tx = memoptax.sm3(optax.constant_schedule(0.5), cover=memoptax.covers.rows)
    gradient = sparse([1, 1], jnp.ones((2, 2), jnp.bfloat16), 5)
    updates, state = tx.update(gradient, tx.init(table), table)
    assert updates.data.dtype == jnp.bfloat16
    assert updates.indices.dtype == jnp.int32
    table = memoptax.sparse.apply_updates(table, updates)
    assert table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(table[1], 0.5)


def test_value_and_gradient_of_a_lookup():
    table = jnp.arange(12.0).reshape(6, 2)
    ids = jnp.array([[0, 2], [-1, 2], [9, 1]])  # -1 is row 5; 9 is outside

    def loss(rows, w):
        return jnp.sum(rows**3) * w

    def dense(table, w):
        rows = table[jnp.array([[0, 2], [5, 2], [0, 1]])].at[2, 0].set(0.0)
        return loss(rows, w)

    value, (grad, by_w) = memoptax.sparse.row_value_and_grad(loss, table, ids, 2.0)
    expected, (table_grad, w_grad) = jax.value_and_grad(dense, (0, 1))(table, 2.0)
    np.testing.assert_allclose(value, expected)
    np.testing.assert_allclose(by_w, w_grad)
    assert isinstance(grad, BCOO) and grad.shape == table.shape and grad.nse == 6
    np.testing.assert_allclose(grad.todense(), table_grad)
    value, grad = memoptax.sparse.row_value_and_grad(
        lambda r: jnp.sum(r**2), table, ids
    )
    assert isinstance(grad, BCOO)
    np.testing.assert_allclose(value, 0 + 1 + 2 * (16 + 25) + 100 + 121 + 4 + 9)


def test_two_tables_at_once():
    tables = {"a": jnp.ones((5, 2)), "b": jnp.ones((7, 2))}
    ids = {"a": jnp.array([1, 1]), "b": jnp.array([[6, 0]])}

    def loss(rows):
        return jnp.sum(rows["a"]) * jnp.sum(rows["b"])

    value, grad = memoptax.sparse.row_value_and_grad(loss, tables, ids)
    dense = jax.grad(lambda t: loss({k: t[k][ids[k]] for k in t}))(tables)
    assert value == 16.0
    for k in tables:
        np.testing.assert_allclose(grad[k].todense(), dense[k])


def test_ids_outside_of_the_table_change_nothing():
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows)
    table = jnp.ones((4, 2))

    @jax.jit
    def step(table, state, ids):
        _, g = memoptax.sparse.row_value_and_grad(lambda r: jnp.sum(r), table, ids)
        updates, state = tx.update(g, state)
        return memoptax.sparse.apply_updates(table, updates), state

    table, state = step(table, tx.init(table), jnp.array([4, 4, 2, 100]))
    np.testing.assert_allclose(table[2], 0.9)
    np.testing.assert_array_equal(table[np.array([0, 1, 3])], 1.0)
    np.testing.assert_array_equal(state[0].accumulators[0][0][:, 0], [0, 0, 1, 0])


@pytest.mark.parametrize(
    "cover", [None, memoptax.covers.full, memoptax.covers.whole, [(1, 1), (1, 2)]]
)
def test_any_other_cover_is_refused(cover):
    tx = memoptax.sm3(0.1, cover=cover)
    params = {"table": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"\['table'\] has a row-sparse .* rows"):
        tx.update({"table": sparse([1], jnp.ones((1, 2)), 4)}, tx.init(params))


def test_only_one_sparse_dimension():
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows)
    gradient = BCOO.fromdense(jnp.eye(3))
    with pytest.raises(ValueError, match="0 batch and 2 sparse dimensions"):
        tx.update(gradient, tx.init(jnp.eye(3)))


def test_apply_updates_is_optax_elsewhere():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": None, "c": [jnp.float32(1)]}
    updates = {"a": jnp.ones(3), "b": None, "c": [jnp.float32(2)]}
    ours = memoptax.sparse.apply_updates(params, updates)
    theirs = optax.apply_updates(params, updates)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def compiled_step(rows, columns=64, touched=1024):
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        _, g = memoptax.sparse.row_value_and_grad(lambda r: jnp.sum(r**2), table, ids)
        updates, state = tx.update(g, state)
        return memoptax.sparse.apply_updates(table, updates), state

    table = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    state = jax.eval_shape(tx.init, table)
    ids = jax.ShapeDtypeStruct((touched,), jnp.int32)
    return step.lower(table, state, ids).compile()


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_work_and_memory_follow_the_rows_touched():
    small, large = compiled_step(10_000), compiled_step(1_000_000)
    costs = [c.cost_analysis() for c in (small, large)]
    assert costs[1]["flops"] <= 1.1 * costs[0]["flops"]
    temporaries = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert temporaries[1] <= 1.1 * temporaries[0]
    # The table and its accumulator are changed in place.
    assert large.memory_analysis().alias_size_in_bytes >= 1_000_000 * 65 * 4


def test_train_state_recipe():
    class TrainState(train_state.TrainState):
        def apply_gradients(self, *, grads, **kwargs):
            updates, state = self.tx.update(grads, self.opt_state, self.params)
            params = memoptax.sparse.apply_updates(self.params, updates)
            return self.replace(
                step=self.step + 1, params=params, opt_state=state, **kwargs
            )

    def cover(path, leaf):
        table = "table" in jax.tree_util.keystr(path)
        return (memoptax.covers.rows if table else memoptax.covers.axes)(path, leaf)

    params = {"table": jnp.ones((20, 4)), "w": jnp.ones((4, 1))}
    state = TrainState.create(
        apply_fn=None, params=params, tx=memoptax.sm3(0.1, 0.9, cover=cover)
    )

    @jax.jit
    def step(state, ids):
        def loss(rows, w):
            return jnp.mean((rows @ w) ** 2)

        value, (table, w) = memoptax.sparse.row_value_and_grad(
            loss, state.params["table"], ids, state.params["w"]
        )
        return state.apply_gradients(grads={"table": table, "w": w}), value

    losses = []
    for t in range(30):
        state, value = step(state, jnp.arange(4) + t % 3)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0] and int(state.step) == 30
    np.testing.assert_array_equal(state.params["table"][10:], 1.0)
