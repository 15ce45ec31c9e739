"""The L2 norms of leaves, as they are and as storage rounds them. No gradient flows."""

import jax
import jax.numpy as jnp

from memoptax._tensors import storage


def of(leaves, dtype, across=None):
    """The L2 norm of every leaf, (L,).

    ``across`` adds up what several devices know of the squares of every leaf; None
    where one device sees whole leaves.
    """
    return _roots(_squares(leaves, dtype), dtype, across)


def encode_and_bound(leaves, stacks, dtype, across=None):
    """The leaves as the stacks store them, and bounds on their norms then, (L,)."""
    return _encoded(leaves, stacks, of(leaves, dtype, across), across)


def keep_and_bound(values, stacks, dtypes, dtype, step, across=None):
    """The same of ``values`` that are stored already, and were of ``dtypes``.

    They are stored anew where the stacks store in another way. ``step`` is an integer
    scalar that the compiler cannot know, at least 0.
    """

    def leaves(values):
        return list(map(storage.decode, values, dtypes))

    def squares(values):
        return _squares(leaves(values), dtype)

    exact = _roots(_alone(squares, step, values), dtype, across)
    if all(storage.alike(x, stack) for x, stack in zip(values, stacks)):
        return values, exact
    return _encoded(leaves(values), stacks, exact, across)


def vector(scalars, dtype):
    """An array of ``scalars``, of which there may be none."""
    return jnp.stack(scalars) if scalars else jnp.zeros((0,), dtype)


def _alone(function, step, *operands):
    """``function(*operands)``, on CPU in a branch that is always taken.

    Else XLA would store what is computed from the operands and then reduced, because
    others compute the same. ``step`` is an integer that it cannot know, at least 0.
    """

    def guarded(step, *operands):
        def zeros(*operands):
            return function(*jax.tree.map(jnp.zeros_like, operands))

        return jax.lax.cond(step >= 0, function, zeros, *operands)

    return jax.lax.platform_dependent(
        step, *operands, cpu=guarded, default=lambda step, *rest: function(*rest)
    )


def _encoded(leaves, stacks, exact, across):
    """Bounds, and not the norms of the rounded values: to round every value once more
    for those would cost a copy of the parameters and a fifth of the step.
    """
    values = [storage.encode(x, stack) for x, stack in zip(leaves, stacks)]
    return values, storage.norm_bounds(exact, leaves, values, across)


def _squares(leaves, dtype):
    wide = jnp.result_type(dtype, *leaves)
    leaves = [jax.lax.stop_gradient(x).astype(wide) for x in leaves]
    return [jnp.sum(jnp.square(x)) for x in leaves]


def _roots(squares, dtype, across):
    squares = squares if across is None else across(squares)
    squares = vector(squares, jnp.result_type(dtype, *squares))
    # Of a single element XLA would make |x|, which overflows later than its square.
    return jnp.where(jnp.isfinite(squares), jnp.sqrt(squares), squares).astype(dtype)
