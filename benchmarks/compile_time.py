"""Time to trace and compile one step, as a ratio to optax.adam, against leaves and C.

    python benchmarks/compile_time.py [--quick] [--device h100|v5e|v6e]
        [--leaves 10 50 200] [--topc 1 5 20 80] [--dtype float32 int8] [--repeats 3]

It measures the processor time of tracing, lowering and compiling the donated update
with apply_updates, and shows the median of the repeats. Leaves are matrices and vectors
of four shapes, as in a transformer of many equal layers. By default it compiles for the
device that is here. With ``--device`` it compiles for one that need not be present, as
``ahead_of_time.py`` does.
"""

import argparse
import functools
import statistics
import time

import absent_devices
import jax
import jax.numpy as jnp
import optax
from contexts import donated
from jax.sharding import SingleDeviceSharding
from measuring import RESULTS, add_arguments, describe_machine, report
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


def seconds(tx, leaves, device):
    shapes = [SHAPES[i % len(SHAPES)] for i in range(leaves)]
    step, arguments, donate = donated(
        tx, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    )
    there = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: x.update(sharding=there), arguments)
    jax.clear_caches()
    begin = time.process_time()
    jax.jit(step, donate_argnums=donate).lower(*arguments).compile()
    return time.process_time() - begin


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    targets = [name for name, t in absent_devices.TARGETS.items() if 1 in t.topologies]
    parser.add_argument("--device", choices=targets, help="by default the one here")
    parser.add_argument("--leaves", type=int, nargs="+", default=(10, 50, 200))
    parser.add_argument("--topc", type=int, nargs="+", default=(1, 5, 20, 80))
    dtypes = ("float32", "int8")
    parser.add_argument("--dtype", nargs="+", default=dtypes, help="of the slots")
    parser.add_argument("--repeats", type=int, default=3)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.leaves, args.topc, args.repeats = (4,), (5,), 1
    if args.device:
        absent_devices.open_no_device()
        (device,) = absent_devices.devices(args.device)
        machine = describe_machine() | absent_devices.describe(args.device)
        kept = RESULTS / f"ahead-of-time-{args.device}.json"
        args.output = args.output or (None if args.quick else kept)
    else:
        device, machine = jax.devices()[0], describe_machine()
    cases = [(name, None, None, make) for name, make in PLAIN.items()]
    cases += [
        (name, c, slots, functools.partial(make, 0.1, topc=c, buffer_dtype=slots))
        for name, make in OPTIMIZERS.items()
        for c in args.topc
        for slots in args.dtype
    ]
    seconds(optax.adam(0.1), 4, device)  # this also starts the compiler
    rows = []
    with tqdm(total=len(args.leaves) * len(cases), unit="case") as bar:
        for leaves in args.leaves:
            after = seconds(optax.adam(0.1), leaves, device)
            for name, c, slots, make in cases:
                bar.set_description(f"{name}, C = {c}, {slots}, {leaves} leaves")
                taken, ratios = [], []
                for _ in range(args.repeats):
                    taken.append(seconds(make(), leaves, device))
                    before, after = after, seconds(optax.adam(0.1), leaves, device)
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
