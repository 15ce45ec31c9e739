"""Critical gradients: keep the C largest gradients seen, and join them to each new one.

McRae et al., Memory Augmented Optimizers for Deep Learning, ICLR 2022.
"""

from typing import NamedTuple

import optax

from memoptax import _buffer, _options


class CriticalGradientsState(NamedTuple):
    """State of critical_gradients."""

    buffer: _buffer.Buffer  # of gradients; its own docstring has shapes and dtypes


def critical_gradients(
    topc=None,
    decay=0.7,
    kappa=1.0,
    aggr="sum",
    *,
    synced=True,
    priority_fn=None,
    buffer_dtype=None,
    fifo_probability=None,
    seed=0,
):
    options = _options.options(
        topc,
        decay,
        kappa,
        aggr,
        synced,
        priority_fn,
        buffer_dtype,
        fifo_probability,
        seed,
    )
    if options.keeps_nothing:
        return optax.identity()

    def init_fn(params):
        return CriticalGradientsState(_options.empty(options, params))

    def update_fn(updates, state, params=None):
        del params
        updates, buffer = _options.remember(options, state.buffer, updates, updates)
        return updates, CriticalGradientsState(buffer)

    return optax.GradientTransformation(init_fn, update_fn)
