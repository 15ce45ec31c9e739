"""Does it help? Train with many optimizers and controls, and report intervals.

    python -m benchmarks.learning e8             # make the runs that are missing
    python -m benchmarks.learning e8 --quick     # a few runs of 20 steps, kept nowhere
    python -m benchmarks.learning e8 --table     # print its tables from the results
    python -m benchmarks.learning --docs         # all tables and pictures of docs/

Runs are appended to ``benchmarks/learning/results``. A run that is there already is not
repeated, so a stopped experiment resumes. ``--cost`` measures the time of a step. The
tables then show it beside every score, like the bytes of the state.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.learning import cost, experiment, page
from benchmarks.learning.experiments import load
from benchmarks.learning.results import FOLDER, Results


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "experiments", nargs="*", help="e7 to e13 and e8_more to e13_more; none: all"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        help="make only the runs of rows that begin with one of these",
    )
    parser.add_argument("--quick", action="store_true", help="20 steps, kept nowhere")
    parser.add_argument(
        "--cost", action="store_true", help="measure the time of a step"
    )
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--docs", action="store_true", help="write the pages of docs/")
    parser.add_argument(
        "--results", type=Path, default=FOLDER, help="where results are kept"
    )
    parser.add_argument(
        "--lanes", type=int, help="runs at once: more suit an accelerator"
    )
    args = parser.parse_args(argv)
    known = load()
    for name in args.experiments:
        if name not in known:
            parser.error(f"experiments are {', '.join(known)}, but not {name}")
    chosen = [known[name] for name in args.experiments or known]
    if args.docs:
        page.write(list(known.values()), args.results)
        return
    for each in chosen:
        if args.quick and not each.quick:
            continue  # its tasks are those of another experiment
        if args.quick:
            with tempfile.TemporaryDirectory() as folder:
                show(each, Path(folder), quick=True)
            continue
        results = Results(args.results / f"{each.name}.csv")
        if args.cost:
            cost.measure(each, args.results / f"{each.name}-cost.csv")
        elif not args.table:
            if args.results == FOLDER and (other := other_python(each)):
                parser.error(
                    f"the kept runs of {each.name} are on the help of Python {other}, "
                    "and this Python's is another text: run it with that Python, or "
                    "keep your runs in another folder (--results)."
                )
            experiment.run(each, results, lanes=args.lanes, only=args.only)
        print(page.tables(each, args.results))


def other_python(each) -> str:
    """The Python whose help the kept runs use as data, or "" if it is this one."""
    pythons = {task.python for task, _ in each.plan()} - {None, sys.version_info[:2]}
    return ", ".join("{}.{}".format(*python) for python in pythons)


def show(each, folder, quick):
    """Run and print an experiment whose results are kept in ``folder``."""
    results = Results(folder / f"{each.name}.csv")
    experiment.run(each, results, quick=quick)
    print(page.tables(each, folder, quick=quick))


if __name__ == "__main__":
    main()
