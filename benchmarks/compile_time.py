"""Time to trace and compile one step, as a ratio to optax.adam, against leaves and C.

    python benchmarks/compile_time.py [--quick] [--leaves 10 50 200] [--topc 1 5 20 80]
        [--dtype float32 int8] [--repeats 3]

It measures the processor time of tracing, lowering and compiling the donated update
with apply_updates, and shows the median of the repeats. Leaves are matrices and vectors
of four shapes, as in a transformer of many equal layers. XLA compiles equal code only
once.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import optax
from measuring import add_arguments, describe_machine, optimizer_runner, report
from tqdm import tqdm

import memoptax

SHAPES = ((64, 64), (64,), (64, 128), (128,))
OPTIMIZERS = {
    "sgd_c": memoptax.sgd_c,
    "adam_c": memoptax.adam_c,
    "adam_cm": memoptax.adam_cm,
}
PLAIN = {
    "sm3": lambda: memoptax.sm3(0.1),
    "optax.sm3": lambda: optax.sm3(0.1),
    "optax.adamw": lambda: optax.adamw(0.1),
}
COLUMNS = ("optimizer", "leaves", "C", "slots", "seconds", "/ adam")


def seconds(tx, leaves):
    like = [jnp.zeros(SHAPES[i % len(SHAPES)]) for i in range(leaves)]
    jax.clear_caches()
    return optimizer_runner(lambda: tx, like).compile_processor_seconds


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, nargs="+", default=(10, 50, 200))
    parser.add_argument("--topc", type=int, nargs="+", default=(1, 5, 20, 80))
    dtypes = ("float32", "int8")
    parser.add_argument("--dtype", nargs="+", default=dtypes, help="of the slots")
    parser.add_argument("--repeats", type=int, default=3)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.leaves, args.topc, args.repeats = (4,), (5,), 1
    machine = describe_machine()
    cases = [(name, None, None, make) for name, make in PLAIN.items()]
    cases += [
        (name, c, slots, functools.partial(make, 0.1, topc=c, buffer_dtype=slots))
        for name, make in OPTIMIZERS.items()
        for c in args.topc
        for slots in args.dtype
    ]
    seconds(optax.adam(0.1), 4)  # the first compilation also starts the compiler
    rows = []
    with tqdm(total=len(args.leaves) * len(cases), unit="case") as bar:
        for leaves in args.leaves:
            after = seconds(optax.adam(0.1), leaves)
            for name, c, slots, make in cases:
                bar.set_description(f"{name}, C = {c}, {slots}, {leaves} leaves")
                taken, ratios = [], []
                for _ in range(args.repeats):
                    taken.append(seconds(make(), leaves))
                    before, after = after, seconds(optax.adam(0.1), leaves)
                    ratios.append(taken[-1] / ((before + after) / 2))
                rows.append(
                    {
                        "optimizer": name,
                        "leaves": leaves,
                        "C": c,
                        "slots": slots,
                        "seconds": statistics.median(taken),
                        "/ adam": statistics.median(ratios),
                    }
                )
                bar.update()
    report(args, "compile time", machine, rows, COLUMNS)
    return rows


if __name__ == "__main__":
    main()
