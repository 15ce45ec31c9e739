"""Adversarial streams through many configurations, against the oracles.

Every configuration of ``property_configs`` is compiled once per process, with all
numbers traced, and hypothesis chooses the configuration, the numbers and the stream of
``property_streams``: exact ties, zeros of both signs, NaN and infinity, subnormal
numbers, and entries from 1e-37 to 1e37. ``property_oracles`` has what is expected, and
``error_bars`` says how far a result may be from it.

The comparison ends with a step where two keys are so close that rounding decides
between them, or where a square is so close to the largest number that rounding decides
whether it overflows. The state must be a valid one even then.
"""

import collections
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

import memoptax

from error_bars import Unsure
from property_configs import COVERS, FUNCTIONS, STEPS, named
from property_oracles import ORACLES
from property_streams import ROWS, WIDTH, cases, rows_of, stream_of
from untyped import untyped

# The package


def build(config, numbers):
    static = dict(config.static)
    for key in ("aggr", "priority_fn"):
        if key in static:
            static[key] = FUNCTIONS.get(static[key], static[key])
    if "cover" in static:
        static["cover"] = functools.partial(_cover_of, static["cover"])
    return getattr(memoptax, config.name)(**static, **named(numbers))


def _cover_of(cover, path, leaf):
    if jax.tree_util.keystr(path) == "['t']":
        cover = "rows"
    return COVERS[cover](path, leaf)


@functools.cache
def params_of(config):
    dtype = jnp.dtype(config.dtype)
    shapes = dict(config.shapes) | ({"t": (ROWS, WIDTH)} if config.sparse else {})
    return {name: np.full(shape, 0.5, dtype) for name, shape in shapes.items()}


@functools.cache
def compiled(config):
    """All updates of a stream, the last parameters and the last state.

    A gradient that is not finite reaches only the buffer. The state of optax's
    transformations behind the buffer does not change. Updates that are not finite are
    not applied.
    """

    def run(params, stream, rows, numbers):
        tx = build(config, numbers)

        def body(carry, step):
            params, state = carry
            gradient, rows = step
            fine = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient)]
            fine = functools.reduce(jnp.logical_and, fine, True)
            if config.sparse:
                ids, values = rows
                table = BCOO((values, ids[:, None]), shape=(ROWS, WIDTH))
                gradient = gradient | {"t": table}
            updates, new = tx.update(gradient, state, params)
            if config.family == "critical gradients" and isinstance(new, tuple):
                new = _behind(config, fine, new, state)
            if config.sparse:
                table = updates.pop("t")
                rows = table.indices[:, 0], table.data
            applied = {
                name: jnp.where(fine & jnp.isfinite(u), p + u, p).astype(p.dtype)
                for (name, u), p in zip(updates.items(), map(params.get, updates))
            }
            return (params | applied, new), (updates, rows)

        start = params, tx.init(params)
        (params, state), (updates, rows) = jax.lax.scan(
            body, start, (stream, rows), length=STEPS
        )
        return updates, rows, params, state

    return jax.jit(run)


def _behind(config, fine, new, old):
    if config.name == "critical_gradients":
        return new
    kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new[1:], old[1:])
    return (new[0], *kept)


@functools.cache
def concrete(config):
    """The optimizer with numbers that are known, for its structure alone."""
    return build(config, dict.fromkeys(config.numbers, 0.5))


# Comparisons


def within(got, want, error, what):
    """``got`` is within the bound, and not finite exactly where ``want`` is not.

    Where the bound is infinite it may be anything.
    """
    got = np.asarray(got, np.float64)
    assert got.shape == np.shape(want), what
    known = np.isfinite(error) | np.isnan(want)
    got, want, error = got[known], want[known], error[known]
    shown = np.isnan(want)
    np.testing.assert_array_equal(np.isfinite(got), ~shown, f"finite: {what}")
    if not np.all(np.abs(got - want)[~shown] <= error[~shown]):
        raise AssertionError(f"{what}: {got} is not within {error} of {want}.")


def same_buffer(buffer, held, names):
    """Keys, ages and counters are the oracle's, and so is every value."""
    groups = [(row, group) for row, group in enumerate(held.memory.buffers)]
    for row, group in groups:
        theirs, fill = held.memory.buffers[group], len(held.memory.buffers[group].keys)
        counts = int(buffer.offered[row]), int(buffer.accepted[row])
        assert counts == (theirs.offered, theirs.accepted)
        ages = [age + 1 for age in theirs.ages]
        empty = [0] * (theirs.topc - fill)
        assert buffer.ages[row].tolist() == ages + empty, group
        p, keys = held.precision, np.array(theirs.keys)
        off = p.rounding(np.abs(keys), 2 * STEPS)
        within(buffer.keys[row, :fill], keys, off, f"keys {group}")
        for entry in range(fill):
            for name in group:
                value = _value(buffer, names.index(name), row, entry)
                want = theirs.values[entry][name]
                error = held.errors[group][entry][name] + p.tiny
                within(value, want, error, f"entry {entry} of {name}")


def _value(buffer, leaf, row, entry):
    slots = jax.tree.leaves(buffer.slots)[leaf]
    scales = None if buffer.scales is None else buffer.scales[leaf]
    if buffer.entries is not None:
        slot = np.argsort(buffer.entries[row])[entry]
        slots, scales = slots[slot], None if scales is None else scales[slot]
    slots = np.asarray(slots, np.float64)
    return slots if scales is None else slots * np.asarray(scales, np.float64)


def check(case):
    """One example: the package against the oracle. Returns the steps compared."""
    config, numbers, kinds, seed, whole = case
    dtype = np.dtype(config.wide)
    numbers = {name: dtype.type(x) for name, x in numbers.items()}
    stream = stream_of(config, kinds, seed, whole)
    rows = rows_of(seed, config, kinds, whole) if config.sparse else None
    with jax.enable_x64(config.wide == "float64"):
        found = compiled(config)(params_of(config), stream, rows, numbers)
        updates, touched, params, state = jax.device_get(found)
        memoptax.check_state(concrete(config), params_of(config), state)
    with np.errstate(all="ignore"):
        return _compare(
            config, numbers, (stream, rows), updates, touched, params, state
        )


def _compare(config, numbers, given, updates, touched, params, state):
    """How many steps were compared."""
    stream, rows = given
    numbers = {name: float(x) for name, x in numbers.items()}
    buffer = _buffer_of(state)
    summed = buffer is not None and buffer.total is not None
    alone = ORACLES[config.family](config, numbers, summed)
    for t in range(STEPS):
        grads = {name: np.asarray(g[t], np.float64) for name, g in stream.items()}
        try:
            expected = alone.step(grads)
            if rows is not None:
                ids, values = rows[0][t], np.asarray(rows[1][t], np.float64)
                _same_rows(alone.rows(ids, values), touched[0][t], touched[1][t], t)
        except Unsure:
            return t
        for name, (want, error) in expected.items():
            within(updates[name][t], want, error, f"update {t} of {name}")
        if not alone.sure:
            return t + 1
    _same_state(config, alone, buffer, params, state)
    return STEPS


def _same_state(config, alone, buffer, params, state):
    names = list(config.shapes)
    if not config.half:
        for name in names:
            want, error = alone.params[name]
            within(params[name], want, error, f"parameter {name}")
    if buffer is not None:
        same_buffer(buffer, alone.held, names)
    if config.name in ("sm3_cm", "sm3", "scale_by_sm3"):
        first = state if hasattr(state, "accumulators") else state[0]
        families = alone.families()
        for name, mine in zip(families, first.accumulators if families else ()):
            for numbers, (want, error) in zip(mine, families[name], strict=True):
                within(np.ravel(numbers), np.ravel(want), np.ravel(error), name)


def _same_rows(expected, ids, values, t):
    """Rows of an update come in any order, each once, with padding outside."""
    distinct, want, error = expected
    inside = ids < ROWS
    order = np.argsort(ids[inside])
    assert ids[inside][order].tolist() == distinct.tolist(), f"rows {t}"
    got = values[inside][order]
    within(got, want.reshape(got.shape), error.reshape(got.shape), f"rows {t}")


def _buffer_of(state):
    def is_buffer(node):
        return hasattr(node, "_fields") and "accepted" in node._fields

    nodes = jax.tree.leaves(state, is_leaf=is_buffer)
    return next((node for node in nodes if is_buffer(node)), None)


def search(family, examples, configs, phases=tuple(hypothesis.Phase)):
    """Try that many examples, and count what was tried.

    The first that fails is made small, and raises.
    """
    counts, used = collections.Counter(), set()

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(untyped(hypothesis.HealthCheck)),
    )
    @hypothesis.given(cases(configs))
    def examine(case):
        counts["failures"] += 1
        ended = check(case)
        counts["failures"] -= 1
        counts["examples"] += 1
        counts["to the end"] += ended == STEPS
        used.add(case[0])

    examine()
    return {
        "family": family,
        "configurations": len(used),
        **{key: counts[key] for key in ("examples", "to the end", "failures")},
    }
