"""What a base refuses: a state that other arguments made, and numbers out of range."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from memoptax import _check
from memoptax._tensors import layout, row_sparse


def expecting(inner: optax.GradientTransformation, kind: type, **arguments):
    """``inner``, which refuses a state that is not a ``kind``, and names the arguments
    that decide this. Some tools restore an ``optax.EmptyState`` as another empty node.
    A count in few bits, which would stop growing, is refused too.
    """

    def check(state, updates):
        del updates
        nodes = jax.tree.structure(state)
        bare = nodes.num_nodes == 1 and nodes.num_leaves == 0
        empty = bare and not hasattr(state, "_fields")
        if not (isinstance(state, kind) or kind is optax.EmptyState and empty):
            asked = " and ".join(f"{k} is {v!r}" for k, v in arguments.items())
            made = (
                "pass the arguments that it was made with, or make a new one with init"
            )
            raise ValueError(
                f"{asked}, but the state has {type(state).__name__} where "
                f"{kind.__name__} is needed: {_check.without_target(state) or made}."
            )
        if "count" in getattr(state, "_fields", ()):
            _check.count(state.count)

    return checking(inner, check)


def without_buffer(inner: optax.GradientTransformation, kind: type):
    """``inner`` for a ``topc`` or ``kappa`` of 0, which refuses the ``kind`` of state
    that has a buffer.
    """
    inner = checking(inner, lambda s, _: _check.without_buffer(isinstance(s, kind)))

    def update_fn(updates, state, params=None, **extra_args):
        row_sparse.refuse(updates)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def checking_moments(inner: optax.GradientTransformation):
    """``inner``, which refuses moments that do not fit the updates, or are in less than
    float32. A sum in few bits stops growing.
    """

    def check(state, updates):
        for name, moments in state._asdict().items():
            if name != "count":
                _check.moments(name, moments, updates)
                _check.wide(name, moments)

    return checking(inner, check)


def checking(inner: optax.GradientTransformation, check):
    """``inner``, which lets ``check`` see every state and its updates before it."""
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        check(state, updates)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def while_sound(inner: optax.GradientTransformation, sound):
    """``inner``, whose state stays and whose updates are NaN where not ``sound``.

    ``sound`` says whether traced numbers are in their ranges. It is True if all are
    known.
    """
    if sound is True:
        return inner
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        updates, new_state = inner.update(updates, state, params, **extra_args)
        return _chosen(sound, updates, new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def while_finite(chain: optax.GradientTransformation, rates: dict[int, Any]):
    """``chain``, whose state stays and whose updates are NaN where a schedule is not
    finite.

    ``rates`` has what may be a schedule, by its place in the chain. Schedules keep
    counting, because otherwise their values would not change again.
    """
    schedules: dict[int, Any] = {k: f for k, f in rates.items() if callable(f)}
    if not schedules:
        return chain
    chain = optax.with_extra_args_support(chain)

    def update_fn(updates, state: Any, params=None, **extra_args):
        new_state: Any
        updates, new_state = chain.update(updates, state, params, **extra_args)
        finite = [jnp.isfinite(f(state[place].count)) for place, f in schedules.items()]
        old = list(state)
        for place in schedules:
            old[place] = new_state[place]
        return _chosen(jnp.all(jnp.stack(finite)), updates, new_state, old)

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def _chosen(taken, updates, new, old):
    """The updates and the new state where ``taken``, or NaN and the old one.

    Leaf by leaf, because a restored state may have lists where a new one has tuples.
    """
    leaves, treedef = jax.tree.flatten(new)
    leaves = [
        layout.where(taken, a.astype(b.dtype), b)
        for a, b in zip(leaves, jax.tree.leaves(old))
    ]
    updates = jax.tree.map(
        lambda u: layout.where(taken, u, jnp.nan).astype(u.dtype), updates
    )
    return updates, treedef.unflatten(leaves)
