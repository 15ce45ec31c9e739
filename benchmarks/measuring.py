"""Shared by the benchmarks: compiled steps that take turns, and files of results.

Optimizers take turns in one process on the same parameters and gradients, so that other
work on the machine slows all of them. Most tables show ratios of medians.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import memoptax

RESULTS = Path(__file__).parent / "results"


class Runner:
    """A compiled step, its carry, and the seconds that its runs took."""

    def __init__(self, step, carry, *arguments):
        """``step`` maps the carry (donated) and the arguments to the next carry."""
        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(carry, *arguments)
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes
        self.carry = carry
        self.seconds = []

    def run(self, *arguments):
        begin = time.perf_counter()
        self.carry = jax.block_until_ready(self.step(self.carry, *arguments))
        self.seconds.append(time.perf_counter() - begin)

    @property
    def milliseconds(self):
        """The median of the runs."""
        return 1e3 * statistics.median(self.seconds)


def optimizer_runner(make, like, *hyperparameters):
    """A runner of update and apply. Its arguments are gradients and hyperparameters.

    ``make`` is a function of the hyperparameters, which are traced.
    """

    def step(carry, gradients, *hyperparameters):
        params, state = carry
        updates, state = make(*hyperparameters).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.zeros_like, like)
    state = jax.jit(make(*hyperparameters).init)(params)
    return Runner(step, (params, state), like, *hyperparameters)


def nbytes(tree):
    """Bytes of arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_gradients(size, leaves, count=3):
    """Trees of square matrices of normal numbers, with about equal norms."""
    rows = math.isqrt(size // leaves)
    shape = (leaves, rows, size // leaves // rows)
    keys = jax.random.split(jax.random.key(0), count)
    stacks = [jax.jit(jax.random.normal, static_argnums=1)(key, shape) for key in keys]
    return [{f"leaf{i}": stack[i] for i in range(leaves)} for stack in stacks]


def describe_machine():
    """The machine and the versions that ran this, and the date."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    return {
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        ),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "optax": optax.__version__,
        "memoptax": memoptax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def results_file(machine):
    words = re.sub(r"\((R|TM)\)|CPU|@.*", "", machine["device"])
    hardware = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    name = f"{hardware}-{machine['cores']}-cores-jax{machine['jax']}.json"
    return RESULTS / name


def save(path, section, machine, rows):
    """Write ``rows`` as one section of the file, and keep the other sections."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = json.loads(path.read_text()) if path.exists() else {}
    contents[section] = {"machine": machine, "rows": rows}
    path.write_text(json.dumps(contents, indent=1) + "\n")


def add_arguments(parser):
    """The options of every benchmark."""
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try it out"
    )
    parser.add_argument("--output", type=Path, help="JSON; by default under results/")


def report(args, section, machine, rows, columns):
    """Print some ``columns`` of the rows as a table, and keep all in a file."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    for line in (columns, *cells):
        first, *others = [text for text in line]
        texts = [first.ljust(widths[0])]
        texts += [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join(texts))
    if args.output or not args.quick:
        path = args.output or results_file(machine)
        save(path, section, machine, rows)
        print(f"Written to {path}")


def _cell(value):
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else f"{value}"
