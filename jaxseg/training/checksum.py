"""A checksum of arrays: differs wherever any bit of any number does, or two exchange places."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PLACE_FACTOR = 2654435761  # 2^32 / golden ratio (Knuth): places of few digits spread far apart


def checksum(tree: Any, start: Sequence[int | jax.Array] = ()) -> jax.Array:
    """Sum modulo 2^32 of the bits of all numbers, each times an odd number for its place.

    Args:
      tree: arrays of numbers of four bytes or one.
      start: where each of these begins in an array of which it is a part, along the first axes. The
        checksum of the whole is the sum of those of its parts.
    Returns:
      uint32 scalar.
    """

    def of(leaf):
        factor = jnp.uint32(1)
        for axis in range(leaf.ndim):
            place = lax.iota(jnp.uint32, leaf.shape[axis])
            if axis < len(start):
                place += jnp.uint32(start[axis])
            stride = PLACE_FACTOR ** (axis + 1) % 2**32
            factor += jnp.expand_dims(2 * place * np.uint32(stride), range(1, leaf.ndim - axis))
        if leaf.dtype.itemsize == 1:
            leaf = leaf.astype(jnp.uint32)
        return jnp.sum(lax.bitcast_convert_type(leaf, jnp.uint32) * factor, dtype=jnp.uint32)

    return sum(map(of, jax.tree.leaves(tree)))
