"""Statistics, resizing and emptying of the buffers inside a state."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from slots import entries, exact_sums
from untyped import untyped

pytestmark = pytest.mark.few(1)

HELD = [
    {"topc": 2},
    {"topc": 2, "holding": "sum", "buffer_dtype": "int8", "synced": False},
    {"topc": 1, "buffer_dtype": "int8", "fifo_probability": 0.5},
]
TREE = {"a": jnp.ones((4, 5)), "b": jnp.ones(())}
each_holding = pytest.mark.parametrize("options", HELD, ids=str)


def trained(tx, steps=12, seed=0) -> Any:
    """The state after gradients of random scale, on a tree of two leaves."""
    random = np.random.default_rng(seed)
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(())}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        grads = jax.tree.map(
            lambda p: jnp.asarray(random.lognormal(0, 2) * random.normal(size=p.shape)),
            params,
        )
        _, state = update(grads, state, params)
    return state


def test_stats_of_a_buffer_by_hand():
    tx = memoptax.critical_gradients(topc=3, decay=0.5)
    state = tx.init(jnp.zeros(()))
    for gradient in (4.0, -2.0, 0.0, 0.25):
        _, state = tx.update(jnp.asarray(gradient), state)
    # Keys 4/16, 2/8 and 0; then .25 replaces the 0, and decays.
    stats = jax.jit(memoptax.buffer_stats)(state)
    expected = {
        "fill": 3,
        "acceptance": 1,
        "key_min": 0.125,
        "key_mean": (0.25 + 0.25 + 0.125) / 3,
        "key_max": 0.25,
        "age_mean": (3 + 2 + 0) / 3,
        "age_max": 3,
        "mean_norm": (4 - 2 + 0.25) / 3,
        "coherence": (4 - 2 + 0.25) / (4 + 2 + 0.25),
        "rebuilds": 0,
    }
    assert {k: pytest.approx(v, rel=1e-6) for k, v in expected.items()} == stats


def test_counters_of_many_leaves_do_not_overflow_together():
    params = [jnp.zeros(3)] * 4
    tx = untyped(memoptax.sgd_c(0.1, synced=False))
    counts = [jnp.full((4,), n, jnp.int32) for n in (1_400_000_000, 700_000_000)]
    _, state = tx.update([jnp.ones(3)] * 4, tx.init(params))
    buffer = state[0].buffer._replace(offered=counts[0], accepted=counts[1])
    state = (state[0]._replace(buffer=buffer), *state[1:])
    assert memoptax.buffer_stats(state)["acceptance"] == 0.5


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.few(2)
def test_coherence_and_share_are_those_of_the_entries(synced):
    """Against the entries themselves. Without syncing they differ between leaves."""
    buffer = trained(memoptax.critical_gradients(4, 0.9, synced=synced), 9).buffer
    updates = {"a": jnp.full((3, 2), 2.0), "b": jnp.asarray(-1.0)}
    means, apart = [], []
    for leaf in (0, 1):
        values = entries(buffer, 0 if synced else leaf, leaf).reshape(4, -1)
        means.append(np.linalg.norm(values.mean(0)))
        apart.append(np.linalg.norm(values, axis=1).mean())
    mean, whole = np.linalg.norm(means), np.linalg.norm(apart)
    stats = jax.jit(memoptax.buffer_stats)(buffer, updates)
    np.testing.assert_allclose(stats["coherence"], mean / whole, rtol=1e-6)
    np.testing.assert_allclose(stats["share"], mean / (mean + 5), rtol=1e-6)
    assert 0 < stats["coherence"] < 1
    assert "share" not in memoptax.buffer_stats(buffer)


def test_values_that_agree_are_coherent_and_those_that_cancel_are_not():
    tx = memoptax.critical_gradients(topc=2, decay=1.0)
    for second, expected in ((1.0, 1), (-1.0, 0)):
        state = tx.init(jnp.zeros(3))
        for sign in (1.0, second):
            _, state = tx.update(sign * jnp.array([1.0, 2.0, -2.0]), state)
        stats = memoptax.buffer_stats(state, jnp.zeros(3))
        assert float(stats["coherence"]) == pytest.approx(expected)
        assert float(stats["share"]) == expected  # as the updates are 0


def test_shares_of_a_partition_are_those_of_its_parts():
    tx = optax.partition(
        {"a": memoptax.sgd_c(0.1), "b": memoptax.sgd_c(0.1)}, {"a": "a", "b": "b"}
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params), params)
    stats = memoptax.buffer_stats(state, {"a": jnp.ones(2), "b": 3 * jnp.ones(3)})
    assert float(stats["0/share"]) == pytest.approx(1 / 2)
    assert float(stats["1/share"]) == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match=r"updates have no leaf at \['b'\]"):
        memoptax.buffer_stats(state, {"a": jnp.ones(2)})


@pytest.mark.slow
def test_buffers_are_found_resized_and_emptied_inside_an_nnx_optimizer():
    from flax import nnx  # not installed with the oldest versions

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    small, large = (
        nnx.Optimizer(model, memoptax.sgd_c(0.1, topc=c), wrt=nnx.Param) for c in (2, 4)
    )
    x = jnp.arange(6.0).reshape(2, 3)
    grads = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
    small.update(model, grads)
    stats = jax.jit(memoptax.buffer_stats)(small.opt_state, grads)
    assert (stats["fill"], stats["coherence"], stats["share"]) == (1, 1, 0.5)
    large.opt_state = nnx.data(memoptax.resize_buffer(small.opt_state, 4))
    large.update(model, jax.tree.map(lambda g: 2 * g, grads))
    assert memoptax.buffer_stats(large.opt_state)["fill"] == 2
    large.opt_state = nnx.data(memoptax.reset_buffer(large.opt_state))
    large.update(model, grads)
    assert memoptax.buffer_stats(large.opt_state)["fill"] == 1


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_stats_copy_no_slots():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    state = jax.eval_shape(memoptax.adam_c(0.1).init, x)
    compiled = untyped(jax.jit(memoptax.buffer_stats).lower(state, x).compile())
    # There are six slots. jax 0.10 stores two values of a slot's size, jax 0.8 three.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * x.size


def test_stats_are_zero_while_empty_and_found_in_any_nesting():
    tx = optax.partition(
        {"a": memoptax.adam_c(0.1), "b": optax.apply_if_finite(memoptax.sgd_c(0.1), 2)},
        {"a": "a", "b": "b"},
    )
    stats = memoptax.buffer_stats(tx.init({"a": jnp.zeros(2), "b": jnp.zeros(3)}))
    assert {name.split("/")[0] for name in stats} == {"0", "1"}
    assert not any(float(value) for value in stats.values())


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("topc", [2, 4, 9])
def test_a_resized_buffer_keeps_the_most_critical_entries(topc, synced, dtype):
    tx = memoptax.critical_gradients(4, 0.9, synced=synced, buffer_dtype=dtype)
    state = trained(tx)
    old, new = state.buffer, memoptax.resize_buffer(state, topc).buffer
    for row in range(old.keys.shape[0]):
        order = np.sort(np.argsort(-old.keys[row], stable=True)[:topc])
        filled = len(order)
        np.testing.assert_array_equal(new.keys[row][:filled], old.keys[row][order])
        np.testing.assert_array_equal(new.ages[row][:filled], old.ages[row][order])
        assert not new.ages[row][filled:].any()
        leaves = [row] if not synced else [0, 1]
        for leaf in leaves:
            np.testing.assert_array_equal(
                entries(new, row, leaf), entries(old, row, leaf)[order]
            )
    for total, exact in zip(jax.tree.leaves(new.total), exact_sums(new)):
        np.testing.assert_allclose(total, exact, rtol=1e-6)


def test_a_resized_buffer_has_finite_norms_too():
    """Rounding to int8 lifts this norm above the largest number of float32."""
    row = np.full(4096, 10.51, np.float32)
    row[0] = 127
    row *= np.float32(3.39e38) / np.linalg.norm(row.astype(np.float64))
    params = jnp.zeros(4096)
    two, three = (
        memoptax.critical_gradients(topc=topc, holding="sum", buffer_dtype="int8")
        for topc in (2, 3)
    )
    _, state = two.update(jnp.asarray(row), two.init(params), params)
    memoptax.check_state(two, params, state)
    resized = memoptax.resize_buffer(state, 3, holding="sum")
    memoptax.check_state(three, params, resized)


@each_holding
@pytest.mark.few(9)
def test_an_empty_buffer_is_resized_to_a_new_one(options):
    small, large = (
        untyped(memoptax.critical_gradients(**options | {"topc": topc})).init(TREE)
        for topc in (options["topc"], 5)
    )
    # The numbers behind the empty entries may be anything.
    odd = small.buffer._replace(keys=jnp.full_like(small.buffer.keys, 7.0))
    small = small._replace(buffer=odd)
    resized = memoptax.resize_buffer(small, 5, holding=options.get("holding"))
    jax.tree.map(np.testing.assert_array_equal, resized, large)


def test_the_norms_of_a_resized_sum_are_those_of_each_leaf():
    tx = memoptax.critical_gradients(2, 0.5, synced=False, holding="read")
    state = tx.init([jnp.zeros(())] * 3)
    for gradient in ([np.nan, 1.0, 8.0], [np.nan, 2.0, 4.0], [5.0, 3.0, 1.0]):
        _, state = tx.update(jax.tree.map(jnp.asarray, gradient), state)
    resized = untyped(memoptax.resize_buffer(state, 2, holding="sum"))
    # The third gradient of the second leaf took the place of the first one.
    wanted = [[5, 0], [3, 2], [8, 4]]
    np.testing.assert_allclose(resized.buffer.norms, wanted, rtol=1e-6)


@pytest.mark.long
def test_a_resized_state_goes_on_as_one_of_that_size():
    """A buffer that grew before it was full equals one that was always large."""
    small, large = (memoptax.adam_c(0.1, topc=c) for c in (5, 8))
    grown = memoptax.resize_buffer(trained(small, steps=4), 8)
    fresh = trained(large, steps=4)
    assert jax.tree.structure(grown) == jax.tree.structure(fresh)
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(())}
    for _ in range(12):
        ours, grown = large.update(params, grown, params)
        theirs, fresh = large.update(params, fresh, params)
        for x, y in zip(*map(jax.tree.leaves, (ours, theirs))):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_a_reset_buffer_is_a_new_one_and_moments_stay():
    tx = memoptax.adam_cm(0.1, fifo_probability=0.5, buffer_dtype="int8")
    state = trained(tx)
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(())}
    fresh, reset = untyped(tx.init(params)), memoptax.reset_buffer(state)
    draws = state[0].buffer.draws
    expected = fresh[0].buffer._replace(draws=draws)
    jax.tree.map(np.testing.assert_array_equal, reset[0].buffer, expected)
    jax.tree.map(np.testing.assert_array_equal, reset[0].mu, state[0].mu)


@pytest.mark.parametrize("call", ["buffer_stats", "reset_buffer", "resize_buffer"])
@pytest.mark.parametrize("tx", [optax.adam(0.1), memoptax.adam_c(0.1, topc=0)])
def test_a_state_without_a_buffer_is_refused(call, tx):
    arguments = (3,) if call == "resize_buffer" else ()
    with pytest.raises(ValueError, match=f"{call} found no buffer in state"):
        getattr(memoptax, call)(tx.init(jnp.zeros(2)), *arguments)


@pytest.mark.parametrize("topc", [0, -1, 2.0, True, None])
@pytest.mark.few(5)
def test_a_bad_size_is_refused(topc):
    state = memoptax.sgd_c(0.1).init(jnp.zeros(2))
    message = f"topc must be an integer of at least 1, but is {topc}"
    with pytest.raises(ValueError, match=message):
        memoptax.resize_buffer(state, topc)


def transformer(d_model=256, layers=4, vocabulary=5000):
    """The shapes of a transformer, with its biases and norms."""
    matrices = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (1, 4)}
    d, shapes = d_model, {"embedding": (vocabulary, d_model), "norm": (d_model,)}
    for i in range(layers):
        for name, (rows, columns) in {**matrices, "down": (4, 1)}.items():
            shapes[f"{i} {name}"] = (rows * d, columns * d)
            shapes[f"{i} {name} bias"] = (columns * d,)
        shapes |= {f"{i} norm {k}": (d,) for k in ("1 scale", "1 bias", "2 scale")}
    return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}


def test_adam_c_with_five_int8_slots_holds_14_bytes_a_parameter():
    params = transformer()
    report = memoptax.memory_report(memoptax.adam_c(0.1, buffer_dtype="int8"), params)
    n = sum(p.size for p in params.values())
    rows = sum(p.size // p.shape[-1] for p in params.values())
    # Six slots, their scales and two moments. Then two rows of five numbers and one of
    # six, two single numbers of the tree, and a count.
    scalars = 4 * (2 * 5 + 6 + 2 + 1)
    assert report.fields["slots"] == 6 * n
    assert report.fields["scales"] == 6 * 4 * rows
    assert report.total == (6 + 8) * n + 6 * 4 * rows + scalars
    assert report.per_parameter <= 14.4


def test_memory_report_counts_what_init_allocates():
    params = {"w": jnp.zeros((30, 7), jnp.bfloat16), "b": jnp.zeros(7)}
    tx = memoptax.adam_c(0.1, topc=3)
    report = memoptax.memory_report(tx, params)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
    assert report.total == allocated == memoptax.state_bytes(tx, params)
    assert report.fields["slots"] == 4 * (30 * 7 * 2 + 7 * 4)
    assert report.fields["mu"] == 4 * (30 * 7 + 7)
    assert report.parameters == 30 * 7 + 7
    assert report.per_parameter == allocated / 217
    *_, in_all, undonated = str(report).splitlines()
    assert in_all.split()[-2] == f"{allocated:,}"
    assert undonated.split()[-2] == f"{2 * allocated:,}"


@pytest.mark.parametrize("size", [1e-25, 1e-21, 1.0, 1e30])
def test_equal_entries_are_coherent_whatever_their_size(size):
    tx, params = memoptax.sgd_c(0.1), {"w": jnp.full((3, 4), size)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(memoptax.buffer_stats(state)["coherence"], 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, "float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("of_params", ["float64", "float32", "float16"])
def test_a_resized_sum_is_as_wide_as_a_new_one(of_params, dtype, x64):
    params = jnp.ones(3, of_params)
    options = {"buffer_dtype": dtype, "topc": 3}
    state = memoptax.sgd_c(0.1, holding="read", **options).init(params)
    state = memoptax.resize_buffer(state, 3, holding="sum")
    memoptax.check_state(memoptax.sgd_c(0.1, holding="sum", **options), params, state)


def test_sums_of_mixed_slots_are_resized_as_wide_as_new_ones(x64):
    params = {"a": jnp.ones(3, jnp.float64), "b": jnp.ones(3, jnp.float32)}
    read, summed = (memoptax.sgd_c(0.1, topc=2, holding=w) for w in ("read", "sum"))
    state = memoptax.resize_buffer(untyped(read.init(params)), 2, holding="sum")
    memoptax.check_state(summed, params, state)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_resized_sums_of_mixed_parameters_are_wide_enough(dtype, x64):
    """The state does not say which of the slots belong to float64."""
    params = {"a": jnp.ones(3, jnp.float64), "b": jnp.ones(3, jnp.float32)}
    tx = memoptax.sgd_c(0.1, topc=2, buffer_dtype=dtype, holding="sum")
    state = memoptax.resize_buffer(untyped(tx.init(params)), 2, holding="read")
    state = memoptax.resize_buffer(state, 2, holding="sum")
    total = state[0].buffer.total
    assert total["a"].dtype == total["b"].dtype == jnp.float64
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert {k: u.dtype for k, u in updates.items()} == {
        k: p.dtype for k, p in params.items()
    }
    dtypes = [jax.tree.map(lambda x: x.dtype, s) for s in (state, after)]
    assert dtypes[0] == dtypes[1]


def test_statistics_of_a_batch_of_empty_leaves_are_numbers():
    tx, params = memoptax.critical_gradients(2), jnp.zeros((3, 0))
    _, state = tx.update(params, tx.init(params))
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    for name, value in memoptax.buffer_stats(batch).items():
        assert np.isfinite(value).all(), name


# Buffers that something has bent, and states of shapes


def bent(buffer):
    """Each buffer has one array of another rank or length, or in its place None or
    something that is not an array.
    """
    yield "keys", buffer._replace(keys=buffer.keys[:, :0])
    if buffer.scales is None:
        yield "scales", buffer._replace(scales={"a": jnp.ones((4, 1))})
    for name, field in zip(buffer._fields, buffer):
        leaves, treedef = jax.tree.flatten(field)
        for k, leaf in enumerate(leaves):
            others = ["x", 1j, leaf[None], leaf[None, None]]
            if leaf.ndim:
                others.append(leaf[0])
            if (
                leaf.ndim
                and name != "draws"
                and (name != "slots" or buffer.entries is not None)
            ):
                others.append(jnp.concatenate([leaf, leaf]))
            for other in others:
                changed = treedef.unflatten([*leaves[:k], other, *leaves[k + 1 :]])
                yield name, buffer._replace(**{name: changed})
        if leaves and name not in ("slots", "draws"):
            yield name, buffer._replace(**{name: None})


@each_holding
@pytest.mark.few(9)
def test_a_bent_buffer_is_refused_in_a_sentence(options):
    tx = untyped(memoptax.critical_gradients(**options))
    _, state = tx.update(TREE, tx.init(TREE))
    calls = {
        "buffer_stats": memoptax.buffer_stats,
        "reset_buffer": memoptax.reset_buffer,
        "resize_buffer": lambda state: memoptax.resize_buffer(state, 3),
        "update": lambda state: tx.update(TREE, state),
        "check_state": lambda state: memoptax.check_state(tx, TREE, state),
    }
    for field, buffer in bent(state.buffer):
        for name, call in calls.items():
            with pytest.raises(ValueError, match=r"state(\.|\[| has)"):
                call(state._replace(buffer=buffer))
                pytest.fail(f"{name} takes bent {field}")


@each_holding
def test_shapes_of_a_state_give_shapes(options):
    """Such as those of a target for a checkpoint that is to be resized."""
    tx = memoptax.critical_gradients(**options)
    state = tx.init(TREE)
    shapes = jax.eval_shape(tx.init, TREE)
    for call in (
        memoptax.buffer_stats,
        lambda state: memoptax.buffer_stats(state, TREE),
        memoptax.reset_buffer,
        lambda state: memoptax.resize_buffer(state, 3),
    ):
        found, wanted = call(shapes), jax.eval_shape(lambda call=call: call(state))
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            assert isinstance(a, jax.ShapeDtypeStruct)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_updates_of_another_shape_are_refused():
    state = memoptax.sgd_c(0.1).init(TREE)
    for wrong in ({**TREE, "a": jnp.ones(4)}, {**TREE, "b": np.ones(1)}):
        with pytest.raises(ValueError, match="updates have a leaf of shape"):
            memoptax.buffer_stats(state, wrong)
    with pytest.raises(
        ValueError, match=r"updates must be real, .* complex64 at \['b'"
    ):
        memoptax.buffer_stats(state, {**TREE, "b": jnp.array(1j)})
    members = jax.vmap(lambda key: memoptax.sgd_c(0.1).init(TREE))(jnp.arange(2))
    with pytest.raises(ValueError, match="updates have a leaf of shape"):
        memoptax.buffer_stats(members, TREE)
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), TREE)
    assert memoptax.buffer_stats(members, batched)["share"].shape == (2,)


@pytest.mark.parametrize("topc", [1, 2])
def test_stats_are_the_same_without_jit(topc):
    tx = memoptax.sgd_c(0.1, topc=topc)
    params = jnp.array([3.0, 4.0])
    _, state = tx.update(params, tx.init(params), params)
    expected = memoptax.buffer_stats(state)
    with jax.disable_jit():
        found = memoptax.buffer_stats(state)
    chex.assert_trees_all_close(found, expected)


@pytest.mark.parametrize("holding, copies", [(None, 1), ("read", 2), ("sum", 3)])
def test_one_value_takes_the_copies_that_the_docstring_says(holding, copies):
    params = jax.ShapeDtypeStruct((100, 100), jnp.float32)
    tx = memoptax.critical_gradients(topc=1, holding=holding)
    assert memoptax.state_bytes(tx, params) == pytest.approx(4e4 * copies, rel=0.01)
