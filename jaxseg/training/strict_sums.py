"""Sums over a batch in one order, so that any number of devices gives the same bits.

Compilers merge and reorder sums, and then round otherwise. What is to be rounded alike is computed
in a loop whose number of turns, and whose inputs, are hidden from them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any  # of arrays


def sum_in_one_order(
    sums: Callable[[Tree, jax.Array], Tree], batch: Tree, num_shards: int, axis_name: str | None
) -> Tree:
    """Sums over virtual shards as a tree: 0 + 1, 2 + 3 ..., then (0 + 1) + (2 + 3) and so on.

    Each device adds up its own branch; above it, partners exchange what they have and both add.
    """
    num_devices = 1 if axis_name is None else lax.axis_size(axis_name)
    num_local = num_shards // num_devices
    first = 0 if axis_name is None else lax.axis_index(axis_name) * num_local
    shards = jax.tree.map(lambda x: x.reshape(num_local, -1, *x.shape[1:]), batch)

    def shard_sums(index):
        index, known = lax.optimization_barrier((index, shards))  # as in `compiled_apart`
        shard = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), known)
        return sums(shard, first + index)

    def put(index, stacked):
        return jax.tree.map(
            lambda all_shards, one: lax.dynamic_update_index_in_dim(all_shards, one, index, 0),
            stacked,
            shard_sums(index),
        )

    shapes = jax.eval_shape(shard_sums, 0)
    empty = jax.tree.map(lambda x: jnp.zeros((num_local, *x.shape), x.dtype), shapes)
    totals = lax.fori_loop(0, _unknown(num_local), put, empty)
    while num_local > 1:
        totals = jax.tree.map(lambda x: x[0::2] + x[1::2], totals)
        num_local //= 2
    totals = jax.tree.map(lambda x: x[0], totals)

    distance = 1
    while distance < num_devices:
        partners = [(device, device ^ distance) for device in range(num_devices)]
        exchange = functools.partial(lax.ppermute, axis_name=axis_name, perm=partners)
        totals = jax.tree.map(lambda x, exchange=exchange: x + exchange(x), totals)
        distance *= 2
    return totals


def compiled_apart(function: Callable[..., Tree], *arguments: Tree) -> Tree:
    """The function's result, rounded alike whatever the program around it."""
    empty = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments)
    )

    def body(turn, _):
        # As if they depended on the turn: what does not is computed before the loop.
        return function(*lax.optimization_barrier((turn, arguments))[1])

    return lax.fori_loop(0, _unknown(1), body, empty)


def _unknown(number):
    """A number of turns that is hidden from the compiler.

    It would merge a single turn of a loop with what is around it, and then round otherwise.
    """
    return lax.optimization_barrier(number)
