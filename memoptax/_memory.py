"""Bytes of an optimizer's state, known before anything is allocated."""

import collections
import dataclasses
import math

import jax


def state_bytes(tx, params) -> int:
    """Bytes of ``tx.init(params)``, without running it.

    Args:
      tx: any optax transformation.
      params: parameters, or ``jax.ShapeDtypeStruct``s like them.

    Returns:
      The number of bytes, of all devices together.

    Examples:
      >>> import memoptax, optax, jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1000,), jnp.float32)
      >>> memoptax.state_bytes(optax.adam(0.1), params)
      8004
    """
    return memory_report(tx, params).total


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of an optimizer's state by field; prints as a table."""

    fields: dict[str, int]  # name of the state's field -> bytes, the largest first
    total: int
    parameters: int  # how many numbers the parameters are

    @property
    def per_parameter(self) -> float:
        return self.total / max(self.parameters, 1)

    def __str__(self):
        rows = [*self.fields.items(), ("in all", self.total)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'field':<{width}}  {'bytes':>15}  per parameter"]
        for name, size in rows:
            share = size / max(self.parameters, 1)
            lines.append(f"{name:<{width}}  {size:>15,}  {share:>13.3f}")
        return "\n".join(lines)


def memory_report(tx, params) -> MemoryReport:
    """Bytes of ``tx.init(params)`` by field of the state, without running it.

    Args:
      tx: any optax transformation, ours or not.
      params: parameters, or ``jax.ShapeDtypeStruct``s like them.

    Returns:
      A :class:`MemoryReport`. A buffer's ``slots`` and ``total`` (their sum) are fields
      of their own; a moment has the name that its optimizer gives it.

    Examples:
      >>> import memoptax, jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
      >>> print(memoptax.memory_report(memoptax.adam_c(0.1, topc=5), params))
      field               bytes  per parameter
      slots          24,000,000         24.000
      total           4,000,000          4.000
      mu              4,000,000          4.000
      nu              4,000,000          4.000
      keys                   20          0.000
      ages                   20          0.000
      place                  20          0.000
      norms                  20          0.000
      spare                   4          0.000
      error                   4          0.000
      offered                 4          0.000
      accepted                4          0.000
      rebuilds                4          0.000
      count                   4          0.000
      in all         36,000,104         36.000
    """
    state = jax.eval_shape(tx.init, params)
    inside = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    fields = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        # A field may hold a tree like the parameters, whose own names do not count.
        like = (i for i in range(len(path) + 1) if path[i:] in inside)
        names = [key.name for key in path[: next(like, None)] if hasattr(key, "name")]
        fields[names[-1] if names else "state"] += (
            math.prod(leaf.shape) * leaf.dtype.itemsize
        )
    return MemoryReport(
        fields=dict(fields.most_common()),
        total=fields.total(),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
    )
