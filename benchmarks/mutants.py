"""Do the tests test? Change the package in small ways, and see which tests notice.

    python benchmarks/mutants.py --count 500           # needs cosmic-ray
    python benchmarks/mutants.py --count 20 --minutes 20 --seed 1
    python benchmarks/mutants.py --again               # the survivors, once more
    python benchmarks/mutants.py --show                # the survivors that are kept

cosmic-ray names all mutants of the files below, and a seeded sample of them is tried,
each in a copy of the repository. First the fast suite runs once, to measure which tests
run each line. The tests of a mutant are those that run its line: those that noticed
others first, then the cheapest, until one fails or they have taken ``--seconds``. A
mutant that hangs is noticed as well. Two processes run the tests and start over after
forty mutants, so JAX starts rarely, and what XLA compiles is cached on disk.

Results are added to benchmarks/results/mutants.json, and what is kept there is not
tried again. A mutant counts only while the code of its function stays the same. The
place of one that no longer counts is taken by the next of the sample. A survivor that
changes nothing, or nothing that a CPU shows, is explained: write the reason there, as
its "why".
"""

import argparse
import ast
import collections
import concurrent.futures
import difflib
import functools
import hashlib
import itertools
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/mutants.json"

# The buffer, the storage and the update equations.
FILES = (
    "_buffer/algorithm.py",
    "_buffer/eviction.py",
    "_buffer/holding.py",
    "_buffer/running_sum.py",
    "_buffer/aggregation.py",
    "_buffer/resizing.py",
    "_buffer/matching.py",
    "_tensors/storage.py",
    "_tensors/norms.py",
    "_critical_gradients.py",
    "_critical_momenta.py",
    "_momentum.py",
    "_sm3.py",
    "_sm3_rules.py",
    "_sm3_momenta.py",
    "_bases/pytorch.py",
    "_bases/precision.py",
)
# Tests of pages, scripts and processes notice a mutant by its text, or late.
OTHERS = "docs examples hlo layout learning multihost platform release trust"
RESTART = 40  # mutants after which a process starts over: its memory grows
IGNORED = shutil.ignore_patterns(".git", ".venv*", "_build", ".sdist")
KEY = ("file", "operator", "definition", "occurrence")
# Operators of arrays that take each other's place. cosmic-ray has others, such as a
# shift for a product. Floating-point arrays have no shift, so every test would notice.
KINDS = ({"Add", "Sub", "Mul", "Div"}, {"BitAnd", "BitOr", "BitXor"})


def sensible(name):
    """Whether an operator of cosmic-ray makes a mutant that could survive."""
    if "ReplaceBinaryOperator" in name:
        return any(set(name.split("_")[1:]) <= kind for kind in KINDS)
    # The decorators of the package compile, or make a derivative.
    return name != "core/RemoveDecorator"


def mutants():
    """Every mutant by its key, with its line and its place.

    The key is the file, the operator, the definition in which it is, and which
    occurrence of the operator in that definition. The place is which occurrence it is
    in the whole file.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    found = {}
    for file in FILES:
        text = (ROOT / "memoptax" / file).read_text()
        tree, inside = get_ast(text), definitions(text)
        for name in sorted(operator_names()):
            kind = get_operator(name)
            if kind.arguments() or not sensible(name):
                continue
            lines = [
                line
                for node in ast_nodes(tree)
                for (line, _), _ in kind().mutation_positions(node)
            ]
            seen = collections.Counter()
            for place, line in enumerate(lines):
                definition, digest = inside[line]
                mutant = dict(zip(KEY, (file, name, definition, seen[definition])))
                seen[definition] += 1
                mutant |= {"line": line, "place": place, "code": digest}
                found[key(mutant)] = mutant
    return found


def definitions(text):
    """For each line, the function or class at the top level in which it is ("" if it is
    in none), and a digest of the code there.
    """
    body = ast.parse(text).body
    named = [node for node in body if hasattr(node, "name")]
    others = ast.Import, ast.ImportFrom
    rest = [n for n in body if not hasattr(n, "name") and not isinstance(n, others)]
    outside = "", digest(rest)
    inside = collections.defaultdict(lambda: outside)
    for node in named:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        found = node.name, digest([node])
        inside |= dict.fromkeys(range(first, node.end_lineno + 1), found)
    return inside


def digest(nodes):
    """What tells whether code has changed since a mutant was tried."""
    return hashlib.sha256("".join(map(code, nodes)).encode()).hexdigest()[:12]


def mutated(mutant):
    """The text of the file, changed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    text = (ROOT / "memoptax" / mutant["file"]).read_text()
    return mutate_code(text, get_operator(mutant["operator"])(), mutant["place"])


def code(node):
    """The code of a node, without its docstrings, comments and annotations."""

    class Bare(ast.NodeTransformer):
        def visit_arg(self, node):
            node.annotation = None
            return node

        def visit_FunctionDef(self, node):
            node.returns = None
            return self.generic_visit(node)

        def visit_AnnAssign(self, node):
            node.annotation = ast.Constant(None)
            return self.generic_visit(node)

        def visit_Expr(self, node):
            is_text = isinstance(node.value, ast.Constant)
            return ast.Pass() if is_text else self.generic_visit(node)

    return ast.dump(Bare().visit(node))


def is_idle(mutant, text):
    """Whether no code has changed, or the result is not valid Python."""
    old = (ROOT / "memoptax" / mutant["file"]).read_text()
    try:
        return code(ast.parse(old)) == code(ast.parse(text))
    except SyntaxError:
        return True


class Worker:
    """A process that runs tests in a copy of the repository: mutant_worker.py."""

    def __init__(self, copy, cache):
        shutil.copytree(ROOT, copy, ignore=IGNORED)
        self.copy, self.process, self.tried = copy, None, 0
        self.environment = os.environ | {
            "PYTHONPATH": str(copy),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def ask(self, task, limit):
        """The answer to a task, or None if it takes longer or ends the process."""
        self.tried += 1
        if self.tried % RESTART == 0:
            self.stop()
        if self.process is None:
            command = [sys.executable, "benchmarks/mutant_worker.py"]
            self.process = subprocess.Popen(
                command,
                cwd=self.copy,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        try:
            print(json.dumps(task), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self.stop()
        if "file" in task:  # which the process could not restore
            file = task["file"]
            shutil.copy(ROOT / "memoptax" / file, self.copy / "memoptax" / file)
        return None

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def ordered(mutant, seconds, lines, noticing, most):
    """The tests that run the line of a mutant, up to ``most`` seconds of them.

    Those that noticed others come first, then those of files that are near, then the
    cheapest. A line that runs when the package is imported, such as the default of an
    argument, has the tests of the next line that tests run.
    """
    of_file = {int(k): tests for k, tests in lines.get(mutant["file"], {}).items()}
    later = [k for k, tests in of_file.items() if tests and k >= mutant["line"]]
    running = of_file[min(later)] if later else seconds
    tests = [test for test in running if test in seconds]
    near = {file for file in test_files() if is_near(file, mutant["file"])}
    far = {test: test.partition("::")[0] not in near for test in tests}
    tests.sort(key=lambda test: (-noticing[test], far[test], seconds[test]))
    total = itertools.accumulate(seconds[test] for test in tests)
    return [test for test, end in zip(tests, total) if end <= most]


@functools.cache
def is_near(test, file):
    """Whether a file of tests is named after a module of the package, or imports it."""
    name = Path(file).stem
    found = set()
    for node in ast.walk(ast.parse((ROOT / test).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("memoptax."):
            found |= {node.module.split(".")[-1], *(name.name for name in node.names)}
    return name in found or Path(test).stem.startswith(f"test_{name.strip('_')}")


def test_files():
    """The files of tests that may notice a mutant."""
    others = {f"test_{name}.py" for name in OTHERS.split()}
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{file.name}" for file in files if file.name not in others]


def show(kept):
    """How many mutants of each file were noticed, and those that were not."""
    tried, noticed = collections.Counter(), collections.Counter()
    for mutant in kept["mutants"]:
        tried[mutant["file"]] += 1
        noticed[mutant["file"]] += bool(mutant["noticed"])
    for file in sorted(tried):
        print(f"{file}: {noticed[file]} of {tried[file]} noticed")
    print(f"all: {noticed.total()} of {tried.total()} noticed")
    for mutant in kept["mutants"]:
        if not mutant["noticed"]:
            print("EXPLAINED" if "why" in mutant else "SURVIVED", mutant)
            print(difference(mutant))


def difference(mutant):
    """The lines that a mutant takes away and adds."""
    old = (ROOT / "memoptax" / mutant["file"]).read_text()
    lines = difflib.unified_diff(old.split("\n"), mutated(mutant).split("\n"), n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def key(mutant):
    return tuple(mutant[name] for name in KEY)


def results(everything):
    """What is kept, without the mutants of functions that have changed."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"mutants": []}
    found = [(everything.get(key(m), {}), m) for m in kept["mutants"]]
    # Lines and places are those of today.
    counting = [m | now for now, m in found if now.get("code") == m["code"]]
    return kept | {"mutants": counting}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, default=180, help="stop after so many")
    parser.add_argument("--limit", type=float, default=300, help="seconds per mutant")
    parser.add_argument("--seconds", type=float, default=60, help="of tests per mutant")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--cache", help="folder of compiled programs, to use again")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of file names")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--show", action="store_true", help="only print what is kept")
    options = parser.parse_args(argv)
    everything = mutants()
    kept = results(everything)
    if options.show:
        show(kept)
        return
    again = []
    if options.again:
        again = [
            m
            for m in kept["mutants"]
            if not m["noticed"]
            and "why" not in m
            and any(part in m["file"] for part in options.only)
        ]
        kept["mutants"] = [m for m in kept["mutants"] if m not in again]
    known = {key(m) for m in (*kept["mutants"], *again)}
    sample = list(everything.values())
    random.Random(options.seed).shuffle(sample)
    new = (
        mutant
        for mutant in sample
        if key(mutant) not in known
        and any(part in mutant["file"] for part in options.only)
        and not is_idle(mutant, mutated(mutant))
    )
    missing = max(options.count - len(known), 0)
    chosen = [*again, *itertools.islice(new, missing)]
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder) / "compiled"
        workers = [
            Worker(Path(folder) / f"memoptax-{k}", cache)
            for k in range(options.workers)
        ]
        measured = workers[0].ask({"tests": test_files()}, 60 * options.minutes)
        if measured is None or measured["status"]:
            parser.error(f"the tests fail without a mutant: {measured}")
        print(f"{len(measured['seconds'])} tests run", flush=True)
        free, noticing = queue.Queue(), collections.Counter()
        for worker in workers:
            free.put(worker)

        def one(mutant):
            if time.monotonic() > end:
                return None
            worker, file = free.get(), mutant["file"]
            tests = ordered(
                mutant,
                measured["seconds"],
                measured["lines"],
                noticing,
                options.seconds,
            )
            task = {"file": file, "text": mutated(mutant), "tests": tests}
            try:
                answer = worker.ask(task, options.limit)
            finally:
                free.put(worker)
            if answer is None:
                return mutant | {"noticed": "hung or ended", "by": ""}
            noticing[answer["failed"]] += 1
            how = "failed" if answer["status"] else ""
            return mutant | {"noticed": how, "by": answer["failed"]}

        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            for done in concurrent.futures.as_completed(
                [pool.submit(one, mutant) for mutant in chosen]
            ):
                mutant = done.result()
                if mutant is None:
                    continue
                kept["mutants"].append(mutant)
                kept |= {"seed": options.seed, "of": len(everything)}
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
                print(len(kept["mutants"]), mutant, flush=True)
        for worker in workers:
            worker.stop()
    show(kept)


if __name__ == "__main__":
    main()
