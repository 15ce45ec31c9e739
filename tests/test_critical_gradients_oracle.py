"""Critical gradients on streams of ties, zeros and faults, against NumPy."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memoptax
from memoptax import critical_gradients

import oracle
from compiled import train
from streams import at, close, emit

pytestmark = pytest.mark.few(2)

nan, inf = float("nan"), float("inf")


STEPS = 12


# Quarters and powers of two: sums of their squares are exact, and so are ties.
values = st.sampled_from([-2.0, -1.0, -0.75, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0])


sizes = hnp.arrays(np.float64, STEPS, elements=st.sampled_from([0, 0.25, 1, 1, 4]))


# A subnormal κ is a 0 to XLA, where mid and mean jump.
kappas = st.floats(-1, 2).map(lambda kappa: round(kappa, 3))


fractions = st.sampled_from([0.0, 0.5, 0.7, 1.0]) | st.floats(0, 1)


@st.composite
def streams(draw, shapes):
    size = draw(sizes)
    return {
        name: draw(hnp.arrays(np.float64, (STEPS, *shape), elements=values))
        * size.reshape(-1, *[1] * len(shape))
        for name, shape in shapes.items()
    }


TREES = [{"w": (3,)}, {"a": (), "b": (2, 2)}, {"a": (2,), "b": (0, 3)}]


CONFIGURATIONS = {
    "critical only": ("sgd_c", {"topc": 4, "aggr": "mid"}, ()),
    "sgd": ("sgd_c", {"topc": 1}, ("momentum", "dampening")),
    "nesterov": (
        "sgd_c",
        {"topc": 3, "synced": False, "aggr": "mean", "nesterov": True},
        ("momentum",),
    ),
    "rmsprop": ("rmsprop_c", {"topc": 2, "eps": 1e-3}, ("momentum", "alpha")),
    "amsgrad": (
        "adam_c",
        {"topc": 5, "synced": False, "amsgrad": True, "eps": 1e-3},
        ("b1", "b2"),
    ),
    "adamw": ("adamw_c", {"topc": 2, "aggr": "sum", "eps": 1e-3}, ("b1", "b2")),
    "int8": ("sgd_c", {"topc": 2, "buffer_dtype": "int8"}, ("momentum",)),
    "int8 apart": (
        "adam_c",
        {"topc": 3, "buffer_dtype": "int8", "synced": False, "eps": 1e-3},
        ("b1", "b2"),
    ),
}


@functools.cache
def compiled_run(configuration):
    name, options, _ = CONFIGURATIONS[configuration]

    def replay(params, stream, numbers):
        return train(getattr(memoptax, name)(**options, **numbers), params, stream)[0]

    return jax.jit(replay)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_any_stream_agrees_with_the_oracle(configuration, x64):
    name, options, own = CONFIGURATIONS[configuration]
    shapes = TREES[list(CONFIGURATIONS).index(configuration) % len(TREES)]
    numbers = {
        "learning_rate": st.floats(1e-3, 1),
        "decay": fractions,
        "kappa": kappas,
        "weight_decay": st.sampled_from([0.0, 0.1]),
        **{name: st.floats(0, 0.99) for name in own},
    }

    @hypothesis.settings(max_examples=25)
    @hypothesis.given(streams(shapes), st.fixed_dictionaries(numbers))
    def check(stream, numbers):
        params = {name: np.full(shape, 0.5) for name, shape in shapes.items()}
        got = compiled_run(configuration)(params, stream, numbers)
        want = oracle.run(name, params, stream, **options, **numbers)
        close(got, want, 1e-9, 1e-9)

    check()


def drops_gradient(update, buffer_mean, fill):
    del update, fill
    return buffer_mean


@functools.cache
def compiled_emit(topc, synced, aggr, dtype):
    def emitted(stream, decay):
        tx = critical_gradients(topc, decay, synced=synced, aggr=aggr)
        return emit(tx, stream)[0]

    return jax.jit(emitted)


@pytest.mark.parametrize(
    "topc, synced, aggr, dtype",
    [
        (1, True, "sum", "float64"),
        (3, False, "mean", "float32"),
        (2, True, "mid", "bfloat16"),
        (4, False, drops_gradient, "float16"),
    ],
)
def test_any_stream_with_bad_gradients_agrees_with_the_oracle(
    topc, synced, aggr, dtype, x64
):
    shapes = {"a": (), "b": (3,)}
    spoilt = hnp.arrays(
        np.float64, (STEPS, 2), elements=st.sampled_from([0.0] * 6 + [nan, inf, -inf])
    )

    # Exact in every dtype, and so are ties under these decays.
    @hypothesis.settings(max_examples=25)
    @hypothesis.given(streams(shapes), spoilt, st.sampled_from([0.0, 0.5, 1.0]))
    def check(stream, spoilt, decay):
        stream = {"a": stream["a"] + spoilt[:, 0], "b": stream["b"]}
        stream["b"][:, 1] += spoilt[:, 1]
        got = compiled_emit(topc, synced, aggr, dtype)(
            jax.tree.map(lambda g: jnp.asarray(g, dtype), stream), decay
        )
        steps = [at(stream, t) for t in range(STEPS)]
        options = {"topc": topc, "decay": decay, "synced": synced, "aggr": aggr}
        with np.errstate(invalid="ignore"):
            wanted = list(oracle.critical_gradients(steps, **options))
        eps = float(jnp.finfo(dtype).eps)
        for name in shapes:
            want = np.stack([step[name] for step in wanted])
            np.testing.assert_allclose(np.float64(got[name]), want, eps, 50 * eps)

    check()
