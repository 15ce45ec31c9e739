"""Streams of gradients, and runs of an optimizer over them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from compiled import train

SHAPES = {"a": (), "b": (2, 3), "c": (4,)}
PARAMS = {name: jnp.full(shape, 0.5) for name, shape in SHAPES.items()}


def gradients(steps=20, shapes=SHAPES, seed=0):
    """In float32, with sizes from an eighth to eight. Leaves are (steps, *shape)."""
    random = np.random.default_rng(seed)
    size = np.exp2(random.uniform(-3, 3, steps))
    return {
        name: np.array(
            random.normal(size=(steps, *shape)) * size.reshape(-1, *[1] * len(shape)),
            np.float32,
        )
        for name, shape in shapes.items()
    }


def lognormal(steps=20, shapes=SHAPES, seed=0):
    """In float64, with unbounded sizes."""
    random = np.random.default_rng(seed)
    size = random.lognormal(0, 1, size=steps)
    return {
        name: np.einsum("t,t...->t...", size, random.normal(size=(steps, *shape)))
        for name, shape in shapes.items()
    }


def normal(seed, shape, scale=1.0):
    """One gradient, in float64."""
    return scale * np.random.default_rng(seed).standard_normal(shape)


def at(stream, t):
    return jax.tree.map(lambda g: g[t], stream)


def zeros(stream):
    """Initial parameters."""
    return jax.tree.map(lambda g: jnp.zeros_like(jnp.asarray(g[0])), stream)


def replay(tx, params, stream):
    """The parameters after every step, and the last state."""
    return jax.jit(functools.partial(train, tx))(params, stream)


def trajectory(tx, params=None, stream=None):
    """The parameters after every step."""
    params = PARAMS if params is None else params
    return replay(tx, params, gradients() if stream is None else stream)[0]


def emit(tx, stream):
    """The updates of every step, and the last state."""

    def body(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, updates

    state = tx.init(at(stream, 0))
    state, updates = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(state, stream)
    return updates, state


def updates_of(tx, params, steps):
    """Yields the updates of a list of gradients, one jitted step after the other."""
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in steps:
        updates, state = update(gradient, state, params)
        yield updates


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want, rtol=1e-6, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, want)


def sparse(ids, values, rows) -> Any:
    """The gradient of a table: ``values`` (k, ...) for its rows ``ids`` (k,)."""
    values = jnp.asarray(values)
    return BCOO((values, jnp.asarray(ids)[:, None]), shape=(rows, *values.shape[1:]))
