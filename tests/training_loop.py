"""The training loop that faults are put into, and a comparison of its runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract import OPTIMIZERS, SHAPES, gradients, params_like, steps_of

NAMED = {opt.name: opt for opt in OPTIMIZERS}
STANDARD = [opt for opt in OPTIMIZERS if opt.name == opt.factory.__name__]

WRAPS = {
    "alone": lambda tx: tx,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "clipped": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "accumulated": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


class Loop:
    """A training loop that applies an update only if it is finite."""

    def __init__(self, opt, wrap):
        self.opt, self.tx = opt, WRAPS[wrap](opt.build())

        def step(params, state, gradient):
            updates, state = self.tx.update(gradient, state, params)
            leaves = [jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates)]
            sound = functools.reduce(jnp.logical_and, leaves)
            updates = jax.tree.map(lambda u: jnp.where(sound, u, 0), updates)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step)

    def start(self, shapes=SHAPES):
        params = params_like(shapes)
        return params, self.tx.init(params)

    def run(self, stream, carry=None):
        carry = self.start() if carry is None else carry
        for gradient in stream:
            carry = self.step(*carry, gradient)
        return carry

    def memory(self, carry):
        return optax.tree.get(carry[1], self.opt.memory)


@functools.cache
def loop(opt, wrap="alone"):
    """One loop for all rows, so that each optimizer compiles once per wrapper."""
    return Loop(opt, wrap)


def stream(steps=14):
    return steps_of(gradients(steps=steps))


def everywhere(value):
    """A gradient with this number in every entry."""
    return jax.tree.map(lambda g: np.full_like(g, value), stream(1)[0])


def same(got, want):
    """Bitwise."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, a in jax.tree.leaves_with_path(got):
        b = functools.reduce(_child, path, want)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def _child(node, key):
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    return node[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]


def is_finite(tree):
    return all(np.isfinite(np.asarray(x, float)).all() for x in jax.tree.leaves(tree))
