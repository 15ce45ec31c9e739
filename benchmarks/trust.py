"""Write the tables of docs/trust.md from the results that are kept.

    python benchmarks/trust.py
    python benchmarks/trust.py --faults   # run the faults first (about 20 minutes)
    python benchmarks/trust.py --properties   # search first (15 minutes)

A table named x stands between the comments "<!-- trust: x -->" and "<!-- end -->".
benchmarks/soak.py, versions.py and mutants.py keep the other results.
"""

import argparse
import collections
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
from tables import table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/trust.md"
RESULTS = ROOT / "benchmarks/results"


def kept(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# Faults in training


def run_faults(*selection):
    """Run the cases of tests/training_faults.py, and keep which of them held.

    Results of other cases are kept, so a selection can be run on its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/test_training_faults.py"]
        command += ["-q", "-m", "long or not long", f"--junitxml={report}", *selection]
        subprocess.run(command, cwd=ROOT)
        keep_faults(report)


def keep_faults(report):
    """Add the cases of a report of pytest to those that are kept."""
    path = RESULTS / "faults.json"
    cases = kept("faults")["cases"] if path.exists() else {}
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[2].removesuffix("]")
        if name and case.find("skipped") is None:
            bad = any(case.find(tag) is not None for tag in ("failure", "error"))
            kind = "without" if "without" in case.get("name", "") else "with"
            cases[f"{kind}: {name}"] = not bad
    command = "python benchmarks/trust.py --faults"
    found = {"jax": jax.__version__, "command": command, "cases": cases}
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def faults(results):
    """The rows of the harness, and how many of their cases held."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import training_faults

    lines = [("fault", "promised", "kept by", "held", "fails without its guard")]
    for row in training_faults.ROWS:
        cells = []
        for kind in ("with", "without"):
            start = f"{kind}: {row.fault}: "
            held = [h for case, h in results["cases"].items() if case.startswith(start)]
            cells.append(f"{sum(held)} of {len(held)}" if held else "")
        lines.append((row.fault, row.promise, row.guard, *cells))
    return table(*lines)


# Adversarial properties


def run_properties(*families):
    """Search families of tests/property_configs.py, and keep what was tried.

    What is kept of other families stays, so one may be searched at a time.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import properties
    import property_configs

    for family in families or property_configs.FAMILIES:
        start = time.process_time()
        row = properties.search(family, 5000, property_configs.table(family))
        row["jax"], row["date"] = jax.__version__, datetime.date.today().isoformat()
        row["CPU minutes"] = round((time.process_time() - start) / 60, 1)
        keep_properties(row, property_configs.FAMILIES)


def keep_properties(row, families):
    path = RESULTS / "properties.json"
    rows = {r["family"]: r for r in kept("properties")["rows"]} if path.exists() else {}
    rows[row["family"]] = row
    found = {
        "command": "python benchmarks/trust.py --properties",
        "rows": [rows[family] for family in families if family in rows],
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def properties(results):
    """How many examples of each family were tried, and how many did not agree."""
    names = ("configurations", "examples", "compared to the end", "failures")
    lines = [("family", *names, "jax", "date")]
    for row in results["rows"]:
        numbers = (row[k] for k in ("examples", "to the end", "failures"))
        numbers = (row["configurations"], *(f"{n:,}" for n in numbers))
        lines.append((row["family"], *numbers, row["jax"], row["date"]))
    return table(*lines) + f"\n\nMade by `{results['command']}`."


# Mutants


def mutants(results):
    """How many mutants of each file the tests noticed, and why others cannot be."""
    found = collections.defaultdict(list)
    for mutant in results["mutants"]:
        found[mutant["file"]].append(mutant)
    lines = [("file", "mutants", "noticed", "explained", "not noticed")]
    for file in sorted(found):
        lines.append((f"`{file}`", *_counts(found[file])))
    lines.append(("all", *_counts(results["mutants"])))
    reasons = [("file", "line", "why no test on a CPU can notice it")]
    for mutant in sorted(results["mutants"], key=lambda m: (m["file"], m["line"])):
        if "why" in mutant:
            reasons.append((f"`{mutant['file']}`", mutant["line"], mutant["why"]))
    tried, noticed, explained, _ = _counts(results["mutants"])
    return (
        f"{table(*lines)}\n\nThe sample has {tried} of {results['of']:,} mutants (seed "
        f"{results['seed']}). Noticed: {noticed / tried:.1%}; noticed or explained: "
        f"{(noticed + explained) / tried:.1%}.\n\n{table(*reasons)}"
    )


def _counts(mutants):
    """How many there are, were noticed, are explained, and neither."""
    noticed = sum(bool(m["noticed"]) for m in mutants)
    explained = sum("why" in m for m in mutants)
    return len(mutants), noticed, explained, len(mutants) - noticed - explained


# Coverage


def keep_coverage(report):
    """Keep the totals of a report of ``coverage json``, and the files below 100 %."""
    measured = json.loads(Path(report).read_text())
    below = {
        name: [summary["covered"], summary["of"]]
        for name, file in measured["files"].items()
        for summary in [_covered(file["summary"])]
        if summary["covered"] < summary["of"]
    }
    found = {
        "command": "python -m coverage run -m pytest -n 2; python -m coverage combine; "
        "python -m coverage json; python benchmarks/trust.py --coverage coverage.json",
        "date": measured["meta"]["timestamp"][:10],
        "all": list(_covered(measured["totals"]).values()),
        "files": len(measured["files"]),
        "below": below,
    }
    (RESULTS / "coverage.json").write_text(json.dumps(found, indent=1) + "\n")


def _covered(summary):
    return {
        "covered": summary["covered_lines"] + summary["covered_branches"],
        "of": summary["num_statements"] + summary["num_branches"],
    }


def coverage(results):
    """Lines and branches that the fast suite runs, of each file and of all."""
    lines = [("file", "lines and branches run", "of", "%")]
    for name, (covered, of) in sorted(results["below"].items()):
        lines.append((f"`{name}`", covered, of, f"{100 * covered / of:.1f}"))
    covered, of = results["all"]
    lines.append(("all", f"{covered:,}", f"{of:,}", f"{100 * covered / of:.1f}"))
    full = results["files"] - len(results["below"])
    return table(*lines) + f"\n\nThe other {full} files are run in full."


# The others


def soak(results):
    """The largest error of a run over its bound, by what is stored and by C."""
    found = {(r["dtype"], r["holding"], r["topc"]): r for r in results["jitted"]}
    columns = list(dict.fromkeys(key[:2] for key in found))
    lines = [("C", *map(", ".join, columns))]
    for topc in dict.fromkeys(key[2] for key in found):
        rows = [found.get((*column, topc)) for column in columns]
        lines.append((topc, *(f"{r['error / bound']:.2f}" if r else "" for r in rows)))
    wrong, rebuilds = (
        sum(row[key] for row in found.values())
        for key in ("other decisions", "rebuilds")
    )
    steps = min(row["steps"] for row in found.values())
    return table(*lines) + (
        f"\n\n{len(found)} runs of {steps:,} steps, jax {results['jax']}. Decisions "
        f"that differ from the oracle's: {wrong}.\nRebuilds of the sums: {rebuilds:,}."
    )


def eager(results):
    lines = [("eager, 2,000 steps", "compilations", "arrays", "MiB", "time")]
    for row in results["eager"]:
        name, _, rest = row["optimizer"].partition(",")
        lines.append(
            (f"`{name}`" + (rest and f",{rest}"), row["compilations"], row["arrays"])
            + (f"{row['MiB']:.1f}", f"{row['last third / first']:.2f}")
        )
    return table(*lines)


def versions(results):
    """What each row ran, and how many states of the others it restored."""
    names = ("jax", "optax", "flax", "orbax-checkpoint")
    lines = [("Python", *names, "packages", "fast suite", "states of others")]
    for row in results["rows"]:
        tests = "not run"
        if "passed" in row:
            tests = f"{row['passed']:,} passed, {row['failed']} failed"
            tests += f" ({row['selected']})" if row["selected"] else ""
        lines.append(
            (row["python"], *(row.get(name, "") for name in names), row["packages"])
            + (tests, f"{row['states restored']} of {row['states of others']}")
        )
    return table(*lines)


# A table's results, and the function that writes it from them.
TABLES = {
    "faults": ("faults", faults),
    "soak": ("soak", soak),
    "eager": ("soak", eager),
    "versions": ("versions", versions),
    "coverage": ("coverage", coverage),
    "properties": ("properties", properties),
    "mutants": ("mutants", mutants),
}


def fill(text):
    """The text with its tables as the results have them."""

    def written(match):
        name, write = TABLES[match["name"]]
        return f"{match['begin']}\n{write(kept(name))}\n<!-- end -->"

    block = r"(?P<begin><!-- trust: (?P<name>\w+) -->).*?<!-- end -->"
    return re.sub(block, written, text, flags=re.S)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", action="store_true", help="run the faults first")
    parser.add_argument("--properties", action="store_true", help="search first")
    parser.add_argument("--coverage", metavar="JSON", help="keep this report first")
    options, selection = parser.parse_known_args(argv)
    if options.coverage:
        keep_coverage(options.coverage)
    if options.faults:
        run_faults(*selection)
    if options.properties:
        run_properties(*selection)
    PAGE.write_text(fill(PAGE.read_text()))


if __name__ == "__main__":
    main()
