"""What every public optimizer promises, whatever it computes.

A new one joins with a line in ``OPTIMIZERS``. Those named like their factory stand for
it where a property does not depend on options.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from compiled import step_of, train


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Optimizer:
    """A line of the table: a factory, its options, and what is special about it."""

    name: str
    factory: Callable
    options: dict = dataclasses.field(default_factory=dict)
    rate: float = 0.01  # descends the test problems
    needs_params: bool = False
    memory: str | None = "buffer"  # field that no bad gradient ever enters

    def __repr__(self):
        return self.name

    def accepts(self, argument):
        return argument in inspect.signature(self.factory).parameters

    @property
    def rated(self):
        return self.accepts("learning_rate")

    @property
    def squares(self):
        """Whether it squares what it is given, and so refuses what overflows then."""
        momenta = (memoptax.scale_by_adam_cm, memoptax.adam_cm, memoptax.adamw_cm)
        return self.factory in momenta or self.memory == "accumulators"

    def build(self, wrap=lambda factory: factory, **options):
        options = {**self.options, **options}
        if self.rated:
            options.setdefault("learning_rate", self.rate)
        return wrap(self.factory)(**options)

    def descends(self):
        """With a learning rate, if it has none of its own."""
        tx = self.build()
        if self.rated:
            return tx
        return optax.chain(tx, optax.scale_by_learning_rate(self.rate))


def matrices(params):
    """A mask: weight decay for whatever has two axes or more."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


CG, SGD, RMS = memoptax.critical_gradients, memoptax.sgd_c, memoptax.rmsprop_c
ADAM, ADAMW = memoptax.adam_c, memoptax.adamw_c
NESTEROV = {"momentum": 0.9, "dampening": 0.1, "nesterov": True}
CENTERED = {"centered": True, "momentum": 0.5, "alpha": 0.9}
FIFO = {"topc": 2, "fifo_probability": 0.5, "seed": 3}
BF16 = {"topc": 2, "buffer_dtype": "bfloat16"}

OPTIMIZERS = [
    Optimizer("critical_gradients", CG),
    Optimizer("sgd_c", SGD),
    Optimizer("rmsprop_c", RMS),
    Optimizer("adam_c", ADAM),
    Optimizer("adamw_c", ADAMW, needs_params=True),
    Optimizer("critical_momenta", memoptax.critical_momenta),
    Optimizer("scale_by_adam_cm", memoptax.scale_by_adam_cm),
    Optimizer("sgd_cm", memoptax.sgd_cm),
    Optimizer("adam_cm", memoptax.adam_cm),
    Optimizer("adamw_cm", memoptax.adamw_cm, needs_params=True),
    Optimizer("scale_by_sm3_cm", memoptax.scale_by_sm3_cm),
    Optimizer("sm3_cm", memoptax.sm3_cm),
    Optimizer("scale_by_sm3", memoptax.scale_by_sm3, rate=0.1, memory="accumulators"),
    Optimizer("sm3", memoptax.sm3, rate=0.1, memory="accumulators"),
    Optimizer(
        "sm3 momentum",
        memoptax.sm3,
        {"momentum": 0.9, "momentum_dtype": "int8", "beta": 0.95, "variant": "I"},
        rate=0.1,
        memory="accumulators",
    ),
    Optimizer(
        "sm3_cm int8",
        memoptax.sm3_cm,
        {"topc": 1, "mu_dtype": "int8", "buffer_dtype": "int8"},
        memory="accumulators",
    ),
    Optimizer("unsynced", CG, {"topc": 2, "synced": False, "aggr": "mid"}),
    Optimizer("fifo", CG, FIFO),
    Optimizer("bf16 slots", CG, BF16),
    Optimizer("int8 slots", CG, {"topc": 2, "buffer_dtype": "int8"}),
    Optimizer("summed", CG, {"topc": 2, "holding": "sum"}),
    Optimizer("one slot", CG, {"topc": 1}),
    Optimizer("sgd_c momentum", SGD, {"momentum": 0.9}, rate=0.002),
    Optimizer("sgd_c nesterov", SGD, {**NESTEROV, "topc": 1}, rate=0.002),
    Optimizer("rmsprop_c centered", RMS, CENTERED, rate=0.001),
    Optimizer(
        "adam_cm released",
        memoptax.adam_cm,
        {"skip_first": True, "amsgrad": True, "synced": False, **BF16},
    ),
    Optimizer(
        "adam_cm int8",
        memoptax.adam_cm,
        {"topc": 2, "mu_dtype": "int8", "buffer_dtype": "int8", "synced": False},
    ),
    Optimizer(
        "adam_c amsgrad", ADAM, {"amsgrad": True, "synced": False, "mu_dtype": "int8"}
    ),
    Optimizer("adam_c L2", ADAM, {"weight_decay": 1e-3, **FIFO}, needs_params=True),
    Optimizer("adamw_c mask", ADAMW, {"mask": matrices, **BF16}, needs_params=True),
]

each_optimizer = pytest.mark.parametrize("opt", OPTIMIZERS, ids=repr)
each_factory = pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.name == opt.factory.__name__], ids=repr
)
# The buffer's own options are tried where nothing else costs time.
each_block = pytest.mark.parametrize(
    "opt",
    [opt for opt in OPTIMIZERS if opt.name == opt.factory.__name__ or not opt.rated],
    ids=repr,
)
each_capacity = pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.accepts("topc")], ids=repr
)
each_memory = pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.memory], ids=repr
)

STEPS = 8
SHAPES = {"scalar": (), "vector": (3,), "rank 4": (2, 1, 2, 1)}


def params_like(shapes, dtype=jnp.float32):
    return {name: jnp.full(shape, 0.5, dtype) for name, shape in shapes.items()}


def gradients(seed=0, shapes=SHAPES, steps=STEPS):
    """A stream of gradients of very different sizes, the fourth of them zero."""
    random = np.random.default_rng(seed)
    size = np.exp2(random.uniform(-3, 3, steps))
    size[3:4] = 0
    return {
        name: np.float32(random.normal(size=(steps, *shape)))
        * np.float32(size).reshape(-1, *[1] * len(shape))
        for name, shape in shapes.items()
    }


def trained(tx, params=None, stream=None):
    params = params_like(SHAPES) if params is None else params
    stream = gradients() if stream is None else stream
    return jax.jit(functools.partial(train, tx))(params, stream)


def at(stream, t):
    return jax.tree.map(lambda g: g[t], stream)


def steps_of(stream):
    return [at(stream, t) for t in range(len(jax.tree.leaves(stream)[0]))]


class Donating:
    """A jitted step that donates, and counts how often it was traced."""

    def __init__(self, tx):
        self.traces = 0

        def step(params, state, gradient):
            self.traces += 1
            return step_of(tx)(params, state, gradient)

        self.tx, self.step = tx, jax.jit(step, donate_argnums=(0, 1))

    def run(self, stream, also=lambda old, new: None):
        """Final parameters and state of a Python loop."""
        carry = params_like(SHAPES), self.tx.init(params_like(SHAPES))
        for gradient in stream:
            old, carry = carry, self.step(*carry, gradient)
            also(old, carry)
        return carry


@functools.cache
def donating(opt):
    return Donating(opt.build())


@functools.cache
def expected(opt, seed=0):
    """What all ways of running the optimizer should give: that of a Python loop."""
    trajectory = []
    _, state = donating(opt).run(
        steps_of(gradients(seed)),
        lambda old, new: trajectory.append(jax.device_get(new[0])),
    )
    return jax.tree.map(lambda *p: np.stack(p), *trajectory), state


def close(got, want, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol
        ),
        got,
        want,
    )


def signature(tree):
    """All that a compiled step or a scan may object to."""

    def leaf(x):
        return x.shape, str(x.dtype), x.weak_type

    return jax.tree.map(leaf, jax.eval_shape(lambda: tree))


# JAX's own transformations


@each_optimizer
def test_a_donating_loop_compiles_once_and_copies_nothing(opt):
    def dead_and_alike(old, new):
        assert all(x.is_deleted() for x in jax.tree.leaves(old) if x.size)
        assert signature(new) == born

    runner, params = donating(opt), params_like(SHAPES)
    born = signature((params, runner.tx.init(params)))
    runner.run(steps_of(gradients()), dead_and_alike)
    assert runner.traces == 1


@each_factory
def test_a_scan_equals_a_loop(opt):
    close(trained(opt.build()), expected(opt))


@each_block
def test_vmap_over_seeds_equals_runs_apart(opt):
    both = jax.tree.map(lambda *g: jnp.stack(g), gradients(0), gradients(1))
    run = functools.partial(train, opt.build())
    batched = jax.jit(jax.vmap(run, (None, 0)))(params_like(SHAPES), both)
    for seed in (0, 1):
        close(at(batched, seed), expected(opt, seed))


@each_optimizer
def test_init_needs_shapes_only(opt):
    tx, params = opt.build(), params_like(SHAPES)
    shapes = jax.eval_shape(lambda: params)
    state = tx.init(params)
    assert signature(tx.init(shapes)) == signature(state)
    assert signature(jax.eval_shape(tx.init, shapes)) == signature(state)


@each_factory
def test_gradients_flow_through_a_run(opt):
    shapes = {"vector": (3,)}

    def travel(stream):
        trajectory, _ = train(opt.build(), params_like(shapes), stream)
        return jnp.sum(jnp.sin(trajectory["vector"][-1]))

    stream = gradients(shapes=shapes, steps=3)
    slopes = jax.jit(jax.grad(travel))(stream)
    assert np.isfinite(slopes["vector"]).all()
    assert np.all(slopes["vector"] != 0)


@each_factory
def test_a_mesh_changes_nothing(opt, mesh):
    shapes = {"matrix": (8, 4), "vector": (4,)}
    specs = {"matrix": jax.P("data", "model"), "vector": jax.P("model")}
    params, stream = params_like(shapes), gradients(shapes=shapes)
    alone = trained(opt.build(), params, stream)
    sharded = {
        k: jax.device_put(p, jax.NamedSharding(mesh, specs[k]))
        for k, p in params.items()
    }
    stream = {
        k: jax.device_put(g, jax.NamedSharding(mesh, jax.P(None, *specs[k])))
        for k, g in stream.items()
    }
    together = trained(opt.build(), sharded, stream)
    close(jax.device_get(together), alone)


# Dtypes

HALVES = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")]
DOUBLES = [("float16", "float64"), ("float64", "float32"), ("float32", "float64")]


@each_optimizer
@pytest.mark.parametrize("of_params, of_gradients", HALVES + DOUBLES)
def test_dtypes_are_stable_for_ever(opt, of_params, of_gradients, x64):
    params = params_like(SHAPES, of_params)
    gradient = params_like(SHAPES, of_gradients)
    tx = opt.build()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradient, state, params)
    # A step maps these types to themselves, so all later ones do too.
    assert signature(after) == signature(state)
    assert signature(updates) == signature(gradient)
    small = {"bfloat16", "float16"} - {opt.options.get("buffer_dtype")}
    if of_params not in small:
        assert not small & {str(x.dtype) for x in jax.tree.leaves(state)}


@each_optimizer
def test_weak_types_never_enter_the_state(opt):
    weak = jnp.asarray(2.0)
    assert weak.weak_type
    tx = opt.build()
    for state in (tx.init(weak), tx.init(jax.eval_shape(lambda: weak))):
        assert signature(state) == signature(tx.init(jnp.float32(2)))


@pytest.mark.parametrize(
    ("tx", "field", "expected"),
    [
        (CG(decay=0.999), "keys", 0.999 * 2),
        (memoptax.critical_momenta(b1=0.999, decay=0.5), "mu", 0.001),
        (ADAM(0.1, b2=0.999), "nu", 0.001),
        (ADAM(0.1, b2=0.999, amsgrad=True), "nu", 0.001),
        (RMS(0.1, alpha=0.999), "nu", 0.001),
        (memoptax.adam_cm(0.1, b2=0.999), "nu", 0.001 * 0.1**2),
        (memoptax.scale_by_sm3_cm(b2=0.999), "accumulators", 0.001 * 0.1**2),
        (memoptax.scale_by_sm3(beta=0.999), "accumulators", 0.001),
    ],
    ids=[
        *("decay", "critical_momenta", "adam", "amsgrad", "rmsprop", "adam_cm"),
        *("sm3_cm", "sm3"),
    ],
)
def test_a_decay_near_one_stays_below_one(tx, field, expected):
    """In bfloat16 .999 would be 1, and nothing would ever fade, or come in."""
    params = jnp.ones(4, jnp.bfloat16)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    (memory,) = jax.tree.leaves(optax.tree.get(state, field))
    assert float(memory.ravel()[0]) == pytest.approx(expected, rel=1e-4)


@each_factory
def test_half_precision_follows_full_precision(opt):
    half = trained(opt.build(), params_like(SHAPES, jnp.bfloat16))[0]
    largest = max(float(jnp.max(jnp.abs(p))) for p in jax.tree.leaves(half))
    # Every addition to a parameter rounds by up to 2^-8 of it.
    close(half, expected(opt)[0], rtol=0, atol=STEPS * 2**-8 * largest)


@each_optimizer
@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_what_is_not_real_and_floating_is_refused(opt, dtype):
    params = {"good": jnp.zeros(2), "bad": jnp.zeros(2, dtype)}
    with pytest.raises(ValueError, match=f"'bad'.* has dtype {dtype}"):
        opt.build().init(params)


# Trees


class Point(NamedTuple):
    x: Any
    y: Any


def nested(tree):
    """The same leaves in the same order, among None and leaves without elements."""
    a, b, c = (tree[name] for name in sorted(tree))
    empty = jnp.zeros((*a.shape, 0, 2))
    return {"first": [a, None], "then": Point((b, empty), {"last": (c,)})}


@each_factory
def test_containers_and_empty_leaves_change_nothing(opt):
    params, stream = nested(params_like(SHAPES)), nested(gradients())
    trajectory, _ = trained(opt.build(), params, stream)
    close(trajectory, nested(expected(opt)[0]))


@each_optimizer
def test_a_tree_without_leaves_is_no_error(opt):
    params, tx = {"none": None, "empty": ()}, opt.build()
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert updates == params
    assert signature(after) == signature(state)


@each_factory
def test_a_bare_array_is_a_tree(opt):
    (params,) = params_like({"w": (3,)}).values()
    tx = opt.build()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert signature(updates) == signature(params)
    assert signature(after) == signature(state)


@each_optimizer
def test_parameters_are_asked_for_only_where_needed(opt):
    tx, params = opt.build(), params_like(SHAPES)
    state = jax.eval_shape(tx.init, params)
    if opt.needs_params:
        with pytest.raises(ValueError, match="params"):
            jax.eval_shape(tx.update, params, state)
    else:
        jax.eval_shape(tx.update, params, state)


@each_optimizer
def test_another_tree_than_at_birth_is_refused(opt):
    tx, params = opt.build(), params_like(SHAPES)
    state = jax.eval_shape(tx.init, params)
    fewer = {name: p for name, p in params.items() if name != "vector"}
    with pytest.raises(ValueError, match="updates have .* state was made for"):
        jax.eval_shape(tx.update, fewer, state, fewer)
    wider = {**params, "vector": jnp.zeros(4)}
    with pytest.raises(ValueError, match="updates have a leaf|'vector'"):
        jax.eval_shape(tx.update, wider, state, wider)


# Optax


def ending_at(step, rate):
    """A schedule: the rate, and from this step on 0."""
    return optax.piecewise_constant_schedule(rate, {step: 0.0})


@each_factory
@pytest.mark.parametrize("inject", [False, True], ids=["plain", "injected"])
def test_schedules_and_traced_hyperparameters(opt, inject):
    wrap = optax.inject_hyperparams if inject else lambda factory: factory
    options = {"learning_rate": ending_at(5, opt.rate)} if opt.rated else {}
    tx = opt.build(wrap, **options)
    if inject:
        traced = jax.eval_shape(tx.init, params_like(SHAPES)).hyperparams
        floats = {
            name
            for name, p in inspect.signature(opt.factory).parameters.items()
            if isinstance(p.default, float) or name == "learning_rate"
        }
        assert floats <= traced.keys()
    trajectory, _ = trained(tx)
    want = expected(opt)[0]
    if opt.rated:
        want = jax.tree.map(lambda p: np.asarray(p)[[0, 1, 2, 3, 4, 4, 4, 4]], want)
    close(trajectory, want)


def test_the_annotation_of_a_rate_is_the_type_of_optax():
    """Optax's own tests look at it, and skip what has another, or a string."""
    for factory in {opt.factory for opt in OPTIMIZERS if opt.rated}:
        rate = inspect.signature(factory).parameters["learning_rate"]
        assert rate.annotation is optax.ScalarOrSchedule, factory


OPTIONAL = ("fifo", "sgd_c nesterov", "rmsprop_c centered", "adam_c L2")


@pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.name in OPTIONAL], ids=repr
)
def test_numbers_that_may_be_none_may_be_traced(opt):
    """Of these the type of the default does not tell that they are numbers."""
    numbers = {k for k, value in opt.options.items() if isinstance(value, float)}
    static = opt.options.keys() - numbers
    tx = opt.build(lambda f: optax.inject_hyperparams(f, static_args=static))
    state = jax.eval_shape(tx.init, params_like(SHAPES))
    assert numbers and numbers <= state.hyperparams.keys()
    close(trained(tx)[0], expected(opt)[0])


@each_factory
def test_hyperparameters_in_half_precision_are_not_kept_in_it(opt):
    """Injected numbers have the dtype of the parameters; the state has not."""
    params, tx = params_like(SHAPES, jnp.bfloat16), opt.build(optax.inject_hyperparams)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert signature(after) == signature(state)
    assert signature(updates) == signature(params)
    kept = jax.tree.leaves(optax.tree.get(state.inner_state, opt.memory))
    slots = optax.tree.get(state.inner_state, "slots", default={})
    names = [str(x.dtype) for x in kept]
    assert names.count("bfloat16") <= len(jax.tree.leaves(slots))


@each_factory
def test_counters_stop_at_their_end(opt):
    """And do not turn negative, as if there had been no step yet."""
    runner, last = donating(opt), np.iinfo(np.int32).max

    def counted(path, x):
        counter = x.dtype == jnp.int32 and path[-1].name != "entries"
        return jnp.full_like(x, last) if counter else x

    params = params_like(SHAPES)
    state = jax.tree.map_with_path(counted, runner.tx.init(params))
    params, state = runner.step(params, state, at(gradients(), 0))
    counters = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert any(np.any(x == last) for x in counters)
    assert all(np.all(np.asarray(x) >= 0) for x in counters)
    assert all(np.isfinite(p).all() for p in params.values())


@each_capacity
def test_a_traced_capacity_is_refused_with_its_cure(opt):
    static = tuple(opt.options)
    params = params_like(SHAPES)
    traced = opt.build(
        lambda factory: optax.inject_hyperparams(
            factory, static_args=tuple(set(static) - {"topc"})
        ),
        topc=3,
    )
    with pytest.raises(ValueError, match="topc must be a static.*static_args='topc'"):
        traced.init(params)
    cured = opt.build(
        lambda factory: optax.inject_hyperparams(
            factory, static_args=(*static, "topc")
        ),
        topc=3,
    )
    slots = optax.tree.get(jax.eval_shape(cured.init, params), "slots")
    assert slots["vector"].shape == (4, 3)


INSIDE = ("scalar", "rank 4")


def inside(tree):
    return {name: tree[name] for name in INSIDE}


def masked(tx):
    return optax.masked(tx, {name: name in INSIDE for name in SHAPES})


def partitioned(tx):
    labels = {name: "ours" if name in INSIDE else "theirs" for name in SHAPES}
    return optax.partition({"ours": tx, "theirs": optax.identity()}, labels)


@functools.cache
def trained_apart(opt):
    return trained(opt.build(), inside(params_like(SHAPES)), inside(gradients()))[0]


@each_factory
@pytest.mark.parametrize("wrap", [masked, partitioned])
def test_a_part_of_the_tree_is_as_if_it_were_alone(opt, wrap):
    params, stream = params_like(SHAPES), gradients()
    trajectory, _ = trained(wrap(opt.build()))
    close(inside(trajectory), trained_apart(opt))
    for name in SHAPES.keys() - set(INSIDE):
        untouched = np.asarray(params[name]) + np.cumsum(stream[name], axis=0)
        np.testing.assert_allclose(trajectory[name], untouched, rtol=1e-5)


@each_factory
def test_multi_steps_sees_the_mean_of_its_micro_batches(opt):
    def micro(g):
        noise = np.float32([0.5, -0.5]).reshape(-1, *[1] * (g.ndim - 1))
        return (g[:, None] * (1 + noise)).reshape(-1, *g.shape[1:])

    stream = jax.tree.map(micro, gradients())
    tx = optax.MultiSteps(opt.build(), 2).gradient_transformation()
    trajectory, _ = trained(tx, stream=stream)
    close(jax.tree.map(lambda p: p[1::2], trajectory), expected(opt)[0])


@each_factory
def test_apply_if_finite_skips_a_step_and_goes_on(opt):
    stream = jax.tree.map(
        lambda g: np.insert(g, 5, np.nan, axis=0).astype(g.dtype), gradients()
    )
    trajectory, state = trained(optax.apply_if_finite(opt.build(), 2), stream=stream)
    want, want_state = expected(opt)
    close(at(trajectory, 5), at(trajectory, 4), rtol=0, atol=0)
    close(jax.tree.map(lambda p: np.delete(p, 5, axis=0), trajectory), want)
    close(state.inner_state, want_state)
    assert int(state.total_notfinite) == 1


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


@each_optimizer
@pytest.mark.parametrize("wrap", [lambda tx: tx, masked], ids=["plain", "masked"])
def test_map_params_tells_parameters_from_the_rest(opt, wrap):
    tx, params = wrap(opt.build()), params_like(SHAPES)
    state = jax.eval_shape(tx.init, params)
    specs = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else name,
        state,
        {name: name for name in SHAPES},
        transform_non_params=lambda leaf: None,
        is_leaf=is_masked,
    )

    def check(name, leaf):
        if name is not None and not is_masked(name):
            rank = len(SHAPES[name])
            assert leaf.shape[leaf.ndim - rank :] == SHAPES[name]

    jax.tree.map(check, specs, state, is_leaf=lambda x: x is None)
    assert set(jax.tree.leaves(specs)) <= set(SHAPES)


@each_memory
def test_tree_get_finds_the_memory(opt):
    state = jax.eval_shape(opt.build().init, params_like(SHAPES))
    assert jax.tree.leaves(optax.tree.get(state, opt.memory))


@each_optimizer
def test_extra_arguments_pass_through_a_chain(opt):
    def asks_for_value(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: u * value, updates), state

    consumer = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), asks_for_value
    )
    params = params_like(SHAPES)
    for tx in (
        optax.chain(opt.build(), consumer),
        optax.apply_if_finite(optax.chain(opt.build(), consumer), 2),
    ):
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(tx.update, params, state, params, value=2.0)
        assert signature(updates) == signature(params)


# Bad gradients


@each_memory
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30], ids=["nan", "inf", "1e30"])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_bad_gradient_was_never_offered(opt, bad, step):
    def memory_is_finite(old, new):
        del old
        memory = optax.tree.get(new[1], opt.memory)
        for path, leaf in jax.tree.leaves_with_path(memory):
            assert np.all(np.isfinite(np.float64(leaf))), path

    if np.isfinite(bad) and not opt.squares:
        return  # a large gradient is a gradient
    stream = gradients()
    good = steps_of(stream)
    spoilt = jax.tree.map(lambda g: np.full_like(g, bad), good[0])
    with_it = [*good[:step], spoilt, *good[step:]]
    _, state = donating(opt).run(with_it, memory_is_finite)
    got = optax.tree.get(state, opt.memory)
    # The last step wrote over whatever the bad one may have left in a spare slot.
    close(got, optax.tree.get(expected(opt)[1], opt.memory))


# Descent


def losses(params):
    """A parabola, Rosenbrock's valley, and least squares over a matrix."""
    x, y = params["valley"]
    residual = jnp.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]]) @ params["matrix"] - 1
    return {
        "parabola": jnp.sum(jnp.square(params["parabola"])),
        "valley": ((1 - x) ** 2 + 100 * (y - x**2) ** 2) / 20,
        "matrix": jnp.sum(jnp.square(residual)) / 2,
    }


@each_optimizer
def test_descends(opt):
    start = {
        "parabola": jnp.array([1.0, -0.5, 0.3]),
        "valley": jnp.array([-1.2, 1.0]),
        "matrix": jnp.full((2, 2), 2.0),
    }
    tx = opt.descends()

    @jax.jit
    def run(params):
        def body(carry, _):
            slope = jax.grad(lambda p: sum(losses(p).values()))(carry[0])
            return step_of(tx)(*carry, slope), None

        return jax.lax.scan(body, (params, tx.init(params)), length=1500)[0][0]

    before, after = losses(start), losses(run(start))
    least = {"parabola": 0.0, "valley": 0.0, "matrix": 3 / 22}
    for name in before:
        share = (after[name] - least[name]) / (before[name] - least[name])
        assert share < 0.1, (name, float(share))
