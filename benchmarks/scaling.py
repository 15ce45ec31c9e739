"""How the cost of one step grows: with the parameters, with C, and with the leaves.

    python benchmarks/scaling.py [--quick] [--rounds 21]

Each of the three is varied around 4 M float32 parameters in 4 leaves at C = 5. The
donated update with apply_updates takes turns with optax.adam. Every gradient enters the
buffer. The growth is the exponent of the time as a power of what is varied, from the
first row to the last.
"""

import argparse
import math

import optax
from measuring import (
    add_arguments,
    describe_machine,
    make_gradients,
    nbytes,
    optimizer_runner,
    report,
)
from tqdm import tqdm

import memoptax

SIZE, LEAVES, TOPC = 1 << 22, 4, 5
VARIED = {
    "parameters": [(1 << k, LEAVES, TOPC) for k in (16, 18, 20, 22, 24)],
    "C": [(SIZE, LEAVES, c) for c in (1, 5, 20, 80)],
    "leaves": [(SIZE, leaves, TOPC) for leaves in (1, 4, 16, 64, 300)],
}
QUICK = {"C": [(4096, 2, 1), (4096, 2, 5)]}
# With keys that halve at every step, any gradient of about the same norm enters.
OPTIMIZERS = {
    "sgd_c": lambda c: memoptax.sgd_c(1e-4, topc=c, decay=0.5),
    "adam_c": lambda c: memoptax.adam_c(1e-4, topc=c, decay=0.5),
    "adam_cm": lambda c: memoptax.adam_cm(1e-4, topc=c, decay=0.5),
    "sm3": lambda c: memoptax.sm3(1e-4),
}
COLUMNS = (
    "optimizer",
    "varied",
    "parameters",
    "leaves",
    "C",
    "ms",
    "/ adam",
    "state B/param",
)


def measure(size, leaves, topc, rounds):
    """Milliseconds, ratio to adam and bytes per parameter of every optimizer."""
    gradients = make_gradients(size, leaves)
    makes = {"optax.adam": lambda c: optax.adam(1e-4)} | OPTIMIZERS
    runners = {
        name: optimizer_runner(lambda make=make: make(topc), gradients[0])
        for name, make in makes.items()
    }
    for turn in range(topc + 2 + rounds):
        for runner in runners.values():
            runner.run(gradients[turn % len(gradients)])
    for runner in runners.values():
        del runner.seconds[: topc + 2]
    adam = runners["optax.adam"].milliseconds
    return {
        name: {
            "ms": runner.milliseconds,
            "/ adam": runner.milliseconds / adam,
            "state B/param": nbytes(runner.carry[1]) / (nbytes(gradients[0]) / 4),
        }
        for name, runner in runners.items()
    }


def growth(rows, varied):
    """The exponent of the time, as a power of ``varied``."""
    first, last = rows[0], rows[-1]
    return math.log(last["ms"] / first["ms"]) / math.log(last[varied] / first[varied])


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    add_arguments(parser)
    args = parser.parse_args(argv)
    machine, grid = describe_machine(), QUICK if args.quick else VARIED
    rows = []
    with tqdm(total=sum(map(len, grid.values())), unit="case") as bar:
        for varied, cases in grid.items():
            for size, leaves, topc in cases:
                bar.set_description(f"{varied}: {size} in {leaves}, C = {topc}")
                case = {"varied": varied, "parameters": size, "leaves": leaves}
                rounds = 3 if args.quick else args.rounds
                for name, row in measure(size, leaves, topc, rounds).items():
                    rows.append({"optimizer": name, **case, "C": topc, **row})
                bar.update()
    report(args, "scaling", machine, rows, COLUMNS)
    for varied in grid:
        for name in ("optax.adam", *OPTIMIZERS):
            chosen = [
                r for r in rows if (r["varied"], r["optimizer"]) == (varied, name)
            ]
            print(f"time of {name} ~ {varied}^{growth(chosen, varied):.2f}")
    return rows


if __name__ == "__main__":
    main()
