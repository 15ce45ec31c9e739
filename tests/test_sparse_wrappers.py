"""Row-sparse gradients through optax's transformations, and their updates applied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO

import memoptax

from streams import sparse
from untyped import untyped

pytestmark = pytest.mark.few(2)

TABLES = {"table": jnp.ones((6, 2)), "w": jnp.ones(3)}


def duplicated():
    """A gradient with a row that occurs twice, an alias and padding."""
    data = jnp.array([[3.0, 0.0], [1.0, 2.0], [4.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    return {"table": sparse([1, 5, 1, -1, 6], data, 6), "w": jnp.array([2.0, 0.0, 1.0])}


def densely(gradient):
    table = jnp.zeros((6, 2))
    ids = jnp.array([1, 5, 1, 5])
    table = table.at[ids].add(gradient["table"].data[:4])
    return {"table": table, "w": gradient["w"]}


ELEMENTWISE = {
    "clip": optax.clip(2.5),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "scale": optax.scale(3.0),
    "scale_by_schedule": optax.scale_by_schedule(lambda count: 0.5),
    "zero_nans": optax.zero_nans(),
    "chain": optax.chain(optax.clip(2.5), optax.clip_by_global_norm(1.0)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_wrapped_transformations_act_as_on_the_dense_gradient(name, before):
    inner, sm3 = ELEMENTWISE[name], memoptax.sm3(0.1, cover=cover_of_tables)
    ours = memoptax.sparse.on_values(inner)
    order = slice(None) if before else slice(None, None, -1)
    tx, dense = (optax.chain(*[first, sm3][order]) for first in (ours, inner))
    gradient = duplicated()
    updates, _ = jax.jit(tx.update)(gradient, tx.init(TABLES), TABLES)
    moved = memoptax.sparse.apply_updates(TABLES, updates)
    updates, _ = dense.update(densely(gradient), dense.init(TABLES), TABLES)
    expected = optax.apply_updates(TABLES, updates)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), moved, expected
    )


def cover_of_tables(path, leaf):
    table = "table" in jax.tree_util.keystr(path)
    return (memoptax.covers.rows if table else memoptax.covers.axes)(path, leaf)


def test_the_wrapper_passes_on_the_rows_of_the_parameters():
    tx = memoptax.sparse.on_values(optax.add_decayed_weights(0.5))
    gradient = duplicated()
    updates, _ = untyped(tx.update(gradient, tx.init(TABLES), TABLES))
    decayed = densely(gradient)["table"].at[jnp.array([1, 5])].add(0.5)
    np.testing.assert_allclose(updates["table"].todense(), decayed)


def test_a_mask_may_be_a_function():
    """It sees the table's shape in place of a gradient."""

    def large(params):
        return jax.tree.map(lambda p: p.size >= 12, params)

    def vectors(params):
        return jax.tree.map(lambda p: p.ndim == 1, params)

    for mask in (large, vectors):
        updates = []
        for same in (mask, mask(TABLES)):
            tx = memoptax.sm3(0.1, cover=cover_of_tables, weight_decay=0.1, mask=same)
            step = jax.jit(tx.update)(duplicated(), tx.init(TABLES), TABLES)
            updates.append(step[0])
        np.testing.assert_array_equal(updates[0]["w"], updates[1]["w"])
        rows = [u["table"].todense() for u in updates]
        np.testing.assert_array_equal(*rows)


def test_a_mask_may_be_a_function_where_there_are_no_parameters():
    def by_name(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "w", params)

    masked, bare = (
        memoptax.sm3(0.1, cover=cover_of_tables, mask=mask) for mask in (by_name, None)
    )
    # An extra argument is for other transformations, whatever its name.
    updates, _ = masked.update(duplicated(), masked.init(TABLES), given=3)
    want, _ = bare.update(duplicated(), bare.init(TABLES))
    jax.tree.map(np.testing.assert_array_equal, densely(updates), densely(want))


def test_apply_if_finite_goes_around_it():
    tx = optax.apply_if_finite(
        optax.chain(
            memoptax.sparse.on_values(optax.clip_by_global_norm(1.0)),
            memoptax.sm3(0.1, cover=cover_of_tables),
        ),
        3,
    )
    state, good, step = tx.init(TABLES), duplicated(), jax.jit(tx.update)
    updates, state = step(good, state, TABLES)
    moved = untyped(memoptax.sparse.apply_updates(TABLES, updates))
    assert np.all(moved["table"][1] < 1) and np.all(moved["table"][0] == 1)
    bad = {**good, "table": sparse([1, 2], jnp.full((2, 2), jnp.nan), 6)}
    updates, after = step(bad, state, TABLES)
    still = memoptax.sparse.apply_updates(moved, updates)
    jax.tree.map(np.testing.assert_array_equal, still, moved)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "uint8", "uint16", "uint32"]
)
@pytest.mark.parametrize("outer", ["apply_if_finite", "conditionally_transform"])
@pytest.mark.parametrize("inner", ["sm3", "momentum", "on_values"])
def test_ids_keep_a_dtype_that_can_hold_the_number_of_rows(kind, outer, inner):
    """A wrapper with a branch compares the types of what goes in and comes out."""
    inside = {
        "sm3": memoptax.sm3(0.1, cover=memoptax.covers.rows),
        "momentum": memoptax.sm3(0.1, momentum=0.9, cover=memoptax.covers.rows),
        "on_values": memoptax.sparse.on_values(optax.clip(0.5)),
    }[inner]
    tx = {
        "apply_if_finite": lambda: optax.apply_if_finite(inside, 3),
        "conditionally_transform": lambda: optax.conditionally_transform(
            inside, lambda step, **_: jnp.isfinite(step)
        ),
    }[outer]()
    data = jnp.array([[3.0, 0.0], [1.0, 2.0], [4.0, 1.0], [5.0, 5.0]])
    for rows in (6, min(int(jnp.iinfo(kind).max), 300)):
        got = want = jnp.ones((rows, 2))
        ids = [1, rows - 1, 1, rows]
        gradient, same = (
            sparse(jnp.array(ids, dtype), data, rows) for dtype in (kind, "int32")
        )
        state, plain = tx.init(got), inside.init(want)
        for _ in range(2):
            updates, state = untyped(jax.jit(tx.update)(gradient, state, got))
            assert updates.indices.dtype == kind
            got = untyped(memoptax.sparse.apply_updates(got, updates))
            updates, plain = untyped(inside.update(same, plain, want))
            want = untyped(memoptax.sparse.apply_updates(want, updates))
            np.testing.assert_allclose(got, want, rtol=1e-6)
        assert np.all(got[1] != 1) and np.all(got[0] == 1)


def test_zero_nans_acts_on_the_values():
    tx = untyped(memoptax.sparse.on_values(ELEMENTWISE["zero_nans"]))
    good = duplicated()
    bad = sparse([1, 2], jnp.array([[jnp.nan, 2.0], [3.0, 4.0]]), 6)
    updates, state = tx.update({**good, "table": bad}, tx.init(TABLES), TABLES)
    want = jnp.zeros((6, 2)).at[1, 1].set(2).at[2].set(jnp.array([3.0, 4.0]))
    np.testing.assert_array_equal(updates["table"].todense(), want)
    assert state.found_nan["table"] and not state.found_nan["w"]


@pytest.mark.parametrize(
    "inner",
    [
        optax.trace(0.9),
        optax.scale_by_adam(),
        optax.MultiSteps(optax.sgd(0.1), 2),
        optax.chain(optax.clip(1.0), memoptax.sm3(0.1, cover=cover_of_tables)),
    ],
    ids=["trace", "adam", "MultiSteps", "sm3"],
)
def test_what_holds_numbers_for_every_row_is_refused(inner):
    tx = memoptax.sparse.on_values(inner)
    with pytest.raises(ValueError, match=r"inner must keep nothing .*\['table'\] has"):
        tx.update(duplicated(), tx.init(TABLES), TABLES)
    dense = densely(duplicated())
    tx.update(dense, tx.init(TABLES), TABLES)


def test_as_many_ids_as_rows_do_not_hide_the_numbers_of_rows():
    tx = memoptax.sparse.on_values(memoptax.sm3(0.1, cover=memoptax.covers.rows))
    table = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="inner must keep nothing"):
        tx.update(sparse([2, 2, 2], jnp.ones((3, 2)), 3), tx.init(table))


def test_momenta_of_dense_leaves_alone_are_no_hindrance():
    masked = optax.masked(optax.trace(0.9), {"table": False, "w": True})
    tx, gradient = untyped(memoptax.sparse.on_values(masked)), duplicated()
    _, state = tx.update(gradient, tx.init(TABLES), TABLES)
    updates, _ = tx.update(gradient, state, TABLES)
    np.testing.assert_allclose(updates["w"], 1.9 * gradient["w"], rtol=1e-6)
    table = densely(gradient)["table"]
    np.testing.assert_array_equal(updates["table"].todense(), table)


@pytest.mark.parametrize(
    "inner",
    [optax.clip, "x", None, optax.MultiSteps],
    ids=["function", "text", "None", "class"],
)
def test_what_is_no_transformation_is_refused(inner):
    with pytest.raises(ValueError, match="inner must be an optax.GradientTransf"):
        memoptax.sparse.on_values(inner)


@pytest.mark.parametrize("name", ["clip", "scale"])
def test_optax_without_the_wrapper_is_refused_and_the_error_names_it(name):
    sm3 = memoptax.sm3(0.1, cover=cover_of_tables)
    tx = optax.chain(ELEMENTWISE[name], sm3)
    cure = r"\['table'\] has indices of dtype float32.*memoptax.sparse.on_values"
    with pytest.raises(ValueError, match=cure):
        tx.update(duplicated(), tx.init(TABLES), TABLES)
    tx = optax.chain(sm3, ELEMENTWISE[name])
    updates, _ = tx.update(duplicated(), tx.init(TABLES), TABLES)
    with pytest.raises(ValueError, match=cure):
        memoptax.sparse.apply_updates(TABLES, updates)


def test_apply_updates_is_optax_elsewhere():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": None, "c": [jnp.float32(1)]}
    updates = {"a": jnp.ones(3), "b": None, "c": [jnp.float32(2)]}
    ours = memoptax.sparse.apply_updates(params, updates)
    theirs = optax.apply_updates(params, updates)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


ENTRIES = jnp.arange(3)[:, None]  # of a diagonal


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (sparse([1, 8], jnp.ones((2, 3)), 10), r"\['t'\] has the shape \(10, 3\)"),
        (sparse([1, 2], jnp.ones((2, 1)), 3), r"\['t'\] has the shape \(3, 1\)"),
        (
            BCOO((jnp.ones(3), jnp.tile(ENTRIES, 2)), shape=(3, 3)),
            r"\['t'\] has 0 batch and 2 sparse",
        ),
        (
            BCOO((jnp.ones((3, 1)), ENTRIES[:, None]), shape=(3, 3)),
            r"\['t'\] has 1 batch and 1 sparse",
        ),
    ],
    ids=["more rows", "narrow rows", "entries", "batch"],
)
def test_updates_of_another_shape_are_not_applied(update, message):
    with pytest.raises(ValueError, match=message):
        memoptax.sparse.apply_updates({"t": jnp.zeros((3, 3))}, {"t": update})
