"""Several processes: examples/multihost.py gives the same result as one."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "multihost.py"
PATHS = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run(output, *arguments, devices):
    """The example in its own process, which may start others."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--steps", "10", "--output", output, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, np.load(output)


@pytest.mark.cpu_only("processes of simulated devices")
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.minutes
def test_two_processes_of_two_devices_are_one_of_four(tmp_path):
    said, two = run(tmp_path / "two.npz", "--local", "2", devices=1)
    assert "2 processes, 4 devices" in said
    said, one = run(tmp_path / "one.npz", devices=4)
    assert "1 processes, 4 devices" in said
    assert len(one.files) == 5
    # One process does not communicate by gloo, and adds up in another order.
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-5)
    assert one["losses"][-1] < one["losses"][0] - 0.1


@pytest.mark.cpu_only("processes of simulated devices")
@pytest.mark.slow
@pytest.mark.long
def test_tools_take_an_ensemble_divided_over_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    script = pathlib.Path(__file__).with_name("processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, coordinator, str(process)],
            env=os.environ | {"PYTHONPATH": PATHS},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


@pytest.mark.slow
def test_processes_that_do_not_share_the_devices_are_refused():
    command = [sys.executable, EXAMPLE, "--local", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "--devices must be a multiple of --local" in done.stderr
