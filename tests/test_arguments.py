"""Every argument of every optimizer and building block, good and bad."""

import decimal
import enum
import fractions
import inspect
import itertools
import pathlib
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from arguments import ANY_SIZE, ARGUMENTS, BUFFERED, FACTORIES, arguments_of, build
from untyped import untyped

each_factory = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)


def refuse(factory, name, value, **options):
    with pytest.raises(ValueError) as error:
        build(factory, **{**options, name: value})
    sentence = str(error.value)
    assert sentence.startswith(f"{name} must "), (name, value, sentence)
    assert repr(value) in sentence, (name, value, sentence)


@each_factory
def test_bad_values_are_refused_by_name(factory):
    for name, _, bad in arguments_of(factory):
        for value in bad:
            refuse(factory, name, value)


@pytest.mark.parametrize("factory", BUFFERED, ids=lambda f: f.__name__)
def test_bad_values_are_refused_where_nothing_uses_them(factory):
    """Without a buffer, and without momentum, which is the default."""
    for name, _, bad in arguments_of(factory):
        for value in bad:
            for nothing in {"topc", "kappa"} - {name}:
                refuse(factory, name, value, **{nothing: 0})


@each_factory
def test_good_values_are_taken(factory):
    for name, good, _ in arguments_of(factory):
        for value in good:
            tx = build(factory, **{name: value})
            jax.eval_shape(tx.init, {"w": jnp.zeros((2, 2))})


class Model(eqx.Module):
    w: Any

    def __call__(self, x, key):
        return self.w @ x


@pytest.mark.parametrize(
    "factory",
    [f for f in FACTORIES if "mask" in inspect.signature(f).parameters],
    ids=lambda f: f.__name__,
)
def test_a_mask_may_be_a_tree_that_can_be_called(factory):
    params = Model(jnp.ones((2, 2)))
    tx = factory(0.1, weight_decay=0.1, mask=Model(w=True))
    update, _ = tx.update(Model(jnp.zeros((2, 2))), tx.init(params), params)
    assert jnp.all(update.w < 0)


@each_factory
def test_tracers_are_taken(factory):
    """Their values are unknown while tracing, so none is refused."""
    for name, good, _ in arguments_of(factory):
        if any(isinstance(value, float) for value in good):

            def init(value, name=name):
                return build(factory, **{name: value}).init({"w": jnp.zeros((2, 2))})

            jax.eval_shape(init, -5.0)
            with pytest.raises(ValueError, match=f"{name} must .*2"):
                jax.eval_shape(init, jnp.zeros(2))


@each_factory
def test_numpy_numbers_are_pythons(factory):
    """They decide what a state holds, as Python's own do."""
    params = {"w": jnp.zeros((2, 2))}
    for name, good, _ in arguments_of(factory):
        for value in good:
            if type(value) is not float:
                continue
            for number in (0.0, value):
                if name == "beta" and number == 0:
                    continue
                want, *others = (
                    jax.eval_shape(build(factory, **{name: kind(number)}).init, params)
                    for kind in (float, np.float32, np.array)
                )
                assert all(found == want for found in others), name


@each_factory
def test_integers_may_be_large(factory):
    """JAX without x64 takes none of more than 32 bits."""
    params = {"w": jnp.ones((2, 2))}
    for name in ANY_SIZE.intersection(inspect.signature(factory).parameters):
        for large in (2**40, np.int64(2**40)):
            tx = build(factory, **{name: large})
            state = jax.eval_shape(tx.init, params)
            jax.eval_shape(tx.update, params, state, params)


def test_a_momentum_of_zero_is_none():
    params = {"w": jnp.zeros((2, 2))}
    for zero in (0, 0.0, np.float32(0), np.array(0.0), None):
        state = untyped(memoptax.scale_by_sm3(zero).init(params))
        assert state.momentum is None
    # A number that is a tracer under jit must give the same state outside of it.
    state = untyped(memoptax.scale_by_sm3(jnp.array(0.0)).init(params))
    assert state.momentum is not None


SEEDS = [
    0,
    1,
    -1,
    2**31,
    2**32 - 1,
    2**32,
    2**32 + 1,
    2**40,
    2**40 + 1,
    2**62,
    -(2**62),
]


@pytest.mark.parametrize("x64_too", [False, True])
def test_all_bits_of_a_seed_count(x64_too):
    """JAX alone uses the last 32 without x64, and makes other draws with x64."""
    found = []
    for seed in SEEDS:
        for enabled in (False, True) if x64_too else (False,):
            with jax.enable_x64(enabled):
                tx = memoptax.critical_gradients(fifo_probability=0.5, seed=seed)
                draws = untyped(tx.init(jnp.ones(2, jnp.float32))).buffer.draws
            found.append(tuple(np.asarray(draws).tolist()))
    assert len(set(found)) == len(SEEDS)


def test_a_small_seed_is_jaxs():
    for seed in untyped((0, 3, np.int64(3), 2**32 - 1, jnp.array(3))):
        tx = memoptax.critical_gradients(fifo_probability=0.5, seed=seed)
        want = jax.random.key_data(jax.random.key(seed))
        draws = untyped(tx.init(jnp.ones(2))).buffer.draws
        np.testing.assert_array_equal(draws, want)


# The results of a user's functions


@pytest.mark.parametrize("factory", BUFFERED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "returned",
    ["x", None, [1.0], True, {}, 1j, np.ones(1), jnp.ones(1), jnp.array(1j)],
    ids=repr,
)
def test_a_priority_must_be_a_scalar(factory, returned):
    tx, params = build(factory, priority_fn=lambda g: returned), {"w": jnp.ones(2)}
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="priority_fn must return a real scalar, but"):
        jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("priority", [1, 0.5, np.float32(2), np.array(2), jnp.array(1)])
def test_a_priority_may_be_any_real_scalar(priority):
    tx = untyped(memoptax.critical_gradients(priority_fn=lambda g: priority))
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    assert float(jnp.max(state.buffer.keys)) == pytest.approx(0.7 * float(priority))


@pytest.mark.parametrize("factory", BUFFERED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "aggr",
    [
        *(lambda u, b, n: u[0], lambda u, b, n: None, lambda u, b, n: "x"),
        *(lambda u, b, n: u + 1j, lambda u, b, n: u > 0),
    ],
    ids=["shape", "None", "string", "complex", "bool"],
)
def test_an_aggregate_must_be_real_and_have_the_shape_of_its_update(factory, aggr):
    tx, params = build(factory, aggr=aggr), {"w": jnp.ones(2)}
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="aggr must return a real array of shape"):
        jax.eval_shape(tx.update, params, state, params)


# The page for users of PyTorch and optax


def test_the_page_for_newcomers_names_arguments_that_exist():
    page = pathlib.Path(__file__).parent.parent / "docs" / "coming_from.md"
    table = page.read_text().split("| argument of theirs |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines()[2:]]
    theirs = {name for row in rows for name in re.findall(r"`(\w+)", row[0])}
    ours = {name for row in rows for name in re.findall(r"`(\w+)", row[1])}
    assert {"lr", "betas", "topC", "critical_test"} <= theirs
    assert ours - set(ARGUMENTS) == {"adamw_c", "adamw_cm"}
    for name in ("lr", "betas", "topC", "critical_test"):
        assert not any(name in inspect.signature(f).parameters for f in FACTORIES)


TWINS = {
    memoptax.sgd_c: optax.sgd,
    memoptax.adam_c: optax.adam,
    memoptax.adamw_c: optax.adamw,
    memoptax.adam_cm: optax.adam,
    memoptax.adamw_cm: optax.adamw,
}


@pytest.mark.parametrize("factory", TWINS, ids=lambda f: f.__name__)
def test_positions_are_those_of_the_twin_in_optax(factory):
    ours, theirs = (
        [name for name, p in inspect.signature(f).parameters.items() if p.kind == 1]
        for f in (factory, TWINS[factory])
    )
    assert ours == theirs


# Parameters


def leaf_signature(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, bool(x.weak_type)), tree)


@each_factory
@pytest.mark.few(3)
def test_numbers_do_not_widen_updates(factory):
    """For every kind of number: NumPy's and JAX's are not weakly typed."""
    half = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    for name, good, _ in arguments_of(factory):
        for value in good:
            if isinstance(value, (np.generic, np.ndarray, jax.Array)):
                tx = build(factory, **{name: value})
                state = jax.eval_shape(tx.init, half)
                updates, after = jax.eval_shape(tx.update, half, state, half)
                assert updates["w"].dtype == jnp.bfloat16, (name, value)
                assert leaf_signature(after) == leaf_signature(state), (name, value)


@each_factory
@pytest.mark.few(3)
def test_a_rate_without_a_negative_goes_down(factory):
    if "learning_rate" not in inspect.signature(factory).parameters:
        return
    params = {"w": jnp.ones((2, 2))}
    found = []
    for one in (1, jnp.uint8(1), lambda count: jnp.uint8(1)):
        tx = factory(one)
        # The first step of CM does nothing.
        _, state = tx.update(params, tx.init(params), params)
        updates, _ = tx.update(params, state, params)
        found.append(updates["w"])
    assert jnp.all(found[0] < 0)
    np.testing.assert_array_equal(found, [found[0]] * 3)


@each_factory
def test_a_schedule_returns_real_numbers(factory):
    params = {"w": jnp.ones((2, 2))}
    odd = [0.1j, jnp.complex64(0.1), decimal.Decimal("0.1"), fractions.Fraction(1, 10)]
    for name, returned in itertools.product(("learning_rate", "weight_decay"), odd):
        if name in inspect.signature(factory).parameters:
            tx = build(factory, **{name: lambda count, returned=returned: returned})
            state = jax.eval_shape(tx.init, params)
            with pytest.raises(ValueError, match=f"{name} must return a real number"):
                jax.eval_shape(tx.update, params, state, params)


@each_factory
@pytest.mark.few(3)
def test_a_narrow_kappa_does_not_overflow(factory):
    if "kappa" not in inspect.signature(factory).parameters:
        return
    params = {"w": jnp.ones((2, 2))}
    want, *found = (
        tx.update(params, tx.init(params), params)
        for tx in (
            build(factory, kappa=kind(100)) for kind in (float, jnp.int8, jnp.uint8)
        )
    )
    for each in found:
        jax.tree.map(np.testing.assert_array_equal, each, want)


NOTHING = [{}, {"topc": 0}, {"kappa": 0}]


def variants(factory):
    """Without options, and without a buffer."""
    for options in NOTHING if factory in BUFFERED else NOTHING[:1]:
        yield build(factory, **options)


@each_factory
@pytest.mark.few(3)
def test_parameters_may_be_numbers(factory):
    """Python's and NumPy's, as in optax. float64 without x64 gives no warning."""
    array = {"w": jnp.float32(1), "v": jnp.ones(3)}
    for params in (
        {"w": 1.0, "v": np.ones(3)},
        {"w": np.float64(1), "v": np.ones(3, np.float64)},
        {"w": np.array(1.0), "v": np.ones(3, np.float32)},
    ):
        for tx in variants(factory):
            state, want = tx.init(params), tx.init(array)
            if jax.tree.leaves(want):
                assert leaf_signature(state) == leaf_signature(want)
            updates, state = tx.update(params, state, params)
            expected, want = tx.update(array, want, array)
            for found, wanted in ((updates, expected), (state, want)):
                jax.tree.map(np.testing.assert_array_equal, found, wanted)
            optax.apply_updates(params, updates)
            of_numbers, of_arrays = (
                (
                    str(memoptax.memory_report(tx, p)),
                    memoptax.state_partition_specs(tx, p, jax.P()),
                )
                for p in (params, array)
            )
            assert of_numbers == of_arrays


@each_factory
@pytest.mark.parametrize(
    "leaf",
    [jax.nn.relu, "x", 1, True, 1j, jax.random.key(0), np.array("x"), np.arange(3)],
    ids=lambda leaf: type(leaf).__name__,
)
def test_the_path_of_what_is_no_parameter_is_named(factory, leaf):
    tx, good = build(factory), {"layers": [jnp.ones(2), jnp.ones(2)]}
    bad = {"layers": [jnp.ones(2), leaf]}
    problem = r"\['layers'\]\[1\] (has|must be an array)"
    with pytest.raises(ValueError, match=f"parameter {problem}"):
        tx.init(bad)
    with pytest.raises(ValueError, match=f"gradient {problem}"):
        tx.update(bad, tx.init(good), good)


@each_factory
def test_extra_arguments_are_ignored(factory):
    params = {"w": jnp.ones((2, 2))}
    for tx in variants(factory):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(
            lambda g, s, p, tx=tx: tx.update(g, s, p, loss=1), params, state, params
        )


DECAYING = [memoptax.adamw_c, memoptax.adamw_cm, memoptax.sm3, memoptax.sgd_c]


@pytest.mark.parametrize("factory", DECAYING, ids=lambda f: f.__name__)
def test_a_weight_decay_may_be_a_schedule(factory):
    """It is evaluated at the count of earlier steps, as in optax."""
    params = {"w": jnp.full((2, 2), 3.0)}
    scheduled = build(factory, weight_decay=lambda count: 0.5 * (count == 1))
    plain = [build(factory, weight_decay=rate) for rate in (0.0, 0.5, 0.0)]
    state = scheduled.init(params)
    states = [tx.init(params) for tx in plain]
    for step, tx in enumerate(plain):
        updates, state = scheduled.update(params, state, params)
        wanted, states[step] = tx.update(params, states[step], params)
        if step < 2:  # the memory of the third step has another decay in it
            np.testing.assert_allclose(updates["w"], wanted["w"], rtol=1e-6)
        for other in range(step + 1, 3):
            _, states[other] = plain[0].update(params, states[other], params)


@pytest.mark.parametrize("factory", [memoptax.adam_c, memoptax.adamw_c])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_moment_in_few_bytes_is_the_moment(factory, amsgrad, dtype):
    params = {"w": jnp.linspace(0.5, 1.0, 6).reshape(2, 3)}
    few, full = (
        factory(0.1, mu_dtype=mu_dtype, amsgrad=amsgrad) for mu_dtype in (dtype, None)
    )
    state, wide = few.init(params), full.init(params)
    for _ in range(5):
        updates, state = few.update(params, state, params)
        wanted, wide = full.update(params, wide, params)
        np.testing.assert_allclose(updates["w"], wanted["w"], rtol=2e-2)
    (moment,) = jax.tree.leaves(optax.tree.get(state, "moment"))
    assert moment.dtype == dtype


def test_numbers_of_subclasses_are_pythons_own():
    class Rate(float):
        pass

    class Size(enum.IntEnum):
        five = 5

    state = memoptax.adam_c(Rate(0.1), topc=Size.five).init(jnp.zeros(2))
    assert memoptax.buffer_stats(state)["fill"] == 0


@pytest.mark.parametrize("value", [np.ma.masked, np.timedelta64(3, "s")], ids=str)
def test_what_numpy_counts_as_a_number_but_is_none_is_refused(value):
    with pytest.raises(ValueError, match="learning_rate must be"):
        memoptax.adam_c(value)
    with pytest.raises(ValueError, match="topc must be"):
        memoptax.adam_c(0.1, topc=value)
