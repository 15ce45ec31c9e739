"""Corrupted or forged states are refused with a sentence, and not used."""

import ast
import functools
import pathlib
import re

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from contract import (
    OPTIMIZERS,
    SHAPES,
    each_factory,
    gradients,
    params_like,
    signature,
    steps_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import memoptax

from training_loop import NAMED, is_finite, loop

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
FORGED = [NAMED[n] for n in ("adam_c", "fifo", "sm3_cm int8", "summed", "sm3 momentum")]


@functools.cache
def honest(opt):
    """A state after eight steps, as arrays of NumPy."""
    params, state = loop(opt).run(steps_of(gradients()))
    return params, jax.device_get(state)


def check(opt, state):
    memoptax.check_state(loop(opt).tx, params_like(SHAPES), state)


# Ways to forge a leaf. Each is a function of the draw, the leaf and its name. It
# returns the forged leaf, or None if the leaf cannot be forged in this way.


def another_shape(draw, leaf, name):
    del name
    return draw(
        st.sampled_from([leaf[None], np.append(leaf.ravel(), leaf.ravel()[:1])])
    )


def another_dtype(draw, leaf, name):
    del name
    others = {"float32", "float16", "int32", "int8", "uint32"} - {leaf.dtype.name}
    with np.errstate(over="ignore", invalid="ignore"):
        return leaf.astype(draw(st.sampled_from(sorted(others))))


def not_a_number(draw, leaf, name):
    del name
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    bad = draw(st.sampled_from([np.nan, np.inf, -np.inf] if leaf.ndim else [np.nan]))
    return put(draw, leaf, bad)


def out_of_range(draw, leaf, name):
    """A number below 0 where that is impossible, or one outside of a permutation."""
    low = {"keys": -1, "ages": -1, "offered": -1, "accepted": -1, "norms": -1}
    low |= {"error": -1, "entries": draw(st.sampled_from([-1, 99]))}
    return put(draw, leaf, low[name]) if name in low else None


def no_permutation(draw, leaf, name):
    if name != "entries":
        return None
    forged = leaf.copy()
    forged[..., draw(st.integers(0, leaf.shape[-1] - 1))] = forged[..., 0]
    return None if np.array_equal(forged, leaf) else forged


def no_array(draw, leaf, name):
    del leaf, name
    return draw(st.sampled_from(["text", b"bytes", object()]))


def put(draw, leaf, value):
    forged = np.array(leaf).reshape(-1)
    forged[draw(st.integers(0, forged.size - 1))] = value
    return forged.reshape(leaf.shape)


FORGERIES = [
    *(another_shape, another_dtype, not_a_number),
    *(out_of_range, no_permutation, no_array),
]


@st.composite
def forgeries(draw):
    """An optimizer, and its state with one forged leaf."""
    opt, forge = draw(st.sampled_from(FORGED)), draw(st.sampled_from(FORGERIES))
    paths, treedef = jax.tree.flatten_with_path(honest(opt)[1])
    possible = [k for k, (_, leaf) in enumerate(paths) if leaf.size]
    k = draw(st.sampled_from(possible))
    path, leaf = paths[k]
    name = path[-1].name if hasattr(path[-1], "name") else ""
    forged = forge(draw, leaf, name)
    leaves = [leaf for _, leaf in paths]
    if forged is None:
        return opt, None
    leaves[k] = forged
    return opt, treedef.unflatten(leaves)


def refuse(case):
    opt, state = case
    if state is None:
        return
    with pytest.raises(ValueError) as error:
        check(opt, state)
    sentence = str(error.value)
    assert sentence.startswith("state") and sentence.endswith("."), sentence
    assert len(sentence) > 20


@settings(max_examples=60)
@given(forgeries())
def test_a_forged_leaf_is_refused_with_a_sentence(case):
    refuse(case)


@settings(max_examples=5000)
@given(forgeries())
@pytest.mark.long
def test_five_thousand_forged_leaves_are_refused(case):
    refuse(case)


@st.composite
def trees(draw):
    """Not a state of this optimizer: another's, or anything that a file may hold."""
    opt = draw(st.sampled_from(FORGED))
    other = draw(st.sampled_from([o for o in OPTIMIZERS if o is not opt]))
    leaves = st.sampled_from([None, 0.0, np.zeros(3), "text"])
    anything = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner)
        ),
        max_leaves=5,
    )
    return opt, draw(anything | st.just(other.build().init(params_like(SHAPES))))


def mistake(case):
    opt, tree = case
    born = loop(opt).tx.init(params_like(SHAPES))
    if jax.tree.structure(tree) == jax.tree.structure(born):
        if signature(tree) == signature(born):
            return  # a sibling's, with the same numbers at the same places
    with pytest.raises(ValueError, match="^state"):
        check(opt, tree)


@settings(max_examples=30)
@given(trees())
def test_what_is_no_state_is_refused_with_a_sentence(case):
    mistake(case)


@settings(max_examples=1000)
@given(trees())
@pytest.mark.long
@pytest.mark.minutes
def test_a_thousand_trees_that_are_no_state_are_refused(case):
    mistake(case)


@each_factory
@pytest.mark.few(3)
def test_an_honest_state_is_taken(opt):
    """This shows that the checks above do not refuse everything."""
    check(opt, honest(opt)[1])
    check(opt, loop(opt).tx.init(params_like(SHAPES)))


# Forgeries that look like a state: training stays finite


@st.composite
def plausible(draw):
    """Every number is moved a little, and the entries of a buffer are reordered."""
    opt = draw(st.sampled_from(FORGED))
    seed = draw(st.integers(0, 2**31 - 1))
    random = np.random.default_rng(seed)

    def leaf(path, x):
        name = getattr(path[-1], "name", "")
        if name == "entries" and not np.array_equal(x, 0 * x):
            return np.stack([random.permutation(row) for row in x])
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        factor = np.asarray(random.uniform(0.5, 2, x.shape), np.float32)
        return (x.astype(np.float32) * factor).astype(x.dtype)

    return opt, jax.tree.map_with_path(leaf, honest(opt)[1])


def go_on(case):
    opt, state = case
    if opt is NAMED["summed"]:  # other slots than those of the sum
        with pytest.raises(ValueError, match="running sum .* is not that of its slots"):
            check(opt, state)
        topc = opt.options["topc"]
        state = memoptax.resize_buffer(state, topc, holding="sum")
    check(opt, state)
    after = loop(opt).run(steps_of(gradients(seed=1)), (honest(opt)[0], state))
    assert is_finite(after)
    check(opt, after[1])


@settings(max_examples=10)
@given(plausible())
def test_a_plausible_forgery_goes_on_finite(case):
    go_on(case)


@settings(max_examples=500)
@given(plausible())
@pytest.mark.long
def test_five_hundred_plausible_forgeries_go_on_finite(case):
    go_on(case)


# The package executes nothing that it reads

UNSAFE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


def test_no_path_of_ours_pickles_or_evaluates():
    for path in (ROOT / "memoptax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Call):
                called = node.func
                name = getattr(called, "id", None)
                assert name not in {"eval", "exec", "open", "compile"}, path
            assert not names & (UNSAFE | {"subprocess", "socket", "os"}), path


def test_examples_and_benchmarks_read_no_pickle():
    for folder in ("examples", "benchmarks", "notebooks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not re.search(rf"\b(import|from) ({'|'.join(UNSAFE)})\b", text), path
            assert "allow_pickle=True" not in text, path


def test_what_flax_writes_of_a_state_holds_arrays_only():
    kinds = set()

    def array(code, data):
        kinds.add(code)
        return data

    written = flax.serialization.to_bytes(honest(NAMED["adam_c"])[1])
    msgpack.unpackb(written, ext_hook=array, strict_map_key=False)
    assert kinds <= {1, 3}  # an array, and a scalar of NumPy


def test_security_says_what_is_promised():
    text = (ROOT / "SECURITY.md").read_text()
    for promise in ("No pickle", "check_state", "one leaf", "cannot tell"):
        assert promise in text, promise
