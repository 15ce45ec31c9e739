"""A state that was made with other arguments, or by another optimizer, is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from contract import OPTIMIZERS, each_optimizer

import memoptax

from untyped import untyped

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}

CG = [memoptax.sgd_c, memoptax.rmsprop_c, memoptax.adam_c, memoptax.adamw_c]
CM = [memoptax.sgd_cm, memoptax.adam_cm, memoptax.adamw_cm, memoptax.sm3_cm]
BUFFERED = CG + CM
RATED = [*BUFFERED, memoptax.sm3]
ADAM = [memoptax.adam_c, memoptax.adamw_c, memoptax.adam_cm, memoptax.adamw_cm]
AVERAGED = [memoptax.adam_c, memoptax.adamw_c, *CM]
NOTHING = {"topc": 0}


def schedule(count):
    return 0.1 + 0 * count


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


# An argument, the optimizers that have it, and pairs of values whose states differ
# visibly. Each pair is tried both ways.
TABLE = [
    ("momentum", [memoptax.sgd_c, memoptax.rmsprop_c, memoptax.sm3], [(None, 0.9)], {}),
    ("dampening", [memoptax.sgd_c], [(0.0, 0.1)], {"momentum": 0.9}),
    (
        "accumulator_dtype",
        [memoptax.sgd_c],
        [(None, "bfloat16"), ("float16", "bfloat16")],
        {"momentum": 0.9},
    ),
    ("centered", [memoptax.rmsprop_c], [(False, True)], {}),
    ("amsgrad", ADAM, [(False, True)], {}),
    ("amsgrad", ADAM, [(False, True)], NOTHING),
    ("amsgrad", ADAM[:2], [(False, True)], {"mu_dtype": "int8"}),
    ("mu_dtype", AVERAGED, [(None, "int8"), ("bfloat16", "float16")], {}),
    ("mu_dtype", AVERAGED, [(None, "bfloat16"), ("int8", "float16")], NOTHING),
    ("mu_dtype", ADAM[:2], [(None, "int8")], {"amsgrad": True}),
    (
        "buffer_dtype",
        BUFFERED,
        [(None, "bfloat16"), (None, "int8"), ("float16", "bfloat16")],
        {},
    ),
    ("momentum_dtype", [memoptax.sm3], [(None, "bfloat16")], {"momentum": 0.9}),
    ("topc", BUFFERED, [(0, 5), (2, 3)], {}),
    ("kappa", BUFFERED, [(0.0, 1.0)], {}),
    ("synced", BUFFERED, [(True, False)], {}),
    ("fifo_probability", BUFFERED, [(None, 0.5)], {}),
    ("holding", BUFFERED, [("read", "sum")], {}),
    ("learning_rate", RATED, [(0.1, schedule)], {}),
    ("learning_rate", BUFFERED, [(0.1, schedule)], NOTHING),
    ("weight_decay", [*CG, memoptax.adamw_cm, memoptax.sm3], [(0.1, schedule)], {}),
    (
        "mask",
        [memoptax.adamw_c, memoptax.adamw_cm, memoptax.sm3],
        [(None, matrices)],
        {"weight_decay": 0.1},
    ),
]
CASES = [
    pytest.param(factory, name, *values, options, id=f"{factory.__name__}-{name}")
    for name, factories, pairs, options in TABLE
    for factory in factories
    for pair in pairs
    for values in (pair, pair[::-1])
]


def build(factory, **options):
    return factory(**{"learning_rate": 0.1, **options})


def updated(tx, state):
    return jax.eval_shape(tx.update, PARAMS, state, PARAMS)


@pytest.mark.parametrize("factory, name, asked, made, options", CASES)
@pytest.mark.few(40)
def test_a_state_of_another_value_is_refused_by_name(
    factory, name, asked, made, options
):
    tx, other = (build(factory, **{**options, name: x}) for x in (asked, made))
    state = jax.eval_shape(other.init, PARAMS)
    updated(other, state)
    with pytest.raises(ValueError, match="state") as error:
        updated(tx, state)
    assert re.search(rf"\b{name}\b", str(error.value)), error.value


@functools.cache
def born(opt):
    tx = opt.build()
    return tx, jax.eval_shape(tx.init, PARAMS)


@each_optimizer
@pytest.mark.few(8)
def test_the_state_of_another_optimizer_is_refused(opt):
    tx, own = born(opt)
    for other in OPTIMIZERS:
        state = born(other)[1]
        if jax.tree.flatten(state) == jax.tree.flatten(own):
            continue
        with pytest.raises(ValueError, match="state"):
            updated(tx, state)
    for state in (optax.adam(0.1), optax.sgd(0.1, 0.9)):
        with pytest.raises(ValueError, match="state"):
            updated(tx, jax.eval_shape(state.init, PARAMS))


@pytest.mark.parametrize("options", [{"topc": 0}, {"kappa": 0.0}])
@pytest.mark.parametrize("other", [memoptax.critical_momenta(), optax.rmsprop(0.1)])
def test_critical_gradients_without_a_buffer_refuse_a_state(options, other):
    tx = memoptax.critical_gradients(**options)
    with pytest.raises(ValueError, match="kappa is .* but the state has"):
        updated(tx, jax.eval_shape(other.init, PARAMS))


def plain(node, sequence):
    """What a restore without a target gives: dicts, and lists or dicts of numbers."""
    if hasattr(node, "_asdict"):
        return {name: plain(x, sequence) for name, x in node._asdict().items()}
    if isinstance(node, tuple):
        return sequence(plain(x, sequence) for x in node)
    return node


def numbered(nodes):
    return {str(k): node for k, node in enumerate(nodes)}


@pytest.mark.parametrize("scales", [(), [], {}, (jnp.ones(1),)], ids=str)
def test_scales_without_a_momentum_are_refused(scales):
    tx = memoptax.scale_by_sm3()
    state = untyped(tx.init(PARAMS))._replace(scales=scales)
    with pytest.raises(ValueError, match="state has scales .* no momentum"):
        tx.update(PARAMS, state)


@pytest.mark.parametrize("options", [{}, NOTHING], ids=str)
@each_optimizer
@pytest.mark.few(12)
def test_a_restore_without_a_target_is_refused_by_name(opt, options):
    tx = opt.build(**(options if opt.accepts("topc") else {}))
    state = tx.init(PARAMS)
    if not jax.tree.leaves(state):  # of optax.sgd, which takes any empty node
        return
    for sequence in (list, numbered):  # the second by flax.serialization
        with pytest.raises(ValueError, match="state .* without the structure of"):
            tx.update(PARAMS, plain(state, sequence), PARAMS)


@pytest.mark.parametrize("alone", [jnp.zeros(3), None, {"0": jnp.zeros(3)}], ids=type)
@pytest.mark.parametrize("factory", [memoptax.sm3_cm, memoptax.sm3])
def test_accumulators_without_their_tuples_are_refused(factory, alone):
    tx, params = factory(0.1), jnp.zeros(3)
    first, *rest = tx.init(params)
    for accumulators in ((alone,), alone):
        state = (first._replace(accumulators=accumulators), *rest)
        with pytest.raises(ValueError, match="state .* accumulators|state was made"):
            tx.update(params, state, params)


# Another tree


@each_optimizer
@pytest.mark.few(8)
def test_updates_of_other_names_are_refused(opt):
    """If the state has no names, those of the parameters are compared."""
    tx, state = born(opt)
    renamed = {name + "x": x for name, x in PARAMS.items()}
    with pytest.raises(ValueError, match="updates have"):
        jax.eval_shape(tx.update, renamed, state, PARAMS)


@pytest.mark.parametrize("options", [{}, NOTHING, {"kappa": 0.0}], ids=str)
@pytest.mark.parametrize("factory", [memoptax.sm3_cm, memoptax.sm3])
def test_updates_of_other_names_are_refused_without_parameters(factory, options):
    options = {"momentum": 0.9} if factory is memoptax.sm3 else options
    tx = factory(0.1, **options)
    state = jax.eval_shape(tx.init, PARAMS)
    renamed = {name + "x": x for name, x in PARAMS.items()}
    with pytest.raises(ValueError, match="updates have the structure"):
        jax.eval_shape(tx.update, renamed, state)


# Other arrays


def forged(state):
    """States with one array of another shape, or with what is no array in its place."""
    leaves, treedef = jax.tree.flatten_with_path(state)
    for k, (path, leaf) in enumerate(leaves):
        first = [leaf[:1]] if leaf.ndim and len(leaf) > 1 else []
        for other in (leaf[None], None, "text", *first):
            changed = [x for _, x in leaves]
            changed[k] = other
            yield jax.tree_util.keystr(path), other, treedef.unflatten(changed)


def refuse_forged(tx):
    """Moments in one row would be broadcast over all rows."""
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    for path, other, wrong in forged(state):
        with pytest.raises(ValueError, match=r"(?s)\bstate\b.*[.]$"):
            tx.update(PARAMS, wrong, PARAMS)
            pytest.fail(f"{path} was taken as {other!r}")


@each_optimizer
@pytest.mark.few(6)
def test_arrays_of_another_shape_or_kind_are_refused(opt):
    refuse_forged(opt.build())


@pytest.mark.parametrize("options", [NOTHING, {"kappa": 0}], ids=str)
@pytest.mark.parametrize("opt", [o for o in OPTIMIZERS if o.accepts("topc")], ids=repr)
@pytest.mark.few(6)
def test_they_are_refused_without_a_buffer(opt, options):
    refuse_forged(opt.build(**options))
