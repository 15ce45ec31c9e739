"""Does a buffer stay exact in long runs? Every step is compared with the exact mean.

    python benchmarks/soak.py                       # 200,000 steps of every case
    python benchmarks/soak.py --steps 10000 --only int8

A stream with many outliers goes through one buffer in jitted scans. Beside it the scan
keeps the values that should be held, unrounded, and adds them up in float64. It also
compares decisions: priorities are exact in float32, so the buffer must hold the same
entries. Each case saves its results in benchmarks/results/soak.json when it ends.
``--eager`` takes 2,000 steps without jit instead, and looks for anything that grows.
"""

import argparse
import functools
import gc
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import memoptax

RESULTS = Path(__file__).parent / "results/soak.json"
SHAPES = {"matrix": (4, 8), "vector": (8,)}
DECAY = 0.7


class Case(NamedTuple):
    dtype: str
    topc: int
    holding: str

    def __str__(self):
        return f"{self.dtype}, C = {self.topc}, {self.holding}"


CASES = [
    Case(dtype, topc, holding)
    for topc in (1, 5, 20, 101)
    for dtype in ("float32", "bfloat16", "int8")
    for holding in ("select", "read", "sum")
    if topc == 1 or holding != "select"
]


def gradients_of(steps):
    """Sizes over three decades, outliers 1e4 and 1e8 times as large, zeros, NaN."""
    count = len(steps)
    key = jax.random.fold_in(jax.random.key(0), steps[0])
    kind, size, *keys = jax.random.split(key, 2 + len(SHAPES))
    draw = jax.random.uniform(kind, (count,), jnp.float32)
    scale = jnp.exp(2 * jax.random.normal(size, (count,), jnp.float32) - 6)
    scale = jnp.where(draw < 0.02, 1e4 * scale, scale)
    scale = jnp.where(draw < 0.002, 1e4 * scale, scale)
    scale = jnp.where(draw > 0.99, 0, scale)
    scale = jnp.where(draw > 0.999, jnp.nan, scale)

    def leaf(key, shape):
        numbers = jax.random.normal(key, (count, *shape), jnp.float32)
        return numbers * scale.reshape(-1, *[1] * len(shape))

    return {k: leaf(key, s) for key, (k, s) in zip(keys, SHAPES.items())}


stream = jax.jit(gradients_of)


def priority(gradients):
    """The largest magnitude, which has no rounding error."""
    return functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(g)) for g in jax.tree.leaves(gradients)]
    )


def optimizer(case):
    """Its update is the mean of the values held, or the gradient if there are none."""
    return memoptax.critical_gradients(
        case.topc,
        DECAY,
        aggr=lambda update, mean, fill: mean,
        priority_fn=priority,
        buffer_dtype=case.dtype,
        holding=case.holding,
    )


class Oracle(NamedTuple):
    """The values that should be held: Algorithm 1, in its shortest form."""

    keys: jax.Array  # (C,); -1 is empty
    facts: jax.Array  # (C, n): of the values, as they were offered, in float64

    @classmethod
    def empty(cls, case):
        one = jax.eval_shape(lambda: facts(case, gradients_of(jnp.arange(1))))
        rows = jnp.zeros((case.topc, one.shape[1]), one.dtype)
        return cls(jnp.full(case.topc, -1.0, jnp.float32), rows)

    def offer(self, key, fact):
        least = jnp.argmin(self.keys)
        taken = key > self.keys[least]  # never for NaN
        keys = self.keys.at[least].set(jnp.where(taken, key, self.keys[least]))
        decayed = jnp.where(keys >= 0, keys * jnp.float32(DECAY), keys)
        row = jnp.where(taken, fact, self.facts[least])
        keys = jnp.where(jnp.isnan(key), self.keys, decayed)
        return Oracle(keys, self.facts.at[least].set(row))


def facts(case, gradients):
    """Per step: all entries, the norm of each leaf, and how far storage rounds each."""
    leaves = [g.astype(jnp.float64) for g in jax.tree.leaves(gradients)]
    flat = [g.reshape(len(g), -1) for g in leaves]
    norms = [jnp.linalg.norm(g, axis=1, keepdims=True) for g in flat]
    off = [rounding(case, g).reshape(len(g), -1) for g in leaves]
    return jnp.concatenate([*flat, *norms, *off], axis=1)


def parts(rows):
    """Rows of facts, or of their sums, leaf by leaf."""
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    widths = [*sizes, *[1] * len(sizes), *sizes]
    found = jnp.split(rows, np.cumsum(widths)[:-1].tolist(), axis=1)
    return [found[k :: len(sizes)] for k in range(len(sizes))]


def rounding(case, values):
    """A bound on the change of each entry when it is stored."""
    if case.dtype == "float32":
        return jnp.zeros_like(values)
    if case.dtype == "bfloat16":  # to nearest, with 8 bits
        return jnp.abs(values) / 256
    rows = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    # A scale is a little less than a 127th of the row.
    each = jnp.where(rows < 1.5e-36, rows, rows / 254 * (1 + 1e-5))
    return jnp.broadcast_to(each, values.shape)


def ratios(case, used, fill, sums, offered):
    """The error of the mean at each step, over its bound and over the norms held.

    The bound: 1e-5 of the summed norms for the arithmetic, the rounding of storage, and
    for a sum on a CPU two roundings of the value that arrives (docs/trust.md).
    """
    leaves = zip(jax.tree.leaves(used), parts(sums), parts(offered), strict=True)
    known = (fill > 0) & jnp.isfinite(offered[:, 0])
    found = []
    for mean, (total, norms, off), (_, arriving, _) in leaves:
        mean = mean.reshape(total.shape).astype(jnp.float64)
        error = jnp.linalg.norm(mean * fill[:, None] - total, axis=1)
        bound = 1e-5 * norms[:, 0] + jnp.linalg.norm(off, axis=1)
        if case.holding == "sum":
            bound += 2 * float(jnp.finfo(jnp.float32).eps) * arriving[:, 0]
        for whole in (bound, norms[:, 0]):
            ratio = jnp.where(error == 0, 0, error / whole)
            found.append(jnp.where(known, ratio, 0))
    return jnp.maximum(*found[::2]), jnp.maximum(*found[1::2])


def chunk(case):
    """A function that takes steps and returns the worst ratios in them."""
    tx = optimizer(case)

    def body(carry, offer):
        (state, oracle), (gradients, key, fact) = carry, offer
        update, state = tx.update(gradients, state)
        seen = update, jnp.sum(oracle.keys >= 0), jnp.sum(oracle.facts, axis=0)
        oracle = oracle.offer(key, fact)
        keys = optax.tree.get(state, "keys")[0]
        wrong = jnp.any(keys != jnp.maximum(oracle.keys, 0))
        return (state, oracle), (*seen, wrong)

    def run(carry, steps, gradients):
        offered = facts(case, gradients)
        # XLA's maximum on a CPU may overlook NaN. A sum does not.
        bad = jnp.isnan(jnp.sum(offered, axis=1))
        keys = jnp.where(bad, jnp.nan, jax.vmap(priority)(gradients))
        offers = gradients, keys, offered
        carry, (*seen, wrong) = jax.lax.scan(body, carry, offers)
        ratio, share = ratios(case, *seen, offered)
        worst = jnp.argmax(ratio)
        return carry, (ratio[worst], steps[worst], jnp.max(share), jnp.sum(wrong))

    return tx, jax.jit(run, donate_argnums=0)


def soak(case, steps, length=1000):
    """The worst ratios of a run of ``steps``."""
    with jax.enable_x64(True):  # for the exact mean (the state is float32)
        tx, run = chunk(case)
        params = {k: jnp.zeros(s, jnp.float32) for k, s in SHAPES.items()}
        carry = tx.init(params), Oracle.empty(case)
        worst, at, share, wrong = 0.0, 0, 0.0, 0
        for start in range(0, steps, length):
            numbers = jnp.arange(start, min(start + length, steps), dtype=jnp.int32)
            # Made by a separate program, because XLA may round a value that it computes
            # twice in two ways.
            carry, found = run(carry, numbers, stream(numbers))
            ratio, step, part, other = (float(x) for x in found)
            # A NaN is the worst, and stays.
            if not ratio <= worst:
                worst, at = ratio, int(step)
            share, wrong = max(share, part), wrong + int(other)
        buffer = carry[0].buffer
        memoptax.check_state(tx, params, carry[0])
        return {
            "dtype": case.dtype,
            "topc": case.topc,
            "holding": case.holding,
            "steps": steps,
            "error / bound": worst,
            "at step": at,
            "error / norms": share,
            "other decisions": wrong,
            "accepted": int(buffer.accepted[0]),
            "offered": int(buffer.offered[0]),
            "rebuilds": 0 if buffer.rebuilds is None else int(buffer.rebuilds),
        }


# Steps without jit

EAGER = {
    "sgd_c": lambda: memoptax.sgd_c(0.01),
    "adam_c, C = 20, sum": lambda: memoptax.adam_c(0.01, topc=20, holding="sum"),
    "adam_cm, int8": lambda: memoptax.adam_cm(
        0.01, topc=1, buffer_dtype="int8", mu_dtype="int8"
    ),
    "sm3": lambda: memoptax.sm3(0.01),
    "sm3_cm": lambda: memoptax.sm3_cm(0.01),
}

COMPILED = []


def _listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


def resident():
    """The memory of this process, in bytes, where Linux reports it."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def eager(name, steps=2000, settled=200):
    """The growth after the first steps: compilations, arrays, bytes, time of a step."""
    if not COMPILED:
        jax.monitoring.register_event_duration_secs_listener(_listen)
        jax.jit(lambda x: x + 1)(jnp.ones(3))  # from here on the list is not empty
    tx = EAGER[name]()
    params = {k: jnp.zeros(s, jnp.float32) for k, s in SHAPES.items()}
    random = np.random.default_rng(0)
    state, times, before = tx.init(params), [], (0, 0, 0)
    for step in range(steps):
        gradients = {k: np.float32(random.normal(size=s)) for k, s in SHAPES.items()}
        begin = time.process_time()
        updates, state = tx.update(gradients, state, params)
        params = jax.block_until_ready(optax.apply_updates(params, updates))
        times.append(time.process_time() - begin)
        if step + 1 == settled:
            gc.collect()
            before = len(COMPILED), len(jax.live_arrays()), resident()
    gc.collect()
    compiled, arrays, memory = before
    part = (steps - settled) // 3
    first = statistics.median(times[settled : settled + part])
    return {
        "optimizer": name,
        "steps": steps,
        "compilations": len(COMPILED) - compiled,
        "arrays": len(jax.live_arrays()) - arrays,
        "MiB": (resident() - memory) / 2**20,
        "last third / first": statistics.median(times[-part:]) / first,
    }


# Results


def kept():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(section, row, keys):
    """Put a row into a section of the results, and replace an older one."""
    results = kept() | {"jax": jax.__version__, "command": "python benchmarks/soak.py"}
    rows = results.get(section, [])
    rows = [r for r in rows if any(r[key] != row[key] for key in keys)]
    RESULTS.write_text(json.dumps(results | {section: [*rows, row]}, indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", default="", help="cases that contain this text")
    parser.add_argument("--missing", action="store_true", help="cases not kept yet")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print, and keep nothing")
    options = parser.parse_args(argv)
    cases, section = (EAGER, "eager") if options.eager else (CASES, "jitted")
    keys = ["optimizer"] if options.eager else list(Case._fields)
    done = [[row[key] for key in keys] for row in kept().get(section, [])]
    for case in cases:
        known = [case] if options.eager else list(case)
        if options.only not in str(case) or (options.missing and known in done):
            continue
        begin = time.perf_counter()
        if options.eager:
            row = eager(case, options.steps or 2000)
        else:
            row = soak(case, options.steps or 200_000)
        print(f"{time.perf_counter() - begin:6.1f} s  {case}: {row}", flush=True)
        if not options.dry:
            keep(section, row, keys)


if __name__ == "__main__":
    main()
