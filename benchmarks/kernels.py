"""Where the time of a step goes: the kernels of the compiled program, by jax.profiler.

    python benchmarks/kernels.py [--quick] [--topc 5] [optimizer ...]

For every kernel it prints how many arrays of a leaf's size it touches, and its time in
copies. One copy is the time to move all leaves once, taken from a plain x + y (two
reads, one write). If a kernel's time in copies is about what it touches, memory limits
it. If it is more, the kernel computes or waits. Kernels run side by side where they
can, so their times add up to more than the step's.
"""

import argparse
import collections
import math
import pathlib
import re
import statistics
import tempfile

import jax
import jax.numpy as jnp
import steps
from measuring import Runner, add_arguments, describe_machine, make_gradients, report
from tqdm import tqdm

NAMES = ("optax.adam", "sgd_c", "adam_c", "adam_cm", "rmsprop_c", "sm3")
LEAVES = 4
COLUMNS = ("optimizer", "slots", "kernel", "leaves", "touches", "ms", "copies")
INSTRUCTION = re.compile(
    r"%?([\w.\-]+) = (\w+\[[\d,]*\])\S* ([a-z][a-z\-]*)\(([^)]*)\)"
)


def kernels(compiled, leaf):
    """For each instruction: its kind, and how many leaves it reads and writes.

    Only operands and results of at least ``leaf`` elements count. A kernel reads one
    slot of a stack, or writes one in place.
    """
    found = INSTRUCTION.findall(compiled.as_text())
    elements = {
        name: math.prod(map(int, re.findall(r"\d+", shape.split("[")[1])))
        for name, shape, _, _ in found
    }
    kinds = {}
    for name, _, opcode, operands in found:
        operands = set(re.findall(r"%([\w.\-]+)", operands)) | {name}
        touched = sum(elements.get(x, 0) >= leaf for x in operands)
        in_place = "dynamic-update-slice" in name
        if opcode not in ("get-tuple-element", "bitcast", "parameter") and touched:
            # Kernels that differ only in their number are one kind, on several leaves.
            kinds[name] = re.sub(r"[.\d]+$", "", name), touched - in_place
    return kinds


def profile(runner, arguments, rounds):
    """For each kind of kernel: its milliseconds in a step (by a trace), its count."""
    leaf = min(x.size for x in jax.tree.leaves(arguments[0][0]))
    kinds = kernels(runner.step, leaf)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for turn in range(rounds):
                runner.run(*arguments[turn % len(arguments)])
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(file))
    spent, names = collections.Counter(), collections.defaultdict(set)
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in kinds:
                    kind = kinds[event.name]
                    spent[kind] += event.duration_ns / 1e6 / rounds
                    names[kind].add(event.name)
    if not spent:
        raise SystemExit("The trace names no kernel of the compiled program.")
    return [
        {"kernel": kind[0], "touches": kind[1], "leaves": len(names[kind]), "ms": ms}
        for kind, ms in spent.most_common()
    ]


def copy_milliseconds(gradients, rounds):
    """Time to read or write one copy of the parameters."""

    def add(carry, other):
        return jax.tree.map(jnp.add, carry, other)

    runner = Runner(add, jax.tree.map(jnp.copy, gradients[0]), gradients[1])
    for _ in range(rounds + 2):
        runner.run(gradients[1])
    return 1e3 * statistics.median(runner.seconds[2:]) / 3


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("optimizer", nargs="*", default=NAMES)
    parser.add_argument("--topc", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="of the slots")
    parser.add_argument("--rounds", type=int, default=20)
    add_arguments(parser)
    args = parser.parse_args(argv)
    machine = describe_machine()
    gradients = make_gradients(1 << 12 if args.quick else 1 << 24, LEAVES)
    rounds = 2 if args.quick else args.rounds
    one = copy_milliseconds(gradients, rounds)
    arguments = [(g, jnp.float32(steps.ACCEPTING)) for g in gradients]
    rows = []
    for name in tqdm(args.optimizer, unit="optimizer"):
        buffered = name in steps.BUFFERED
        topc, dtype = (args.topc, args.dtype) if buffered else (None, None)
        runner = steps.make_runner(name, gradients[0], topc, dtype)
        for turn in range((topc or 0) + 2):
            runner.run(*arguments[turn % len(arguments)])
        runner.seconds.clear()
        parts = profile(runner, arguments, rounds)
        touched = sum(part["touches"] * part["leaves"] for part in parts) / LEAVES
        whole = {"kernel": "the step", "touches": touched, "ms": runner.milliseconds}
        rows += [{"optimizer": name, "slots": dtype, **row} for row in (whole, *parts)]
        del runner
    for row in rows:
        row["copies"] = row["ms"] / one
    report(args, "kernels", machine, rows, COLUMNS)
    print(f"One copy of the parameters: {one:.2f} ms")
    return rows


if __name__ == "__main__":
    main()
