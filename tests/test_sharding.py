"""On eight devices: where the state is, what a step sends, and equal numbers."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax
from memoptax import _sharding

from compiled import compile_step, step_of, temporaries, train
from meshes import (
    BUFFER,
    LAYOUTS,
    OPTIMIZERS,
    SHAPES,
    assert_lies_as,
    few,
    mesh_of,
    placed,
    values,
)
from untyped import untyped

pytestmark = [pytest.mark.cpu_only("a mesh of eight devices"), pytest.mark.few(1)]


# Where the state is


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["sgd_c", "adam_cm", "sm3", "sm3_cm", "partition"])
def test_init_follows_the_parameters(name, kind):
    """Eagerly, and jitted in explicit mode. In automatic mode jit must be told."""
    tx, mesh = OPTIMIZERS[name](), mesh_of(kind)
    with jax.set_mesh(mesh):
        params = placed(values(), mesh, LAYOUTS["mixed"])
        shardings = memoptax.state_shardings(tx, params)
        explicit = kind is AxisType.Explicit
        jitted = jax.jit(tx.init, out_shardings=None if explicit else shardings)
        assert_lies_as(shardings, jitted(params))
        eager = tx.init(params)
    alone, everywhere = jax.devices()[0], NamedSharding(mesh, P())
    # Eagerly, arrays that follow no parameter are on one device.
    assert_lies_as(
        shardings,
        jax.tree.map(
            lambda x: jax.device_put(x, everywhere) if x.devices() == {alone} else x,
            eager,
        ),
    )


@pytest.mark.parametrize(
    ("name", "layout"), [("sgd_c", "fsdp"), ("adam_cm", "tensor parallel")]
)
def test_a_device_holds_an_eighth(name, layout, mesh):
    tx = OPTIMIZERS[name]()
    params = placed(values(), mesh, LAYOUTS[layout])
    init = jax.jit(tx.init, out_shardings=memoptax.state_shardings(tx, params))
    large = small = held = 0
    for x in jax.tree.leaves(init(params)):
        held += x.addressable_shards[0].data.nbytes
        if x.nbytes >= 64:  # a moment of the vector is the smallest large array
            large += x.nbytes
        else:
            small += x.nbytes
    of_params = 4 * sum(math.prod(s) for s in SHAPES.values() if s)
    copies = 3 + 1  # C and a spare, and a moment (adam_cm has one more)
    assert large >= (copies if name == "sgd_c" else copies + 1) * of_params
    assert held == large / 8 + small
    assert small < 600


def test_accumulators_of_sm3_are_not_on_every_device(mesh):
    tx = memoptax.sm3(0.1)
    x = jax.device_put(jnp.zeros((64, 32)), NamedSharding(mesh, P("data", "model")))
    state = untyped(tx.init(x))[0]
    held = [a.addressable_shards[0].data.size for a in state.accumulators[0]]
    assert held == [64 // 4, 32 // 2]


# What a step does


STEPS = [(name, "mixed") for name in OPTIMIZERS if name not in ("sgd_c", "adam_cm")]
STEPS += [("sgd_c", "fsdp"), ("adam_cm", "tensor parallel"), ("sm3", "fsdp")]


@functools.cache
def alone(name):
    tx = OPTIMIZERS[name]()
    trajectory, _ = jax.jit(functools.partial(train, tx))(few(values()), few(values(4)))
    return trajectory


@pytest.mark.parametrize(("name", "layout"), STEPS)
def test_a_mesh_changes_nothing_and_sends_few_numbers(name, layout, mesh):
    tx, specs = OPTIMIZERS[name](), LAYOUTS[layout]
    params, stream = placed(few(values()), mesh, specs), few(values(4))
    shardings = memoptax.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    gradients = placed(jax.tree.map(lambda x: x[0], stream), mesh, specs)
    compiled = compile_step(step_of(tx), params, state, gradients)
    for i in range(4):
        gradients = placed(jax.tree.map(lambda x, i=i: x[i], stream), mesh, specs)
        params, state = compiled(params, state, gradients)
        for key, expected in alone(name).items():
            np.testing.assert_allclose(params[key], expected[i], atol=2e-5, rtol=1e-5)
    assert_lies_as(shardings, state)
    text = compiled.as_text()
    for forbidden in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {forbidden}(" not in text, forbidden
    # Norms, one for each leaf, and SM3's accumulators, of up to 32 numbers.
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n)
        for line in re.findall(r"= (.*) all-reduce\(", text)
        for shape in re.findall(r"\[([\d,]*)\]", line)
    ]
    assert sizes and max(sizes) <= (
        128 if name in ("sm3", "sm3_cm", "partition") else len(SHAPES)
    )


@pytest.mark.slow  # the oldest jax takes more temporaries
def test_slots_divided_by_a_generic_helper_cost_what_the_docs_say():
    """The figures of docs/zero1.md."""
    tx = memoptax.adam_c(1e-3, topc=7)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    like = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=whole)
    shapes = jax.eval_shape(tx.init, like)

    def first_divisible_axis(x):
        axis = next((k for k, size in enumerate(x.shape) if size % 8 == 0), None)
        entries = () if axis is None else (*[None] * axis, "data")
        return NamedSharding(mesh, P(*entries))

    def cost(shardings):
        state = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)
        placed = {"out_shardings": (whole, shardings), "donate_argnums": (0, 1)}
        step = jax.jit(step_of(tx), **placed)
        compiled = step.lower(like, state, like).compile()
        program = Program(compiled.as_text())
        sent = sum(a.size for i in program.collectives() for a in i.arrays)
        return 4 * sent / like.size, temporaries(compiled, like)

    right = cost(memoptax.state_shardings(tx, like, over="data"))
    np.testing.assert_allclose(right, (4, 1 / 8), rtol=0.01)
    wrong = cost(jax.tree.map(first_divisible_axis, shapes))
    np.testing.assert_allclose(wrong, (12, 3), rtol=0.01)


# Slots in host memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd_c", "adam_cm"])
@pytest.mark.long
def test_slots_may_lie_in_the_memory_of_the_host(name, mesh):
    """The numbers stay, and a step copies no buffer on the device or to it."""
    make = {"sgd_c": memoptax.sgd_c, "adam_cm": memoptax.adam_cm}[name]
    tx, specs = make(0.01, holding="sum", **BUFFER), LAYOUTS["mixed"]

    def run(**options):
        params = placed(few(values()), mesh, specs)
        with pytest.raises(ValueError, match="pass holding='sum'"):
            memoptax.state_shardings(
                make(0.01, **BUFFER), params, slots_memory_kind="pinned_host"
            )
        shardings = memoptax.state_shardings(tx, params, **options)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        compiled = compile_step(step_of(tx), params, state, params)
        for i in range(6):
            gradients = jax.tree.map(lambda x, i=i: x[i], few(values(6)))
            gradients = placed(gradients, mesh, specs)
            params, state = compiled(params, state, gradients)
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        return params, state[0].buffer, temporaries

    params, there, temporaries = run()
    hosted_params, here, hosted_temporaries = run(slots_memory_kind="pinned_host")
    jax.tree.map(np.testing.assert_array_equal, params, hosted_params)
    jax.tree.map(np.testing.assert_array_equal, there, here)
    assert hosted_temporaries == temporaries
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, here)
    assert set(kinds.slots.values()) == {"pinned_host"}
    assert "pinned_host" not in jax.tree.leaves(kinds._replace(slots=None))
    larger = memoptax.resize_buffer(here, 5, holding="sum")
    for buffer in (memoptax.reset_buffer(here), larger):
        for slots in buffer.slots.values():
            assert slots.sharding.memory_kind == "pinned_host"


def test_memory_that_is_not_there_is_refused(mesh):
    tx, x = memoptax.sgd_c(0.1), jax.ShapeDtypeStruct((8,), jnp.float32)
    # JAX itself accepts 'unpinned_host' and leaves the slots where they are.
    for kind in ("disk", "unpinned_host"):
        message = f"slots_memory_kind must be one of 'pinned_host', .* is '{kind}'"
        with pytest.raises(ValueError, match=message):
            memoptax.state_shardings(tx, x, mesh, slots_memory_kind=kind)

    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return [types.SimpleNamespace(kind="device")]

    message = (
        r"is 'pinned_host', but the devices of the mesh \(abacus\) have only device"
    )
    with pytest.raises(ValueError, match=message):
        mesh = types.SimpleNamespace(devices=np.array([Device()]))
        _sharding._check_memory("pinned_host", mesh)
