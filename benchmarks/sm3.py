"""Time of a donated training step of SM3, relative to optax.adam and optax.sm3.

    python benchmarks/sm3.py [--quick] [--rounds 31] [--dtype bfloat16] [shape ...]

The optimizers take turns in one process, step by step, so that a busy machine slows all
of them down. The order changes every time, so that none always runs after the same one.
The table shows ratios of medians. A step is `tx.update` and `optax.apply_updates` on
given gradients, with parameters and state donated.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import (
    add_arguments,
    describe_machine,
    nbytes,
    optimizer_runner,
    report,
)

import memoptax

SHAPES = {
    "square: 4 x (2048, 2048)": [(2048, 2048)] * 4,
    "convolution: 7 x (3, 3, 512, 512)": [(3, 3, 512, 512)] * 7,
    "vector: 4 x (4194304,)": [(4 * 2**20,)] * 4,
    "tall: (200000, 64)": [(200_000, 64)],
    "tall: (50257, 768)": [(50_257, 768)],
    "wide: (64, 200000)": [(64, 200_000)],
    "wide: (768, 50257)": [(768, 50_257)],
    "small: 64 x (256, 256)": [(256, 256)] * 64,
}
QUICK = {"square: (256, 256)": [(256, 256)], "vector: (65536,)": [(2**16,)]}
OPTIMIZERS = {
    "optax.adam": optax.adam(1e-3),
    "optax.sm3": optax.sm3(1e-3),
    "sm3": memoptax.sm3(1e-3),
    "sm3, momentum": memoptax.sm3(1e-3, 0.9),
    "sm3, momentum in int8": memoptax.sm3(1e-3, 0.9, momentum_dtype="int8"),
}


COLUMNS = (
    "optimizer",
    "parameters",
    "ms",
    "/ adam",
    "/ optax.sm3",
    "temporaries",
    "state",
)


def measure(shapes, rounds, dtype):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes)]
    size = nbytes(gradients)
    runners = {
        name: optimizer_runner(lambda tx=tx: tx, gradients)
        for name, tx in OPTIMIZERS.items()
    }
    order = np.random.default_rng(0)
    for _ in range(rounds + 2):
        for name in order.permutation(list(runners)):
            runners[name].run(gradients)
    medians = {n: statistics.median(r.seconds[2:]) for n, r in runners.items()}
    return {
        name: {
            "ms": 1e3 * medians[name],
            "/ adam": medians[name] / medians["optax.adam"],
            "/ optax.sm3": medians[name] / medians["optax.sm3"],
            "temporaries": r.temporaries / size,
            "state": nbytes(r.carry[1]) / size,
        }
        for name, r in runners.items()
    }


def measure_rows(rounds, touched=1024, columns=64, sizes=(10_000, 1_000_000)):
    """A step that touches 1,024 rows of a small and of a large table."""
    tx = memoptax.sm3(0.1, cover=memoptax.covers.rows)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        _, g = memoptax.sparse.row_value_and_grad(lambda r: jnp.sum(r**2), table, ids)
        updates, state = tx.update(g, state)
        return memoptax.sparse.apply_updates(table, updates), state

    rng = np.random.default_rng(0)
    tables = {n: jnp.ones((n, columns)) for n in sizes}
    carries = {n: (t, tx.init(t)) for n, t in tables.items()}
    del tables
    seconds = {n: [] for n in sizes}
    for _ in range(3 * rounds + 5):
        for n in sizes:
            ids = jax.block_until_ready(jnp.asarray(rng.integers(0, n, touched)))
            start = time.perf_counter()
            carries[n] = jax.block_until_ready(step(*carries[n], ids))
            seconds[n].append(time.perf_counter() - start)
    return {n: 1e3 * statistics.median(s[5:]) for n, s in seconds.items()}


def main(argv=None):
    """The figures of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="*", help="parts of names of shapes")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--dtype", default="float32", help="of the parameters")
    add_arguments(parser)
    args = parser.parse_args(argv)
    machine, rounds = describe_machine(), 3 if args.quick else args.rounds
    rows = []
    for kind, leaves in (QUICK if args.quick else SHAPES).items():
        if not args.shape or any(text in kind for text in args.shape):
            for name, row in measure(leaves, rounds, args.dtype).items():
                rows.append({"optimizer": name, "parameters": kind, **row})
    section = "sm3" if args.dtype == "float32" else f"sm3 {args.dtype}"
    for size, ms in measure_rows(rounds).items() if section == "sm3" else ():
        rows.append(
            {"optimizer": "sm3", "parameters": f"rows of {size} x 64", "ms": ms}
        )
    report(args, section, machine, rows, COLUMNS)
    print("temporaries and state in copies of the parameters")
    return rows


if __name__ == "__main__":
    main()
