"""Faults of processes and disks, and the check of what is promised after each.

Every second step is saved with Orbax.
"""

import os
import pathlib
import resource
import signal
import subprocess
import sys

import jax
import pytest
from contract import gradients, params_like, steps_of

import memoptax

from training_loop import NAMED, loop, same

ROOT = pathlib.Path(__file__).parents[1]

SAVED = {"matrix": (64, 64), "vector": (3,)}


def saved_steps():
    return steps_of(gradients(shapes=SAVED, steps=8))


def save(folder, step, carry):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / str(step), carry)


_save = save  # the real one, also while the function below stands in for it


def save_in_place(folder, step, carry):
    """A save without Orbax's guard: the folder has its name before it is complete."""
    place = folder / str(step)
    place.mkdir()
    _save(place, step, carry)
    for path in (place / str(step)).iterdir():
        path.rename(place / path.name)


def restored(run, folder):
    """The last complete checkpoint, and its step."""
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    params = params_like(SAVED)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, run.tx.init(params)))
    with ocp.StandardCheckpointer() as checkpointer:
        return step, checkpointer.restore(folder / str(step), like)


def train_and_die(name, folder, event, ending, saving):
    """Train in this process until it is killed, at a step or at an event of Python."""
    folder, save = pathlib.Path(folder), globals()[saving]

    def kill(found, arguments):
        if found == event and str(arguments[0]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    run = loop(NAMED[name])
    carry = run.start(SAVED)
    for step, gradient in enumerate(saved_steps(), 1):
        sys.audit("step", str(step))
        carry = run.step(*carry, gradient)
        if step % 2 == 0:
            save(folder, step, carry)


def check_killed(event, ending, last, opt, folder):
    program = "import sys, machine_faults as m; m.train_and_die(*sys.argv[1:])"
    command = [sys.executable, "-c", program, opt.name, str(folder), event, ending]
    command.append(save.__name__)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != -signal.SIGKILL:  # no assertion, which a test may expect
        raise RuntimeError(done.stderr)
    goes_on(opt, folder, last)


def goes_on(opt, folder, last):
    """From the last complete checkpoint the run equals one without a fault, bitwise."""
    run, good = loop(opt), saved_steps()
    step, carry = restored(run, folder)
    assert step == last
    memoptax.check_state(run.tx, *carry)
    same(run.run(good[step:], carry), run.run(good, run.start(SAVED)))


def check_full_disk(opt, folder):
    """No file may exceed 2,000 bytes. The checkpoint before stays complete."""
    run, good = loop(opt), saved_steps()
    carry = run.run(good[:4], run.start(SAVED))
    save(folder, 4, carry)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    later = run.run(good[4:6], carry)
    try:
        with pytest.raises(Exception, match="(?i)too large|EFBIG|write"):
            save(folder, 6, later)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    same(run.run(good[6:], later), run.run(good, run.start(SAVED)))
    goes_on(opt, folder, 4)
    save(folder, 8, run.run(good[6:], later))  # with room again
    goes_on(opt, folder, 8)
