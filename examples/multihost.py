"""One training run on several processes, each with devices of its own.

    python examples/multihost.py --local 2      # two processes on this machine
    python examples/multihost.py --cluster      # on every host of a real cluster

It trains a classifier of scikit-learn's digits. Parameters, optimizer state and batches
are sharded over all devices (FSDP). Every process runs this same script and holds only
the shards of its own devices. The numbers do not depend on how many processes share the
devices. On Cloud TPU, SLURM, Open MPI and Kubernetes `jax.distributed.initialize()`
finds the other processes by itself. Elsewhere give each process
`--coordinator host:port --processes N --process i`. With `--local` a parent starts the
processes on simulated CPU devices, which communicate through gloo on the loopback
interface.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax

WIDTH, BATCH = 64, 64


def load_digits():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


def init_params(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    normal = jax.nn.initializers.lecun_normal()
    return {
        "hidden": {"w": normal(keys[0], (64, WIDTH)), "b": jnp.zeros(WIDTH)},
        "out": {"w": normal(keys[1], (WIDTH, 10)), "b": jnp.zeros(10)},
    }


def specs_of(params):
    """Specs that divide the first axis over all devices, if it divides evenly."""
    devices = jax.device_count()
    return jax.tree.map(
        lambda p: P("data") if p.shape[0] % devices == 0 else P(), params
    )


def loss_of(params, images, labels):
    hidden = jax.nn.relu(images @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = hidden @ params["out"]["w"] + params["out"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, steps):
    """The losses, the parameters in every process, and the bytes of state per device.

    Every process loads all data here and takes its own rows. With data in files, each
    would read only its own rows.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    over = functools.partial(NamedSharding, mesh)
    abstract = jax.eval_shape(init_params)
    specs = specs_of(abstract)
    shardings = jax.tree.map(over, specs)
    state_shardings = jax.tree.map(
        over, memoptax.state_partition_specs(tx, abstract, specs)
    )

    @functools.partial(jax.jit, out_shardings=(shardings, state_shardings))
    def init():
        params = init_params()
        return params, tx.init(params)

    @functools.partial(
        jax.jit,
        donate_argnums=(0, 1),
        out_shardings=(shardings, state_shardings, over(P())),
    )
    def step(params, state, images, labels):
        loss, gradients = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    images, labels = load_digits()
    rng, rows = np.random.default_rng(0), over(P("data"))
    params, state = init()
    losses = []
    for _ in tqdm.trange(steps, disable=jax.process_index() > 0):
        chosen = rng.choice(len(labels), BATCH, replace=False)
        batch = [
            jax.make_array_from_callback(x.shape, rows, x.__getitem__)
            for x in (images[chosen], labels[chosen])
        ]
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    return losses, multihost_utils.process_allgather(params, tiled=True), held


def start_local(processes, devices, arguments):
    """Run this script in several processes on this machine, which share the devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flag = f"--xla_force_host_platform_device_count={devices // processes}"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--coordinator", f"localhost:{port}"]
    command += ["--processes", str(processes), *arguments]
    children = [
        subprocess.Popen([*command, "--process", str(i)], env=environment)
        for i in range(processes)
    ]
    if any([child.wait() for child in children]):
        raise SystemExit("A process failed.")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--local", type=int, help="how many processes to start on this machine (none)"
    )
    parser.add_argument(
        "--devices", type=int, default=4, help="devices of --local, in all (4)"
    )
    parser.add_argument(
        "--cluster", action="store_true", help="let JAX find the other processes"
    )
    parser.add_argument(
        "--coordinator", help="host:port of process 0, where --cluster finds nothing"
    )
    parser.add_argument(
        "--processes", type=int, help="with --coordinator: how many there are"
    )
    parser.add_argument(
        "--process", type=int, help="with --coordinator: which one this is, from 0"
    )
    parser.add_argument("--steps", type=int, default=300, help="of training (300)")
    parser.add_argument(
        "--output", help="a .npz file for the losses and parameters (none)"
    )
    options = parser.parse_args(arguments)
    if options.local:
        devices, local = options.devices, options.local
        if min(devices, local) < 1 or devices % local or BATCH % devices:
            parser.error(
                f"--devices must be a multiple of --local and divide {BATCH}, the "
                f"batch, but they are {devices} and {local}."
            )
        passed = ["--steps", str(options.steps)]
        passed += ["--output", options.output] if options.output else []
        return start_local(local, devices, passed)
    if options.cluster:
        jax.distributed.initialize()
    elif options.coordinator:
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process
        )
    tx = memoptax.adam_c(3e-3, topc=5)
    losses, params, held = train(tx, options.steps)
    if jax.process_index() == 0:
        whole = memoptax.state_bytes(tx, params)
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices: loss "
            f"{losses[0]:.4f} -> {np.mean(losses[-20:]):.4f}; state {whole:,} bytes, "
            f"{held:,} per device"
        )
        if options.output:
            leaves = {
                jax.tree_util.keystr(path): leaf
                for path, leaf in jax.tree.leaves_with_path(params)
            }
            np.savez(options.output, losses=losses, **leaves)


if __name__ == "__main__":
    main()
