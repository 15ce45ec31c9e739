"""Critical momenta: the authors' trajectories, the oracle, and Adam in the limit."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

import goldens
import oracle
from compiled import CONTEXTS, PARAMS, assert_slots_stay_in_place
from test_buffer import entries

pytestmark = pytest.mark.few(2)

nan, inf = float("nan"), float("inf")
SHAPES = {"a": (), "b": (3,), "c": (2, 2)}


def stream(steps=20, seed=0, shapes=None):
    """Gradients of random scale, leaves (steps, *shape)."""
    random = np.random.default_rng(seed)
    scale = random.lognormal(0, 1, size=steps)
    return {
        name: np.einsum("t,t...->t...", scale, random.normal(size=(steps, *shape)))
        for name, shape in (shapes or SHAPES).items()
    }


def first_of(grads):
    return jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads)


def replay(tx, params, grads, guarded=False):
    """Parameters after every step, and the last state.

    ``guarded`` leaves every number alone whose step is not finite.
    """

    def body(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        if guarded:
            updates = jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), updates)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def run(params, grads):
        params = jax.tree.map(jnp.asarray, params)
        return jax.lax.scan(body, (params, tx.init(params)), grads)

    (_, state), trajectory = run(params, grads)
    return trajectory, state


def assert_same_run(one, other, **tolerance):
    grads = jax.tree.map(jnp.asarray, stream(shapes={"a": (3,)}))
    got, _ = replay(one, first_of(grads), grads)
    want, _ = replay(other, first_of(grads), grads)
    if tolerance:
        chex.assert_trees_all_close(got, want, **tolerance)
    else:
        chex.assert_trees_all_equal(got, want)


# The authors' own trajectories

RECORDED = [
    case for case in goldens.cases("cm") if goldens.ours(case)[0].endswith("_cm")
]


@pytest.mark.parametrize("case, way", goldens.in_every_way(RECORDED))
def test_replays_the_recorded_trajectory(case, way):
    with jax.enable_x64(case.dtype == "float64"):
        name, arguments = goldens.ours(case)
        tx = getattr(memoptax, name)(**arguments, holding=way)
        params, _ = replay(tx, case.params0, case.grads)
        assert goldens.deviation(case, params) < goldens.tolerance(case)


def test_no_recorded_trajectory_is_left_out():
    assert len(RECORDED) == 4
    assert {goldens.ours(case)[0] for case in RECORDED} == {"adam_cm", "adamw_cm"}


@pytest.mark.parametrize("case", RECORDED[:1], ids=repr)
def test_the_first_step_is_what_differs_from_the_released_code(case):
    with jax.enable_x64(case.dtype == "float64"):
        name, arguments = goldens.ours(case)
        tx = getattr(memoptax, name)(**{**arguments, "skip_first": False})
        params, _ = replay(tx, case.params0, case.grads)
        assert goldens.deviation(case, params) > 0.01


# Tables made by hand


def updates_of(tx, gradients):
    """The updates of one float64 number."""
    state, got = tx.init(jnp.zeros(())), []
    for gradient in gradients:
        update, state = tx.update(jnp.asarray(gradient), state, jnp.zeros(()))
        got.append(float(update))
    return got


def test_sgd_by_hand(x64):
    # b1 = .5; keys: 4, decayed to 2.8; 2 < 2.8 is refused; 3 > 1.96 is taken.
    #   g:      4   -2    3     0
    #   m:      2    0    1.5   .75
    #   stored: -    2    2     1.5
    tx = memoptax.sgd_cm(0.1, b1=0.5, topc=1)
    got = updates_of(tx, [4.0, -2.0, 3.0, 0.0])
    np.testing.assert_allclose(got, [-0.2, -0.2, -0.35, -0.225], rtol=1e-14)


def test_adam_by_hand(x64):
    # m = .4, .16, .444; M = .4, .56, .844, for 2 < 2.8 is refused.
    v1 = 0.001 * 0.4**2
    v2 = 0.999 * v1 + 0.001 * 0.56**2
    v3 = 0.999 * v2 + 0.001 * 0.844**2
    want = [
        # v is of M, not of g: the first step is 1 / (1 - b1) times the rate.
        -10.0,
        -(0.56 / 0.19) / np.sqrt(v2 / 0.001999),
        -(0.844 / 0.271) / np.sqrt(v3 / (1 - 0.999**3)),
    ]
    tx = memoptax.adam_cm(1.0, eps=0.0, topc=1)
    np.testing.assert_allclose(updates_of(tx, [4.0, -2.0, 3.0]), want, rtol=1e-12)


def test_the_released_first_step_by_hand(x64):
    # m = 0, -.2, and the bare gradient 4 is what is stored: M = 0, 3.8.
    want = [0.0, -(3.8 / 0.19) / np.sqrt(0.001 * 3.8**2 / 0.001999)]
    tx = memoptax.adam_cm(1.0, topc=1, skip_first=True, eps=1e-300)
    np.testing.assert_allclose(updates_of(tx, [4.0, -2.0]), want, rtol=1e-12)


# The oracle, on streams of ties, zeros and faults

RULES = {
    "adam": ("adam_cm", {"topc": 3}),
    "one slot": ("adam_cm", {"topc": 1, "amsgrad": True, "synced": False}),
    "released": ("adam_cm", {"topc": 2, "skip_first": True, "aggr": "mid"}),
    "decoupled": ("adamw_cm", {"topc": 2, "weight_decay": 0.1, "aggr": "mean"}),
    "bfloat16": ("adamw_cm", {"topc": 5, "buffer_dtype": "bfloat16"}),
    "sgd": ("sgd_cm", {"topc": 2}),
    "sgd unsynced": ("sgd_cm", {"topc": 3, "synced": False, "aggr": "mean"}),
    "fifo": ("sgd_cm", {"topc": 3, "fifo_probability": 1.0}),
    "int8": ("adam_cm", {"topc": 2, "mu_dtype": "int8", "buffer_dtype": "int8"}),
    "int8 slots": ("sgd_cm", {"topc": 3, "buffer_dtype": "int8", "synced": False}),
    "bfloat16 momentum": ("sgd_cm", {"topc": 2, "mu_dtype": "bfloat16"}),
}


@functools.cache
def ruled(rule):
    """A jitted run of one rule; what is a number may still be chosen."""
    name, static = RULES[rule]

    @jax.jit
    def run(params, grads, numbers):
        if name != "sgd_cm":
            numbers = {**numbers, "eps": 1e-3}
        tx = getattr(memoptax, name)(**numbers, **static)
        return replay(tx, params, grads, guarded=True)[0]

    return run


@st.composite
def hard_streams(draw, steps=14):
    """Gradients full of zeros, exact ties, and sometimes numbers that are none."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    scales = draw(
        st.lists(
            st.sampled_from([0, 0.25, 0.5, 1, 1, 2]), min_size=steps, max_size=steps
        )
    )
    tied = draw(st.booleans())
    grads = {}
    for name, shape in SHAPES.items():
        values = random.normal(size=(steps, *shape))
        values = np.sign(values) if tied else values
        grads[name] = np.einsum("t,t...->t...", np.asarray(scales, float), values)
    for bad in draw(st.lists(st.integers(0, steps - 1), max_size=3)):
        leaf = draw(st.sampled_from(list(SHAPES)))
        grads[leaf][bad].flat[0] = draw(st.sampled_from([nan, inf, -inf]))
    return grads


@pytest.mark.parametrize("rule", RULES)
@hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    grads=hard_streams(),
    decay=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    kappa=st.sampled_from([0.0, 0.5, 1.0, -1.0]),
    b1=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_agrees_with_the_oracle(rule, x64, grads, decay, kappa, b1):
    name, static = RULES[rule]
    # A traced κ of 0 emits m as stored, and the oracle's Adam stores none.
    hypothesis.assume(kappa != 0 or "mu_dtype" not in static)
    numbers = {"learning_rate": 0.1, "decay": decay, "kappa": kappa, "b1": b1}
    params = {k: np.ones(shape) for k, shape in SHAPES.items()}
    if kappa == 0:  # a κ of 0 is Adam, which has no rule for faults
        grads = {k: np.nan_to_num(g, posinf=1, neginf=-1) for k, g in grads.items()}
    got = ruled(rule)(params, grads, numbers)

    static = dict(static)
    fifo = [True] * len(grads["a"]) if static.pop("fifo_probability", 0) else None
    eps = {} if name == "sgd_cm" else {"eps": 1e-3}
    with np.errstate(invalid="ignore"):
        want = oracle.run(
            name, params, grads, fifo=fifo, guarded=True, **numbers, **static, **eps
        )
    for leaf in params:
        np.testing.assert_allclose(got[leaf], want[leaf], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("topc", [1, 5])
@pytest.mark.long
def test_half_precision_slots_cost_their_rounding_and_no_more(topc, x64):
    # Who is kept depends on gradients alone, so the same momenta are averaged, each
    # off by at most 2**-8 of itself.
    grads = stream(40)
    params = first_of(grads)
    exact, rounded = (
        memoptax.critical_momenta(topc=topc, buffer_dtype=dtype)
        for dtype in (None, "bfloat16")
    )
    one, other = exact.init(params), rounded.init(params)
    step_exact, step_rounded = jax.jit(exact.update), jax.jit(rounded.update)
    for t in range(40):
        gradient = {k: jnp.asarray(g[t]) for k, g in grads.items()}
        held = {k: entries(one.buffer, 0, i) for i, k in enumerate(sorted(SHAPES))}
        want, one = step_exact(gradient, one)
        got, other = step_rounded(gradient, other)
        for k, values in held.items():
            bound = np.abs(values).mean(0) * 2.0**-8 if len(values) else 0
            assert (np.abs(got[k] - want[k]) <= 1.001 * bound + 1e-12).all()


# One road or another


@pytest.mark.parametrize("without", [{"kappa": 0.0}, {"kappa": 0}, {"topc": 0}])
@pytest.mark.parametrize("skip_first", [False, True])
def test_without_a_buffer_it_is_adam_bit_for_bit(without, skip_first):
    ours = memoptax.adam_cm(0.1, skip_first=skip_first, **without)
    assert_same_run(ours, optax.adam(0.1))
    decoupled = memoptax.adamw_cm(0.1, weight_decay=0.1, **without)
    assert_same_run(decoupled, optax.adamw(0.1, weight_decay=0.1))


def test_without_a_buffer_sgd_is_an_average_of_gradients():
    average = optax.chain(optax.ema(0.8, debias=False), optax.sgd(0.1))
    assert_same_run(memoptax.sgd_cm(0.1, 0.8, topc=0), average)


@pytest.mark.parametrize("skip_first", [False, True])
def test_a_traced_kappa_of_0_is_adam(skip_first, x64):
    # In float32 optax's bias corrections are 2e-5 off, and ours are not.
    traced = optax.inject_hyperparams(memoptax.adam_cm)(
        0.1, kappa=0.0, skip_first=skip_first
    )
    assert_same_run(traced, optax.adam(0.1), rtol=1e-12)


def test_optimizers_are_chains():
    scaled = memoptax.scale_by_adam_cm(0.8, 0.99, topc=2, amsgrad=True)
    rate = optax.scale_by_learning_rate(0.1)
    decayed = optax.chain(scaled, optax.add_decayed_weights(0.3), rate)
    ours = functools.partial(memoptax.adamw_cm, 0.1, 0.8, 0.99, topc=2, amsgrad=True)
    assert_same_run(ours(weight_decay=0.3), decayed)
    assert_same_run(ours(weight_decay=0.0), optax.chain(scaled, rate))
    adam_cm = memoptax.adam_cm(0.1, 0.8, 0.99, topc=2, amsgrad=True)
    assert_same_run(adam_cm, optax.chain(scaled, rate))
    momenta = memoptax.critical_momenta(0.8, topc=2, aggr="mid")
    sgd_cm = memoptax.sgd_cm(0.1, 0.8, topc=2, aggr="mid")
    assert_same_run(sgd_cm, optax.chain(momenta, optax.sgd(0.1)))


def test_decay_is_masked():
    mask = {"a": True, "b": False, "c": True}
    tx = memoptax.adamw_cm(0.1, weight_decay=0.5, mask=mask)
    params = {k: jnp.ones(shape) for k, shape in SHAPES.items()}
    zeros = optax.tree.zeros_like(params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for k, decays in mask.items():
        np.testing.assert_allclose(updates[k], -0.05 * decays, rtol=1e-6)


@pytest.mark.parametrize("make", [memoptax.adam_cm, memoptax.sgd_cm])
def test_over_one_leaf_syncing_is_nothing(make):
    grads = jax.tree.map(jnp.asarray, stream(shapes={"a": (3,)}))
    runs = [
        replay(make(0.1, topc=2, synced=synced), first_of(grads), grads)[0]
        for synced in (True, False)
    ]
    chex.assert_trees_all_equal(*runs)


def test_half_precision_gradients_are_widened_before_they_are_averaged():
    gradient = jnp.full(3, 1.2345, jnp.bfloat16)
    tx = memoptax.scale_by_adam_cm()
    update, state = tx.update(gradient, tx.init(gradient))
    assert update.dtype == jnp.bfloat16
    assert state.mu.dtype == state.nu.dtype == jnp.float32
    np.testing.assert_allclose(state.mu, 0.1 * gradient.astype(jnp.float32), rtol=1e-6)


# Momentum in few bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("off", [{}, {"topc": 0}, {"kappa": 0.0}], ids=str)
def test_a_stored_momentum_stays_close(dtype, off):
    grads = {k: np.float32(g) for k, g in stream(40).items()}
    params = first_of(grads)
    exact, stored = (
        memoptax.critical_momenta(0.8, **off, mu_dtype=mu_dtype)
        for mu_dtype in (None, dtype)
    )
    one, other = exact.init(params), stored.init(params)
    step_exact, step_stored = jax.jit(exact.update), jax.jit(stored.update)
    # An average of ten roundings; in int8 relative to the largest of its row.
    eps = 1 / 127 if dtype == "int8" else float(jnp.finfo(dtype).eps)
    largest = max(np.abs(g).max() for g in grads.values())
    for t in range(40):
        gradient = {k: jnp.asarray(g[t]) for k, g in grads.items()}
        want, one = step_exact(gradient, one)
        got, other = step_stored(gradient, other)
        for k in want:
            assert np.abs(got[k] - want[k]).max() <= 10 * eps * largest
    if dtype == "float32" and not off:
        chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("off", [{"topc": 0}, {"kappa": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_without_a_buffer_adams_momentum_is_stored_as_asked(off, dtype):
    grads = {k: np.float32(g) for k, g in stream(30).items()}
    ours = memoptax.adam_cm(0.1, mu_dtype=dtype, **off)
    want, _ = replay(optax.adam(0.1), first_of(grads), grads)
    got, state = replay(ours, first_of(grads), grads)
    for k in got:
        np.testing.assert_allclose(got[k], want[k], atol=0.05)
    assert not np.array_equal(got["b"], want["b"])
    sizes = {x.dtype.itemsize for x in jax.tree.leaves(state[0].moment)}
    assert sizes == {jnp.dtype(dtype).itemsize}


def test_a_momentum_beyond_its_dtype_stops_at_its_end():
    tx = memoptax.critical_momenta(0.0, topc=2, mu_dtype="float16")
    update, state = tx.update(jnp.array([1e6, -3e5, 1.0]), tx.init(jnp.zeros(3)))
    np.testing.assert_array_equal(update, [65504, -65504, 1])
    assert np.isfinite(state.mu).all()


def test_an_empty_row_has_a_scale_in_int8():
    tx = memoptax.critical_momenta(mu_dtype="int8", topc=2)
    params = {"empty": jnp.zeros((3, 0)), "w": jnp.ones((4, 4)), "none": jnp.zeros(0)}
    before = tx.init(params)
    _, after = tx.update(params, before)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.long
def test_no_step_copies_what_is_in_int8(name, mesh):
    params = {k: jnp.zeros(shape) for k, shape in PARAMS["many"].items()}
    tx = memoptax.adam_cm(0.1, mu_dtype="int8", buffer_dtype="int8")
    assert_slots_stay_in_place(name, tx, params, mesh)


# Steps that are not finite

TRANSFORMS = {
    "momenta": memoptax.critical_momenta(topc=2),
    "adam": memoptax.scale_by_adam_cm(topc=2, amsgrad=True),
    "unsynced": memoptax.scale_by_adam_cm(topc=2, synced=False),
    "released": memoptax.scale_by_adam_cm(topc=2, skip_first=True),
    "fifo": memoptax.scale_by_adam_cm(topc=2, fifo_probability=0.5),
    "int8": memoptax.scale_by_adam_cm(topc=2, buffer_dtype="int8", mu_dtype="int8"),
}


@functools.cache
def jitted(name):
    return jax.jit(TRANSFORMS[name].update)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize("bad", [nan, -inf])
def test_a_step_that_is_not_finite_changes_nothing(name, steps, bad):
    update = jitted(name)
    grads = jax.tree.map(jnp.asarray, stream(steps + 1))
    state = TRANSFORMS[name].init(first_of(grads))
    for t in range(steps):
        _, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state)
    gradient = jax.tree.map(lambda g: g[steps], grads)
    spoiled = {**gradient, "b": gradient["b"].at[1].set(bad)}
    updates, after = update(spoiled, state)
    assert all(np.isnan(u).all() for u in updates.values())
    assert_same_state(after, state)


def assert_same_state(one, other):
    """Equal in all but the spare slots, which may hold anything finite."""
    buffers = [state.buffer for state in (one, other)]
    for leaf in range(len(SHAPES)):
        row = leaf if buffers[0].keys.shape[0] > 1 else 0
        held, wanted = (entries(buffer, row, leaf) for buffer in buffers)
        np.testing.assert_array_equal(held, wanted)
    chex.assert_trees_all_equal(
        *(
            state._replace(buffer=state.buffer._replace(slots=None, scales=None))
            for state in (one, other)
        )
    )


@pytest.mark.parametrize("make", [memoptax.adam_cm, memoptax.sgd_cm])
def test_a_guarded_run_forgets_a_faulty_step(make):
    grads = {k: np.float32(g) for k, g in stream(12).items()}
    spoiled = {k: np.insert(g, 5, g[3], axis=0) for k, g in grads.items()}
    spoiled["c"][5, 0, 1] = nan
    tx = optax.apply_if_finite(make(0.1, topc=2), 3)
    params = first_of(grads)
    want, state = replay(tx, params, grads)
    got, after = replay(tx, params, spoiled)
    assert int(after.total_notfinite) == 1
    got = jax.tree.map(lambda p: np.delete(np.asarray(p), 5, axis=0), got)
    chex.assert_trees_all_equal(got, jax.tree.map(np.asarray, want))
    assert_same_state(after.inner_state[0], state.inner_state[0])


# The compiled program: C never shows


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("topc", [1, 5, 40])
def test_no_step_copies_the_buffer(topc, name, mesh):
    params = {k: jnp.zeros(shape) for k, shape in PARAMS["one"].items()}
    tx = memoptax.adam_cm(0.1, topc=topc)
    assert_slots_stay_in_place(name, tx, params, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(memoptax.adamw_cm, amsgrad=True),
        memoptax.sgd_cm,
    ],
)
@pytest.mark.long
def test_nor_does_any_variant_with_many_leaves(make, mesh):
    params = {k: jnp.zeros(shape) for k, shape in PARAMS["many"].items()}
    tx = make(0.1, topc=5)
    assert_slots_stay_in_place("plain", tx, params, mesh)


@pytest.mark.parametrize("off", [{"kappa": 0.0}, {"topc": 0}], ids=str)
@pytest.mark.parametrize("make", [memoptax.adam_cm, memoptax.sgd_cm])
def test_switched_off_it_keeps_its_state_in_float32(make, off):
    tx, params = make(0.1, **off), jnp.ones(3, jnp.bfloat16)
    state = tx.init(params)
    updates, after = tx.update(jnp.ones(3, jnp.float32), state, params)
    assert updates.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    floats = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


# Bad arguments


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"learning_rate": -1.0}, "learning_rate must lie .* is -1.0"),
        ({"b1": 1.0}, "b1 must lie .* is 1.0"),
        ({"b2": -0.1}, "b2 must lie .* is -0.1"),
        ({"eps": -1e-8}, "eps must lie .* is -1e-08"),
        ({"eps_root": nan}, "eps_root must lie .* is nan"),
        ({"b1": lambda count: 0.9}, "b1 must be a number, .* function"),
        ({"topc": -1}, "topc must be an integer .* is -1"),
        ({"topc": 2.5}, "topc must be an integer .* is 2.5"),
        ({"decay": 1.5}, "decay must lie .* is 1.5"),
        ({"kappa": inf}, "kappa must lie .* is inf"),
        ({"aggr": "median"}, "aggr must be one of .* is 'median'"),
        ({"synced": None}, "synced must be True or False, but is None"),
        ({"priority_fn": 2}, "priority_fn must be a function, but is 2"),
        ({"buffer_dtype": "int4"}, "buffer_dtype must be one of .* is 'int4'"),
        ({"mu_dtype": "int4"}, "mu_dtype must be one of .* is 'int4'"),
        ({"fifo_probability": 2}, "fifo_probability must lie .* is 2"),
        ({"weight_decay": -0.1}, "weight_decay must lie .* is -0.1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        memoptax.adamw_cm(**{"learning_rate": 0.1, **arguments})


def test_a_traced_capacity_and_whole_numbers_are_refused():
    tx = optax.inject_hyperparams(memoptax.adam_cm)(0.1, topc=3)
    with pytest.raises(ValueError, match="topc .* is traced .* static_args"):
        tx.init(jnp.zeros(3))
    with pytest.raises(ValueError, match="parameter .*'n'.* has dtype int32"):
        memoptax.sgd_cm(0.1).init({"n": jnp.zeros(3, jnp.int32)})
