"""Time of one eager step of every optimizer, as a ratio to ``optax.adam``.

    python benchmarks/eager.py [--quick] [--leaves 4] [--steps 50]

The caller jits nothing, as when a user tries an optimizer at a prompt or in a debugger.
Leaves are small, so that the time is that of dispatching the operations. Each optimizer
takes turns with adam.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from cases import OPTIMIZERS
from measuring import add_arguments, describe_machine, report
from tqdm import tqdm

COLUMNS = ("optimizer", "leaves", "ms", "/ adam")


class Eager:
    """An optimizer whose steps are dispatched operation by operation."""

    def __init__(self, tx, params):
        self.tx, self.params, self.state = tx, params, tx.init(params)
        self.seconds = []

    def step(self, gradients):
        begin = time.perf_counter()
        updates, self.state = self.tx.update(gradients, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)
        jax.block_until_ready((self.params, self.state))
        self.seconds.append(time.perf_counter() - begin)


def measure(name, params, gradients, steps):
    adam, other = Eager(optax.adam(1e-3), params), Eager(OPTIMIZERS[name](), params)
    for step in range(steps):
        gradient = gradients[step % len(gradients)]
        adam.step(gradient)
        other.step(gradient)
    # The first steps compile.
    taken, of_adam = (statistics.median(x.seconds[5:]) for x in (other, adam))
    return {
        "optimizer": name,
        "leaves": len(params),
        "ms": 1e3 * taken,
        "/ adam": taken / of_adam,
    }


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, default=4, help="matrices of 64 x 64")
    parser.add_argument("--steps", type=int, default=50, help="of which 5 warm up")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.leaves, args.steps = 2, 7
    keys = jax.random.split(jax.random.key(0), (5, args.leaves))
    draws = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (64, 64))))(keys)
    gradients = [list(each) for each in draws]
    params = [jnp.zeros((64, 64))] * args.leaves
    rows = [
        measure(name, params, gradients, args.steps)
        for name in tqdm(OPTIMIZERS, unit="optimizer")
    ]
    report(args, "eager", describe_machine(), rows, COLUMNS)
    return rows


if __name__ == "__main__":
    main()
