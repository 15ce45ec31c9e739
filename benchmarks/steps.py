"""Time and memory of a step of all optimizers but sm3_cm, as ratios to ``optax.adam``.

    python benchmarks/steps.py [--quick] [--flat] [--size 1048576 16777216]
        [--leaves 1 64] [--topc 1 5 20 80] [--dtype float32 bfloat16 int8] [--steps 10]

In one process, each optimizer takes turns with adam on the same parameters and
gradients, so that other work on the machine slows both. The donated, jitted update with
``apply_updates`` is timed once the buffer is full, in two streams of gradients. In one
every gradient enters the buffer, and in the other none does.

``--flat`` shows instead whether the time of a step depends on C. It takes the mean over
500 accepted steps of ``sgd_c``, with the rebuilds of its sums.
"""

import argparse
import itertools
import statistics

import jax
import jax.numpy as jnp
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

RATE = 1e-4
TOPC = (1, 5, 20, 80)
FLAT_TOPC = (1, 5, 20, 100)
FLAT_LEAVES = (4, 1)
SIZES = (1 << 20, 1 << 24)
LEAVES = (1, 64)

DTYPES = ("float32", "bfloat16", "int8")

# Optimizers with a buffer, and their arguments besides it.
BUFFERED = {
    "sgd_c": (memoptax.sgd_c, {}),
    "sgd_c momentum": (memoptax.sgd_c, {"momentum": 0.9}),
    "rmsprop_c": (memoptax.rmsprop_c, {}),
    "adam_c": (memoptax.adam_c, {}),
    "adamw_c": (memoptax.adamw_c, {}),
    "sgd_cm": (memoptax.sgd_cm, {}),
    "adam_cm": (memoptax.adam_cm, {}),
    "adamw_cm": (memoptax.adamw_cm, {}),
}
# Optimizers without a buffer.
PLAIN = {
    "optax.adam": (optax.adam, {}),
    "optax.sgd momentum": (optax.sgd, {"momentum": 0.9}),
    "sm3": (memoptax.sm3, {}),
    "sm3 momentum": (memoptax.sm3, {"momentum": 0.9}),
}
COLUMNS = (
    *("optimizer", "topc", "slots", "size", "leaves"),
    *("accepted ms", "accepted / adam", "rejected ms", "rejected / adam"),
    *("temporaries", "state B/param"),
)
FLAT_COLUMNS = (
    *("optimizer", "topc", "size", "leaves", "accepted", "rebuilds"),
    *("mean ms", "/ adam", "median ms", "slowest ms", "adam: slowest"),
)
# If keys halve at every step, a gradient of about the same norm always enters. If keys
# never decay, a smaller one never does.
ACCEPTING, REJECTING = 0.5, 1.0


def make_runner(name, gradients, topc=None, dtype=None, **chosen):
    """A runner. Its arguments are gradients and the decay of keys, which is traced."""

    def make(decay):
        if name in PLAIN:
            function, options = PLAIN[name]
            return function(RATE, **options)
        function, options = BUFFERED[name]
        buffer = {"topc": topc, "decay": decay, "buffer_dtype": dtype, **chosen}
        return function(RATE, **options, **buffer)

    return optimizer_runner(make, gradients, jnp.float32(ACCEPTING))


def counts(runner):
    """The gradients accepted and the sums rebuilt so far (0 without sums)."""
    buffer = optax.tree.get(runner.carry[1], "buffer")
    rebuilds = 0 if buffer.rebuilds is None else int(buffer.rebuilds)
    return int(buffer.accepted.sum()), rebuilds


def alternate(adam, other, gradients, steps, turn=5, decay=ACCEPTING, bar=None):
    """Let the two take turns of a few steps. Returns the seconds of each."""
    decay = jnp.float32(decay)
    adam.seconds, other.seconds = [], []
    for start in range(0, steps, turn):
        stream = [
            gradients[k % len(gradients)]
            for k in range(start, min(start + turn, steps))
        ]
        for gradient in stream:
            adam.run(gradient, decay)
        for gradient in stream:
            other.run(gradient, decay)
        if bar is not None:
            bar.update(len(stream))
    return adam.seconds, other.seconds


def measure(name, topc, dtype, adam, gradients, steps):
    """One row of the table of steps."""
    size = sum(x.size for x in jax.tree.leaves(gradients[0]))
    runner = make_runner(name, gradients[0], topc, dtype)
    row = {
        "optimizer": name,
        "topc": topc,
        "slots": dtype,
        "size": size,
        "leaves": len(jax.tree.leaves(gradients[0])),
        "state B/param": nbytes(runner.carry[1]) / size,
        "temporaries": runner.temporaries / (4 * size),
    }
    smaller = [jax.tree.map(lambda x: x / 2, gradients[0])]
    for label, decay, stream in (
        ("accepted", ACCEPTING, gradients),
        ("rejected", REJECTING, smaller),
    ):
        # Fill the buffer with keys that the rejected stream cannot beat.
        for k in range((topc or 0) + 2):
            runner.run(gradients[k % len(gradients)], jnp.float32(decay))
        before = counts(runner)[0] if topc else 0
        of_adam, seconds = alternate(adam, runner, stream, steps, decay=decay)
        if topc:
            accepted = counts(runner)[0] - before
            assert accepted == (steps if label == "accepted" else 0), accepted
        taken, adam_taken = statistics.median(seconds), statistics.median(of_adam)
        row |= {f"{label} ms": 1e3 * taken, f"{label} / adam": taken / adam_taken}
        if not topc:
            break
    return row


def measure_steps(sizes, leaves, topc, dtypes, steps):
    """Rows of all optimizers at all sizes. Only adam and one other are held at once."""
    cases = [(name, None, None) for name in PLAIN]
    cases += list(itertools.product(BUFFERED, topc, dtypes))
    rows = []
    with tqdm(total=len(sizes) * len(leaves) * len(cases), unit="case") as bar:
        for size, count in itertools.product(sizes, leaves):
            gradients = make_gradients(size, count)
            adam = make_runner("optax.adam", gradients[0])
            for name, c, dtype in cases:
                bar.set_description(f"{name}, C = {c}, {dtype}, {size} in {count}")
                rows.append(measure(name, c, dtype, adam, gradients, steps))
                bar.update()
    return rows


def measure_flat(size, topc, steps):
    """Rows of sgd_c with running sums over many accepted steps, with the rebuilds."""
    rows = []
    with tqdm(total=steps * len(topc) * len(FLAT_LEAVES), unit="step") as bar:
        for leaves, c in itertools.product(FLAT_LEAVES, topc):
            gradients = make_gradients(size, leaves)
            adam = make_runner("optax.adam", gradients[0])
            bar.set_description(f"C = {c}")
            runner = make_runner("sgd_c", gradients[0], c, holding="sum")
            for k in range(c + 2):
                adam.run(gradients[k % len(gradients)], jnp.float32(ACCEPTING))
                runner.run(gradients[k % len(gradients)], jnp.float32(ACCEPTING))
            before = counts(runner)
            of_adam, seconds = alternate(adam, runner, gradients, steps, bar=bar)
            accepted, rebuilds = (b - a for a, b in zip(before, counts(runner)))
            assert accepted == steps, accepted
            rows.append(
                {
                    "optimizer": "sgd_c",
                    "topc": c,
                    "size": size,
                    "leaves": leaves,
                    "accepted": accepted,
                    "rebuilds": rebuilds,
                    "mean ms": 1e3 * statistics.mean(seconds),
                    "/ adam": statistics.mean(seconds) / statistics.mean(of_adam),
                    "median ms": 1e3 * statistics.median(seconds),
                    "slowest ms": 1e3 * max(seconds),
                    "adam: slowest": 1e3 * max(of_adam),
                }
            )
            del runner, adam, gradients
    return rows


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flat", action="store_true", help="does time depend on C?")
    parser.add_argument("--steps", type=int, help="timed steps of each stream")
    for name, default in (("size", SIZES), ("leaves", LEAVES), ("topc", TOPC)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, help="of the slots")
    add_arguments(parser)
    args = parser.parse_args(argv)

    machine = describe_machine()
    if args.flat:
        size, topc = (4096, (1, 5)) if args.quick else (1 << 24, FLAT_TOPC)
        rows = measure_flat(size, topc, args.steps or 500)
        report(args, "flat", machine, rows, FLAT_COLUMNS)
        for leaves in FLAT_LEAVES:
            means = [r["mean ms"] for r in rows if r["leaves"] == leaves]
            print(f"{leaves} leaves: largest over least {max(means) / min(means):.3f}")
    else:
        chosen = (args.size, args.leaves, args.topc, args.dtype)
        grid = ((4096,), (4,), (5,), ("float32",)) if args.quick else chosen
        rows = measure_steps(*grid, args.steps or (5 if args.quick else 10))
        report(args, "steps", machine, rows, COLUMNS)
        print("The row of adam shows the error of such ratios.")
    return rows


if __name__ == "__main__":
    main()
