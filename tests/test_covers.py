"""Covers: their boxes, what is refused, and how a cover is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memoptax

import oracle_sm3
from labels import named
from streams import updates_of
from untyped import untyped


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes(cover, params):
    state = untyped(memoptax.scale_by_sm3(cover=cover).init(params))
    return [tuple(a.shape for a in family) for family in state.accumulators]


@pytest.mark.parametrize(
    "cover, shape, boxes",
    [
        (memoptax.covers.axes, (2, 3, 4), [(1, 3, 4), (2, 1, 4), (2, 3, 1)]),
        (memoptax.covers.axes, (5,), [(1,)]),
        (memoptax.covers.axes, (), [()]),
        (memoptax.covers.rows, (7, 3), [(1, 3)]),
        (memoptax.covers.rows, (7,), [(1,)]),
        (memoptax.covers.full, (7, 3), [(1, 1)]),
        (memoptax.covers.whole, (7, 3), [(7, 3)]),
        (memoptax.covers.whole, (), [()]),
        (memoptax.covers.blocks(None, 2), (7, 3), [(7, 2)]),
        (memoptax.covers.blocks(4), (7, 3), [(1, 4)]),
        (memoptax.covers.blocks(2, 2, 2), (7, 3), [(2, 2)]),
        (memoptax.covers.blocks(2), (), [()]),
    ],
)
def test_public_covers_have_their_boxes(cover, shape, boxes):
    assert cover((), leaf(*shape)) == boxes


@pytest.mark.parametrize(
    "boxes, shape, accumulators",
    [
        ([(1, 3)], (7, 3), ((7, 1),)),
        ([(2, 2)], (7, 3), ((4, 2),)),
        ([(7, 2), (3, 3)], (7, 3), ((1, 2), (3, 1))),
        ([(100, 100)], (7, 3), ((1, 1),)),
        ([(6,)], (10,), ((2,),)),
    ],
)
def test_accumulators_have_one_number_per_box(boxes, shape, accumulators):
    assert shapes(boxes, jnp.zeros(shape)) == [accumulators]


@pytest.mark.parametrize("boxes", [[(6,)], [(5,)], [(6,), (4,)], [(9,)]], ids=named)
def test_uneven_edges_are_where_the_box_shape_says(boxes):
    """ceil(10 / 6) = ceil(10 / 5): the state by itself cannot tell these covers
    apart."""
    g = jnp.arange(1.0, 11.0)
    tx = untyped(memoptax.scale_by_sm3(cover=boxes))
    oracle = oracle_sm3.SM3((10,), boxes)
    _, state = tx.update(g, tx.init(g))
    u, _ = tx.update(g[::-1], state)
    oracle.step(g)
    np.testing.assert_allclose(u, oracle.step(g[::-1]), rtol=1e-6)


def test_families_that_overlap_take_the_minimum():
    g = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    tx = untyped(memoptax.scale_by_sm3(cover=[(2, 2), (1, 2)]))
    _, state = tx.update(g, tx.init(g))
    u, _ = tx.update(jnp.ones((2, 2)), state)
    np.testing.assert_allclose(u, [[5**-0.5] * 2, [17**-0.5] * 2], rtol=1e-6)


def test_more_families_never_take_smaller_steps():
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.standard_normal((8, 6))) for _ in range(5)]
    few = memoptax.scale_by_sm3(cover=memoptax.covers.axes)
    more = memoptax.scale_by_sm3(
        cover=lambda path, x: (
            memoptax.covers.axes(path, x) + memoptax.covers.blocks(2, 2)(path, x)
        )
    )
    short, long = (
        np.abs([*updates_of(tx, gradients[0], gradients)]) for tx in (few, more)
    )
    assert (long >= short * (1 - 1e-6)).all()
    assert (long[-1] > short[-1] * 1.01).any()


def test_a_function_chooses_for_each_parameter():
    def cover(path, x):
        if "embedding" in jax.tree_util.keystr(path):
            return memoptax.covers.rows(path, x)
        return (
            memoptax.covers.full(path, x)
            if x.size < 10
            else memoptax.covers.axes(path, x)
        )

    params = {"embedding": jnp.zeros((9, 4)), "b": jnp.zeros(4), "w": jnp.zeros((4, 5))}
    assert shapes(cover, params) == [((4,),), ((9, 1),), ((4, 1), (1, 5))]
    tx = memoptax.scale_by_sm3(cover=cover)
    tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    "cover, sentence",
    [
        ([], r"every entry of \['w'\] with shape \(4, 3\) uncovered"),
        (lambda path, x: [], r"every entry of \['w'\] .* uncovered"),
        ([(1,)], r"cover of \['w'\] .* \(1,\): a box needs one positive integer"),
        ([(0, 3)], r"cover of \['w'\] .* \(0, 3\)"),
        (lambda path, x: [(1, 3), (2.0, 3)], r"cover of \['w'\] .* \(2.0, 3\)"),
        (lambda path, x: [4], r"cover of \['w'\] .* 4: a box needs one positive"),
        (lambda path, x: 4, r"cover of \['w'\] .* is 4: it must be a list of box"),
        (lambda path, x: [(-1, 3)], r"cover of \['w'\] .* \(-1, 3\)"),
    ],
    ids=named,
)
def test_a_cover_that_leaves_entries_uncovered_is_refused(cover, sentence):
    with pytest.raises(ValueError, match=sentence):
        memoptax.scale_by_sm3(cover=cover).init({"w": jnp.zeros((4, 3))})


def test_a_cover_must_not_change():
    answers = iter([[(1, 3)], [(1, 1)]])
    tx = memoptax.sm3(0.1, cover=lambda path, leaf: next(answers))
    params = {"w": jnp.ones((4, 3))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['w'\].*state has \[\(4, 1\)\]"):
        tx.update(params, state)


def test_blocks_take_positive_integers():
    for size in untyped((0, -1, True, 2.0, "x", [2])):
        with pytest.raises(ValueError) as error:
            memoptax.covers.blocks(None, size)
        assert str(error.value).startswith("size of covers.blocks must be an integer")
        assert repr(size) in str(error.value)
    bare = memoptax.sm3(0.1, cover=untyped(memoptax.covers.blocks))
    with pytest.raises(ValueError, match="a cover is what covers.blocks returns"):
        bare.init(jnp.ones((4, 6)))
    leaf = jax.ShapeDtypeStruct((4, 6), "float32")
    sizes = untyped((np.int64(2), np.uint8(3)))
    (box,) = memoptax.covers.blocks(*sizes)((), leaf)
    assert box == (2, 3) and all(type(n) is int for n in box)


def test_a_kernel_needs_two_sweeps():
    """Four families read the kernel only twice, and the update reads it once more."""
    g = jnp.zeros((3, 3, 128, 128))
    tx = memoptax.scale_by_sm3()
    text = str(jax.make_jaxpr(tx.update)(g, tx.init(g)))
    assert text.count("platform_index") == text.count("platform_index[") == 2
