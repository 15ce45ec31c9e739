"""Streams of gradients for a configuration, and the examples of a search."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from property_configs import NUMBERS, STEPS

KINDS = (
    *("pattern", "repeat") * 3,
    *(
        "plain",
        "zero",
        "lonely",
        "mixed",
        "by leaf",
        "subnormal",
        "huge",
        "edge",
        "bad",
    ),
)


def stream_of(config, kinds, seed, whole, shapes=None):
    """A gradient per step, each a dict of arrays in the dtype of the parameters.

    Sizes are powers of two, over the ``whole`` range or near 1.
    """
    shapes = config.shapes if shapes is None else shapes
    rng, steps = np.random.default_rng(seed), []
    info = jnp.finfo(config.dtype)
    limit = min(2.0 ** (config.reach + 1), float(info.max) / 64)
    for kind in kinds:
        drawn = _gradient(rng, kind, shapes, config.reach, steps, whole, info)
        steps.append({name: np.clip(g, -limit, limit) for name, g in drawn.items()})
        if kind == "bad":
            _spoil(rng, steps[-1])
    return {
        name: np.stack([step[name] for step in steps]).astype(jnp.dtype(config.dtype))
        for name in shapes
    }


def _gradient(rng, kind, shapes, reach, steps, whole, info):
    low, high = (-reach, reach) if whole else (-2, 2)

    def power(shape=()):
        return 2.0 ** rng.integers(low, high + 1, shape)

    one = power()
    normal = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if kind == "repeat" and steps:
        # An earlier gradient, half of it, or twice it: norms that are or will be equal.
        earlier, factor = steps[rng.integers(len(steps))], 2.0 ** rng.integers(-1, 2)
        return {name: factor * rng.choice([1, -1]) * g for name, g in earlier.items()}
    if kind == "edge" and reach > 64:  # the sum of two squares overflows in float32
        return {n: 1.5 * 2.0**63 * _pattern(rng, shape) for n, shape in shapes.items()}
    if kind in ("pattern", "edge"):
        one = 2.0 ** rng.integers(-2, 3) if rng.random() < 0.8 else one
        return {name: one * _pattern(rng, shape) for name, shape in shapes.items()}
    if kind == "zero":
        return {name: np.copysign(0.0, x) for name, x in normal.items()}
    if kind == "lonely":
        alone = {name: np.copysign(0.0, x) for name, x in normal.items()}
        _put(rng, alone, one)
        return alone
    if kind == "mixed":
        return {name: x * power(x.shape) for name, x in normal.items()}
    if kind == "by leaf":
        return {name: x * power() for name, x in normal.items()}
    if kind == "subnormal":
        tiny = float(info.smallest_normal)
        return {
            n: np.copysign(tiny * rng.random(x.shape), x) for n, x in normal.items()
        }
    if kind == "huge" and reach > 60:
        one = 2.0 ** rng.integers(60, reach + 1)
    return {name: x * one for name, x in normal.items()}


def _pattern(rng, shape):
    """Entries of 0 and ±1, whose norm is exactly 0, 1 or 2."""
    flat = np.zeros(int(np.prod(shape)))
    ones = rng.choice([n for n in (0, 1, 1, 4) if n <= flat.size])
    flat[rng.permutation(flat.size)[:ones]] = rng.choice([1, -1], ones)
    return flat.reshape(shape)


def _spoil(rng, step):
    _put(rng, step, rng.choice([np.nan, np.inf, -np.inf]))


def _put(rng, step, value):
    names = [name for name, g in step.items() if g.size]
    if names:
        name = rng.choice(names)
        flat = step[name].ravel()
        flat[rng.integers(flat.size)] = value
        step[name] = flat.reshape(step[name].shape)


ROWS, WIDTH, TOUCHED = 6, 3, 4


def rows_of(seed, config, kinds, whole):
    """Ids (also negative ones, and some outside of the table) and values per step."""
    rng = np.random.default_rng([seed, 1])
    ids = rng.integers(-ROWS - 1, ROWS + 1, (len(kinds), TOUCHED))
    shapes = {"t": (TOUCHED, WIDTH)}
    values = stream_of(config, kinds, seed, whole, shapes)["t"]
    return ids.astype(np.int32), values


@st.composite
def cases(draw, configs):
    config = draw(st.sampled_from(configs))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=STEPS, max_size=STEPS))
    numbers = {name: draw(NUMBERS[name]) for name in config.numbers}
    return config, numbers, kinds, draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
