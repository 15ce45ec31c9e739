"""One of two processes, each with two devices, which share an ensemble of four.

python tests/processes.py localhost:1234 0 & python tests/processes.py localhost:1234 1
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memoptax


def take_steps(tx, params):
    """Two steps of every member, whose state the tools take in between."""
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(tx.update))
    every = optax.GradientTransformation(jax.vmap(tx.init), update)
    for _ in range(2):
        _, state = update(params, state, params)
        memoptax.check_state(every, params, state)
        state = memoptax.resize_buffer(state, 3)
    memoptax.check_state(every, params, memoptax.reset_buffer(state))
    fill = memoptax.buffer_stats(state)["fill"]
    return jnp.min(fill), jnp.max(fill)


def main(coordinator, process):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(process))
    for mode in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), (mode,))
        over = NamedSharding(mesh, P("data"))
        with jax.set_mesh(mesh):
            params = jax.jit(lambda: jnp.ones((4, 3)), out_shardings=over)()
            for tx in (memoptax.adam_c(0.1, topc=3), memoptax.sgd_cm(0.1, topc=3)):
                np.testing.assert_array_equal(take_steps(tx, params), (2, 2))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*sys.argv[1:])
