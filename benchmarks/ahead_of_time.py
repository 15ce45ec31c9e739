"""What steps cost on devices that are not present: programs for an H100 and TPUs.

    python benchmarks/ahead_of_time.py --device h100|v5e|v6e|v5e-256
        [--tables float32 ...] [--only TEXT ...] [--dump FOLDER]
    python benchmarks/ahead_of_time.py --device v5e --check
    python benchmarks/ahead_of_time.py --table

It needs the compiler and not the device: pip install "jax[tpu]" or "jax[cuda12]". It
prints for each step: bytes moved per parameter (``hlo.py`` says how they are counted),
the same for one pass through its loops, temporaries in copies of the parameters, bytes
of state per parameter, whole copies of leaves and slots, stacks of slots that are not
updated in place, bytes of results that share no argument's memory, instructions that
send, the most numbers that one sends, loops, and seconds to compile. On a mesh these
are figures of one device. Figures over the limits of ``cases.py`` are listed at the
end.

The tables are kept in results/ahead-of-time-DEVICE.json. ``--table`` prints these as
Markdown and compiles nothing. ``--check`` compiles only six steps, four of them on a
mesh too, and fails if one is over its limits. v5e-256 is the update of a model of
Llama-7B's shapes on 256 chips, with parameters divided over all of them, or with
data-parallel parameters and a state that is divided further (ZeRO-1).
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absent_devices import TARGETS, describe, open_no_device
from cases import LIMITS, OPTIMIZERS
from contexts import CONTEXTS
from hlo import Program
from jax.sharding import NamedSharding
from measuring import RESULTS, add_arguments, save
from shapes import PARAMETERS

import memoptax

FEW = ("optax.adam", "sgd_c, C = 1", "sgd_c, C = 5", "adam_c, C = 5, int8")
FEW += ("adam_cm, C = 5", "sm3")
# What --check compiles: each way to hold slots, each paper, and slots in float32 and
# int8.
CHECKED = ("sgd_c, C = 1", "adam_c, C = 5", "adam_c, C = 20")
CHECKED += ("adam_cm, C = 5, int8 slots and m", "sm3")
CHECKED += ("sm3_cm, C = 5, int8 slots and m",)


class Table(NamedTuple):
    """The rows of a table: optimizers on some parameters, in some contexts."""

    names: tuple
    parameters: str = "matrices"
    dtype: str = "float32"
    contexts: tuple = ("donated",)
    devices: tuple = ("h100", "v5e", "cpu")
    over: tuple = ()  # axes of the mesh that divide the state and not the parameters


TABLES = {
    "float32": Table(tuple(OPTIMIZERS)),
    "bfloat16": Table(("optax.adam", *LIMITS["float32"]), dtype="bfloat16"),
    "one-dimensional leaves": Table(FEW, parameters="vectors"),
    "contexts": Table(FEW, parameters="two matrices", contexts=tuple(CONTEXTS)),
    "a mesh of 8": Table(
        ("optax.adam", *LIMITS["a mesh of 8"], "sm3"),
        parameters="shared matrices",
        devices=("h100", "v5e"),
    ),
    "float32, v6e": Table(("optax.adam", "adam_c, C = 5"), devices=("v6e",)),
    "7B": Table(
        ("optax.adam", *LIMITS["7B"], "sm3", "sm3, momentum in int8"),
        parameters="7B",
        devices=("v5e-256",),
    ),
    "7B, data-parallel, bfloat16": Table(
        (
            "optax.adam",
            "adam_c, C = 1",
            "adam_cm, C = 5, int8 slots and m",
            "sm3_cm, C = 1, int8 slots and m",
            "sm3_cm, C = 5, int8 slots and m",
        ),
        parameters="7B, data-parallel",
        dtype="bfloat16",
        devices=("v5e-256",),
        over=("data",),
    ),
}


# --- compilation ----------------------------------------------------------------------


def compile_step(context, tx, params, over=()):
    """The compiled step, and its arguments with their shardings."""
    function, arguments, donate = CONTEXTS[context](tx, params)
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        state = jax.tree.map(
            lambda x, sharding: x.update(sharding=sharding),
            arguments[1],
            memoptax.state_shardings(tx, params, over=over),
        )
        arguments = (params, state, *arguments[2:])
    else:
        arguments = jax.tree.map(lambda x: x.update(sharding=sharding), arguments)
    results = jax.tree.map(lambda x: x.sharding, arguments[:2])
    jitted = jax.jit(function, donate_argnums=donate, out_shardings=results)
    return jitted.lower(*arguments).compile(), arguments


def share(x):
    """Elements of an array on one device."""
    return math.prod(x.sharding.shard_shape(x.shape))


def examine(compiled, params, state):
    """What a compiled step costs, by column."""
    program = Program(compiled.as_text())
    memory = compiled.memory_analysis()
    sizes = {share(p) for p in jax.tree.leaves(params)}
    size = sum(share(p) for p in jax.tree.leaves(params))
    held = sum(share(s) * s.dtype.itemsize for s in jax.tree.leaves(state))
    own = sum(share(p) * p.dtype.itemsize for p in jax.tree.leaves(params))
    # Norms and biases do not matter: they are small beside the rest.
    large = {s for s in sizes if 16 * s >= max(sizes)}
    sent = program.collectives()
    return {
        "moved": program.moved() / size,
        "in loops": program.moved_in_loops() / size,
        "temporaries": memory.temp_size_in_bytes / own,
        "state": held / size,
        "copies": len(program.copies(min(large))),
        "stacks": len(program.stacks(large)),
        "unaliased": int(sum(array.nbytes for array in program.unaliased())),
        "sent": len(sent),
        "largest sent": max((a.size for i in sent for a in i.arrays), default=0),
        "loops": program.loops,
        "parameters": size,
        "which": program.copies(min(large)) + program.stacks(large),
    }


def measure(table, name, context, args):
    """One row. If the compiler fails, the row has its error."""
    tx, make = OPTIMIZERS[name](), PARAMETERS[TABLES[table].parameters]
    row = {"optimizer": name, "context": context}
    begin = time.perf_counter()
    try:
        params = make(tx, args.device, TABLES[table].dtype, args.quick)
        compiled, arguments = compile_step(context, tx, params, TABLES[table].over)
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": str(error).strip().split("\n")[0][:200]}
    row["seconds"] = round(time.perf_counter() - begin, 1)
    if args.dump:
        args.dump.mkdir(parents=True, exist_ok=True)
        file = f"{args.device} {table} {name} {context}.hlo".replace(" ", "-")
        (args.dump / file).write_text(compiled.as_text())
    return row | examine(compiled, *arguments[:2])


# --- printing -------------------------------------------------------------------------

NAME = 36  # width of the first column
COLUMNS = {
    "moved": (8, ".1f"),
    "in loops": (9, ".1f"),
    "temporaries": (12, ".3f"),
    "state": (7, ".2f"),
    "copies": (7, "d"),
    "stacks": (7, "d"),
    "unaliased": (12, "d"),
    "sent": (5, "d"),
    "largest sent": (13, "d"),
    "loops": (6, "d"),
    "seconds": (8, ".1f"),
}


def print_head(table):
    columns = "".join(f"{key:>{width}}" for key, (width, _) in COLUMNS.items())
    print(f"\n{table:{NAME}}{columns}", flush=True)


def print_row(row):
    cells = [
        f"{row[key]:{w}{form}}" for key, (w, form) in COLUMNS.items() if key in row
    ]
    print(f"{label(row):{NAME}}{row.get('error', ''.join(cells))}", flush=True)


def label(row):
    context = row["context"]
    return row["optimizer"] + ("" if context == "donated" else f"; {context}")


def print_exceeded(over):
    """Print rows of five cells: table, step, figure, its value and its limit."""
    if not over:
        print("\nNothing is over its limit.")
        return
    print("\nOver the limits of benchmarks/cases.py:")
    head = ("table", "step", "what", "measured", "at most")
    rows = [[str(cell) for cell in line] for line in (head, *over)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


# The kept results, in Markdown

DEVICES = {"h100": "H100", "v5e": "v5e", "v6e": "v6e", "v5e-256": "256 × v5e"}


def markdown(folder=RESULTS):
    """All kept results, as tables with three columns for each device."""
    kept = {}
    for device in DEVICES:
        path = folder / f"ahead-of-time-{device}.json"
        if path.exists():
            kept[device] = json.loads(path.read_text())
    tables = []
    for table in TABLES:
        found = {d: s[table]["rows"] for d, s in kept.items() if table in s}
        if found:
            tables.append(_markdown_table(table, found))
    return "\n\n".join(tables)


def _markdown_table(title, found):
    """The bytes moved, temporaries and copies of these rows, by device."""
    head = [title]
    for device in found:
        head += [f"{DEVICES[device]}: bytes moved", "temporaries", "copies"]
    lines = [head, ["---"] * len(head)]
    columns = [{label(row): row for row in rows} for rows in found.values()]
    for name in dict.fromkeys(name for rows in columns for name in rows):
        cells = [re.sub(r"^[\w.]+", r"`\g<0>`", name)]
        for rows in columns:
            row = rows.get(name, {})
            if "moved" in row:
                # A scan runs its steps in a loop.
                moved = row["in loops" if row["context"] == "scan" else "moved"]
                copies = row["copies"] + row["stacks"]
                cells += [f"{moved:.1f}", f"{row['temporaries']:.2f}", f"{copies}"]
            else:
                cells += ["fails" if "error" in row else "", "", ""]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the command ----------------------------------------------------------------------


def compile_table(table, names, args):
    """Print the rows of a table. Returns them, and those that are over a limit."""
    rows, over = [], []
    print_head(table)
    for name in names:
        for context in TABLES[table].contexts:
            row = measure(table, name, context, args)
            print_row(row)
            rows.append(row)
            limit = LIMITS.get(table, {}).get(name)
            if limit and args.device != "cpu":
                over += [(table, name, *x) for x in limit.exceeded(row, args.device)]
    return rows, over


def check(args):
    """Compile a few steps, and return those that are over a limit."""
    _, over = compile_table("float32", CHECKED, args)
    on_mesh = [name for name in CHECKED if name in LIMITS["a mesh of 8"]]
    return over + compile_table("a mesh of 8", on_mesh, args)[1]


def main(argv=None):
    """The rows that were compiled, by table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=TARGETS, default="v5e")
    parser.add_argument("--tables", nargs="+", choices=TABLES, metavar="TABLE")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows whose name contains one of them"
    )
    parser.add_argument("--dump", type=Path, help="folder for the programs' texts")
    parser.add_argument("--check", action="store_true", help="only six steps")
    parser.add_argument("--table", action="store_true")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.table:
        print(markdown())
        return {}
    open_no_device()
    machine = describe(args.device)
    print(f"{machine['device']}, {machine['compiler']}, jax {machine['jax']}")
    if args.check:
        if "a mesh of 8" not in tables_for(args.device):
            parser.error(f"--check has no limits for --device {args.device}.")
        over = check(args)
        print_exceeded(over)
        sys.exit(1 if over else 0)
    keep = args.output or not (args.only or args.quick)
    path = args.output or RESULTS / f"ahead-of-time-{args.device}.json"
    compiled, over = {}, []
    for table in args.tables or tables_for(args.device):
        names = [
            name
            for name in TABLES[table].names
            if not args.only or any(text in name for text in args.only)
        ]
        compiled[table], exceeded = compile_table(table, names, args)
        over += exceeded
        if keep:
            save(path, table, machine, compiled[table])
    print_exceeded(over)
    if keep:
        print(f"Written to {path}")
    return compiled


def tables_for(device):
    return [name for name, table in TABLES.items() if device in table.devices]


if __name__ == "__main__":
    main()
