"""Bytes of an optimizer's state, known before anything is allocated."""

import bisect
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from memoptax import _check, _parameters
from memoptax._tensors import flax_metadata


def state_bytes(tx: _check.Optimizer, params: Any) -> int:
    """The bytes of ``tx.init(params)``, without running it.

    Args:
      tx: any optax transformation.
      params: parameters, or ``jax.ShapeDtypeStruct`` leaves like them.

    Returns:
      The number of bytes of the whole state. A replicated array counts once.

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1000,), jnp.float32)
      >>> memoptax.state_bytes(optax.adam(0.1), params)
      8004
    """
    return memory_report(tx, params).total


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of an optimizer's state by field. It prints as a table."""

    fields: dict[str, int]  # name of the state's field -> bytes, the largest first
    total: int
    parameters: int  # how many numbers the parameters have
    per_device: dict[str, int] | None = None  # as fields, if shardings were given
    whole: dict[str, int] | None = None  # likewise, of arrays that no mesh axis divides

    @property
    def per_parameter(self) -> float:
        """Bytes per number in the parameters."""
        return self.total / max(self.parameters, 1)

    @property
    def total_per_device(self) -> int | None:
        """Bytes on each device, or None without shardings."""
        return None if self.per_device is None else sum(self.per_device.values())

    @property
    def undonated(self) -> int:
        """Bytes in a step that does not donate the state: the old and the new state."""
        return 2 * self.total

    def __str__(self) -> str:
        def column(found):
            total = sum(found.values())
            return [*found.values(), total, 2 * total]

        columns = [
            ("field", [*self.fields, "in all", "undonated"]),
            ("bytes", [f"{n:,}" for n in column(self.fields)]),
        ]
        for head, found in (("per device", self.per_device), ("whole", self.whole)):
            if found is not None:
                sizes = column({name: found[name] for name in self.fields})
                columns.append((head, [f"{n:,}" for n in sizes]))
        numbers = max(self.parameters, 1)
        shares = [f"{n / numbers:.3f}" for n in column(self.fields)]
        return _table([*columns, ("per parameter", shares)])


def _table(columns) -> str:
    """A heading and cells for each column. The first column is aligned to the left."""
    widths = [max(map(len, [head, *cells])) for head, cells in columns]
    lines = zip(*([head, *cells] for head, cells in columns))
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def memory_report(
    tx: _check.Optimizer, params: Any, shardings: Any = None
) -> MemoryReport:
    """The bytes of ``tx.init(params)`` by field of the state, without running it.

    Args:
      tx: any optax transformation.
      params: parameters, or ``jax.ShapeDtypeStruct`` leaves like them.
      shardings: a tree of ``jax.sharding.Sharding`` like the state, or a function
        ``(tx, params) -> tree`` that makes it, such as
        :func:`memoptax.state_shardings`. With it the report also counts the bytes on
        each device, and those of arrays that every device holds whole.

    Returns:
      A :class:`MemoryReport`. The ``slots`` of a buffer and their ``total`` (the sum)
      are fields of their own. A moment has the name that its optimizer gives it. The
      row ``undonated`` is for a step that does not donate the state
      (``donate_argnums``), and so holds both the old and the new one.

    Raises:
      ValueError: if ``shardings`` is not like the state, or has something other than
        shardings, such as specs, or a sharding that does not fit its array.

    Examples:
      >>> import memoptax, jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
      >>> print(memoptax.memory_report(memoptax.adam_c(0.1, topc=5), params))
      field           bytes  per parameter
      slots      24,000,000         24.000
      mu          4,000,000          4.000
      nu          4,000,000          4.000
      entries            24          0.000
      keys               20          0.000
      ages               20          0.000
      offered             4          0.000
      accepted            4          0.000
      count               4          0.000
      in all     32,000,076         32.000
      undonated  64,000,152         64.000

      Divided over eight devices that all hold the same parameters. The bias of 1001
      entries stays whole, because eight does not divide 1001:

      >>> from functools import partial
      >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
      >>> place = partial(memoptax.state_shardings, mesh=mesh, over="data")
      >>> params = {"w": params, "b": jax.ShapeDtypeStruct((1001,), jnp.float32)}
      >>> tx = memoptax.critical_gradients(topc=1)
      >>> print(memoptax.memory_report(tx, params, place))
      field          bytes  per device  whole  per parameter
      slots      4,004,004     504,004  4,004          4.000
      keys               4           4      4          0.000
      ages               4           4      4          0.000
      offered            4           4      4          0.000
      accepted           4           4      4          0.000
      in all     4,004,020     504,020  4,020          4.000
      undonated  8,008,040   1,008,040  8,040          8.000
    """
    _check.transformation("tx", tx)
    state = _parameters.shapes_of(tx.init, params)
    leaves, treedef = jax.tree.flatten_with_path(state)
    laid_out: list[Any] = [None] * len(leaves)
    if shardings is not None:
        tree = shardings
        if callable(shardings):
            _check.function("shardings", shardings, 2)
            tree = shardings(tx, params)
        if jax.tree.structure(tree) != treedef:
            raise ValueError(
                "shardings must be a tree like the state, with a sharding for each of "
                f"its arrays, but is {jax.tree.structure(tree)} where the state is "
                f"{treedef}."
            )
        laid_out = jax.tree.leaves(tree)
        for (path, _), one in zip(leaves, laid_out):
            _check.sharding("shardings" + jax.tree_util.keystr(path), one)
    # Flax's boxes are not fields of the state.
    bare_params, bare_state = map(flax_metadata.bare, (params, state))
    inside = {path for path, _ in jax.tree.leaves_with_path(bare_params)}
    roots = _paths_of(type(bare_params), bare_state)
    bare_leaves = jax.tree.leaves_with_path(bare_state)
    fields, per_device, whole = (collections.Counter() for _ in range(3))
    arrays = filter(_parameters.is_array, jax.tree.leaves(params))
    for (path, leaf), sharding in zip(bare_leaves, laid_out):
        name = _field(path, roots, inside)
        part = leaf.shape if sharding is None else _shard(path, sharding, leaf.shape)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        fields[name] += size
        per_device[name] += math.prod(part) * leaf.dtype.itemsize
        whole[name] += size if part == leaf.shape else 0
    return MemoryReport(
        fields=dict(fields.most_common()),
        total=fields.total(),
        parameters=sum(math.prod(np.shape(leaf)) for leaf in arrays),
        per_device=None if shardings is None else dict(per_device),
        whole=None if shardings is None else dict(whole),
    )


def _shard(path, sharding, shape):
    """The shape of the part of an array that each device has."""
    try:
        return sharding.shard_shape(shape)
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"shardings{jax.tree_util.keystr(path)} is {sharding!r}, which does not "
            f"fit an array of shape {shape}."
        ) from error


def _field(path, roots, inside):
    """The innermost named field of the state, above any tree like the parameters."""
    for i in range(len(path)):
        if path[:i] in roots and path[i:] in inside:  # the rest names a parameter
            path = path[:i]
            break
    names = [key.name for key in path if hasattr(key, "name")]
    return names[-1] if names else "state"


def _paths_of(kind, tree):
    """The paths of all nodes of exactly this type."""
    paths = set()

    def descend(path, node):
        if type(node) is kind:
            paths.add(path)
        return False

    jax.tree.leaves_with_path(tree, is_leaf=descend, is_leaf_takes_path=True)
    return paths


class LargestTopc(NamedTuple):
    """The result of :func:`largest_topc`."""

    topc: int
    buffer_dtype: DTypeLike | None  # as it was named
    bytes: int  # of the state, per device if shardings were given


def largest_topc(
    optimizer: Callable[..., _check.Optimizer],
    params: Any,
    budget: float,
    *,
    at_most: int = 20,
    buffer_dtypes: Sequence[DTypeLike | None] = (None, "bfloat16", "int8"),
    shardings: Any = None,
) -> LargestTopc:
    """The largest C whose state fits into a number of bytes, and the dtype for it.

    The dtype that allows the largest C wins. If two allow the same C, the earlier one
    wins. So slots are rounded only if that allows a larger C.

    Args:
      optimizer: a function that takes ``buffer_dtype`` and any ``topc`` from 1 to
        ``at_most`` by name, and returns the transformation, such as
        ``functools.partial(memoptax.adam_c, 1e-3)``.
      params: parameters, or ``jax.ShapeDtypeStruct`` leaves like them.
      budget: bytes for the whole state, moments included, or with ``shardings`` those
        on one device. Parameters, gradients and activations are not counted.
      at_most: the largest C to consider. The authors' grid ends at 20.
      buffer_dtypes: dtypes of the slots to consider, the preferred one first.
      shardings: a function ``(tx, params) -> tree``, as for :func:`memory_report`, such
        as :func:`memoptax.state_shardings`.

    Returns:
      A named tuple ``(topc, buffer_dtype, bytes)``.

    Raises:
      ValueError: if not even C = 1 fits, with the bytes that it would take; if an
        argument is out of its range, with its name and value.

    Examples:
      >>> import functools, memoptax, jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
      >>> adam_c = functools.partial(memoptax.adam_c, 1e-3)
      >>> memoptax.largest_topc(adam_c, params, budget=100e6)
      LargestTopc(topc=20, buffer_dtype=None, bytes=96000344)
      >>> memoptax.largest_topc(adam_c, params, budget=30e6)
      LargestTopc(topc=20, buffer_dtype='int8', bytes=29084256)
    """
    if not callable(optimizer):
        raise ValueError(f"optimizer must be a function, but is {optimizer!r}.")
    if not (shardings is None or callable(shardings)):
        raise ValueError(f"shardings must be a function, but is {shardings!r}.")
    budget = _check.known("budget", budget, 0, finite=False)
    at_most = _check.size("at_most", at_most, 1)
    if not (isinstance(buffer_dtypes, (list, tuple)) and buffer_dtypes):
        raise ValueError(
            "buffer_dtypes must be a list of at least one dtype, but is "
            f"{buffer_dtypes!r}."
        )

    def size(topc, dtype):
        tx = optimizer(topc=topc, buffer_dtype=dtype)
        _check.transformation("what optimizer returns", tx)
        report = memory_report(tx, params, shardings)
        return sum((report.per_device or report.fields).values())

    def fitting(dtype):
        # The bytes grow with C, so the number of sizes that fit is the largest C.
        sizes = functools.partial(size, dtype=dtype)
        return bisect.bisect_right(range(1, at_most + 1), budget, key=sizes)

    topc, dtype = max(
        ((fitting(d), d) for d in buffer_dtypes), key=lambda pair: pair[0]
    )
    if topc == 0:
        least = min(size(1, d) for d in buffer_dtypes)
        raise ValueError(
            f"budget is {budget:,.0f} bytes, but even topc=1 takes {least:,}."
        )
    return LargestTopc(topc, dtype, size(topc, dtype))
