"""Critical gradients and their four optimizers: what they compute."""

import functools
import re

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest

import memoptax
from memoptax import adam_c, adamw_c, critical_gradients, rmsprop_c, sgd_c

import goldens
import oracle
from compiled import train
from test_buffer import entries

pytestmark = pytest.mark.few(2)

nan, inf = float("nan"), float("inf")
SHAPES = {"a": (), "b": (2, 3), "c": (4,)}
PARAMS = {name: jnp.full(shape, 0.5) for name, shape in SHAPES.items()}


def gradients(steps=20, shapes=SHAPES, seed=0):
    random = np.random.default_rng(seed)
    size = np.exp2(random.uniform(-3, 3, steps))
    return {
        name: np.float32(
            random.normal(size=(steps, *shape)) * size.reshape(-1, *[1] * len(shape))
        )
        for name, shape in shapes.items()
    }


def run(tx, params=None, stream=None):
    """The trajectory of the parameters."""
    params = PARAMS if params is None else params
    stream = gradients() if stream is None else stream
    return jax.jit(lambda p, g: train(tx, p, g)[0])(params, stream)


def emit(tx, stream):
    """The updates themselves, and the last state."""

    def body(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, updates

    state = tx.init(at(stream, 0))
    state, updates = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(state, stream)
    return updates, state


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want, rtol=1e-6, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, want)


def at(stream, t):
    return jax.tree.map(lambda g: g[t], stream)


# Recorded trajectories

ALIASES = ("sgd_c", "rmsprop_c", "adam_c", "adamw_c")
# Released SGD_C adds weight decay before the buffer; here L2 comes after aggregation.
# The oracle replays those cases both ways.
RECORDED = [
    case
    for case in goldens.cases("cg", "cm")
    if goldens.ours(case)[0] in ALIASES and "l2_before_buffer" not in case.quirks
]


@pytest.mark.parametrize("case, way", goldens.in_every_way(RECORDED))
def test_replays_the_recorded_trajectory(case, way):
    name, options = goldens.ours(case)
    with jax.enable_x64(case.dtype == "float64"):
        tx = getattr(memoptax, name)(**options, holding=way)
        params = run(tx, case.params0, case.grads)
    assert goldens.deviation(case, params) <= goldens.tolerance(case)


def test_all_recorded_cases_but_two_are_replayed():
    assert len(RECORDED) == 24
    assert {goldens.ours(case)[0] for case in RECORDED} == set(ALIASES)


# The base optimizers

NESTEROV = {"momentum": 0.9, "nesterov": True}
BASES = {
    "sgd": (sgd_c, {}, optax.sgd, {}),
    "momentum": (sgd_c, {"momentum": 0.9}, optax.sgd, {"momentum": 0.9}),
    "nesterov": (sgd_c, NESTEROV, optax.sgd, NESTEROV),
    "rmsprop": (
        rmsprop_c,
        {"alpha": 0.95, "momentum": 0.9},
        optax.rmsprop,
        {"decay": 0.95, "momentum": 0.9, "eps_in_sqrt": False},
    ),
    "adam": (adam_c, {"eps": 1e-6}, optax.adam, {"eps": 1e-6}),
    "nadam": (adam_c, {"nesterov": True}, optax.adam, {"nesterov": True}),
    "adamw": (adamw_c, {}, optax.adamw, {"weight_decay": 0.01}),
}
each_base = pytest.mark.parametrize("name", BASES)


def with_and_without(name, **buffer):
    ours, options, base, base_options = BASES[name]
    return ours(0.05, **options, **buffer), base(0.05, **base_options)


@functools.cache
def base_trajectory(name):
    return run(with_and_without(name)[1])


def state_shapes(tx, params=PARAMS):
    state = jax.eval_shape(tx.init, params)
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]


@each_base
@pytest.mark.parametrize("off", [{"kappa": 0}, {"kappa": 0.0}, {"topc": 0}], ids=repr)
def test_switched_off_it_is_the_base_bit_for_bit(name, off):
    tx, base = with_and_without(name, **off)
    assert state_shapes(tx) == state_shapes(base)
    if off != {"kappa": 0}:
        equal(run(tx), base_trajectory(name))


@pytest.mark.parametrize("name", ["momentum", "rmsprop", "adam", "adamw"])
def test_a_traced_kappa_of_zero_is_the_base(name):
    trajectory = jax.jit(
        lambda kappa: train(with_and_without(name, kappa=kappa)[0], PARAMS, gradients())
    )(0.0)[0]
    close(trajectory, base_trajectory(name))


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_an_alias_is_a_chain(name):
    buffer = {"topc": 3, "decay": 0.9, "aggr": "mean"}
    tx, base = with_and_without(name, **buffer)
    equal(run(tx), run(optax.chain(critical_gradients(**buffer), base)))


# Whom the buffer keeps, and what comes out


def test_leaf_order_does_not_matter():
    def reverse(tree):
        return {chr(ord("z") - ord(name)): leaf for name, leaf in tree.items()}

    tx = sgd_c(0.05, topc=2)
    got = run(tx, reverse(PARAMS), reverse(gradients()))
    close(got, reverse(run(tx)))


def test_over_one_leaf_synced_and_unsynced_are_one():
    stream = gradients()["b"]
    apart, _ = emit(critical_gradients(3, synced=False), stream)
    equal(emit(critical_gradients(3, synced=True), stream)[0], apart)
    # And over many they differ, or nothing was shown.
    apart, _ = emit(critical_gradients(3, synced=False), gradients())
    assert not np.allclose(emit(critical_gradients(3), gradients())[0]["b"], apart["b"])


def test_mid_is_half_of_sum():
    stream = gradients()
    total, half = (
        emit(critical_gradients(3, aggr=aggr, kappa=0.8), stream)[0]
        for aggr in ("sum", "mid")
    )
    # The first meets an empty buffer.
    close(at(half, slice(1, None)), jax.tree.map(lambda u: u[1:] / 2, total))


def drops_gradient(update, buffer_mean, fill):
    del update, fill
    return buffer_mean


AGGREGATIONS = ["sum", "mid", "mean", drops_gradient]


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_without_kappa_or_memory_updates_pass_through(aggr):
    stream = gradients()
    updates = jax.jit(
        lambda kappa: emit(critical_gradients(2, aggr=aggr, kappa=kappa), stream)[0]
    )
    equal(updates(0.0), stream)
    equal(at(updates(1.0), 0), at(stream, 0))
    assert not np.allclose(updates(1.0)["b"][1], stream["b"][1])


def test_one_slot_by_hand(x64):
    table = [
        # g    B before  key before, after   sum: g + B/2   mid, mean: half   g - B
        (4.0, None, 2.0, 4.0, 4.0, 4.0),  # nothing to join yet
        (1.0, 4.0, 1.0, 3.0, 1.5, -3.0),  # 1 < 2: refused
        (-3.0, 4.0, 1.5, -1.0, -0.5, -7.0),  # 3 > 1
        (1.5, -3.0, 0.75, 0.0, 0.0, 4.5),  # 1.5 = 1.5: refused
        (0.0, -3.0, 0.375, -1.5, -0.75, 3.0),  # 0 < .75: refused
        (2.0, -3.0, 1.0, 0.5, 0.25, 5.0),  # 2 > .375
        (0.5, 2.0, 0.5, 1.5, 0.75, -1.5),  # .5 < 1: refused
    ]
    grads, _, keys, total, half, difference = zip(*table)

    def subtract(update, buffer_mean, fill):
        return update - 2 * fill * buffer_mean

    wanted = {"sum": total, "mid": half, "mean": half, subtract: difference}
    for aggr, updates in wanted.items():
        tx = critical_gradients(1, decay=0.5, kappa=0.5, aggr=aggr)
        state = tx.init(jnp.zeros(()))
        assert state.buffer.slots.dtype == jnp.float64
        for t, gradient in enumerate(grads):
            update, state = jax.jit(tx.update)(jnp.asarray(gradient), state)
            assert float(update) == updates[t]
            assert state.buffer.keys.tolist() == [[keys[t]]]


def test_the_global_norm_decides_differently_from_the_sum_of_norms():
    # After (1, 1) a step of (1.9, 0): 1.9 < .99 * 2, but 1.9 > .99 * sqrt(2).
    stream = {"a": np.float32([1, 1.9, 0]), "b": np.float32([1, 0, 0])}
    for priority_fn, kept in [(None, (1, 1)), (optax.tree.norm, (np.float32(1.9), 0))]:
        tx = critical_gradients(1, 0.99, priority_fn=priority_fn)
        updates, _ = emit(tx, stream)
        assert (updates["a"][-1], updates["b"][-1]) == kept


def test_a_priority_of_ones_own_sees_one_leaf_where_leaves_are_apart():
    # The least sums are critical: apart, a keeps -2 and b its 0; together, 1 < 2.
    stream = {"a": np.float32([1, -2, 0]), "b": np.float32([0, 4, 0])}
    for synced, kept in [(True, (1, 0)), (False, (-2, 0))]:
        tx = critical_gradients(
            1,
            decay=1.0,
            synced=synced,
            priority_fn=lambda tree: 9 - sum(jax.tree.leaves(tree)),
        )
        updates, _ = emit(tx, stream)
        assert (updates["a"][-1], updates["b"][-1]) == kept


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_priority_that_is_not_finite_refuses_the_step(bad):
    def priority(gradient):
        return jnp.where(gradient == 7, bad, jnp.abs(gradient))

    tx = critical_gradients(2, priority_fn=priority)
    updates, state = emit(tx, np.float32([3, 7, 2, 7, 1]))
    close(updates[jnp.array([0, 2, 4])], [3, 2 + 3, 1 + 2.5])
    equal(state, emit(tx, np.float32([3, 2, 1]))[1])


@pytest.mark.parametrize(
    "bad, options",
    [
        (7e4, {"buffer_dtype": "float16"}),
        (nan, {"priority_fn": lambda gradient: 1.0}),
        (nan, {"priority_fn": lambda gradient: 1.0, "buffer_dtype": "int8"}),
        (-inf, {"priority_fn": lambda gradient: 1.0, "buffer_dtype": "int8"}),
    ],
    ids=["float16 slot", "priority", "nan in int8", "inf in int8"],
)
def test_what_cannot_be_stored_is_refused(bad, options):
    tx = critical_gradients(2, **options)
    updates, state = emit(tx, np.float32([3, bad, 2, bad, 1]))
    assert not np.isfinite(updates[1]) or updates[1] == np.float32(bad + 3)
    equal(state, emit(tx, np.float32([3, 2, 1]))[1])


# PyTorch's semantics, where optax has others


def replay(tx, grads):
    """From 0, along a list of numbers."""
    return run(tx, jnp.zeros(()), np.float32(grads))


def test_the_first_step_is_undamped():
    # b = 1, .5 + .8, .65 + .8;  Nesterov's: 1 + b/2
    damped = {"momentum": 0.5, "dampening": 0.2, "kappa": 0}
    close(replay(sgd_c(0.1, **damped), [1, 1, 1]), [-0.1, -0.23, -0.375])
    nesterov = sgd_c(0.1, nesterov=True, **damped)
    close(replay(nesterov, [1, 1, 1]), [-0.15, -0.315, -0.4875])


def test_nesterov_by_hand():
    # b = 1, 1.5, 1.75;  1 + b/2
    tx = sgd_c(0.1, momentum=0.5, nesterov=True, topc=0)
    close(replay(tx, [1, 1, 1]), [-0.15, -0.325, -0.5125])


def test_amsgrad_takes_the_maximum_of_the_uncorrected_moment():
    # v = .5, .375: the maximum .5 over 1 - b2^2 = .75, not the maximum of 1 and .5.
    tx = adam_c(1.0, b1=0.0, b2=0.5, eps=0.0, amsgrad=True, kappa=0)
    close(replay(tx, [1, 0.5]), [-1, -1 - 0.5 / np.sqrt(0.5 / 0.75)])


def test_centered_variance_is_clamped():
    # That of a constant gradient tends to 0, and rounding takes it below for some.
    constants = np.linspace(0.1, 3, 100, dtype=np.float32)
    stream = np.broadcast_to(constants, (200, 100))
    for alpha in (0.5, 0.9):
        tx = rmsprop_c(1e-3, alpha, centered=True, topc=2)
        assert np.isfinite(run(tx, jnp.zeros(100), stream)).all()


def test_weight_decay_by_hand():
    # From 10 with a gradient of 4: L2 makes it 4 + 10, decoupled stands beside 1.
    close(run(sgd_c(0.1, weight_decay=1.0), 10.0 + jnp.zeros(()), np.ones(1) * 4), 8.6)
    tx = adamw_c(0.1, weight_decay=1.0, eps=0.0)
    close(run(tx, 10.0 + jnp.zeros(()), np.ones(1) * 4), 8.9)


def test_a_mask_spares_what_it_names_not():
    params, stream = {"a": PARAMS["a"], "b": PARAMS["b"]}, gradients(5)
    stream = {"a": stream["a"], "b": stream["b"]}
    masked, decayed, plain = (
        run(adamw_c(0.1, weight_decay=rate, mask=mask), params, stream)
        for rate, mask in [(0.5, {"a": False, "b": True}), (0.5, None), (0.0, None)]
    )
    close(masked, {"a": plain["a"], "b": decayed["b"]})
    assert not np.allclose(plain["a"], decayed["a"])


def test_weight_decay_never_enters_the_buffer():
    decayed, plain = (
        jax.jit(lambda g, tx=tx: train(tx, PARAMS, g)[1])(gradients())
        for tx in (adam_c(0.1, weight_decay=0.1), adam_c(0.1))
    )
    equal(decayed[0].buffer, plain[0].buffer)


# First in, first out


def falling(steps):
    """Ever smaller gradients, that no priority would let in."""
    return np.float32(1000 - np.arange(steps))


def test_surely_first_in_first_out_keeps_the_last_ones():
    stream = falling(12)
    _, state = emit(critical_gradients(3, 1.0, fifo_probability=1.0), stream)
    assert sorted(entries(state.buffer).tolist()) == sorted(stream[9:].tolist())
    assert sorted(state.buffer.ages[0].tolist()) == [1, 2, 3]


def draws(topc, steps, **options):
    """Which steps were first in, first out, seen on a stream where nothing else is."""
    tx = critical_gradients(topc, 1.0, **options)

    def body(state, gradient):
        after = tx.update(gradient, state)[1]
        return after, (after.buffer.accepted - state.buffer.accepted)[0] > 0

    stream = falling(steps)
    taken = jax.jit(lambda g: jax.lax.scan(body, tx.init(g[0]), g)[1])(stream)
    return np.asarray(taken)


def test_first_in_first_out_with_a_probability_follows_its_draws(x64):
    options = {"fifo_probability": 0.4, "seed": 7}
    taken = draws(2, 400, **options)
    assert 0.3 < taken[2:].mean() < 0.5  # 2 sd: .05
    assert (draws(2, 400, **{**options, "seed": 8}) != taken).any()
    stream = jax.tree.map(np.float64, gradients(400))
    updates, _ = emit(critical_gradients(2, **options), stream)
    steps = [at(stream, t) for t in range(400)]
    wanted = oracle.critical_gradients(steps, fifo=taken, topc=2)
    for t, want in enumerate(wanted):
        close(at(updates, t), want, 1e-12, 1e-12)


# Random streams against the oracle

STEPS = 12
quick = functools.partial(
    hypothesis.settings, derandomize=True, deadline=None, database=None
)
# Quarters and powers of two: sums of their squares are exact, and so are ties.
values = st.sampled_from([-2.0, -1.0, -0.75, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0])
sizes = hnp.arrays(np.float64, STEPS, elements=st.sampled_from([0, 0.25, 1, 1, 4]))
# A subnormal κ is a 0 to XLA, where mid and mean jump.
kappas = st.floats(-1, 2).map(lambda kappa: round(kappa, 3))
fractions = st.sampled_from([0.0, 0.5, 0.7, 1.0]) | st.floats(0, 1)


@st.composite
def streams(draw, shapes):
    size = draw(sizes)
    return {
        name: draw(hnp.arrays(np.float64, (STEPS, *shape), elements=values))
        * size.reshape(-1, *[1] * len(shape))
        for name, shape in shapes.items()
    }


TREES = [{"w": (3,)}, {"a": (), "b": (2, 2)}, {"a": (2,), "b": (0, 3)}]
CONFIGURATIONS = {
    "critical only": ("sgd_c", {"topc": 4, "aggr": "mid"}, ()),
    "sgd": ("sgd_c", {"topc": 1}, ("momentum", "dampening")),
    "nesterov": (
        "sgd_c",
        {"topc": 3, "synced": False, "aggr": "mean", "nesterov": True},
        ("momentum",),
    ),
    "rmsprop": ("rmsprop_c", {"topc": 2, "eps": 1e-3}, ("momentum", "alpha")),
    "amsgrad": (
        "adam_c",
        {"topc": 5, "synced": False, "amsgrad": True, "eps": 1e-3},
        ("b1", "b2"),
    ),
    "adamw": ("adamw_c", {"topc": 2, "aggr": "sum", "eps": 1e-3}, ("b1", "b2")),
    "int8": ("sgd_c", {"topc": 2, "buffer_dtype": "int8"}, ("momentum",)),
    "int8 apart": (
        "adam_c",
        {"topc": 3, "buffer_dtype": "int8", "synced": False, "eps": 1e-3},
        ("b1", "b2"),
    ),
}


@functools.cache
def compiled_run(configuration):
    name, options, _ = CONFIGURATIONS[configuration]

    def replay(params, stream, numbers):
        return train(getattr(memoptax, name)(**options, **numbers), params, stream)[0]

    return jax.jit(replay)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_any_stream_as_the_oracle_has_it(configuration, x64):
    name, options, own = CONFIGURATIONS[configuration]
    shapes = TREES[list(CONFIGURATIONS).index(configuration) % len(TREES)]
    numbers = {
        "learning_rate": st.floats(1e-3, 1),
        "decay": fractions,
        "kappa": kappas,
        "weight_decay": st.sampled_from([0.0, 0.1]),
        **{name: st.floats(0, 0.99) for name in own},
    }

    @quick(max_examples=25)
    @hypothesis.given(streams(shapes), st.fixed_dictionaries(numbers))
    def check(stream, numbers):
        params = {name: np.full(shape, 0.5) for name, shape in shapes.items()}
        got = compiled_run(configuration)(params, stream, numbers)
        want = oracle.run(name, params, stream, **options, **numbers)
        close(got, want, 1e-9, 1e-9)

    check()


@functools.cache
def compiled_emit(topc, synced, aggr, dtype):
    def emitted(stream, decay):
        tx = critical_gradients(topc, decay, synced=synced, aggr=aggr)
        return emit(tx, stream)[0]

    return jax.jit(emitted)


@pytest.mark.parametrize(
    "topc, synced, aggr, dtype",
    [
        (1, True, "sum", "float64"),
        (3, False, "mean", "float32"),
        (2, True, "mid", "bfloat16"),
        (4, False, drops_gradient, "float16"),
    ],
)
def test_any_stream_with_holes_as_the_oracle_has_it(topc, synced, aggr, dtype, x64):
    shapes = {"a": (), "b": (3,)}
    spoilt = hnp.arrays(
        np.float64, (STEPS, 2), elements=st.sampled_from([0.0] * 6 + [nan, inf, -inf])
    )

    # Exact in every dtype, and so are ties under these decays.
    @quick(max_examples=25)
    @hypothesis.given(streams(shapes), spoilt, st.sampled_from([0.0, 0.5, 1.0]))
    def check(stream, spoilt, decay):
        stream = {"a": stream["a"] + spoilt[:, 0], "b": stream["b"]}
        stream["b"][:, 1] += spoilt[:, 1]
        got = compiled_emit(topc, synced, aggr, dtype)(
            jax.tree.map(lambda g: jnp.asarray(g, dtype), stream), decay
        )
        steps = [at(stream, t) for t in range(STEPS)]
        options = {"topc": topc, "decay": decay, "synced": synced, "aggr": aggr}
        with np.errstate(invalid="ignore"):
            wanted = list(oracle.critical_gradients(steps, **options))
        eps = float(jnp.finfo(dtype).eps)
        for name in shapes:
            want = np.stack([step[name] for step in wanted])
            np.testing.assert_allclose(np.float64(got[name]), want, eps, 50 * eps)

    check()


# Derivatives


def test_derivatives_are_those_of_finite_differences(x64):
    stream = jax.tree.map(np.float64, gradients(6, {"a": (), "b": (2,)}))

    @jax.jit
    def travelled(stream, kappa):
        updates, _ = emit(critical_gradients(2, kappa=kappa, aggr="mean"), stream)
        return sum(jnp.sum(jnp.sin(u)) for u in jax.tree.leaves(updates))

    jax.test_util.check_grads(travelled, (stream, 0.7), order=1, modes=("rev",))


@pytest.mark.parametrize("synced", [True, False])
def test_derivatives_at_zero_gradients_are_finite(synced):
    def total(stream):
        updates, _ = emit(critical_gradients(2, synced=synced), stream)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    zeros = jax.tree.map(jnp.zeros_like, gradients(4))
    slopes = jax.jit(jax.grad(total))(zeros)
    # The first two stay for good: each adds itself, and to the second mean all of the
    # first; to the third and fourth one half.
    for slope in jax.tree.leaves(slopes):
        per_step = slope.reshape(4, -1)
        np.testing.assert_allclose(per_step[:, 0], [3.0, 2.0, 1.0, 1.0], rtol=1e-6)


# Strong convexity: whatever is kept and however it is joined, small rates converge

RULES = {
    "largest": (None, "sum", None),
    "smallest": (lambda g: 1 / (1e-3 + optax.tree.norm(g)), "mid", None),
    "newest": (lambda g: 1.0, "mean", None),
    "arbitrary": (lambda g: 2 + jnp.sin(1e4 * jnp.sum(g)), "sum", None),
    "oldest leaves": (None, lambda u, mean, fill: 0.2 * u + 1.5 * mean, 0.5),
}


@pytest.mark.parametrize("rule", RULES)
def test_converges_on_strongly_convex_quadratics(rule):
    priority_fn, aggr, fifo = RULES[rule]
    tx = sgd_c(0.02, aggr=aggr, priority_fn=priority_fn, fifo_probability=fifo)
    random = np.random.default_rng(0)
    roots = random.normal(size=(4, 3, 3))
    hessians = np.float32(roots @ np.swapaxes(roots, 1, 2) + 0.5 * np.eye(3))
    minima = np.float32(random.normal(size=(4, 3)))

    def descend(hessian, minimum):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update(hessian @ (x - minimum), state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.full(3, 5.0)
        return jax.lax.scan(body, (x, tx.init(x)), length=2000)[0][0]

    reached = jax.jit(jax.vmap(descend))(hessians, minima)
    np.testing.assert_allclose(reached, minima, atol=1e-3)


# Arguments


def test_amsgrad_and_nesterov_exclude_each_other():
    with pytest.raises(ValueError, match="amsgrad and nesterov"):
        adam_c(0.1, amsgrad=True, nesterov=True)


# Memory

COPIES = [
    # what it keeps beside its slots, in copies of the parameters; its own counts
    (critical_gradients, {}, 0, 0),
    (sgd_c, {}, 0, 0),
    (sgd_c, {"momentum": 0.9}, 1, 0),
    (sgd_c, {"momentum": 0.9, "dampening": 0.5}, 1, 1),
    (rmsprop_c, {}, 1, 0),
    (rmsprop_c, {"momentum": 0.9, "centered": True}, 3, 0),
    (adam_c, {}, 2, 1),
    (adam_c, {"amsgrad": True}, 3, 1),
    (adamw_c, {}, 2, 1),
    (adamw_c, {"amsgrad": True}, 3, 1),
]


def state_bytes(tx, params):
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("factory, options, more, counts", COPIES)
def test_state_is_as_large_as_documented(factory, options, more, counts):
    params = {name: jnp.zeros((50, 7)) for name in "abc"}
    copy, leaves = 3 * 50 * 7 * 4, 3
    required = {} if factory is critical_gradients else {"learning_rate": 0.1}
    for topc, slots in [(1, 1), (5, 6), (20, 21)]:
        for rows, synced in [(1, True), (leaves, False)]:
            # Per row keys and ages, and two counters; with more than one slot the entry
            # in each.
            numbers = rows * (2 * topc + 2 + (slots if slots > 1 else 0)) + counts
            size = (slots + more) * copy + 4 * numbers
            if topc == 20:  # a sum; per leaf norms and a bound; the count of rebuilds
                size += copy + 4 * (leaves * (topc + 1) + 1)
            tx = factory(topc=topc, synced=synced, **required, **options)
            assert state_bytes(tx, params) == size
            drawing = factory(
                topc=topc, synced=synced, fifo_probability=0.1, **required, **options
            )
            assert state_bytes(drawing, params) == state_bytes(tx, params) + 8
    said = int(re.search(r"C \+ (\d) copies", factory.__doc__)[1])
    assert said == 1 + min(m for f, _, m, _ in COPIES if f is factory)


def test_slots_of_half_precision_are_half_as_large():
    params = jnp.zeros((50, 7))
    full, half = (
        state_bytes(critical_gradients(5, buffer_dtype=dtype), params)
        for dtype in (None, "bfloat16")
    )
    assert full - half == 6 * 50 * 7 * 2


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_rounded_slot_has_the_derivative_of_its_gradient(dtype):
    """Subnormal numbers of float16 too."""
    tx = memoptax.critical_gradients(topc=2, buffer_dtype=dtype)
    gradient, zeros = jnp.array([1e-5, 2e-5, 3e-3]), jnp.zeros(3)

    def later(scale):
        _, state = tx.update(scale * gradient, tx.init(zeros), zeros)
        return tx.update(zeros, state, zeros)[0]

    np.testing.assert_allclose(jax.jacobian(later)(1.0), gradient, rtol=1e-2)
