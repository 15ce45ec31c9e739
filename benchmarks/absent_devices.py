"""Devices that XLA compiles for and that need not be present: an H100, TPUs.

Nothing runs on them. The compiler is the real one, and so is the program.
"""

import datetime
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jax.experimental import topologies

import memoptax

# XLA's description of the GPU. JAX has no list of them, so it is kept here.
H100 = Path(__file__).parent / "data/h100_sxm.txtpb"


class Target(NamedTuple):
    """A kind of device: its platform, and the smallest topology of ``n`` devices."""

    platform: str
    topologies: dict
    leaf: int  # side of a square leaf
    memory: float = float("inf")  # bytes on a device


# A TPU keeps some leaves smaller than 8192 x 8192 in on-chip memory, and a count of
# bytes moved would then be too low.
TARGETS = {
    "h100": Target("cuda", {1: "1x1x1", 8: "1x1x8"}, 2048),
    "v5e": Target("tpu", {1: "v5e:2x2", 8: "v5e:2x4"}, 8192, 15.75 * 2**30),
    "v6e": Target("tpu", {1: "v6e:2x2", 8: "v6e:2x4"}, 8192, 31.25 * 2**30),
    "v5e-256": Target("tpu", {256: "v5e:16x16"}, 8192, 15.75 * 2**30),
    # The machine that runs this, to try the commands out.
    "cpu": Target("cpu", {}, 2048),
}
# For each platform: modules of which one is needed, and how to install it.
COMPILERS = {
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "jax[cuda12]"),
    "tpu": (("libtpu",), "jax[tpu]"),
    "cpu": (("jaxlib",), "jax"),
}


def compiler(platform):
    """The module that compiles for a platform; an error says what to install."""
    modules, extra = COMPILERS[platform]
    found = [name for name in modules if importlib.util.find_spec(name)]
    if not found:
        raise SystemExit(
            f'To compile for this device, install its compiler: pip install "{extra}" '
            f"(none of {', '.join(modules)} is there; the device itself is not needed)."
        )
    return found[0]


def open_no_device():
    """Leave the GPUs and TPUs of this machine alone, if there are any.

    JAX's plugin for CUDA does not load without a driver unless the platform is the CPU.
    """
    jax.config.update("jax_platforms", "cpu")


def devices(name, count=1):
    """``count`` devices of a target."""
    target = TARGETS[name]
    compiler(target.platform)
    if target.platform == "cpu":
        return jax.devices("cpu")[:count]
    topology = target.topologies[count]
    if target.platform == "tpu":
        # libtpu is only a compiler here. These variables spare it a search for TPUs and
        # its warnings, and let several processes compile at once.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        description = topologies.get_topology_desc(topology, "tpu")
    else:
        description = topologies.get_topology_desc(
            platform="cuda", topology=topology, target_config=H100.read_text()
        )
    return description.devices[:count]


def describe(name):
    """The device that is compiled for, the compiler, and the date."""
    target = TARGETS[name]
    module = compiler(target.platform)
    count = min(target.topologies, default=1)
    return {
        "device": devices(name, count)[0].device_kind,
        "compiler": f"{module} {importlib.metadata.version(module.replace('_', '-'))}",
        "jax": jax.__version__,
        "optax": optax.__version__,
        "memoptax": memoptax.__version__,
        "date": datetime.date.today().isoformat(),
    }
