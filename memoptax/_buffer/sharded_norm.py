"""The norm of sharded gradients, for decisions that all devices must share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from memoptax import _check
from memoptax._tensors import dtypes, layout, norms

Names = tuple[Any, ...]


def sharded_norm(
    axes: Any = "auto", rule: Callable[[Any], ArrayLike] | None = None
) -> Callable[[Any], ArrayLike]:
    r"""The sum of the L2 norms of leaves that are sharded over devices.

    .. math::
      \sum_{\text{leaves}} \sqrt{\sum_{\text{devices}} \lVert g \rVert^2}

    Pass it as ``priority_fn`` inside ``jax.shard_map``. There a device sees only its
    own shards and would decide for itself. With this priority, all devices keep and
    drop the same values, and a value that is not finite on one device is refused on
    all. The state then also keeps the norms of whole leaves, and has the specs of
    :func:`state_partition_specs`. Under ``jit`` without ``shard_map``, norms are those
    of whole leaves anyway.

    Args:
      axes: the mesh axes over which the leaves are sharded. A name or a tuple of names
        is for all leaves. A tree has a name, a tuple of names or a ``PartitionSpec``
        for each leaf, such as the ``in_specs`` of the parameters. Use the containers of
        the gradients, because leaves are paired in their order. ``'auto'`` means the
        axes over which JAX knows that a leaf varies. If JAX knows that a leaf does not
        vary over an axis, the leaf is not summed over that axis. Gradients must have
        been averaged over the axes that do not shard the parameters.
      rule: a priority of your own instead of the sum of norms. It is a function from
        the shards of one device (of one leaf if not ``synced``) to a scalar, and sums
        over the devices itself (``jax.lax.psum``). The norms in the state, and the
        check that values are finite, are still those of whole leaves. Without
        ``sharded_norm`` around the rule, they would be those of shards.

    Returns:
      A function from gradients to a scalar, without a derivative.

    Raises:
      ValueError: in three places.
        - At once, if ``rule`` is not a function, or ``axes`` is none of the above or
          names an axis twice.
        - When the result is called, if the tree ``axes`` has the wrong number of
          leaves. Inside a ``shard_map``, also if a name is not an axis of its mesh, or
          if ``axes`` is ``'auto'`` under ``check_vma=False``, where JAX does not track
          which values vary between devices. Outside, every leaf is whole, and names
          are ignored.
        - In ``update``, if a ``PartitionSpec`` divides the last axis of a leaf in int8,
          because a row has one scale.

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
    _check.function("rule", rule, 1)
    for entry in jax.tree.leaves(axes, is_leaf=_is_entry):
        if not _is_entry(entry):
            raise ValueError(
                "axes must be 'auto', names of mesh axes or a tree of names, but has "
                f"{entry!r}."
            )
        if layout.is_partial(entry):
            raise ValueError(
                f"axes must not have reduced or unreduced axes, but has {entry!r}."
            )
        if len(set(layout.mesh_axes(entry))) < len(layout.mesh_axes(entry)):
            raise ValueError(f"axes must name each mesh axis once, but has {entry!r}.")
    return ShardedNorm(axes, rule)


@dataclasses.dataclass(frozen=True)
class ShardedNorm:
    """The priority that :func:`sharded_norm` returns."""

    axes: Any
    rule: Callable[[Any], ArrayLike] | None

    def __call__(self, gradients):
        if self.rule is not None:
            return self.rule(gradients)
        leaves = jax.tree.leaves(gradients)
        dtype = dtypes.widest(jnp.float32, *(x.dtype for x in leaves))
        return jnp.sum(norms.of(leaves, dtype, self.across))

    def across(self, squares: list[jax.Array]) -> list[jax.Array]:
        """The sums of the elements of each leaf, over all devices that share it."""
        squares, groups = list(squares), {}
        for leaf, names in enumerate(self._names(squares)):
            groups.setdefault(names, []).append(leaf)
        for names, members in groups.items():
            if names:
                sums = _sums([squares[leaf] for leaf in members], names)
                for leaf, total in zip(members, sums):
                    squares[leaf] = total
        return squares

    def _names(self, squares) -> list[Names]:
        varying, known = [layout.varying(x) for x in squares], _is_tracked()
        if isinstance(self.axes, str) and self.axes == "auto":
            if not known:
                raise ValueError(
                    "sharded_norm('auto') asks JAX over which axes a gradient varies, "
                    "but JAX does not track this with check_vma=False or in jax.pmap: "
                    "name the axes."
                )
            return [tuple(sorted(names)) for names in varying]
        every = [layout.mesh_axes(entry) for entry in self._entries(len(squares))]
        mesh = jax.sharding.get_abstract_mesh()
        unknown = {n for names in every for n in names}.difference(mesh.axis_names)
        if mesh.manual_axes and unknown:
            raise ValueError(
                f"sharded_norm was given the axes {sorted(unknown)}, but the mesh of "
                f"this shard_map has only {mesh.axis_names}."
            )
        if not known:
            return every
        return [tuple(n for n in a if n in b) for a, b in zip(every, varying)]

    def check_rows(self, leaves):
        """Refuse specs that divide a row of int8, which has one scale.

        Each device would compute the scale of its own shard, and the scales would
        differ.
        """
        if isinstance(self.axes, str) and self.axes == "auto":
            return
        for leaf, entry in zip(leaves, self._entries(len(leaves))):
            if isinstance(entry, PartitionSpec) and 0 < leaf.ndim == len(entry):
                parts = math.prod(map(_devices, layout.mesh_axes(entry[-1])))
                if parts > 1:
                    raise ValueError(
                        f"sharded_norm was given {entry} for a leaf in int8, which "
                        f"divides its last axis over {parts} devices: a row of it has "
                        "one scale. Leave that axis whole, or choose another dtype."
                    )

    def _entries(self, count) -> list[Any]:
        """The entry of ``axes`` for each of ``count`` leaves."""
        entries = jax.tree.leaves(self.axes, is_leaf=_is_entry)
        if len(entries) > count:  # a None may belong to a None, not to a leaf
            entries = [entry for entry in entries if entry is not None]
        if _is_entry(self.axes):
            entries *= count
        if len(entries) != count:
            raise ValueError(
                f"sharded_norm was given axes for {len(entries)} leaves, but the "
                f"gradients have {count}: {self.axes!r}."
            )
        return entries


def _sums(squares, names):
    try:
        return jax.lax.psum(squares, names)
    except NameError as error:
        raise ValueError(
            f"sharded_norm was given the axes {names}, but is not inside a shard_map "
            f"over all of them: {error}."
        ) from None


def _devices(name) -> int:
    """The number of devices along an axis, or 1 if shard_map does not manage it."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.axis_size(name) if name in manual else 1


def _is_entry(node) -> bool:
    """Whether this stands for one leaf: a name, names, a spec, or None."""
    if isinstance(node, PartitionSpec):
        names = () if layout.is_partial(node) else node
        return all(part is None or _is_names(part) for part in names)
    return node is None or _is_names(node)


def _is_names(part) -> bool:
    several = isinstance(part, tuple) and all(isinstance(name, str) for name in part)
    return several or isinstance(part, str)


def _is_tracked() -> bool:
    """Whether JAX tracks what varies. Under check_vma=False it does not."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return all(name in layout.varying(jax.lax.axis_index(name)) for name in manual)
