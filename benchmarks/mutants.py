"""Do the tests test? Change the package in small ways, and see which tests notice.

    python benchmarks/mutants.py --count 500           # needs cosmic-ray
    python benchmarks/mutants.py --count 20 --minutes 20 --seed 1
    python benchmarks/mutants.py --again               # the survivors, once more
    python benchmarks/mutants.py --show                # the survivors that are kept

cosmic-ray names all mutants of the files below, and a seeded sample of them is tried,
each in a copy of the repository. Its tests are those chosen for the file that run the
changed line. Those that noticed other mutants come first, then the cheapest, until one
fails. A mutant that hangs is noticed as well. Two processes run the tests, so JAX
starts twice only, and what XLA compiles is cached on disk.

Results are added to benchmarks/results/mutants.json, and what is kept there is not
tried again. A mutant counts only while the code of its file stays, so the tool starts
over for a file whose code has changed.
"""

import argparse
import ast
import collections
import concurrent.futures
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

# A file, and the tests that should notice a change of it.
_BUFFER = "tests/test_buffer.py tests/test_critical_gradients.py"
_ORACLES = (
    "tests/test_critical_gradients_oracle.py tests/test_critical_momenta_oracle.py"
)
_SM3 = "tests/test_sm3.py tests/test_sm3_rules.py tests/test_oracle.py"
_CONTRACT = "tests/test_contract.py tests/test_contract_tools.py"
_RANGE = "tests/test_run_time_range.py tests/test_schedules.py"
TESTS = {
    "_buffer/algorithm.py": f"{_BUFFER} {_ORACLES} {_CONTRACT} {_RANGE}",
    "_buffer/eviction.py": f"{_BUFFER} {_ORACLES} tests/test_other_states.py",
    "_buffer/holding.py": f"{_BUFFER} tests/test_inspect.py {_ORACLES} {_CONTRACT}",
    "_buffer/running_sum.py": f"{_BUFFER} tests/test_soak.py "
    "tests/test_other_states.py",
    "_buffer/aggregation.py": f"{_BUFFER} {_ORACLES} {_CONTRACT} {_RANGE}",
    "_buffer/resizing.py": "tests/test_inspect.py tests/test_forged_states.py",
    "_buffer/matching.py": "tests/test_arguments.py tests/test_contract.py "
    "tests/test_odd_states.py tests/test_other_states.py tests/test_inspect.py",
    "_tensors/storage.py": "tests/test_storage.py tests/test_buffer.py "
    "tests/test_critical_momenta_storage.py tests/test_sm3_bytes.py "
    f"{_CONTRACT} {_RANGE}",
    "_tensors/norms.py": f"{_BUFFER} tests/test_norms.py tests/test_sm3_range.py "
    f"{_RANGE}",
    "_critical_gradients.py": "tests/test_critical_gradients.py "
    "tests/test_critical_gradients_bases.py tests/test_arguments.py "
    f"{_ORACLES} {_CONTRACT} {_RANGE}",
    "_critical_momenta.py": "tests/test_critical_momenta.py "
    f"{_ORACLES} tests/test_arguments.py {_CONTRACT} {_RANGE}",
    "_momentum.py": "tests/test_critical_momenta.py "
    f"tests/test_critical_momenta_storage.py {_ORACLES} {_CONTRACT} {_RANGE}",
    "_sm3.py": f"{_SM3} tests/test_arguments.py {_CONTRACT} {_RANGE}",
    "_sm3_rules.py": f"{_SM3} tests/test_sm3_range.py tests/test_sm3_bytes.py "
    "tests/test_covers.py tests/test_sparse.py tests/test_zero.py "
    f"{_CONTRACT} {_RANGE}",
    "_sm3_momenta.py": f"tests/test_sm3_momenta.py {_CONTRACT} {_RANGE}",
    "_bases/pytorch.py": f"tests/test_critical_gradients_bases.py {_ORACLES} "
    f"tests/test_arguments.py tests/test_zero.py {_CONTRACT} {_RANGE}",
    "_bases/precision.py": f"tests/test_critical_gradients_bases.py {_CONTRACT}",
}
RESTART = 40  # mutants after which a process starts over: its memory grows
IGNORED = shutil.ignore_patterns(".git", ".venv*", "_build", ".sdist")
# Operators of arrays that take each other's place. cosmic-ray has others, such as a
# shift for a product. Arrays of numbers have none, so every test would notice it.
KINDS = ({"Add", "Sub", "Mul", "Div"}, {"BitAnd", "BitOr", "BitXor"})


def sensible(name):
    """Whether an operator of cosmic-ray makes a mutant that could survive."""
    if "ReplaceBinaryOperator" in name:
        return any(set(name.split("_")[1:]) <= kind for kind in KINDS)
    # The decorators of the package compile, or make a derivative.
    return name != "core/RemoveDecorator"


def mutants():
    """Every mutant: its file, its operator, which occurrence of it, and its line."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    found = []
    for file in TESTS:
        tree = get_ast((ROOT / "memoptax" / file).read_text())
        for name in sorted(operator_names()):
            kind = get_operator(name)
            if kind.arguments() or not sensible(name):
                continue
            places = [
                start
                for node in ast_nodes(tree)
                for start, _ in kind().mutation_positions(node)
            ]
            found += [
                {"file": file, "operator": name, "occurrence": k, "line": line}
                for k, (line, _) in enumerate(places)
            ]
    return found


def mutated(mutant):
    """The text of the file, changed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    text = (ROOT / "memoptax" / mutant["file"]).read_text()
    return mutate_code(text, get_operator(mutant["operator"])(), mutant["occurrence"])


def code(text):
    """The code of a file, without its docstrings, comments and annotations."""

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

    return ast.dump(Bare().visit(ast.parse(text)))


def is_idle(mutant, text):
    """Whether no code has changed, or what came out is no Python."""
    try:
        return code((ROOT / "memoptax" / mutant["file"]).read_text()) == code(text)
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


def ordered(mutant, seconds, lines, noticing):
    """The tests of a mutant: those that noticed others first, then the cheapest.

    They are those chosen for its file that run its line. If none does, as with a line
    that runs when the package is imported, they are all that are chosen for it.
    """
    files = set(TESTS[mutant["file"]].split())
    chosen = [test for test in seconds if test.partition("::")[0] in files]
    running = set(lines.get(mutant["file"], {}).get(str(mutant["line"]), ()))
    tests = [test for test in chosen if test in running] or chosen
    return sorted(tests, key=lambda test: (-noticing[test], seconds[test]))


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
            print("SURVIVED", mutant)


def key(mutant):
    return tuple(mutant[k] for k in ("file", "operator", "occurrence"))


def digest(file):
    """What tells whether the code of a file has changed since a mutant was tried."""
    text = code((ROOT / "memoptax" / file).read_text())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def results():
    """What is kept, without the mutants of files that have changed."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"mutants": []}
    files = {file: digest(file) for file in TESTS}
    old = kept.get("files", {})
    kept["mutants"] = [
        m for m in kept["mutants"] if old.get(m["file"]) == files.get(m["file"])
    ]
    return kept | {"files": files}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, default=180, help="stop after these")
    parser.add_argument("--limit", type=float, default=300, help="seconds a mutant")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--cache", help="folder of compiled programs, to use again")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of file names")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--show", action="store_true", help="only print what is kept")
    options = parser.parse_args(argv)
    kept = results()
    if options.show:
        show(kept)
        return
    everything = mutants()
    sample = random.Random(options.seed).sample(everything, len(everything))
    if options.again:
        kept["mutants"] = [m for m in kept["mutants"] if m["noticed"]]
    known = {key(m) for m in kept["mutants"]}
    active = (mutant for mutant in sample if not is_idle(mutant, mutated(mutant)))
    chosen = [
        mutant
        for mutant in itertools.islice(active, options.count)
        if key(mutant) not in known
        and any(part in mutant["file"] for part in options.only)
    ]
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder) / "compiled"
        workers = [
            Worker(Path(folder) / f"memoptax-{k}", cache)
            for k in range(options.workers)
        ]
        files = sorted({file for tests in TESTS.values() for file in tests.split()})
        measured = workers[0].ask({"tests": files}, 60 * options.minutes)
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
            tests = ordered(mutant, measured["seconds"], measured["lines"], noticing)
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
