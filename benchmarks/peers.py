"""The same step in PyTorch and in JAX: milliseconds on 16 M float32 parameters.

    pip install torch pytorch-optimizer torch-SM3
    python benchmarks/peers.py [--quick] [--rounds 15]

The peers are needed only here. One that is not installed is reported as missing. All
take turns in one process on four square matrices, with as many threads as there are
cores. PyTorch updates in place, as a donated step does.
"""

import argparse
import importlib
import os
import statistics
import time

import numpy as np
import optax
from measuring import (
    add_arguments,
    describe_machine,
    make_gradients,
    optimizer_runner,
    report,
)
from tqdm import tqdm

import memoptax

OURS = {
    "optax.adam": lambda: optax.adam(1e-4),
    "optax.sm3": lambda: optax.sm3(1e-4),
    "sgd_c": lambda: memoptax.sgd_c(1e-4, decay=0.5),
    "adam_c": lambda: memoptax.adam_c(1e-4, decay=0.5),
    "adam_cm": lambda: memoptax.adam_cm(1e-4, decay=0.5),
    "sm3": lambda: memoptax.sm3(1e-4),
}
# Name: module, class in it, arguments.
PEERS = {
    "torch.optim.Adam": ("torch.optim", "Adam", {}),
    "torch.optim.Adam, fused": ("torch.optim", "Adam", {"fused": True}),
    "pytorch-optimizer SM3": ("pytorch_optimizer", "SM3", {}),
    "torch-SM3": ("SM3", "SM3", {}),
}
COLUMNS = ("optimizer", "ms", "/ optax.adam", "version")


class Peer:
    """An optimizer of PyTorch with its parameters."""

    def __init__(self, module, name, arguments, gradients):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.gradients = [
            [torch.tensor(np.asarray(leaf)) for leaf in tree.values()]
            for tree in gradients
        ]
        self.params = [torch.zeros_like(g) for g in self.gradients[0]]
        make = getattr(importlib.import_module(module), name)
        self.optimizer = make(self.params, lr=1e-4, **arguments)
        self.seconds = []

    def run(self, turn):
        for param, gradient in zip(
            self.params, self.gradients[turn % len(self.gradients)]
        ):
            param.grad = gradient
        begin = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)


class Own:
    """An optimizer of JAX. Its arguments come from the number of the turn."""

    def __init__(self, make, gradients):
        self.gradients = gradients
        self.runner = optimizer_runner(make, gradients[0])
        self.seconds = self.runner.seconds

    def run(self, turn):
        self.runner.run(self.gradients[turn % len(self.gradients)])


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    add_arguments(parser)
    args = parser.parse_args(argv)
    machine = describe_machine()
    gradients = make_gradients(4096 if args.quick else 1 << 24, 4)
    rows, running = [], {}
    for name, make in OURS.items():
        running[name] = Own(make, gradients)
        owner = optax if name.startswith("optax") else memoptax
        rows.append({"optimizer": name, "version": owner.__version__})
    for name, (module, optimizer, arguments) in PEERS.items():
        row = {"optimizer": name}
        try:
            running[name] = Peer(module, optimizer, arguments, gradients)
            row["version"] = getattr(
                importlib.import_module(module.split(".")[0]),
                "__version__",
                "installed",
            )
        except ImportError:
            row["version"] = "missing"
        rows.append(row)
    rounds, warm = (2, 1) if args.quick else (args.rounds, 7)  # fills the buffers
    for turn in tqdm(range(rounds + warm), unit="round"):
        for runner in running.values():
            runner.run(turn)
    medians = {
        name: 1e3 * statistics.median(runner.seconds[warm:])
        for name, runner in running.items()
    }
    for row in rows:
        if row["optimizer"] in medians:
            row["ms"] = medians[row["optimizer"]]
            row["/ optax.adam"] = row["ms"] / medians["optax.adam"]
    report(args, "peers", machine, rows, COLUMNS)
    return rows


if __name__ == "__main__":
    main()
