"""Faults of gradients, and the check of what is promised after each.

A bad gradient comes first, or when the buffer is full. It comes twice, which is one
step if two gradients are accumulated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import gradients, signature, steps_of

from training_loop import everywhere, is_finite, loop, same, stream


def with_bad(good, bad, place):
    return [*good[:place], bad, bad, *good[place:]]


def check_not_finite(value, opt, wrap):
    run, good = loop(opt, wrap), stream()
    for place in (0, 10):
        got, want = run.run(with_bad(good, everywhere(value), place)), run.run(good)
        same(run.memory(got), run.memory(want))
        if wrap in ("apply_if_finite", "accumulated"):
            inner = {"apply_if_finite": "inner_state", "accumulated": "inner_opt_state"}
            same(got[0], want[0])
            same(getattr(got[1], inner[wrap]), getattr(want[1], inner[wrap]))


def check_one_entry(opt):
    """On a CPU, XLA's maximum of many entries overlooks NaN, so no guard may use it."""
    shapes = {"matrix": (64, 64)}
    run, good = loop(opt), steps_of(gradients(shapes=shapes, steps=8))
    for value in (np.nan, np.inf):
        bad = {"matrix": np.array(good[6]["matrix"])}
        bad["matrix"][3, 2] = value
        stained = [*good[:6], bad, *good[6:]]
        got = run.run(stained, run.start(shapes))
        same(run.memory(got), run.memory(run.run(good, run.start(shapes))))


def check_huge(opt, wrap):
    run, good, bad = loop(opt, wrap), stream(), everywhere(1e30)
    for place in (0, 10):
        carry = run.start()
        for gradient in with_bad(good, bad, place)[: place + 2]:
            carry = run.step(*carry, gradient)
            assert is_finite(run.memory(carry))
        after = run.run(good[place:], carry)
        assert is_finite((after[0], run.memory(after)))
        if wrap == "clipped":
            clip = optax.clip_by_global_norm(1.0)
            seen, _ = clip.update(bad, clip.init(bad))
            want = run.run(with_bad(good, seen, place))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), after, want
            )
        elif opt.squares:
            same(run.memory(after), run.memory(run.run(good)))
        else:
            assert np.max(run.memory(carry).keys) > 1e28


def check_zero(opt, wrap):
    run, zeros = loop(opt, wrap), [everywhere(0.0)] * 6
    start = run.start()
    rested = run.run(zeros, start)
    if not opt.needs_params and not opt.options.get("weight_decay"):
        same(rested[0], start[0])
    assert is_finite(rested)
    before = run.run(stream()[:10])
    after = run.run(zeros, before)
    assert is_finite(run.run(stream()[10:], after))
    if hasattr(run.memory(before), "accepted") and "fifo_probability" not in (
        opt.options
    ):
        same(run.memory(after).accepted, run.memory(before).accepted)
        same(run.memory(after).entries, run.memory(before).entries)


def check_leaves(lost, opt):
    """The gradient is refused during tracing, so no state is changed or donated."""
    run, good = loop(opt), stream()
    before = run.run(good[:5])
    with pytest.raises(ValueError, match="state was made for"):
        step = jax.jit(run.tx.update)
        step(lost(good[5]), before[1], before[0])
    same(run.run(good[5:], before), run.run(good))


def without_vector(gradient):
    return {name: g for name, g in gradient.items() if name != "vector"}


def none_for_vector(gradient):
    return {**gradient, "vector": None}


def check_gradient_dtype(opt):
    """Three steps have gradients in bfloat16, as when a loss is cast."""
    run, good = loop(opt), stream()
    half = [jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), g) for g in good]
    carry = run.run(good[:4])
    born = signature(carry[1])
    carry = run.run(half[4:7], carry)
    assert signature(carry[1]) == born
    carry = run.run(good[7:], carry)
    rounded = [jax.tree.map(lambda g: np.asarray(g, np.float32), g) for g in half]
    want = run.run([*good[:4], *rounded[4:7], *good[7:]])
    for got, exact in zip(jax.tree.leaves(carry[0]), jax.tree.leaves(want[0])):
        # An update that is in bfloat16 too is rounded by 2⁻⁹ of itself, in three steps.
        np.testing.assert_allclose(got, exact, 2**-9, 0.02 * max(1.0, 10 * opt.rate))
