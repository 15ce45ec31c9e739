"""The norm of sharded gradients, for decisions that all devices must share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Names = tuple[Any, ...]


def sharded_norm(axes: Any = "auto", rule: Callable | None = None):
    r"""The sum of the L2 norms of leaves of which each device sees a part.

    .. math::
      \sum_{\text{leaves}} \sqrt{\sum_{\text{devices}} \lVert g \rVert^2}

    The default priority of a buffer, to be passed as ``priority_fn`` inside
    ``jax.shard_map``. There a device sees its own shards only and would decide for
    itself; with this all of them keep and drop the same, and a value that is not finite
    on one of them is refused on all. The norms that the state keeps are of whole leaves
    too, so the state lies as :func:`state_partition_specs` says. Under ``jit`` alone no
    such thing is needed: there norms are of whole leaves.

    Args:
      axes: the mesh axes over which the leaves are sharded. A name or a tuple of names
        for all leaves; or a tree with a name, a tuple of names or a ``PartitionSpec``
        for each, such as what ``in_specs`` says of the parameters; or ``'auto'``, the
        axes over which JAX says that a leaf varies. A leaf that JAX knows not to vary
        over an axis is not summed over it. Gradients must have been averaged over axes
        that the parameters are not sharded over.
      rule: a priority of your own instead of the sum of norms, a function of the shards
        of one device (of one leaf if not ``synced``) that sums over the devices itself
        (``jax.lax.psum``). What the
        state keeps, and what is refused, is of whole leaves nevertheless; without
        ``sharded_norm`` around it, it would be of shards.

    Returns:
      A function from gradients to a scalar.

    Raises:
      ValueError: if ``rule`` is no function; when it is called: if ``axes`` is
        ``'auto'`` under ``check_vma=False``, where JAX cannot know, or a tree with
        another number of leaves; in ``update``, if a ``PartitionSpec`` divides the last
        axis of a leaf that is kept in int8, where a row has one scale.

    Examples:
      >>> import jax, jax.numpy as jnp, memoptax
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))
      >>> specs = {"w": P("data"), "b": P()}
      >>> norm = memoptax.sharded_norm(specs)
      >>> gradients = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])}
      >>> jax.shard_map(norm, mesh=mesh, in_specs=(specs,), out_specs=P())(gradients)
      Array(7., dtype=float32)
    """
    if not (rule is None or callable(rule)):
        raise ValueError(f"rule must be a function, but is {rule!r}.")
    return ShardedNorm(axes, rule)


@dataclasses.dataclass(frozen=True)
class ShardedNorm:
    """What :func:`sharded_norm` makes."""

    axes: Any
    rule: Callable | None

    def __call__(self, gradients):
        if self.rule is not None:
            return self.rule(gradients)
        leaves = jax.tree.leaves(gradients)
        squares = [jnp.sum(jnp.square(x.astype(_wide(x)))) for x in leaves]
        return sum(map(jnp.sqrt, self.across(squares)), jnp.zeros(()))

    def across(self, squares: list[jax.Array]) -> list[jax.Array]:
        """Sums over the elements of each leaf, added up over its devices."""
        squares, groups = list(squares), {}
        for leaf, names in enumerate(self._names(squares)):
            groups.setdefault(names, []).append(leaf)
        for names, members in groups.items():
            if names:
                sums = jax.lax.psum([squares[leaf] for leaf in members], names)
                for leaf, total in zip(members, sums):
                    squares[leaf] = total
        return squares

    def _names(self, squares) -> list[Names]:
        varying, known = [_varying(x) for x in squares], _is_tracked()
        if isinstance(self.axes, str) and self.axes == "auto":
            if not known:
                raise ValueError(
                    "sharded_norm('auto') asks JAX over which axes a gradient varies, "
                    "which it does not know under check_vma=False: name the axes."
                )
            return [tuple(sorted(names)) for names in varying]
        every = [_flat(entry) for entry in self._entries(len(squares))]
        if not known:
            return every
        return [tuple(n for n in a if n in b) for a, b in zip(every, varying)]

    def check_scales(self, leaves):
        """Refuse specs that divide the rows of leaves which int8 gives one scale.

        Each device would take it from its own shard, and all would pass it for one.
        """
        if isinstance(self.axes, str) and self.axes == "auto":
            return
        for leaf, entry in zip(leaves, self._entries(len(leaves))):
            if isinstance(entry, PartitionSpec) and 0 < leaf.ndim == len(entry):
                parts = math.prod(map(_devices, _flat(entry[-1])))
                if parts > 1:
                    raise ValueError(
                        f"sharded_norm was given {entry} for a leaf in int8, which "
                        f"divides its last axis over {parts} devices: a row of it has "
                        "one scale. Leave that axis whole, or choose another dtype."
                    )

    def _entries(self, count) -> list[Any]:
        """What the axes say of each of so many leaves."""
        entries = jax.tree.leaves(self.axes, is_leaf=_is_entry)
        if len(entries) > count:  # a None may stand for None, which is no leaf
            entries = [entry for entry in entries if entry is not None]
        if _is_entry(self.axes):
            entries *= count
        if len(entries) != count:
            raise ValueError(
                f"sharded_norm was given axes for {len(entries)} leaves, but the "
                f"gradients have {count}: {self.axes!r}."
            )
        return entries


def _devices(name) -> int:
    """Of how many an axis is; 1 where shard_map leaves it to the compiler."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.axis_size(name) if name in manual else 1


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _is_entry(node) -> bool:
    """Whether this stands for one leaf: a name, names, a spec, or None."""
    names = isinstance(node, tuple) and all(isinstance(name, str) for name in node)
    return names or node is None or isinstance(node, str | PartitionSpec)


def _flat(entry) -> Names:
    """The names in an entry, and in the tuples inside a spec."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    return tuple(name for part in entry for name in _flat(part))


def _varying(x) -> frozenset:
    """The mesh axes over which JAX says that a value varies."""
    kind = jax.typeof(x)
    vma = getattr(kind, "vma", None)  # until jax 0.9
    return kind.mat.varying if vma is None else vma


def _is_tracked() -> bool:
    """Whether JAX knows what varies; under check_vma=False nothing seems to."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return all(name in _varying(jax.lax.axis_index(name)) for name in manual)
