"""Between a file's grid and the network's, for arrays of one shape and volumes of many sizes.

Sizes are data, in voxels: `size` is that of the network's grid, `source_size` that of the file's.
Both cover the same extent, as in `geometry`. Arrays may be larger, so that one compiled program
serves many volumes; what lies beyond the size has no influence.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BUCKET = 64
# A cubic spline through samples forgets them by a factor of 0.27 per voxel: 1e-9 after 16.
SPLINE_REACH = 16


def bucket(size: int) -> int:
    """The array size that volumes of about this size share: a multiple of 64, or 1."""
    return size if size == 1 else -(-size // BUCKET) * BUCKET


def box_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The array shape that volumes of about this shape share."""
    return tuple(map(bucket, shape))


def boxed(volume: np.ndarray) -> np.ndarray:
    """Puts a volume into an array of the shape that volumes like it share; NumPy, on the host.

    Args:
      volume: [X, Y, Z, ...], any real dtype.
    Returns:
      [*box, ...] float32, 0 beyond the volume.
    """
    box = np.zeros((*box_of(volume.shape[:3]), *volume.shape[3:]), np.float32)
    box[tuple(map(slice, volume.shape[:3]))] = volume
    return box


def voxels_inside(box: Sequence[int], size: jax.Array) -> jax.Array:
    """Which voxels of an array of spatial shape `box` belong to a volume of `size`, bool."""
    first, second, third = (jnp.arange(n) < size[axis] for axis, n in enumerate(box))
    return first[:, None, None] & second[:, None] & third


def neighbours(
    target: jax.Array, size: jax.Array, source_size: jax.Array, coarse: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a voxel of the source grid lies on the network's grid of the same extent.

    Args:
      target: voxels of the source grid along one axis, int32.
      size, source_size: of the axis on both grids.
      coarse: whether it is not interpolated along this axis, bool.
    Returns:
      (lower, upper, fraction): the two voxels beside it, int32, and the share of the upper one;
      along a coarse axis both are the voxel that its centre lies in.
    """
    place = jnp.clip((2 * target + 1) * size - source_size, 0, 2 * source_size * (size - 1))
    lower = place // (2 * source_size)
    fraction = (place - 2 * source_size * lower).astype(jnp.float32) / (2 * source_size)
    holding = (2 * target + 1) * size // (2 * source_size)
    upper = jnp.minimum(lower + 1, size - 1)
    return (
        jnp.where(coarse, holding, lower),
        jnp.where(coarse, holding, upper),
        jnp.where(coarse, 0, fraction),
    )


def interpolation_matrix(
    size: jax.Array,
    source_size: jax.Array,
    capacity: int,
    source_capacity: int,
    order: int,
    coarse: jax.Array,
) -> jax.Array:
    """Resampling along one axis, as a matrix; rows are what `geometry.resample_to_shape` does.

    Args:
      size, source_size: of the axis after and before.
      capacity, source_capacity: shape of the matrix.
      order: spline order, 1 or 3.
      coarse: whether each voxel takes the one that its centre lies in instead, bool.
    Returns:
      [capacity, source_capacity] float32; rows from `size` and columns from `source_size` on are 0.
    """
    target = jnp.arange(capacity)[:, None]
    # Of the place on the source axis, whose denominator is 2 size.
    numerator = (2 * target + 1) * source_size - size

    def kernel_at(voxel, numerator=numerator):
        return _KERNELS[order]((numerator - 2 * size * voxel).astype(jnp.float32) / (2 * size))

    source = jnp.arange(source_capacity)
    if order == 1:
        clipped = jnp.clip(numerator, 0, 2 * size * (source_size - 1))
        weights = kernel_at(source, clipped)
    else:
        # The edge value continues: voxels beyond the ends count for the outermost ones.
        weights = kernel_at(source)
        beyond = jnp.arange(1, SPLINE_REACH + 1)
        below = kernel_at(-beyond).sum(1, keepdims=True)
        above = kernel_at(source_size - 1 + beyond).sum(1, keepdims=True)
        weights += jnp.where(source == 0, below, 0) + jnp.where(source == source_size - 1, above, 0)
    holding = source == (2 * target + 1) * source_size // (2 * size)
    weights = jnp.where(coarse, holding.astype(jnp.float32), weights)
    return jnp.where((target < size) & (source < source_size), weights, 0)


def _linear(distance):
    return jnp.maximum(1 - jnp.abs(distance), 0)


def _cubic(distance):
    """The spline that is 1 at 0 and 0 at all other integers (Unser 1999)."""
    pole = math.sqrt(3) - 2

    def b_spline(t):
        t = jnp.abs(t)
        near = 2 / 3 - t**2 + t**3 / 2
        return jnp.where(t < 1, near, jnp.maximum(2 - t, 0) ** 3 / 6)

    # Four B-splines reach any place; their coefficients fall off by the pole from 0 on.
    first = jnp.floor(distance)
    total = 0.0
    for offset in (-1, 0, 1, 2):
        centre = first + offset
        total += jnp.sqrt(3.0) * pole ** jnp.abs(centre) * b_spline(distance - centre)
    return total


_KERNELS = {1: _linear, 3: _cubic}


def resample(
    volume: jax.Array,
    source_size: jax.Array,
    size: jax.Array,
    coarse: jax.Array,
    box: Sequence[int],
    order: int,
) -> jax.Array:
    """Interpolates a volume on the network's grid, one slice at a time.

    Args:
      volume: [S0, S1, S2, C] float32, finite everywhere.
      source_size, size: [3] int32 before and after.
      coarse: [3] bool, along which axis voxels are not interpolated, see `geometry.coarse_axis`.
      box: spatial shape of the result.
      order: spline order, 1 or 3.
    Returns:
      [*box, C] float32; voxels beyond `size` hold 0.
    Reference: `geometry.resample_to_shape`, which it equals to rounding.
    """
    first, second, third = (
        interpolation_matrix(size[a], source_size[a], box[a], volume.shape[a], order, coarse[a])
        for a in range(3)
    )
    num_taps = min(2 if order == 1 else 2 * SPLINE_REACH, len(first[0]))

    def add_slice(index, result):
        centre = ((2 * index + 1) * source_size[0] - size[0]) // (2 * size[0])
        start = jnp.clip(centre - num_taps // 2 + 1, 0, volume.shape[0] - num_taps)
        taps = lax.dynamic_slice(first, (index, start), (1, num_taps))[0]
        near = lax.dynamic_slice_in_dim(volume, start, num_taps)
        merged = sum(taps[k] * near[k] for k in range(num_taps))
        merged = jnp.einsum("is,stc->itc", second, merged, precision=lax.Precision.HIGHEST)
        merged = jnp.einsum("jt,itc->ijc", third, merged, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_index_in_dim(result, merged, index, 0)

    def interpolate():
        empty = jnp.zeros((*box, volume.shape[-1]), jnp.float32)
        return lax.fori_loop(0, size[0], add_slice, empty)

    def keep():
        return jnp.where(voxels_inside(box, size)[..., None], volume, 0)

    if volume.shape[:3] != tuple(box):
        return interpolate()
    return lax.cond((size == source_size).all(), keep, interpolate)
