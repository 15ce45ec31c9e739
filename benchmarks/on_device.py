"""Everything at once on the device that JAX finds: one command, one file of results.

    python benchmarks/on_device.py [--quick] [--parts numbers memory times notebooks]
        [--only TEXT ...] [--size 67108864] [--rounds 7]

numbers     The same steps on the device and on the CPU. The parameters may differ by
            50 millionths of the distance travelled, or by 1,000 where slots or moments
            have fewer bits than float32. All counters must be equal.
memory      Bytes per parameter at the peak, if the device reports it, beside those of
            parameters, gradients and state, and of XLA's temporaries.
times       Milliseconds of a donated step as ratios to optax.adam, which takes turns
            with every optimizer. Several steps are dispatched at once, so the host's
            work counts only where it is slower than the device.
notebooks   Each is run from top to bottom, if nbclient and ipykernel are installed.

The command fails if the numbers differ or a notebook fails. On a CPU it compares the
CPU with itself, as a trial of the command.
"""

import argparse
import math
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import OPTIMIZERS
from measuring import (
    add_arguments,
    describe_machine,
    make_gradients,
    nbytes,
    optimizer_runner,
    report,
)
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PARTS = ("numbers", "memory", "times", "notebooks")
SHAPES = {"matrix": (256, 384), "vector": (1000,), "kernel": (3, 3, 16, 32)}
# Millionths of the distance travelled. Between float32 and float64 there are up to 7:
# 1 - .999 ** t has few digits.
TOLERANCE, FEW_BITS = 50.0, 1000.0
LEAVES = 4
QUEUED = 20  # steps dispatched before the host waits

NUMBERS = ("optimizer", "steps", "millionths", "at most", "counts", "verdict")
MEMORY = ("optimizer", "held B/param", "temporaries B/param", "peak B/param", "verdict")
TIMES = ("optimizer", "ms", "adam ms", "/ adam", "compile s", "verdict")
NOTEBOOKS = ("notebook", "seconds", "verdict")
DIFFERS, FAILED = "DIFFERS", "FAILED: "


def attempt(name, measure):
    """A row with the result of ``measure``, or with the error of the device."""
    try:
        return {"optimizer": name, "verdict": "ran"} | measure()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        return {"optimizer": name, "verdict": FAILED + reason[:200]}


# --- numbers --------------------------------------------------------------------------


def stream(steps):
    """Parameters, and gradients of very different norms, the same on every device.

    The parameters are small beside the steps. Otherwise their own rounding would decide
    the comparison.
    """
    rng = np.random.default_rng(0)
    params = {
        key: 1e-3 * rng.normal(size=shape).astype(np.float32)
        for key, shape in SHAPES.items()
    }
    gradients = [
        {
            key: (np.exp(rng.normal()) * rng.normal(size=shape)).astype(np.float32)
            for key, shape in SHAPES.items()
        }
        for _ in range(steps)
    ]
    return params, gradients


def run_on(device, tx, params, gradients):
    """Parameters and state after the stream, as NumPy arrays."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(params, device)
    state = jax.jit(tx.init)(params)
    for gradient in gradients:
        params, state = step(params, state, jax.device_put(gradient, device))
    return jax.device_get((params, state))


def difference(start, one, other):
    """The distance between two ends, in millionths of that from the start."""
    apart = [np.linalg.norm(np.subtract(one[k], other[k], dtype=float)) for k in start]
    moved = [np.linalg.norm(np.subtract(one[k], start[k], dtype=float)) for k in start]
    return 1e6 * max(a / m for a, m in zip(apart, moved))


def counts(state):
    """The 32-bit integers: steps, ages, places. (int8 slots are narrower.)"""
    leaves = jax.tree.leaves(state)
    return [x for x in leaves if x.dtype in (np.int32, np.uint32)]


def compare(name, device, params, gradients):
    """Compare the device with the CPU."""
    cpu = jax.devices("cpu")[0]
    there, here = (
        run_on(d, OPTIMIZERS[name](), params, gradients) for d in (device, cpu)
    )
    few = "int8" in name or "bfloat16" in name
    row = {
        "steps": len(gradients),
        "millionths": difference(params, here[0], there[0]),
        "at most": FEW_BITS if few else TOLERANCE,
        "counts": "equal"
        if all(map(np.array_equal, counts(there[1]), counts(here[1])))
        else "differ",
    }
    agree = row["counts"] == "equal" and row["millionths"] <= row["at most"]
    return row | {"verdict": "agrees" if agree else DIFFERS}


def comparisons(names, device, steps):
    """A row for each optimizer."""
    try:
        jax.devices("cpu")
    except RuntimeError:
        raise SystemExit(
            "The numbers need a CPU too: leave JAX_PLATFORMS unset, or add cpu."
        ) from None
    params, gradients = stream(steps)
    return [
        attempt(name, lambda name=name: compare(name, device, params, gradients))
        for name in tqdm(names, desc="numbers")
    ]


# --- memory ---------------------------------------------------------------------------


def peaks(names, device, size):
    """A row of bytes for each optimizer.

    The peak of a process never falls. So optimizers run in order of memory, the
    smallest first. One that does not raise the peak has no figure.
    """
    side = math.isqrt(size // LEAVES)
    gradients = {f"leaf{i}": jnp.ones((side, side)) for i in range(LEAVES)}
    size = LEAVES * side * side
    states = {
        name: nbytes(jax.eval_shape(OPTIMIZERS[name]().init, gradients))
        for name in names
    }

    def peak():
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)

    def measure(name):
        before = peak()
        runner = optimizer_runner(OPTIMIZERS[name], gradients)
        for _ in range(2):
            runner.run(gradients)
        row = {
            "held B/param": (states[name] + 2 * nbytes(gradients)) / size,
            "temporaries B/param": runner.temporaries / size,
        }
        return row | ({"peak B/param": peak() / size} if peak() > before else {})

    ordered = tqdm(sorted(names, key=states.get), desc="memory")
    return [attempt(name, lambda name=name: measure(name)) for name in ordered]


# --- times ----------------------------------------------------------------------------


def seconds(runner, gradient, steps):
    """Seconds of one step, when ``steps`` of them are dispatched together."""
    begin = time.perf_counter()
    for _ in range(steps):
        runner.carry = runner.step(runner.carry, gradient)
    jax.block_until_ready(runner.carry)
    return (time.perf_counter() - begin) / steps


def ratios(names, size, rounds, steps):
    """A row of times for each optimizer. Each takes turns with adam."""
    gradients = make_gradients(size, LEAVES)
    adam = optimizer_runner(OPTIMIZERS["optax.adam"], gradients[0])

    def measure(name):
        other = optimizer_runner(OPTIMIZERS[name], gradients[0])
        taken = {adam: [], other: []}
        for turn in range(rounds + 1):
            for runner, found in taken.items():
                found.append(seconds(runner, gradients[turn % len(gradients)], steps))
        # The first round touches new memory.
        ours, base = (statistics.median(taken[r][1:]) for r in (other, adam))
        return {
            "ms": 1e3 * ours,
            "adam ms": 1e3 * base,
            "/ adam": ours / base,
            "compile s": other.compile_seconds,
        }

    bar = tqdm(names, desc="times")
    return [attempt(name, lambda name=name: measure(name)) for name in bar]


# --- notebooks ------------------------------------------------------------------------


def execute(paths, timeout):
    """A row for each notebook. Each runs in its own process."""
    try:
        import nbclient
        import nbformat
    except ImportError:
        verdict = "not run: nbclient is not installed"
        return [{"notebook": path.name, "verdict": verdict} for path in paths]
    rows = []
    for path in tqdm(paths, desc="notebooks"):
        begin, verdict = time.perf_counter(), "ran"
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        client = nbclient.NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources=resources
        )
        try:
            client.execute()
        except Exception as error:  # a cell fails, or the kernel is missing or has died
            lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()
            verdict = f"{FAILED}{type(error).__name__}: {' '.join(lines[-1:])}"
        taken = time.perf_counter() - begin
        rows.append({"notebook": path.name, "seconds": taken, "verdict": verdict})
    return rows


def main(argv=None):
    """The rows that were printed, by part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows whose name contains one of them"
    )
    parser.add_argument("--size", type=int, help="parameters in memory and times")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="steps in numbers")
    parser.add_argument(
        "--notebooks",
        nargs="*",
        type=Path,
        default=sorted(ROOT.glob("notebooks/*.ipynb")),
    )
    parser.add_argument("--timeout", type=int, default=1800, help="seconds per cell")
    add_arguments(parser)
    args = parser.parse_args(argv)
    names = [
        name
        for name in OPTIMIZERS
        if not args.only or any(text in name for text in args.only)
    ]
    # Notebooks run first: their process needs the device, and a TPU serves one process.
    executed = (
        execute(args.notebooks, args.timeout) if "notebooks" in args.parts else []
    )
    machine, device = describe_machine(), jax.devices()[0]
    print(f"{machine['device']}, jax {machine['jax']}, memoptax {machine['memoptax']}")
    if not (args.output or args.quick):
        words = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
        file = f"on-device-{words}-jax{machine['jax']}.json"
        args.output = Path(__file__).parent / "results" / file
    size = args.size or (1 << 22 if device.platform == "cpu" else 1 << 26)
    size, rounds, queued = (4096, 2, 2) if args.quick else (size, args.rounds, QUEUED)
    measures = {
        "notebooks": (NOTEBOOKS, lambda: executed),
        # Memory comes before the rest, which would leave its own peak.
        "memory": (MEMORY, lambda: peaks(names, device, size)),
        "numbers": (NUMBERS, lambda: comparisons(names, device, args.steps)),
        "times": (TIMES, lambda: ratios(names, size, rounds, queued)),
    }
    rows, failed = {}, []
    for part, (columns, measure) in measures.items():
        if part in args.parts:
            rows[part] = measure()
            print(f"\n{part}")
            report(args, part, machine, rows[part], columns)
            failed += [
                f"{part} of {row.get('optimizer') or row['notebook']}"
                for row in rows[part]
                if row["verdict"].startswith((DIFFERS, FAILED))
            ]
    if failed:
        raise SystemExit(f"Not as on the CPU, or failed: {'; '.join(failed)}.")
    return rows


if __name__ == "__main__":
    main()
