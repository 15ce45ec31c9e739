"""One buffer: who stays, how exact the sum is, and that a step touches two slots."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memoptax import _buffer, _storage
from memoptax._critical_gradients import critical_gradients

import goldens
import oracle
from compiled import (
    CONTEXTS,
    PARAMS,
    assert_slots_stay_in_place,
    compile_step,
    step_of,
    temporaries,
    whole_buffer_operations,
)


def offer(buffer, values, key=None, decay=1.0):
    """Push scalars or trees with a priority that need not be their norm."""
    values = jax.tree.map(jnp.asarray, values)
    if key is None:
        synced = buffer.spare.shape[0] == 1
        key = _buffer.priority(buffer, values, synced=synced)
    else:
        key = jnp.broadcast_to(jnp.asarray(key, buffer.keys.dtype), buffer.spare.shape)
    return _buffer.push(buffer, values, key, decay)


jitted = jax.jit(offer)  # one compilation for every shape of buffer, whatever the decay


def entries(buffer, row=0, leaf=0):
    """The stored values of a leaf in logical order, as float64."""
    treedef = jax.tree.structure(buffer.total)
    stack = _storage.unpack(treedef, buffer.slots, buffer.scales)[leaf]
    stack = np.asarray(_storage.decode(stack, buffer.keys.dtype), np.float64)
    filled = np.asarray(buffer.keys[row]) > -np.inf
    return stack[np.asarray(buffer.place[row])[filled]]


def exact_sums(buffer):
    """The sums of the slots in float64, leaf by leaf."""
    rows = buffer.keys.shape[0]
    return [
        entries(buffer, leaf if rows > 1 else 0, leaf).sum(0)
        for leaf in range(buffer.norms.shape[0])
    ]


# Who stays


def test_fills_in_order_then_replaces_the_least_strictly():
    buffer = _buffer.empty(jnp.float32(0), 3)
    for value in (3.0, 1.0, 2.0):
        _, buffer = offer(buffer, value)
    np.testing.assert_array_equal(entries(buffer), [3, 1, 2])
    _, buffer = offer(buffer, 1.0)  # a tie with the least: refused
    np.testing.assert_array_equal(entries(buffer), [3, 1, 2])
    _, buffer = offer(buffer, 1.5)
    np.testing.assert_array_equal(entries(buffer), [3, 1.5, 2])
    assert int(buffer.offered[0]) == 5
    assert int(buffer.accepted[0]) == 4


def test_among_equal_keys_the_lowest_entry_leaves():
    buffer = _buffer.empty(jnp.float32(0), 3)
    for value in (1.0, -1.0, 1.0, 2.0, 3.0):
        _, buffer = offer(buffer, value)
    # 2 took the place of the first entry and 3 of the second, though both lie in
    # physical slots that were spare before.
    np.testing.assert_array_equal(entries(buffer), [2, 3, 1])


def test_keys_decay_after_insertion_the_new_one_too():
    buffer = _buffer.empty(jnp.float32(0), 2)
    for value in (4.0, 1.0):
        _, buffer = offer(buffer, value, decay=0.5)
    np.testing.assert_array_equal(buffer.keys, [[1.0, 0.5]])
    np.testing.assert_array_equal(buffer.ages, [[1, 0]])


def test_decay_zero_keeps_empty_slots_empty():
    buffer = _buffer.empty(jnp.float32(0), 3)
    _, buffer = offer(buffer, 4.0, decay=0.0)
    np.testing.assert_array_equal(buffer.keys, [[0.0, -np.inf, -np.inf]])


def test_recalls_the_sum_and_the_fill_before_the_push():
    buffer = _buffer.empty(jnp.float32(0), 2)
    seen = []
    for value in (1.0, 2.0, 4.0, 0.5):
        recall, buffer = offer(buffer, value)
        seen.append((float(recall.total), float(recall.fill)))
    assert seen == [(0, 0), (1, 1), (3, 2), (6, 2)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_was_never_offered(bad):
    buffer = _buffer.empty({"a": jnp.zeros(2), "b": jnp.zeros(())}, 2)
    good = {"a": jnp.array([1.0, 2.0]), "b": jnp.float32(1)}
    _, buffer = offer(buffer, good, decay=0.5)
    _, after = offer(buffer, {**good, "a": jnp.array([bad, 0.0])}, decay=0.5)
    chex.assert_trees_all_equal(after, buffer)
    _, after = offer(buffer, good, key=bad, decay=0.5)
    # The spare slot may hold anything finite; everything that counts is untouched.
    chex.assert_trees_all_equal(after._replace(slots=None), buffer._replace(slots=None))
    _, after = offer(buffer, {**good, "a": jnp.array([bad, 0.0])}, key=1e9)
    chex.assert_trees_all_equal(after, buffer)


def test_rows_of_their_own_decide_for_themselves():
    buffer = _buffer.empty({"a": jnp.zeros(()), "b": jnp.zeros(())}, 1, synced=False)
    for a, b in ((1.0, 5.0), (2.0, 4.0), (np.nan, 6.0)):
        _, buffer = offer(buffer, {"a": a, "b": b})
    np.testing.assert_array_equal(entries(buffer, row=0, leaf=0), [2])
    np.testing.assert_array_equal(entries(buffer, row=1, leaf=1), [6])
    np.testing.assert_array_equal(buffer.offered, [2, 3])
    np.testing.assert_array_equal(buffer.accepted, [2, 2])


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize("topc", [1, 3, 20])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_agrees_with_the_oracle_on_streams_full_of_ties(topc, decay, synced, x64):
    random = np.random.default_rng(topc)
    shapes = {"a": (), "b": (3,), "c": (2, 2)}
    buffer = _buffer.empty(
        {k: jnp.zeros(s) for k, s in shapes.items()}, topc, synced=synced
    )
    names = [("a", "b", "c")] if synced else [("a",), ("b",), ("c",)]
    naive = [oracle.Buffer(topc, decay) for _ in names]
    for _ in range(60):
        # Powers of two, signs and zeros: norms tie exactly, decayed ones too.
        scale = random.choice([0.0, 0.25, 0.5, 1.0, 1.0, 2.0])
        values = {
            k: scale * random.choice([-1.0, 1.0], size=s) for k, s in shapes.items()
        }
        _, buffer = jitted(buffer, values, decay=decay)
        for group, one in zip(names, naive):
            part = {k: values[k] for k in group}
            one.offer(oracle.sum_of_norms(part), part)
    for row, one in enumerate(naive):
        fill = len(one.keys)
        np.testing.assert_allclose(buffer.keys[row][:fill], one.keys, rtol=1e-14)
        np.testing.assert_array_equal(buffer.ages[row][:fill], one.ages)
        assert (int(buffer.offered[row]), int(buffer.accepted[row])) == (
            one.offered,
            one.accepted,
        )
        for name in names[row]:
            leaf = sorted(shapes).index(name)
            expected = np.stack([entry[name] for entry in one.values])
            np.testing.assert_array_equal(entries(buffer, row, leaf), expected)


# Recorded trajectories: SGD needs nothing but the buffer

RECORDED = [
    case
    for case in goldens.cases("cg", "cm")
    if goldens.ours(case)[0] == "sgd_c"
    and case.hyperparameters["dampening"] == 0
    and not (case.hyperparameters["weight_decay"] and case.hyperparameters["kappa"])
]


@pytest.mark.parametrize("case", RECORDED, ids=repr)
def test_replays_the_recorded_streams(case):
    with jax.enable_x64(case.dtype == "float64"):
        _, options = goldens.ours(case)
        rate, momentum = options.pop("learning_rate"), options.pop("momentum")
        weight_decay = options.pop("weight_decay")
        options.pop("dampening")
        tx = optax.chain(
            critical_gradients(**options),
            optax.add_decayed_weights(weight_decay),
            optax.identity() if momentum is None else optax.trace(momentum),
            optax.sgd(rate),
        )

        @jax.jit
        def run(params, gradients):
            def body(carry, gradient):
                params, state = step_of(tx)(*carry, gradient)
                return (params, state), params

            return jax.lax.scan(body, (params, tx.init(params)), gradients)

        (_, state), params = run(case.params0, case.grads)
        assert goldens.deviation(case, params) < goldens.tolerance(case)
        if "burst" in case.stream and options["topc"]:
            assert int(state[0].buffer.rebuilds) > 0


# The sum


def outliers(random, steps, scale=1e4):
    """Gradients of 1e-4 with a few huge ones among them, in leaves of all sizes."""
    shapes = {"large": (64, 32), "small": (3,), "scalar": ()}
    for t in range(steps):
        grads = {k: 1e-4 * random.normal(size=s) for k, s in shapes.items()}
        if t % 37 == 1:
            grads["small"] = scale * random.normal(size=3)
        if t % 53 == 7:
            grads = jax.tree.map(lambda g: scale * g, grads)
        grads["large"] += 1.0  # steady, and hiding the small ones in any joint norm
        yield jax.tree.map(lambda g: np.asarray(g, np.float32), grads)


@pytest.mark.parametrize(
    ("topc", "synced", "dtype"),
    [
        (1, True, None),
        (2, False, None),
        (5, True, None),
        (5, True, "bfloat16"),
        (20, False, "float16"),
        (5, False, "int8"),
        (40, True, "int8"),
        (40, True, None),
    ],
)
def test_the_sum_stays_within_its_bound(topc, synced, dtype):
    random = np.random.default_rng(0)
    buffer = None
    for grads in outliers(random, 400):
        if buffer is None:
            buffer = _buffer.empty(
                jax.tree.map(jnp.zeros_like, grads), topc, synced=synced, dtype=dtype
            )
        _, buffer = jitted(buffer, grads, decay=0.7)
        sums = zip(jax.tree.leaves(buffer.total), exact_sums(buffer))
        for leaf, (total, exact) in enumerate(sums):
            error = np.linalg.norm(np.asarray(total, np.float64) - exact)
            norms = np.asarray(buffer.norms[leaf], np.float64)
            assert error <= buffer.error[leaf]  # the bound is a bound,
            assert buffer.error[leaf] <= 1e-5 * norms.sum()  # and it holds for ever
    assert int(buffer.rebuilds) > 0


def test_the_mean_used_is_exact_to_the_bound_and_the_arriving_outlier():
    random = np.random.default_rng(1)
    buffer = None
    eps = float(jnp.finfo(jnp.float32).eps)
    for grads in outliers(random, 300):
        if buffer is None:
            buffer = _buffer.empty(jax.tree.map(jnp.zeros_like, grads), 5)
        exact, norms = exact_sums(buffer), np.asarray(buffer.norms, np.float64)
        recall, buffer = jitted(buffer, grads, decay=0.7)
        leaves = zip(jax.tree.leaves(recall.total), jax.tree.leaves(grads))
        for leaf, (used, offered) in enumerate(leaves):
            error = np.linalg.norm(np.asarray(used, np.float64) - exact[leaf])
            arriving = 2 * eps * np.linalg.norm(offered)
            assert error <= 1.2e-5 * norms[leaf].sum() + arriving


@pytest.mark.parametrize("topc", [5, 100])
def test_without_outliers_rebuilds_are_rare(topc):
    random = np.random.default_rng(0)
    stream = np.float32(random.normal(size=(1500, 50)))
    buffer = _buffer.empty(jnp.zeros(50), topc)

    @jax.jit
    def run(buffer, stream):
        def body(buffer, x):
            # Every offer is taken: its key is above all others.
            return offer(buffer, x, key=1.0, decay=0.5)[1], None

        return jax.lax.scan(body, buffer, stream)[0]

    buffer = run(buffer, stream)
    assert int(buffer.accepted[0]) == 1500
    assert 1 <= int(buffer.rebuilds) <= 1500 / 100


def test_an_outlier_that_leaves_is_rebuilt_at_once():
    buffer = _buffer.empty(jnp.zeros(3), 2)
    for value in (1e4, 1e-4, 1e-4):
        _, buffer = offer(buffer, jnp.full(3, value), key=1.0, decay=0.5)
    assert int(buffer.rebuilds) == 1
    np.testing.assert_allclose(buffer.total, 2e-4, rtol=1e-6)


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_the_rebuild_stays_a_loop_of_its_own_under_vmap_and_in_apply_if_finite():
    stream = jnp.stack([jnp.full(3, x) for x in (1e4, 1e-4, 1e-4, 1e-4)])
    tx = optax.apply_if_finite(critical_gradients(2, 0.0), 3)

    def run(scale, stream):
        def body(state, x):
            return tx.update(scale * x, state)[1], None

        state = tx.init(stream[0])
        return jax.lax.scan(body, state, stream)[0].inner_state.buffer

    batched = jax.jit(jax.vmap(run, (0, None)))
    buffers = batched(jnp.array([1.0, 0.0, 2.0]), stream)
    # Zeros never pass the gate of a full buffer and never need a rebuild: the other
    # members' rebuilds leave them alone.
    np.testing.assert_array_equal(buffers.rebuilds, [1, 0, 1])
    np.testing.assert_allclose(buffers.total[:, 0], [2e-4, 0, 4e-4], rtol=1e-6)
    text = batched.lower(jnp.ones(3), stream).compile().as_text()
    assert text.count(" while(") >= 2 and "conditional(" in text


@pytest.mark.parametrize("topc", [1, 2, 4])
def test_a_resized_sum_has_the_derivative_of_what_was_kept(topc, x64):
    def total(stream):
        buffer = _buffer.empty(stream[0], 3)
        for x in stream:
            _, buffer = offer(buffer, x, key=jnp.linalg.norm(x))
        return jnp.sum(_buffer.resize(buffer, topc).total * jnp.array([1.0, 2.0]))

    stream = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    kept = jnp.arange(3)[:, None] >= 3 - topc
    np.testing.assert_array_equal(
        jax.grad(total)(stream), jnp.where(kept, jnp.array([1.0, 2.0]), 0)
    )


# The compiled program: C never shows


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("leaves", PARAMS)
@pytest.mark.parametrize("topc", [1, 5, 40])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_no_step_copies_the_buffer(dtype, topc, leaves, name, mesh):
    if dtype and topc == 1:
        return  # shown by 5 and 40
    tx = optax.chain(critical_gradients(topc, buffer_dtype=dtype), optax.sgd(0.1))
    params = {k: jnp.zeros(shape) for k, shape in PARAMS[leaves].items()}
    assert_slots_stay_in_place(name, tx, params, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("topc", [5, 40])
@pytest.mark.parametrize(
    ("params_dtype", "buffer_dtype", "limit"),
    [
        ("float32", "bfloat16", 0.1),
        ("float32", "float16", 0.1),
        ("bfloat16", None, 2.1),
        ("bfloat16", "int8", 2.1),
    ],
)
def test_nor_do_slots_of_half_precision(params_dtype, buffer_dtype, limit, topc, mesh):
    """XLA's CPU backend stores gradients of 16 bits in float32, whatever C is."""
    tx = optax.chain(critical_gradients(topc, buffer_dtype=buffer_dtype), optax.sgd(1))
    params = {"w": jnp.zeros((768, 768), params_dtype)}
    assert_slots_stay_in_place("plain", tx, params, mesh, limit)


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_a_copied_buffer_would_be_seen():
    """The form that everyone writes first, so that the checks above can fail."""
    params = jnp.zeros((256, 256))
    slots = jnp.zeros((6, 256, 256))

    def naive(params, slots, gradient):
        mean = slots.sum(0) / 5
        norms = jnp.sqrt(jnp.sum(slots**2, (1, 2)))
        slots = slots.at[jnp.argmin(norms)].set(gradient)
        return params - gradient - mean, jnp.where(norms.min() > 1, slots, slots + 1)

    compiled = compile_step(naive, params, slots, params)
    assert temporaries(compiled, params) > 0.9 or whole_buffer_operations(
        compiled, {slots.size}
    )
