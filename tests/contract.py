"""The table of public optimizers and options that all contracts are tested over.

To add one, add a line to ``OPTIMIZERS``. A line named like its factory represents it
where a property does not depend on options.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memoptax

from compiled import step_of, train


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Optimizer:
    """A line of the table: a factory, its options, and its special properties."""

    name: str
    factory: Callable
    options: dict = dataclasses.field(default_factory=dict)
    rate: float = 0.01  # descends the test problems
    needs_params: bool = False
    smooth: bool = True  # a derivative flows through a step
    memory: str | None = "buffer"  # the field that a bad gradient never enters

    def __repr__(self):
        return self.name

    def accepts(self, argument):
        return argument in inspect.signature(self.factory).parameters

    @property
    def rated(self):
        return self.accepts("learning_rate")

    @property
    def squares(self):
        """Whether it squares gradients, and so refuses those whose squares overflow."""
        momenta = (memoptax.scale_by_adam_cm, memoptax.adam_cm, memoptax.adamw_cm)
        momenta += (memoptax.scale_by_sm3_cm, memoptax.sm3_cm)
        return self.factory in momenta or self.memory == "accumulators"

    def build(self, wrap=lambda factory: factory, **options):
        options = {**self.options, **options}
        if self.rated:
            options.setdefault("learning_rate", self.rate)
        return wrap(self.factory)(**options)

    def descends(self):
        """With a learning rate, if the factory has none."""
        tx = self.build()
        if self.rated:
            return tx
        return optax.chain(tx, optax.scale_by_learning_rate(self.rate))


def matrices(params):
    """A mask: weight decay for leaves with two axes or more."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


CG, SGD, RMS = memoptax.critical_gradients, memoptax.sgd_c, memoptax.rmsprop_c
ADAM, ADAMW = memoptax.adam_c, memoptax.adamw_c
NESTEROV = {"momentum": 0.9, "dampening": 0.1, "nesterov": True}
CENTERED = {"centered": True, "momentum": 0.5, "alpha": 0.9}
FIFO = {"topc": 2, "fifo_probability": 0.5, "seed": 3}
BF16 = {"topc": 2, "buffer_dtype": "bfloat16"}

OPTIMIZERS = [
    Optimizer("critical_gradients", CG),
    Optimizer("sgd_c", SGD),
    Optimizer("rmsprop_c", RMS),
    Optimizer("adam_c", ADAM),
    Optimizer("adamw_c", ADAMW, needs_params=True),
    Optimizer("critical_momenta", memoptax.critical_momenta),
    Optimizer("scale_by_adam_cm", memoptax.scale_by_adam_cm),
    Optimizer("sgd_cm", memoptax.sgd_cm),
    Optimizer("adam_cm", memoptax.adam_cm),
    Optimizer("adamw_cm", memoptax.adamw_cm, needs_params=True),
    Optimizer("scale_by_sm3_cm", memoptax.scale_by_sm3_cm),
    Optimizer("sm3_cm", memoptax.sm3_cm),
    Optimizer("scale_by_sm3", memoptax.scale_by_sm3, rate=0.1, memory="accumulators"),
    Optimizer("sm3", memoptax.sm3, rate=0.1, memory="accumulators"),
    Optimizer(
        "sm3 momentum",
        memoptax.sm3,
        {"momentum": 0.9, "momentum_dtype": "int8", "beta": 0.95, "variant": "I"},
        rate=0.1,
        memory="accumulators",
    ),
    Optimizer(
        "sm3_cm int8",
        memoptax.sm3_cm,
        {"topc": 1, "mu_dtype": "int8", "buffer_dtype": "int8"},
        memory="accumulators",
    ),
    Optimizer("unsynced", CG, {"topc": 2, "synced": False, "aggr": "mid"}),
    Optimizer("fifo", CG, FIFO),
    Optimizer("bf16 slots", CG, BF16),
    Optimizer("int8 slots", CG, {"topc": 2, "buffer_dtype": "int8"}),
    Optimizer("summed", CG, {"topc": 2, "holding": "sum"}),
    Optimizer("one slot", CG, {"topc": 1}),
    Optimizer("sgd_c momentum", SGD, {"momentum": 0.9}, rate=0.002),
    Optimizer("sgd_c nesterov", SGD, {**NESTEROV, "topc": 1}, rate=0.002),
    Optimizer("rmsprop_c centered", RMS, CENTERED, rate=0.001),
    Optimizer(
        "adam_cm released",
        memoptax.adam_cm,
        {"skip_first": True, "amsgrad": True, "synced": False, **BF16},
    ),
    Optimizer(
        "adam_cm int8",
        memoptax.adam_cm,
        {"topc": 2, "mu_dtype": "int8", "buffer_dtype": "int8", "synced": False},
    ),
    Optimizer(
        "adam_c amsgrad", ADAM, {"amsgrad": True, "synced": False, "mu_dtype": "int8"}
    ),
    Optimizer("adam_c L2", ADAM, {"weight_decay": 1e-3, **FIFO}, needs_params=True),
    Optimizer("adamw_c mask", ADAMW, {"mask": matrices, **BF16}, needs_params=True),
]

each_optimizer = pytest.mark.parametrize("opt", OPTIMIZERS, ids=repr)
each_factory = pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.name == opt.factory.__name__], ids=repr
)
# Each factory, and the building blocks with all options of the buffer.
each_lone_block = pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if not opt.rated], ids=repr
)
each_block = pytest.mark.parametrize(
    "opt",
    [opt for opt in OPTIMIZERS if opt.name == opt.factory.__name__ or not opt.rated],
    ids=repr,
)
each_capacity = pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.accepts("topc")], ids=repr
)
each_memory = pytest.mark.parametrize(
    "opt", [opt for opt in OPTIMIZERS if opt.memory], ids=repr
)

STEPS = 8
# Of parameters and of gradients.
HALVES = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")]
SHAPES = {"scalar": (), "vector": (3,), "rank 4": (2, 1, 2, 1)}


def params_like(shapes, dtype=jnp.float32):
    return {name: jnp.full(shape, 0.5, dtype) for name, shape in shapes.items()}


def gradients(seed=0, shapes=SHAPES, steps=STEPS):
    """A stream of gradients of very different sizes. The fourth is zero."""
    random = np.random.default_rng(seed)
    size = np.exp2(random.uniform(-3, 3, steps))
    size[3:4] = 0
    return {
        name: np.float32(random.normal(size=(steps, *shape)))
        * np.float32(size).reshape(-1, *[1] * len(shape))
        for name, shape in shapes.items()
    }


def trained(tx, params=None, stream=None):
    params = params_like(SHAPES) if params is None else params
    stream = gradients() if stream is None else stream
    return jax.jit(functools.partial(train, tx))(params, stream)


def at(stream, t):
    return jax.tree.map(lambda g: g[t], stream)


def steps_of(stream):
    return [at(stream, t) for t in range(len(jax.tree.leaves(stream)[0]))]


class Donating:
    """A jitted step that donates, and counts how often it was traced."""

    def __init__(self, tx):
        self.traces = 0

        def step(params, state, gradient):
            self.traces += 1
            return step_of(tx)(params, state, gradient)

        self.tx, self.step = tx, jax.jit(step, donate_argnums=(0, 1))

    def run(self, stream, also=lambda old, new: None):
        """Final parameters and state of a Python loop."""
        carry = params_like(SHAPES), self.tx.init(params_like(SHAPES))
        for gradient in stream:
            old, carry = carry, self.step(*carry, gradient)
            also(old, carry)
        return carry


@functools.cache
def donating(opt):
    return Donating(opt.build())


@functools.cache
def expected(opt, seed=0):
    """The result of a Python loop, which all other ways of running must match."""
    trajectory = []
    _, state = donating(opt).run(
        steps_of(gradients(seed)),
        lambda old, new: trajectory.append(jax.device_get(new[0])),
    )
    return jax.tree.map(lambda *p: np.stack(p), *trajectory), state


def close(got, want, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol
        ),
        got,
        want,
    )


def signature(tree):
    """Everything about a leaf that a compiled step or a scan depends on."""

    def leaf(x):
        return x.shape, str(x.dtype), x.weak_type

    return jax.tree.map(leaf, jax.eval_shape(lambda: tree))
