"""What every public optimizer promises to JAX: transformations, dtypes, trees, descent.

The table of optimizers is in ``contract.py``.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    ADAM,
    CG,
    HALVES,
    RMS,
    SHAPES,
    STEPS,
    at,
    close,
    donating,
    each_block,
    each_factory,
    each_lone_block,
    each_memory,
    each_optimizer,
    expected,
    gradients,
    params_like,
    signature,
    steps_of,
    trained,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import memoptax

from compiled import step_of, train

pytestmark = pytest.mark.few(3)

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
@pytest.mark.few(2)
def test_vmap_over_seeds_equals_runs_apart(opt):
    both = jax.tree.map(lambda *g: jnp.stack(g), gradients(0), gradients(1))
    run = functools.partial(train, opt.build())
    batched = jax.jit(jax.vmap(run, (None, 0)))(params_like(SHAPES), both)
    for seed in (0, 1):
        close(at(batched, seed), expected(opt, seed))


@each_lone_block
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="jax before 0.10 cannot batch such slices"
)
def test_an_ensemble_may_be_divided_in_explicit_mode(opt):
    shapes = {**SHAPES, "empty": (0, 2)}
    tx, params = opt.build(), params_like(shapes)

    def run(stream):
        params_, state = params, tx.init(params)
        for t in range(3):
            params_, state = step_of(tx)(params_, state, at(stream, t))
        stats = memoptax.buffer_stats(state) if opt.accepts("topc") else {}
        return params_, stats

    streams = [gradients(seed, shapes, steps=3) for seed in range(8)]
    streams = jax.tree.map(lambda *g: jnp.stack(g), *streams)
    want = jax.jit(jax.vmap(run))(streams)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        divided = jax.device_put(streams, NamedSharding(mesh, PartitionSpec("data")))
        close(jax.jit(jax.vmap(run))(divided), want)


@each_optimizer
@pytest.mark.parametrize("whose", ["the host", "the mesh"])
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.few(13)
def test_a_state_from_outside_a_mesh_takes_steps_in_it(opt, whose, compiled):
    """In explicit mode."""
    shapes = {"matrix": (8, 3), "vector": (3,)}
    tx, params, stream = opt.build(), params_like(shapes), gradients(shapes=shapes)
    want, state = trained(tx, params, stream)[0], tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def home(x):
        if whose == "the host":
            return np.asarray(x)
        over = PartitionSpec("data" if x.ndim == 2 else None)
        return jax.device_put(x, NamedSharding(mesh, over))

    with jax.set_mesh(mesh):
        for t, gradient in enumerate(steps_of(stream)[:2]):
            gradient = jax.tree.map(home, gradient)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            close(params, at(want, t))


@each_optimizer
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.few(8)
def test_members_restored_without_a_mesh_take_steps_on_it(opt, compiled):
    """In explicit mode."""
    tx, shapes = opt.build(), {"matrix": (8, 3), "vector": (8,)}
    gradient = steps_of(gradients(shapes=shapes))[0]
    gradient, params = (
        jax.tree.map(lambda x: np.stack([x, 2 * x, -x]), tree)
        for tree in (gradient, params_like(shapes))
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    there = NamedSharding(mesh, PartitionSpec(None, "data"))
    init, step = jax.vmap(tx.init), jax.vmap(tx.update)
    update = jax.jit(step) if compiled else step
    plain = state = jax.tree.map(np.asarray, init(params))
    on_mesh = jax.device_put((gradient, params), there)
    for _ in range(2):
        want, plain = jax.jit(step)(gradient, plain, params)
        with jax.set_mesh(mesh):
            updates, state = update(on_mesh[0], state, on_mesh[1])
        close(updates, want)


off_a_mesh = pytest.mark.parametrize(
    "mode, compiled", [("Auto", True), ("Auto", False), ("Explicit", False)]
)


@each_optimizer
@off_a_mesh
@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.few(5)
def test_a_state_taken_off_a_mesh_takes_steps_on_one_device(opt, mode, compiled):
    """The types still name the mesh. In explicit mode JAX then compiles no step."""
    take_steps_off_a_mesh(opt.build(), opt, mode, compiled)


@each_factory
@off_a_mesh
@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.few(4)
def test_schedules_taken_off_a_mesh_take_steps_on_one_device(opt, mode, compiled):
    """Their counts too. Eager steps compile all their operations again."""
    rates = filter(opt.accepts, ("learning_rate", "weight_decay"))
    tx = opt.build(**dict.fromkeys(rates, optax.linear_schedule(0.1, 0.05, 10)))
    # An operation of another test, once compiled, would work.
    take_steps_off_a_mesh(tx, opt, mode, compiled, jax.set_mesh, jax.clear_caches)


def take_steps_off_a_mesh(
    tx, opt, mode, compiled, on: Any = contextlib.nullcontext, before=lambda: None
):
    shapes = {"matrix": (8, 3), "vector": (8,)}
    params, gradient = params_like(shapes), steps_of(gradients(shapes=shapes))[0]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType[mode],))
    there = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(tx.update)
    _, plain = step(gradient, tx.init(params), params)
    on_mesh = jax.device_put((params, gradient), there)
    with on(mesh):
        _, state = step(on_mesh[1], tx.init(on_mesh[0]), on_mesh[0])
    moved, state = jax.device_put((on_mesh, state), jax.devices()[0])
    memoptax.check_state(tx, params, state)
    if opt.accepts("topc"):
        assert memoptax.buffer_stats(state)
        memoptax.buffer_stats(memoptax.reset_buffer(memoptax.resize_buffer(state, 4)))
    want, _ = step(gradient, plain, params)
    before()
    for p, g in ((params, gradient), moved, (moved[0], gradient)):
        updates, _ = (step if compiled else tx.update)(g, state, p)
        close(updates, want)


@each_optimizer
@pytest.mark.few(8)
def test_eager_steps_beside_a_mesh_of_one_device(opt):
    """What JAX returns for arrays of one shape may then be on the mesh or not."""
    tx, shapes = opt.build(), {"matrix": (11, 3), "vector": (11,)}
    params, gradient = params_like(shapes), steps_of(gradients(shapes=shapes))[0]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    there = NamedSharding(mesh, PartitionSpec("data"))
    moved = jax.device_put(jax.device_put(gradient, there), jax.devices()[0])
    jax.tree.map(jnp.isfinite, moved)
    state = tx.init(params)
    want, _ = jax.jit(tx.update)(gradient, state, params)
    for g in (gradient, moved):
        updates, _ = tx.update(g, state, params)
        close(updates, want)


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
    assert np.all((slopes["vector"] != 0) == opt.smooth)


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
    """In bfloat16 .999 would be 1: nothing would ever decay or enter."""
    params = jnp.ones(4, jnp.bfloat16)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    (memory,) = jax.tree.leaves(optax.tree.get(state, field))
    assert float(memory.ravel()[0]) == pytest.approx(expected, rel=1e-4)


@each_factory
@pytest.mark.few(2)
def test_half_precision_follows_full_precision(opt):
    half = trained(opt.build(), params_like(SHAPES, jnp.bfloat16))[0]
    largest = max(float(jnp.max(jnp.abs(p))) for p in jax.tree.leaves(half))
    # Every addition to a parameter rounds by up to 2^-8 of it.
    close(half, expected(opt)[0], rtol=0, atol=STEPS * 2**-8 * largest)


@each_optimizer
@pytest.mark.parametrize("dtype", ["complex64", "int32", "float8_e4m3fn"])
def test_a_dtype_that_cannot_be_trained_is_refused(opt, dtype):
    params = {"good": jnp.zeros(2), "bad": jnp.zeros(2, dtype)}
    with pytest.raises(ValueError, match=f"'bad'.* has dtype {dtype}"):
        opt.build().init(params)


# Trees


class Point(NamedTuple):
    x: Any
    y: Any


def nested(tree):
    """The same leaves in the same order, with None and empty leaves among them."""
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
    if not opt.needs_params:
        state = tx.init(None)  # as optax.adam takes it
        assert jax.eval_shape(tx.update, None, state)[0] is None


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
def test_a_tree_other_than_that_of_init_is_refused(opt):
    tx, params = opt.build(), params_like(SHAPES)
    state = jax.eval_shape(tx.init, params)
    fewer = {name: p for name, p in params.items() if name != "vector"}
    with pytest.raises(ValueError, match="updates have .* state was made for"):
        jax.eval_shape(tx.update, fewer, state, fewer)
    wider = {**params, "vector": jnp.zeros(4)}
    with pytest.raises(ValueError, match="updates have a leaf|'vector'"):
        jax.eval_shape(tx.update, wider, state, wider)


# Bad gradients


@each_memory
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30], ids=["nan", "inf", "1e30"])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_bad_gradient_never_enters_the_memory(opt, bad, step):
    def memory_is_finite(old, new):
        del old
        memory = optax.tree.get(new[1], opt.memory)
        for path, leaf in jax.tree.leaves_with_path(memory):
            assert np.all(np.isfinite(np.float64(leaf))), path

    if np.isfinite(bad) and not opt.squares:
        return  # a large gradient is not a bad one
    stream = gradients()
    good = steps_of(stream)
    spoilt = jax.tree.map(lambda g: np.full_like(g, bad), good[0])
    with_it = [*good[:step], spoilt, *good[step:]]
    _, state = donating(opt).run(with_it, memory_is_finite)
    got = optax.tree.get(state, opt.memory)
    # The last step overwrote what the bad one may have left in a spare slot.
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
