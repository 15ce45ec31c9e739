"""Meshes that do not fit, states bound to devices, and the memory of the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import each_factory
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import memoptax

from untyped import untyped

SMALLER = AbstractMesh((4,), ("data",))
MAKERS = [memoptax.sgd_c, memoptax.adam_cm, memoptax.sm3, memoptax.sm3_cm]
needs_host_memory = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="a CPU with jax before 0.10 has one memory"
)
each_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)


@each_maker
@pytest.mark.parametrize("spec", [P("model"), P(None, ("data", "model"))], ids=str)
def test_an_axis_that_the_mesh_does_not_have_is_named(make, spec, mesh):
    tx, params = make(0.1), {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    sentence = r"specs has .* for parameter \['w'\], but the mesh has no axis 'model'"
    with pytest.raises(ValueError, match=sentence):
        memoptax.state_partition_specs(tx, params, {"w": spec}, SMALLER)
    with pytest.raises(ValueError, match=sentence):
        memoptax.state_partition_specs(tx, params, {"w": spec}, SMALLER, over="data")
    there = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec))}
    with pytest.raises(ValueError, match=sentence):
        memoptax.state_shardings(tx, there, SMALLER)


def test_what_is_no_mesh_is_refused():
    tx, params = memoptax.sgd_c(0.1), jnp.ones((8, 8))
    for wrong in ("data", 3, (4, 2), {"data": 4}):
        for call in (
            lambda m: memoptax.state_partition_specs(tx, params, P(), m),
            lambda m: memoptax.state_shardings(tx, params, m),
        ):
            with pytest.raises(ValueError, match="mesh must be None, a Mesh or an"):
                call(wrong)
    with pytest.raises(ValueError, match="slots_memory_kind .* a mesh of devices"):
        memoptax.state_shardings(tx, params, SMALLER, slots_memory_kind="pinned_host")
    with pytest.raises(ValueError, match="specs must name mesh axes"):
        memoptax.state_partition_specs(tx, params, P(P.UNCONSTRAINED))
    for twice in (P("data", "data"), P(("data", "data"))):
        with pytest.raises(ValueError, match="must name each mesh axis once"):
            memoptax.state_partition_specs(tx, params, twice)
    for wrong in (P(3, 3), P(P.UNCONSTRAINED, P.UNCONSTRAINED)):
        with pytest.raises(ValueError, match="specs must name mesh axes"):
            memoptax.state_partition_specs(tx, jnp.ones((4, 4)), wrong)
    for wrong in (P(P.UNCONSTRAINED), P(3), {"w": P("data", None, ("model", 3))}):
        with pytest.raises(ValueError, match="axes must be 'auto', names of mesh axes"):
            memoptax.sharded_norm(wrong)
    for twice in (("data", "data"), P("data", "data"), {"w": P(("data", "data"))}):
        with pytest.raises(ValueError, match="axes must name each mesh axis once"):
            memoptax.sharded_norm(twice)


@pytest.mark.cpu_only("several devices")
@pytest.mark.parametrize("kind", ["reduced", "unreduced"])
def test_specs_with_reduced_axes_are_refused(kind):
    spec = P("data", **{kind: frozenset({"model"})})
    tx, params = memoptax.sgd_c(0.1), jnp.ones(8)
    with pytest.raises(ValueError, match=f"specs has .*{kind}.* for parameter"):
        memoptax.state_partition_specs(tx, params, spec)
    for axes in (spec, {"w": spec}):
        with pytest.raises(ValueError, match=f"axes must not have .* has .*{kind}="):
            memoptax.sharded_norm(axes)


@pytest.mark.cpu_only("several devices")
@each_factory
@pytest.mark.few(3)
def test_parts_of_a_sum_over_devices_are_refused(opt):
    """As optax.adam refuses them, but by name. Parameters may be such parts where a
    step does not use them.
    """
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    spec = P(None, "model", reduced=frozenset({"data"}))
    with jax.set_mesh(mesh):
        whole, part = (
            {"w": jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, s))}
            for s in (P(None, "model"), spec)
        )
        tx, message = opt.build(), r"\['w'\] is .*{R:data}, but must .*reshard"
        state = tx.init(whole)
        wrong = jax.tree.map(lambda x: part["w"] if x.shape == (8, 4) else x, state)
        calls = [
            lambda: tx.init(part),
            lambda: tx.update(part, state, whole),
            lambda: jax.jit(tx.update)(part, state, whole),
            lambda: memoptax.check_state(tx, part, state),
        ]
        if any(x is part["w"] for x in jax.tree.leaves(wrong)):
            calls += [
                lambda: tx.update(whole, wrong, whole),
                lambda: memoptax.check_state(tx, whole, wrong),
            ]
        if opt.memory == "buffer":
            calls += [lambda: memoptax.buffer_stats(state, part)]
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(ValueError, match=r"specs has .* for parameter \['w'\]"):
            memoptax.state_shardings(tx, part)
        if not opt.needs_params:
            tx.update(whole, state, part)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="jax before 0.10 tracks no sums in shard_map"
)
@pytest.mark.cpu_only("several devices")
@each_maker
def test_parts_of_a_sum_are_refused_in_shard_map(make):
    """They come from parameters that are reduced over a mesh axis."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    tx, params, batch = make(0.1), jnp.ones((3, 1)), jnp.ones((16, 3))
    state = tx.init(params)

    def step(summed, params, batch):
        gradients = jax.grad(lambda x: jnp.mean((batch @ x) ** 2))(params)
        if summed:
            gradients = jax.lax.psum(gradients, "data")
        return tx.update(gradients, state)[0]

    def sharded(summed):
        specs = (P(reduced=frozenset({"data"})), P("data"))
        there = [NamedSharding(mesh, spec) for spec in specs]
        function = functools.partial(step, summed)
        function = jax.shard_map(function, in_specs=specs, out_specs=P())
        return jax.jit(function)(*map(jax.device_put, (params, batch), there))

    with jax.set_mesh(mesh):
        sharded(summed=True)
        with pytest.raises(ValueError, match="gradient is .*{U:data}, .*psum"):
            sharded(summed=False)


def test_a_norm_over_an_axis_that_is_not_there_is_refused(mesh):
    tx = memoptax.critical_gradients(priority_fn=memoptax.sharded_norm("dta"))

    def step(x):
        return tx.update(x, tx.init(x))[0]

    for tracked in (True, False):
        specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": tracked}
        with pytest.raises(ValueError, match="sharded_norm was given the axes .*'dta'"):
            jax.eval_shape(jax.shard_map(step, mesh=mesh, **specs), jnp.ones((8, 8)))
    for axes in (3, {"w": 1.0}, [("data", 2)]):
        with pytest.raises(ValueError, match="axes must be 'auto', names of mesh axes"):
            memoptax.sharded_norm(axes)


@each_maker
def test_a_state_bound_to_other_devices_is_refused(make, mesh):
    """A restore may bind to a device what an eager init has left to JAX."""
    params = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data")))
    tx = optax.chain(make(0.1), optax.ema(0.9))
    state = tx.init(params)
    memoptax.check_state(tx, params, state)
    bound = jax.tree.map(
        lambda x: x if x.committed else jax.device_put(x, jax.devices()[1]), state
    )
    calls = [lambda state: memoptax.check_state(tx, params, state)]
    if make is not memoptax.sm3:
        resize = functools.partial(memoptax.resize_buffer, topc=2)
        calls += [memoptax.buffer_stats, memoptax.reset_buffer, resize]
    for call in calls:
        with pytest.raises(ValueError, match=r"bound to .*, but .* to .*: place"):
            call(bound)
    placed = jax.device_put(bound, memoptax.state_shardings(tx, params))
    memoptax.check_state(tx, params, placed)


@pytest.mark.cpu_only("several devices")
@pytest.mark.parametrize(
    "tx",
    [
        memoptax.sm3(0.1),
        optax.partition(
            {name: memoptax.sgd_c(0.1) for name in "ab"}, {"a": "a", "b": "b"}
        ),
    ],
    ids=["by leaf", "by group"],
)
def test_parameters_on_several_devices_have_states_there(tx):
    one, other = jax.devices()[:2]
    params = {
        "a": jax.device_put(jnp.ones(3), one),
        "b": jax.device_put(jnp.ones(3), other),
    }
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    memoptax.check_state(tx, params, state)


@pytest.mark.cpu_only("several devices")
def test_a_buffer_on_several_devices_is_refused_by_leaf():
    devices = jax.devices()
    params = {
        "a": jax.device_put(jnp.ones(3), devices[1]),
        "b": jax.device_put(jnp.ones(3), devices[3]),
    }
    tx = memoptax.sgd_c(0.1)
    with pytest.raises(
        ValueError,
        match=r"slots\['a'\] is bound to device 1, but slots\['b'\] to device 3: place",
    ):
        memoptax.check_state(tx, params, tx.init(params))


@needs_host_memory
@pytest.mark.cpu_only("several devices")
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_state_in_the_memory_of_the_host_is_checked(dtype):
    tx = memoptax.adam_c(0.1, topc=2, holding="sum", buffer_dtype=dtype)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    params = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data")))
    there = memoptax.state_shardings(tx, params, slots_memory_kind="pinned_host")
    state = jax.jit(tx.init, out_shardings=there)(params)
    step = jax.jit(tx.update, out_shardings=(params.sharding, there))
    state = step(params, state, params)[1]
    memoptax.check_state(tx, params, state)
    total = jnp.zeros_like(state[0].buffer.total)
    wrong = state[0]._replace(buffer=state[0].buffer._replace(total=total))
    with pytest.raises(ValueError, match="is not that of its slots"):
        memoptax.check_state(tx, params, (wrong, *state[1:]))


RESIZED = [
    {"topc": 1, "holding": "select"},
    {"topc": 2, "holding": "read"},
    {"topc": 2, "holding": "sum"},
]


def kinds(tree):
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)]


@needs_host_memory
@pytest.mark.cpu_only("several devices")
@pytest.mark.parametrize("smallest", [0, 32], ids=["whole", "large arrays"])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit, None])
@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(memoptax.adam_c, topc=3),
        functools.partial(memoptax.adam_c, topc=3, holding="sum"),
        functools.partial(memoptax.sm3_cm, topc=1),
    ],
    ids=["read", "sum", "select"],
)
@pytest.mark.few(6)
def test_tools_take_a_state_in_the_memory_of_the_host(make, dtype, mode, smallest):
    """As between steps that fetch it, whole or large arrays only. It stays there.

    The type of what a step has put there, on one device, says that it is on the device.
    """
    tx, params = make(0.1, buffer_dtype=dtype), jnp.ones((8, 4))
    if mode is not None:
        mesh = jax.make_mesh((2,), ("data",), (mode,))
        params = jax.device_put(params, NamedSharding(mesh, P("data")))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    host = jax.tree.map(
        lambda x: x.sharding.with_memory_kind(
            "pinned_host" if x.size >= smallest else "device"
        ),
        state,
    )
    hosted = jax.jit(lambda state: state, out_shardings=host)(state)
    assert kinds(hosted) == [sharding.memory_kind for sharding in jax.tree.leaves(host)]
    memoptax.check_state(tx, params, hosted)
    updates = jax.device_put(params, params.sharding.with_memory_kind("pinned_host"))
    for beside in ((), (updates,)):
        found, wanted = (memoptax.buffer_stats(s, *beside) for s in (hosted, state))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for changes in ({}, *RESIZED):
        found, wanted = (
            memoptax.resize_buffer(s, **changes)
            if changes
            else memoptax.reset_buffer(s)
            for s in (hosted, state)
        )
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        memoptax.check_state(make(0.1, buffer_dtype=dtype, **changes), params, found)
        assert kinds(found[1:]) == kinds(hosted[1:])
        new, old = found[0].buffer, hosted[0].buffer
        assert kinds(new.keys) == kinds(old.keys)
        alike = (new.entries is None) == (old.entries is None)
        assert kinds(new.slots) == kinds(old.slots if alike else old.keys)


@needs_host_memory
@pytest.mark.cpu_only("several devices")
@pytest.mark.parametrize("topc", [1, 2])
def test_a_buffer_in_the_memory_of_the_host_may_be_resized(topc):
    """A single slot is in the memory of the device. Every step reads all of it."""
    tx = memoptax.adam_c(0.1, topc=3, holding="sum")
    smaller = untyped(memoptax.adam_c(0.1, topc=topc))
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,))
    params = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    there = memoptax.state_shardings(tx, params, slots_memory_kind="pinned_host")
    state = jax.device_put(tx.init(params), there)
    with jax.set_mesh(mesh):
        state = memoptax.resize_buffer(state, topc)
        memoptax.check_state(smaller, params, state)
        updates, _ = smaller.update(params, state, params)
    want, _ = smaller.update(jnp.ones(8), smaller.init(jnp.ones(8)), jnp.ones(8))
    np.testing.assert_allclose(updates, want, rtol=1e-6)


@needs_host_memory
@pytest.mark.cpu_only("several devices")
@pytest.mark.parametrize("params", [{}, jnp.ones(3)], ids=["empty", "vector"])
def test_a_running_sum_is_made_on_the_device_of_its_buffer(params):
    device = jax.devices()[1]
    there = SingleDeviceSharding(device, memory_kind="pinned_host")
    state = memoptax.sgd_c(0.1, topc=3).init(params)
    state = memoptax.resize_buffer(jax.device_put(state, there), 4, holding="sum")
    assert {d for x in jax.tree.leaves(state) for d in x.devices()} == {device}
