"""The ways to run a step: each is a function, its arguments, and what is donated.

A context maps an optimizer and its parameters (arrays or shapes) to those three. All
functions return parameters and state.
"""

import jax
import jax.numpy as jnp
import optax

MEMBERS = 3  # of a vmapped step
STEPS = 4  # of a scan


def step_of(tx):
    """A training step: update and apply."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def donated(tx, params):
    """The recommended way: parameters and state are overwritten."""
    return step_of(tx), (params, jax.eval_shape(tx.init, params), params), (0, 1)


def undonated(tx, params):
    return *donated(tx, params)[:2], ()


def scan(tx, params):
    """The parameters are the gradient of half their squared norm: no new array."""

    def scanned(params, state):
        def body(carry, _):
            return step_of(tx)(*carry, carry[0]), None

        return jax.lax.scan(body, (params, state), length=STEPS)[0]

    return scanned, (params, jax.eval_shape(tx.init, params)), (0, 1)


def apply_if_finite(tx, params):
    return donated(optax.apply_if_finite(tx, 3), params)


def where(tx, params):
    """A step that is dropped if a gradient is not finite."""

    def guarded(params, state, gradients):
        finite = jnp.isfinite(optax.tree.norm(gradients))
        new = step_of(tx)(params, state, gradients)
        choose = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        return jax.tree.map(choose, new, (params, state))

    return guarded, *donated(tx, params)[1:]


def multi_steps(tx, params):
    """The gradients of two calls make one step."""
    return donated(optax.MultiSteps(tx, 2).gradient_transformation(), params)


def vmap(tx, params):
    """Several sets of parameters at once, each with a buffer of its own."""
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct((MEMBERS, *p.shape), p.dtype), params
    )
    state = jax.eval_shape(jax.vmap(tx.init), params)
    return jax.vmap(step_of(tx)), (params, state, params), (0, 1)


CONTEXTS = {
    "donated": donated,
    "undonated": undonated,
    "scan": scan,
    "apply_if_finite": apply_if_finite,
    "jnp.where": where,
    "MultiSteps": multi_steps,
    "vmap": vmap,
}
