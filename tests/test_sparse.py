"""Row-sparse gradients: against the oracle and dense gradients, and their memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.experimental.sparse import BCOO

import memoptax

import oracle_sm3
from streams import sparse
from untyped import untyped

pytestmark = pytest.mark.few(2)


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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_duplicates_of_half_precision_add_up_in_float32(dtype):
    """In bfloat16 the sum of a thousand ones stops at 256, and the sign is wrong."""
    data = jnp.where(jnp.arange(2000) < 1000, 1, -0.75).astype(dtype)[:, None]
    ids = jnp.zeros((2000, 1), jnp.int32)
    tx = untyped(memoptax.sm3(0.1, cover=memoptax.covers.rows))
    gradient = BCOO((data, ids), shape=(3, 1))
    updates, state = tx.update(gradient, tx.init(jnp.zeros((3, 1), dtype)))
    np.testing.assert_allclose(state[0].accumulators[0][0][0, 0], 250.0**2)
    np.testing.assert_allclose(updates.todense()[0, 0], -0.1, rtol=1e-2)


@pytest.mark.parametrize("variant", ["I", "II"])
def test_equals_the_dense_step_with_rows(variant):
    """Rows with a zero gradient do not move and keep their numbers, dense or not."""
    tx = untyped(memoptax.sm3(0.1, cover=memoptax.covers.rows, variant=variant))
    roads = [(jnp.ones((9, 3)), tx.init(jnp.ones((9, 3))))] * 2
    for ids, values in stream(5, 9):
        gradient = sparse(ids, values, 9)
        pair = (gradient, gradient.todense())
        for i, ((table, state), g) in enumerate(zip(roads, pair)):
            updates, state = tx.update(g, state, table)
            roads[i] = untyped(memoptax.sparse.apply_updates(table, updates)), state
        np.testing.assert_allclose(roads[0][0], roads[1][0], rtol=1e-5)
        a, b = (road[1][0].accumulators for road in roads)
        np.testing.assert_allclose(a[0][0], b[0][0], rtol=1e-5)


def test_rows_not_touched_rest():
    tx = memoptax.sm3(0.1, 0.9, cover=memoptax.covers.rows, weight_decay=0.1)
    params = {"table": jnp.ones((5, 2)), "w": jnp.ones((2, 2))}
    grads = {"table": sparse([3, 1], jnp.ones((2, 2)), 5), "w": jnp.ones((2, 2))}
    updates, new = untyped(tx.update(grads, tx.init(params), params))
    moved = untyped(memoptax.sparse.apply_updates(params, updates))
    np.testing.assert_array_equal(moved["table"][np.array([0, 2, 4])], 1.0)
    # No decay, and no momentum, which would make the step a tenth of this.
    np.testing.assert_allclose(moved["table"][np.array([1, 3])], 0.9, rtol=1e-6)
    np.testing.assert_allclose(moved["w"], 1 - 0.1 * (0.1 + 0.1), rtol=1e-6)
    np.testing.assert_array_equal(new[0].accumulators[0][0][:, 0], [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(new[0].momentum["table"], 0.0)


def test_a_row_that_is_named_decays_even_if_its_gradient_is_zero():
    """As every row of a dense gradient does. Rows that are not named rest."""
    tx = untyped(memoptax.scale_by_sm3(beta=0.5, cover=memoptax.covers.rows))
    table = jnp.ones((4, 2))
    _, state = tx.update(sparse([1, 2], [[8.0, 8.0]] * 2, 4), tx.init(table))
    _, state = tx.update(sparse([1, 3], [[0.0, 0.0], [2.0, 2.0]], 4), state)
    (numbers,) = state.accumulators[0]
    np.testing.assert_array_equal(numbers.ravel(), [0, 16, 32, 2])


def test_bad_gradients_leave_no_trace():
    tx = untyped(memoptax.scale_by_sm3(cover=memoptax.covers.rows))
    state = tx.init(jnp.ones((5, 2)))
    bad = sparse([0, 1], jnp.array([[1.0, 1.0], [jnp.nan, 1.0]]), 5)
    updates, new = tx.update(bad, state)
    np.testing.assert_array_equal(new.accumulators[0][0], 0.0)
    assert np.isnan(np.asarray(updates.data)).any()


def test_bfloat16_table():
    table = jnp.ones((5, 2), jnp.bfloat16)
    tx = memoptax.sm3(optax.constant_schedule(0.5), cover=memoptax.covers.rows)
    gradient = sparse([1, 1], jnp.ones((2, 2), jnp.bfloat16), 5)
    updates, state = untyped(tx.update(gradient, tx.init(table), table))
    assert updates.data.dtype == jnp.bfloat16
    assert updates.indices.dtype == jnp.int32
    table = untyped(memoptax.sparse.apply_updates(table, updates))
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
@pytest.mark.few(4)
def test_any_other_cover_is_refused(cover):
    tx = memoptax.sm3(0.1, cover=cover)
    params = {"table": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"\['table'\] has a row-sparse .* rows"):
        tx.update({"table": sparse([1], jnp.ones((1, 2)), 4)}, tx.init(params))


def test_only_one_sparse_dimension():
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows)
    gradient = untyped(BCOO.fromdense(jnp.eye(3)))
    with pytest.raises(ValueError, match="0 batch and 2 sparse dimensions"):
        tx.update(gradient, tx.init(jnp.eye(3)))


# Ids of any kind

# Ids inside and outside of a table of n rows, as (id, row). None is padding.


def known_ids(n):
    inside = [(i, i % n) for i in (0, 1, n - 1, -1, -n) if -n <= i < n]
    beyond = [n, n + 1, -n - 1, -n - 2, -2 * n, -2 * n - 1, -100, 2 * n, 10**6]
    return inside + [(i, None) for i in beyond if not -n <= i < n]


KINDS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def of_kind(ids, kind):
    """The ids that this integer dtype can hold, and the ends of its range."""
    info = np.iinfo(kind)
    ends = [(i, None) for i in (info.min, info.max, info.max - 1)]
    return [pair for pair in ids if info.min <= pair[0] <= info.max], ends


@pytest.mark.parametrize(
    "n, kind",
    [(4, kind) for kind in KINDS]
    + [(200, "int8"), (200, "uint8"), (60, "int32"), (1, "int32"), (0, "int32")],
)
def test_ids_outside_are_padding_whatever_their_dtype(n, kind):
    possible, ends = of_kind(known_ids(n), kind)
    pairs = possible + [(i, None) for i, _ in ends if not -n <= i < n]
    numbers, rows = zip(*pairs)
    table = jnp.arange(1.0, 2 * n + 1).reshape(n, 2)
    expected = np.zeros((n, 2))
    for row in rows:
        if row is not None:
            expected[row] += 1
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows)
    ids = [np.array(numbers, kind)]
    if max(map(abs, numbers)) < 2**31:
        ids += [list(numbers), jnp.asarray(numbers, kind)]
    elif kind == "uint32":
        ids += [jnp.asarray(ids[0])]
    for given in ids:
        value, grad = memoptax.sparse.row_value_and_grad(jnp.sum, table, given)
        read = sum(float(table[row].sum()) for row in rows if row is not None)
        np.testing.assert_allclose(value, read)
        np.testing.assert_array_equal(grad.todense(), expected)
        updates, state = untyped(tx.update(grad, tx.init(table)))
        moved = memoptax.sparse.apply_updates(table, updates)
        np.testing.assert_array_equal(np.any(moved != table, 1), expected[:, 0] > 0)
        np.testing.assert_array_equal(
            state[0].accumulators[0][0].ravel(), expected[:, 0] ** 2
        )


def test_ids_of_64_bits(x64):
    signed = jnp.array([2**32, -(2**32), 2**32 + 1, -1, 1])
    for ids in (signed, signed.astype(jnp.uint64)):
        _, grad = memoptax.sparse.row_value_and_grad(jnp.sum, jnp.ones((4, 1)), ids)
        touched = [0, 1, 0, float(ids.dtype == jnp.int64)]
        np.testing.assert_array_equal(grad.todense().ravel(), touched)


@pytest.mark.parametrize(
    "ids",
    [
        *([0.5], jnp.array([1.0]), "x", [[1], [1, 2]], [True], jnp.array([True])),
        np.array([1, 2], "m8[s]"),
    ],
)
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(ValueError, match="ids must be integers, but are"):
        memoptax.sparse.row_value_and_grad(jnp.sum, jnp.ones((4, 2)), ids)


@pytest.mark.parametrize("ids", [[0], {"b": [0]}, {"a": [0], "b": [0]}], ids=str)
def test_ids_of_other_tables_are_refused(ids):
    with pytest.raises(ValueError, match="ids must have an array for each table"):
        memoptax.sparse.row_value_and_grad(jnp.sum, {"a": jnp.ones((4, 2))}, ids)


def test_no_ids():
    tx, table = memoptax.sm3(0.1, cover=memoptax.covers.rows), jnp.ones((4, 2))
    for ids in ([], jnp.zeros((0, 3), jnp.int32)):
        _, grad = memoptax.sparse.row_value_and_grad(jnp.sum, table, ids)
        updates, _ = tx.update(grad, tx.init(table))
        moved = memoptax.sparse.apply_updates(table, updates)
        np.testing.assert_array_equal(moved, table)


@pytest.mark.parametrize("table", [jnp.ones(()), jnp.ones((4, 2), jnp.int32), "x"])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(ValueError, match="[Tt]able .*(axis|int32|'x')"):
        memoptax.sparse.row_value_and_grad(jnp.sum, table, [0])


@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int32", "uint8"])
def test_aliases_of_a_row_merge(kind, promised):
    """Even if the indices are marked as unique, which they are as numbers."""
    n = 100
    ids = [-1, n - 1, n, -n - 1] if kind != "uint8" else [n - 1, n - 1, n, 255]
    indices = jnp.asarray(ids, kind)[:, None]
    data = jnp.array([[1.0], [2.0], [jnp.nan], [jnp.nan]])
    gradient = BCOO((data, indices), shape=(n, 1), unique_indices=promised)
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows)
    table = jnp.ones((n, 1))
    updates, state = jax.jit(tx.update)(gradient, tx.init(table))
    accumulators = state[0].accumulators[0][0].ravel()
    np.testing.assert_array_equal(accumulators, [0.0] * (n - 1) + [9.0])
    moved = untyped(memoptax.sparse.apply_updates(table, updates))
    np.testing.assert_allclose(moved.ravel(), [1.0] * (n - 1) + [0.9])
    # A raw update with aliases is added row by row.
    raw = BCOO((jnp.ones((4, 1)), indices), shape=(n, 1))
    added = untyped(memoptax.sparse.apply_updates(table, raw))
    np.testing.assert_array_equal(added.ravel(), [1.0] * (n - 1) + [3.0])


def compiled_step(rows, columns=64, touched=1024) -> Any:
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
