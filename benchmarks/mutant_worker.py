"""Runs tests again and again in one process, for benchmarks/mutants.py.

Each line of its input is a JSON object: ``file`` of the package, its ``text`` for this
run, and ``tests`` in the order in which they run until one fails. The answer is a JSON
object with the test that failed. Without a file, it has the seconds of each test and
the tests that run each line of the package as well.

Only what the repository holds is imported again for each object. So JAX starts once,
and keeps what it has compiled for single operations.
"""

import collections
import json
import os
import sys
from pathlib import Path

import coverage
import pytest


class InOrder:
    """Runs the tests in the order in which they were asked for, and notes failures."""

    def __init__(self, tests):
        self.place = {test: k for k, test in enumerate(tests)}
        self.failed, self.seconds = "", {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.place.get(item.nodeid, 0))

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid or "while the tests were read"


class Lines(InOrder):
    """Notes which tests run each line of the package as well."""

    def __init__(self, package):
        super().__init__([])
        self.package = package
        self.cover = coverage.Coverage(data_file=None, source=[str(package)])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.cover.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self.cover.switch_context("")

    def tests(self):
        """A list of tests for each file and line."""
        found, data = collections.defaultdict(dict), self.cover.get_data()
        for file in data.measured_files():
            name = str(Path(file).relative_to(self.package))
            for line, tests in data.contexts_by_lineno(file).items():
                found[name][line] = [test for test in tests if test]
        return found


def forget(root):
    """Have what the repository holds imported again."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(root) and name != "__main__":
            del sys.modules[name]


def run(tests, plugin):
    options = "-x -q --assert=plain --tb=no -p no:xdist -p no:cacheprovider".split()
    return int(pytest.main([*options, *tests], plugins=[plugin]))


def measure(tests, root):
    plugin = Lines(root / "memoptax")
    plugin.cover.start()
    status = run(tests, plugin)
    plugin.cover.stop()
    return {
        "status": status,
        "failed": plugin.failed,
        "seconds": plugin.seconds,
        "lines": plugin.tests(),
    }


def try_one(file, text, tests):
    plugin, original = InOrder(tests), file.read_text()
    try:
        file.write_text(text)
        return {"status": run(tests, plugin), "failed": plugin.failed}
    finally:
        file.write_text(original)


def main():
    root = Path.cwd()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # pytest prints there
    sys.dont_write_bytecode = True  # a mutant of the same second and size looks alike
    for line in sys.stdin:
        task = json.loads(line)
        forget(root)
        if "text" in task:
            place = root / "memoptax" / task["file"]
            answer = try_one(place, task["text"], task["tests"])
        else:
            answer = measure(task["tests"], root)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
