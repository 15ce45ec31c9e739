"""Write the tables of docs/benchmarks.md from the kept results.

    python benchmarks/tables.py

A table named x stands between the comments "<!-- speed: x -->" and "<!-- end -->".
"""

import json
import re
from pathlib import Path

import ahead_of_time

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/benchmarks.md"
RESULTS = [
    ROOT / "benchmarks/results" / name
    for name in (
        "amd-epyc-2-cores-jax0.10.2.json",
        "on-device-nvidia-h200-jax0.11.2.json",
    )
]


def sections():
    """The rows of the result files, by section."""
    return {
        name: section
        for path in RESULTS
        for name, section in json.loads(path.read_text()).items()
    }


def table(*rows):
    """Rows of cells as a Markdown table. The first row is the head."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def find(rows, **wanted):
    (row,) = (r for r in rows if all(r[key] == x for key, x in wanted.items()))
    return row


def code(name):
    """`sgd_c`, momentum for "sgd_c momentum"."""
    first, _, rest = name.replace(",", "").partition(" ")
    return f"`{first}`" + (f", {rest}" if rest else "")


def flat(rows):
    """The time of a step against C."""
    capacities = sorted({row["topc"] for row in rows})
    lines = [("parameters", "C", *capacities)]
    for leaves, name in ((4, "four 2048²"), (1, "one 4096²")):
        for label, key, digits in (
            ("mean, ms", "mean ms", 1),
            ("/ adam", "/ adam", 2),
            ("slowest, ms", "slowest ms", 0),
        ):
            cells = [find(rows, leaves=leaves, topc=c)[key] for c in capacities]
            lines.append((name, label, *(f"{x:.{digits}f}" for x in cells)))
    return table(*lines)


def steps(rows):
    """Every optimizer by C and the dtype of its slots: accepted, and rejected."""
    rows = [r for r in rows if (r["size"], r["leaves"]) == (1 << 24, 64) and r["topc"]]
    columns = [(c, slots) for c in (1, 5, 20) for slots in ("float32", "int8")]
    columns.append((5, "bfloat16"))
    lines = [("/ adam", *(f"C = {c}, {slots}" for c, slots in columns))]
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        found = [find(rows, optimizer=name, topc=c, slots=s) for c, s in columns]
        cells = [
            f"{r['accepted / adam']:.2f}, {r['rejected / adam']:.2f}" for r in found
        ]
        lines.append((code(name), *cells))
    return table(*lines)


def sm3(rows):
    lines = [
        ("parameters", "`sm3` / `optax.adam`", "/ `optax.sm3`")
        + ("with momentum / `optax.adam`", "in int8")
    ]
    for kind in dict.fromkeys(r["parameters"] for r in rows if "/ adam" in r):
        plain, momentum, int8 = (
            find(rows, parameters=kind, optimizer=name)
            for name in ("sm3", "sm3, momentum", "sm3, momentum in int8")
        )
        cells = plain["/ adam"], plain["/ optax.sm3"], momentum["/ adam"]
        cells += (int8["/ adam"],)
        lines.append((kind, *(f"{x:.2f}" for x in cells)))
    small, large = (
        find(rows, parameters=f"rows of {n} x 64")["ms"] for n in (10_000, 1_000_000)
    )
    return table(*lines) + (
        f"\n\nRow-sparse, 1,024 rows of a table of 10,000 x 64: {small:.2f} ms a step; "
        f"of\n1,000,000 x 64: {large:.2f} ms."
    )


def kernels(rows):
    """The copies that a step touches, and its time."""
    lines = [("16 M parameters", "copies touched", "time in copies", "its kernels")]
    for step in (row for row in rows if row["kernel"] == "the step"):
        parts = [r for r in rows if r["optimizer"] == step["optimizer"]]
        touched = [
            p["touches"]
            for p in parts
            if p is not step
            for _ in range(p["leaves"] // 4)
        ]
        cells = f"{step['touches']:.0f}", f"{step['copies']:.1f}"
        lines.append((code(step["optimizer"]), *cells, " + ".join(map(str, touched))))
    return table(*lines)


def training(rows):
    lines = [("training step of 10.8 M parameters", "/ adam")]
    lines += [
        (code(row["optimizer"]), f"{row['/ adam']:.2f}")
        for row in rows
        if not row["optimizer"].startswith("optax.adam")
    ]
    return table(*lines)


def peers(rows):
    lines = [("update of 16 M parameters", "ms")]
    lines += [
        (row["optimizer"].replace("torch.optim.", "torch "), f"{row['ms']:.1f}")
        for row in rows
    ]
    return table(*lines)


def compile_time(rows):
    rows = [row for row in rows if row["leaves"] == 200]
    buffered = [row for row in rows if row["C"]]
    # Results of version 0.1.0 have float32 slots alone, and do not say so.
    columns = list(dict.fromkeys((r["C"], r.get("slots", "float32")) for r in buffered))
    lines = [("200 leaves, / adam", *(f"C = {c}, {slots}" for c, slots in columns))]
    for name in dict.fromkeys(row["optimizer"] for row in buffered):
        of = [row for row in buffered if row["optimizer"] == name]
        lines.append((code(name), *(f"{row['/ adam']:.1f}" for row in of)))
    plain = find(rows, optimizer="sm3")["/ adam"]
    return table(*lines, ("`sm3`", *[f"{plain:.1f}"] * len(columns)))


def eager(rows):
    lines = [("eager step", "/ adam")]
    for row in rows:
        name, _, rest = row["optimizer"].partition(",")
        lines.append((f"`{name}`" + (rest and f",{rest}"), f"{row['/ adam']:.1f}"))
    return table(*lines)


def device(times, memory):
    """Every optimizer on an accelerator: its time, and the bytes that it holds."""
    lines = [("", "time / adam", "held", "temporaries")]
    for row in times:
        held = find(memory, optimizer=row["optimizer"])
        name, _, rest = row["optimizer"].partition(",")
        lines.append(
            (f"`{name}`" + (rest and f",{rest}"), f"{row['/ adam']:.2f}")
            + (f"{held['held B/param']:.1f}", f"{held['temporaries B/param']:.2f}")
        )
    return table(*lines)


# Each table's sections of the results, and the function that writes it from their rows.
TABLES = {
    "device": ("times", "memory", device),
    "ahead": (ahead_of_time.markdown,),
    "flat": ("flat", flat),
    "steps": ("steps", steps),
    "sm3": ("sm3", sm3),
    "kernels": ("kernels", kernels),
    "training": ("training step", training),
    "peers": ("peers", peers),
    "compile": ("compile time", compile_time),
    "eager": ("eager", eager),
}


def fill(text, sections):
    """The text, with its tables written from these results."""

    def written(match):
        *names, write = TABLES[match["name"]]
        rows = (sections[name]["rows"] for name in names)
        return f"{match['begin']}\n{write(*rows)}\n<!-- end -->"

    block = r"(?P<begin><!-- speed: (?P<name>\w+) -->).*?<!-- end -->"
    return re.sub(block, written, text, flags=re.S)


def main():
    PAGE.write_text(fill(PAGE.read_text(), sections()))


if __name__ == "__main__":
    main()
