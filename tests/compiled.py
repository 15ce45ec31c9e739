"""Training steps, and what XLA made of them: temporaries, copies of a buffer."""

import math
import re

import jax
import optax

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = "
    r"(?P<type>\([^)]*\)|\w+\[[\d,]*\])\S* (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
# Results of a buffer's size that cost nothing, or touch one slot in place.
_FREE = {"parameter", "get-tuple-element", "bitcast", "conditional", "while"}
_IN_PLACE = {"dynamic-update-slice", "scatter"}


def step_of(tx):
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


def compile_step(step, params, state, gradients):
    """``step`` compiled as users should: parameters and state donated."""
    donated = jax.jit(step, donate_argnums=(0, 1))
    return donated.lower(params, state, gradients).compile()


def temporaries(compiled, params):
    """Temporary bytes, in copies of the parameters (on a mesh: of one device's)."""
    own = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(params)
    )
    return compiled.memory_analysis().temp_size_in_bytes / own


def whole_buffer_operations(compiled, elements):
    """Names of operations that make an array of at least ``elements`` anew."""
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
        if computation in fused or _size(found["type"]) < elements:
            continue
        opcode = found["opcode"]
        if opcode == "fusion":
            opcode = roots[re.search(r"calls=%?([\w.-]+)", found["rest"])[1]]
        if opcode not in _FREE | _IN_PLACE:
            bad.append(f"{found['name']}: {opcode}")
    return bad


def _size(array_type):
    """Elements of an array type; 0 for a tuple, whose arrays are made elsewhere."""
    if array_type.startswith("("):
        return 0
    dimensions = re.search(r"\[([\d,]*)\]", array_type)[1]
    return math.prod(int(d) for d in dimensions.split(",") if d)
