"""Check that the numbers of a state can be those of an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from memoptax import _buffer_tools, _check, _parameters
from memoptax._buffer import matching, resizing
from memoptax._tensors import flax_metadata, layout, storage


def check_state(tx: _check.Optimizer, params: Any, state: Any) -> None:
    """Refuse a state that does not belong to ``tx`` and ``params``.

    ``update`` checks only shapes and dtypes, while it is traced. This function checks
    the values too. Call it outside of ``jax.jit`` after every restore from a
    checkpoint, and whenever a state was changed by other means.

    It finds only numbers that no optimizer could have made. A checkpoint that was saved
    or restored without the slots has zeros in their place, and keys that are not 0.
    Only a running sum shows that. :func:`memoptax.reset_buffer` empties such a buffer.

    Args:
      tx: the optimizer.
      params: parameters, or ``jax.ShapeDtypeStruct`` leaves like them.
      state: the state to check.

    Returns:
      None.

    Raises:
      ValueError: The error names the array.
        - If the state differs from ``tx.init(params)`` in structure, shape or dtype.
        - If a leaf is not an array or was deleted, or if leaves are bound to different
          devices and the parameters are not.
        - If a floating-point array has a number that is not finite. A scalar may be
          infinite in states of other packages, except for common ones of optax. The sum
          of a buffer may not, although ``update`` recovers from that.
        - If a second moment, a count or a scale is below 0 in a state of memoptax, or
          in one of optax's common ones, or numbers in int8 have a scale of 0.
        - If the entries of a buffer are not a permutation, its counters or ages
          contradict each other, or its keys or norms are negative.
        - If a buffer has a key, a norm or numbers in slots of entries that are not
          held, or a running sum is not that of its slots.

    Examples:
      >>> import memoptax, jax.numpy as jnp
      >>> tx = memoptax.sgd_c(0.1)
      >>> params = jnp.zeros(3)
      >>> memoptax.check_state(tx, params, tx.init(params))
    """
    _check.transformation("tx", tx)
    asked = _parameters.shapes_of(tx.init, params)
    bare, asked = map(flax_metadata.bare, (state, asked))
    found, wanted = map(jax.tree.leaves_with_path, (bare, asked))
    if jax.tree.structure(bare) != jax.tree.structure(asked):
        raise ValueError(
            f"state has the structure {jax.tree.structure(bare)}, but tx.init(params) "
            f"has {jax.tree.structure(asked)}: it belongs to another optimizer, other "
            "options or other parameters."
        )
    batch, moments = _members(asked), _moments(bare)
    named = [(f"state{jax.tree_util.keystr(path)}", leaf) for path, leaf in found]
    # Parameters on several devices have states there too. Each buffer is checked below.
    together = not layout.conflict([("params", x) for x in jax.tree.leaves(params)])
    if together and (sentence := layout.conflict(named)):
        raise ValueError(sentence)
    for (path, leaf), (name, _), (_, like) in zip(found, named, wanted):
        if isinstance(leaf, Tracer):
            raise ValueError(
                f"{name} is traced, but check_state looks at numbers: call it outside "
                "of jax.jit."
            )
        if wrong := _check.deleted(leaf):
            raise ValueError(f"{name} {wrong}")
        try:
            leaf = storage.on_device(layout.as_placed(jnp.asarray(leaf)))
        except (TypeError, ValueError):
            array = isinstance(leaf, np.ndarray)
            kind = leaf.dtype.name if array else f"type {type(leaf).__name__}"
            kind = _check.foreign(leaf) or f"of {kind}"
            raise ValueError(
                f"{name} must be an array of numbers, but is {kind}."
            ) from None
        if wrong := layout.part_of_sum(leaf):
            raise ValueError(f"{name} is {wrong}")
        if leaf.shape != like.shape or leaf.dtype != like.dtype:
            raise ValueError(
                f"{name} has shape {leaf.shape} and dtype {leaf.dtype},"
                f" but tx.init(params) has {like.shape} and {like.dtype} there."
            )
        if jnp.issubdtype(like.dtype, jnp.floating):
            # A scalar of optax may start at infinity, such as the best value so far.
            # In an ensemble it has the axes of the members.
            scalar = leaf.ndim <= batch and jax.tree_util.keystr(path) not in moments
            good = ~jnp.isnan(leaf) if scalar else jnp.isfinite(leaf)
            if not jnp.all(good):
                raise ValueError(f"{name} has numbers that are not finite.")
    bare = _parameters.state_arrays(bare)
    for path, leaf in _at_least_0(bare):
        if jnp.any(jnp.less(leaf, 0)):
            raise ValueError(f"state{path} has numbers below 0.")
    for buffer in _buffer_tools.buffers_in(bare):
        matching.check_shapes(buffer)
        _buffer_tools.check_numbers(buffer)
        for is_wrong, sentence in _CONTRADICTIONS.items():
            if jnp.any(_buffer_tools.for_each(is_wrong, buffer)):
                raise ValueError(f"state has a buffer {sentence}")
    for path, values, scales in _in_int8(bare):
        values, scales = storage.on_device(values), storage.on_device(scales)
        scales = layout.like(scales, values)
        if jnp.any(jnp.where(scales == 0, values != 0, False)):
            raise ValueError(
                f"state{path} has numbers in int8 whose scales are 0: was it restored "
                "without its scales?"
            )


# What only check_state refuses. An update goes on with such a state.
_CONTRADICTIONS = {
    resizing.has_leftovers: (
        "with a key, a norm or numbers in slots of entries that are not held: was it "
        "scaled or averaged? memoptax.reset_buffer empties it."
    ),
    resizing.has_equal_ages: (
        "with entries of equal ages: was it scaled or averaged? memoptax.reset_buffer "
        "empties it."
    ),
    resizing.has_wrong_sum: (
        "whose running sum (total, norms, error) is not that of its slots: was it "
        "averaged, or restored in parts? memoptax.resize_buffer(state, topc), with the "
        "topc and holding that it has, adds the slots up again."
    ),
}

# Fields that are sums of squares, counts or scales in the states of this package, and
# in these of optax. In others, a name may mean another thing: optax.sm3 keeps its
# momentum in nu. Parameters may have such names too.
_AT_LEAST_0 = ("nu", "nu_max", "accumulators", "scales", "mu_scales", "count")
_OF_OPTAX = (
    *(optax.ScaleByAdamState, optax.ScaleByAmsgradState, optax.ScaleByBeliefState),
    *(optax.ScaleByNovogradState, optax.ScaleByRmsState, optax.ScaleByRStdDevState),
    *(optax.EmaState, optax.ScaleByLionState, optax.TraceState),
    *(optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState),
)


def _members(state):
    """How many axes the members of an ensemble have: as many as their counts.

    A count in the state of another package may be a vector.
    """
    known = [buffer.keys.ndim - 2 for buffer in _buffer_tools.buffers_in(state)]
    others = []
    for _, node in _nodes(state):
        count: Any = getattr(node, "count", None)  # of a tuple it is a method
        if hasattr(count, "dtype") and jnp.issubdtype(count.dtype, jnp.integer):
            (known if _is_known(node) else others).append(count.ndim)
    return max(known or others, default=0)


def _moments(state):
    """The paths of all arrays in states of this package, and in common ones of optax.

    Injected hyperparameters may be infinite.
    """
    return {
        path + jax.tree_util.keystr(rest)
        for path, node in _nodes(state)
        if _is_known(node) and type(node) is not optax.InjectStatefulHyperparamsState
        for rest, _ in jax.tree.leaves_with_path(node)
    }


def _at_least_0(state):
    """The paths and arrays of a state that cannot have numbers below 0."""
    for path, node in _nodes(state):
        if _is_known(node):
            for field in sorted({*_AT_LEAST_0} & {*getattr(node, "_fields", ())}):
                for rest, leaf in jax.tree.leaves_with_path(getattr(node, field)):
                    yield f"{path}.{field}{jax.tree_util.keystr(rest)}", leaf


def _nodes(state):
    """The path and node of everything in a state, parents first."""
    found = []

    def visit(path, node):
        found.append((jax.tree_util.keystr(path), node))
        return False  # so JAX goes on to the children

    jax.tree.leaves_with_path(state, is_leaf=visit, is_leaf_takes_path=True)
    return found


def _is_known(node):
    return type(node) in _OF_OPTAX or _is_ours(node)


def _is_ours(node):
    return type(node).__module__.startswith(f"{__package__}.")


# What this package may store in int8, and the field with its scales.
_SCALES = {
    "slots": "scales",
    "moment": "scales",
    "momentum": "scales",
    "mu": "mu_scales",
}


def _in_int8(state):
    """The paths, values and scales of what this package stores in int8."""
    for path, node in filter(lambda pair: _is_ours(pair[1]), _nodes(state)):
        for field in sorted({*_SCALES} & {*getattr(node, "_fields", ())}):
            values = jax.tree.leaves_with_path(getattr(node, field))
            scales = jax.tree.leaves(getattr(node, _SCALES[field], None))
            for (rest, leaf), scale in zip(values, scales):
                yield f"{path}.{field}{jax.tree_util.keystr(rest)}", leaf, scale
