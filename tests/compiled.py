"""Training steps, and how XLA compiles them: temporaries, copies of a buffer."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memoptax._buffer import algorithm

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = "
    r"(?P<type>\([^)]*\)|\w+\[[\d,]*\])\S* (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
# Operations of a buffer's size that cost nothing, or change one slot in place.
_FREE = {"parameter", "get-tuple-element", "bitcast", "conditional", "while"}
_IN_PLACE = {"dynamic-update-slice", "scatter"}


PARAMS = {
    "one": {"w": (768, 768)},
    "many": {f"w{i}": (256, 128 + 40 * (i % 3)) for i in range(9)},
}
CONTEXTS = ("plain", "scan", "vmap", "apply_if_finite", "mesh")


def context(name, tx, params, mesh):
    """A step in the context ``name``, its arguments, and the copies it may hold."""
    if name == "apply_if_finite":
        tx = optax.apply_if_finite(tx, 3)
    step = step_of(tx)
    if name == "vmap":
        params = jax.tree.map(lambda p: jnp.stack([p] * 3), params)
        return jax.vmap(step), (params, jax.vmap(tx.init)(params), params), 1.1
    if name == "mesh":
        sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
        params = jax.device_put(params, sharding)
    state = tx.init(params)
    if name == "scan":

        def scanned(params, state, _):
            def body(carry, _):
                params, state = carry
                # The gradient of half the squared norm is the parameters themselves.
                # Any other would be computed inside, as one more copy.
                return step(params, state, params), None

            return jax.lax.scan(body, (params, state), length=4)[0]

        return scanned, (params, state, params), 0.1
    return step, (params, state, params), 1.1 if name == "apply_if_finite" else 0.1


def step_of(tx) -> Callable:
    """A training step: update and apply."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, stream):
    """The parameters after every step of a stream of gradients, and the last state."""

    def body(carry, gradient):
        carry = step_of(tx)(*carry, gradient)
        return carry, carry[0]

    carry, trajectory = jax.lax.scan(body, (params, tx.init(params)), stream)
    return trajectory, carry[1]


def compile_step(step, params, state, gradients) -> Any:
    """``step`` compiled as recommended: parameters and state donated."""
    donated = jax.jit(step, donate_argnums=(0, 1))
    return donated.lower(params, state, gradients).compile()


def temporaries(compiled, params):
    """Temporaries in copies of the parameters (on a mesh: of one device's part)."""
    own = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(params)
    )
    return compiled.memory_analysis().temp_size_in_bytes / own


def assert_slots_stay_in_place(name, tx, params, mesh, limit=None):
    """The step stays within its temporaries, and makes no second stack.

    A single slot has its parameter's shape. XLA's CPU backend copies it before it is
    overwritten (twice in a scan), one leaf at a time.
    """
    step, arguments, allowed = context(name, tx, params, mesh)
    compiled = compile_step(step, *arguments)
    nodes = jax.tree.leaves(arguments[1], is_leaf=_is_buffer)
    (buffer,) = (node for node in nodes if _is_buffer(node))
    lone = buffer.entries is None
    copies = 0 if not lone else 2 if name == "scan" else 1
    assert temporaries(compiled, arguments[0]) <= (limit or allowed) + copies
    if lone:
        return
    sizes = {
        math.prod(stack.sharding.shard_shape(stack.shape))
        for stack in jax.tree.leaves((buffer.slots, buffer.scales))
    }
    assert sizes and whole_buffer_operations(compiled, sizes) == []
    if buffer.total is not None:
        # The rebuild must be compiled in, or the test shows nothing.
        loops = compiled.as_text().count(" while(")
        assert loops >= (2 if name == "scan" else 1)


def _is_buffer(node):
    return isinstance(node, algorithm.Buffer)


def whole_buffer_operations(compiled, sizes):
    """Names of operations that write a new array of one of these ``sizes``."""
    instructions, roots, current = [], {}, ""
    for line in compiled.as_text().splitlines():
        if header := _COMPUTATION.match(line):
            current = header["name"]
        elif found := _INSTRUCTION.match(line):
            instructions.append((current, found))
            if found["root"]:
                roots[current] = found["opcode"]
    fused = {
        call[1]
        for _, found in instructions
        if found["opcode"] == "fusion"
        and (call := re.search(r"calls=%?([\w.-]+)", found["rest"]))
    }
    bad = []
    for computation, found in instructions:
        if computation in fused or _size(found["type"]) not in sizes:
            continue
        opcode = found["opcode"]
        if opcode == "fusion":
            opcode = roots[re.findall(r"calls=%?([\w.-]+)", found["rest"])[0]]
        if opcode not in _FREE | _IN_PLACE:
            bad.append(f"{found['name']}: {opcode}")
    return bad


def _size(array_type):
    """Elements of an array type, or 0 for a tuple, whose arrays are made elsewhere."""
    if array_type.startswith("("):
        return 0
    dimensions = re.findall(r"\[([\d,]*)\]", array_type)[0]
    return math.prod(int(d) for d in dimensions.split(",") if d)
