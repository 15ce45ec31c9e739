"""Time of a donated training step of SM3, relative to optax.adam and optax.sm3.

    python benchmarks/sm3.py [--quick] [--rounds 31] [--json sm3.json] [shape ...]

The optimizers take turns in one process, step by step, so that a busy machine slows all
of them down; the table shows ratios of medians. A step is `tx.update` and
`optax.apply_updates` on given gradients, with parameters and state donated.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


class Runner:
    """One optimizer with its compiled step and what the steps took."""

    def __init__(self, tx, params, grads):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.grads, self.seconds = grads, []
        self.carry = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        self.size = sum(p.nbytes for p in params)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.carry[1]))
        start = time.perf_counter()
        self.step = step.lower(*self.carry, grads).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes

    def run(self):
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.step(*self.carry, self.grads))
        self.seconds.append(time.perf_counter() - start)


def measure(shapes, rounds):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [jax.random.normal(k, s) for k, s in zip(keys, shapes)]
    grads = [0.1 * p for p in params]
    runners = {name: Runner(tx, params, grads) for name, tx in OPTIMIZERS.items()}
    for _ in range(rounds + 2):
        for runner in runners.values():
            runner.run()
    medians = {n: statistics.median(r.seconds[2:]) for n, r in runners.items()}
    return {
        name: {
            "ms": 1e3 * medians[name],
            "of adam": medians[name] / medians["optax.adam"],
            "of optax.sm3": medians[name] / medians["optax.sm3"],
            "temporaries": r.temporaries / r.size,
            "state": r.state_bytes / r.size,
            "compile of adam": r.compile_seconds
            / runners["optax.adam"].compile_seconds,
        }
        for name, r in runners.items()
    }


def measure_rows(rounds, touched=1024, columns=64, sizes=(10_000, 1_000_000)):
    """A step that touches 1,024 rows of a small and of a large table."""
    tx = memoptax.sm3(0.1, cover=memoptax.rows)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        _, g = memoptax.row_value_and_grad(lambda r: jnp.sum(r**2), table, ids)
        updates, state = tx.update(g, state)
        return memoptax.apply_updates(table, updates), state

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


def main(shapes=SHAPES, rounds=31):
    columns = ["ms", "of adam", "of optax.sm3", "temporaries", "state"]
    columns += ["compile of adam"]
    print(f"| parameters | optimizer | {' | '.join(columns)} |")
    print("|---|---|" + "---:|" * len(columns))
    results = {}
    for kind, leaves in shapes.items():
        results[kind] = measure(leaves, rounds)
        for name, row in results[kind].items():
            cells = " | ".join(f"{row[c]:.2f}" for c in columns)
            print(f"| {kind} | {name} | {cells} |", flush=True)
    print("\ntemporaries and state in copies of the parameters\n")
    rows = measure_rows(rounds)
    for n, ms in rows.items():
        print(f"row-sparse, 1,024 rows of {n:,} x 64: {ms:.2f} ms")
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "dense": results,
        "row-sparse ms": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="*", help="names that a shape contains")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, for CI")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", help="where to write the figures")
    arguments = parser.parse_args()
    chosen = QUICK if arguments.quick else SHAPES
    if arguments.shape:
        chosen = {
            k: v for k, v in chosen.items() if any(s in k for s in arguments.shape)
        }
    figures = main(chosen, arguments.rounds)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)
