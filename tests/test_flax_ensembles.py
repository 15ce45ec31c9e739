"""Ensembles of Flax models: the name of their axis stays in front of the others."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from contract import OPTIMIZERS, each_optimizer
from flax import linen as nn
from flax import nnx

import memoptax

pytestmark = [pytest.mark.slow, pytest.mark.few(1)]

MEMBERS, NAMES = 4, {"w": ("d", "m"), "b": ("d",)}


def in_boxes(flax, front=(), shape=()):
    """Parameters with names, of an ensemble if there is a name in front."""
    arrays = {"w": jnp.ones((*shape, 4, 6)), "b": jnp.ones((*shape, 4))}
    return {
        key: nn.Partitioned(array, (*front, *NAMES[key]))
        if flax is nn
        else nnx.Param(array, out_sharding=(*front, *NAMES[key]), eager_sharding=False)
        for key, array in arrays.items()
    }


def names_in(state):
    """The names of the axes of every array in a box, by its path."""

    def is_box(node):
        return isinstance(node, (nn.Partitioned, nnx.Variable))

    found = {}
    for path, box in jax.tree.leaves_with_path(state, is_leaf=is_box):
        if is_box(box):
            linen = isinstance(box, nn.Partitioned)
            names = box.names if linen else box.get_metadata()["out_sharding"]
            assert len(names) == jax.tree.leaves(box)[0].ndim
            found[jax.tree_util.keystr(path)] = names
    return found


def named_states(opt, flax):
    """The state of one member and that of four, whose new axis is named."""
    tx = opt.build()
    members = in_boxes(flax, ("e",), (MEMBERS,))
    return tx.init(in_boxes(flax)), jax.vmap(tx.init)(members)


def in_front(names):
    return {path: ("e", *own) for path, own in names.items()}


@pytest.mark.parametrize("flax", [nn, nnx], ids=["linen", "nnx"])
@each_optimizer
def test_the_name_of_an_ensemble_is_in_front(opt, flax):
    """Inside jax.vmap a box has more names than its array has axes."""
    one, all_members = named_states(opt, flax)
    assert names_in(one)
    assert names_in(all_members) == in_front(names_in(one))


@pytest.mark.parametrize("flax", [nn, nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("opt", [o for o in OPTIMIZERS if o.accepts("topc")], ids=repr)
def test_a_resized_ensemble_keeps_its_names(opt, flax):
    """There are as many members as slots, which are told apart."""
    for options in ({}, {"topc": 1}, {"topc": 3}):
        states = named_states(
            dataclasses.replace(opt, options=opt.options | options), flax
        )
        for topc, way in ((1, None), (3, "read"), (MEMBERS, None), (3, "sum")):
            one, all_members = (
                names_in(memoptax.resize_buffer(state, topc, holding=way))
                for state in states
            )
            assert all_members == in_front(one)
        one, all_members = (names_in(memoptax.reset_buffer(s)) for s in states)
        assert all_members == in_front(one)
