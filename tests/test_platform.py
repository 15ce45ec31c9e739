"""How the tests would run on an accelerator."""

import os
import pathlib
import re
import subprocess
import sys

TESTS = """
import os
import pytest

@pytest.mark.cpu_only("it counts the kernels of a CPU")
@pytest.mark.parametrize("n", [1, 2])
def test_marked(n):
    raise AssertionError

def test_on_a_mesh(mesh):
    raise AssertionError

def test_plain():
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
    assert "device_count" not in os.environ.get("XLA_FLAGS", "")
"""


def test_tests_of_a_cpu_are_skipped_on_an_accelerator_with_a_reason(tmp_path):
    conftest = pathlib.Path(__file__).parent / "conftest.py"
    (tmp_path / "conftest.py").write_text(conftest.read_text())
    (tmp_path / "test_one.py").write_text(TESTS)
    environment = os.environ | {"MEMOPTAX_TEST_PLATFORM": "cuda", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert re.search("1 passed, 3 skipped", done.stdout), done.stdout
    reasons = re.findall(r"for a CPU: (.*)", done.stdout)
    assert sorted(reasons) == [
        "a mesh of eight devices",
        "it counts the kernels of a CPU",
    ]
