"""Linear maps of images and their axes: sampling, splines, filters."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np


def sample_linear(image: jax.Array, coordinates: jax.Array) -> jax.Array:
    """Interpolates linearly (bi- or trilinearly) in an image that is 0 outside.

    Args:
      image: [*R, C] float32.
      coordinates: In voxels, [*P, rank] float32.
    Returns:
      [*P, C] float32.
    """
    values, positions, strides = _zero_padded(image, coordinates)
    lower = [
        jnp.minimum(jnp.floor(p), float(n))
        for p, n in zip(positions, image.shape[:-1], strict=True)
    ]
    upper_weights = [p - low for p, low in zip(positions, lower, strict=True)]
    weights = [1 - weight for weight in upper_weights], upper_weights
    first = _flat_index(lower, strides)
    total = jnp.zeros((*coordinates.shape[:-1], image.shape[-1]), image.dtype)
    for corner in itertools.product((0, 1), repeat=len(strides)):
        weight = math.prod(weights[step][axis] for axis, step in enumerate(corner))
        total += weight[..., np.newaxis] * _take(values, first + int(np.dot(corner, strides)))
    return total


def sample_nearest(array: jax.Array, coordinates: jax.Array) -> jax.Array:
    """Takes the nearest value of an array [*R] of any dtype that is 0 outside, at [*P, rank]."""
    values, positions, strides = _zero_padded(array, coordinates)
    return _take(values, _flat_index([jnp.round(p) for p in positions], strides))


def apply_along_axis(matrix: jax.Array | np.ndarray, x: jax.Array, axis: int) -> jax.Array:
    """Multiplies every line of x along one axis by a matrix [M, L], so that its length L becomes M.

    A separable linear filter is one such product per axis.
    """
    axes = "abcd"[: x.ndim]
    line = axes[axis]
    equation = f"z{line},{axes}->{axes.replace(line, 'z')}"
    return jnp.einsum(equation, matrix, x, precision=jax.lax.Precision.HIGHEST)


def cubic_spline_basis(length: int, spacing: float) -> np.ndarray:
    """Uniform cubic B-splines, `spacing` voxels apart, at the voxels of an axis.

    Returns:
      [length, num_splines] float32 numpy; rows are >= 0 and sum to 1.
    """
    position = np.arange(length) / spacing
    knots = np.arange(-1, np.floor(position[-1]) + 3)
    t = np.abs(position[:, np.newaxis] - knots)
    basis = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.maximum(2 - t, 0) ** 3 / 6)
    return basis.astype(np.float32)


def gaussian_matrix(length: int, sigma: jax.Array | float) -> jax.Array:
    """Gaussian filter of standard deviation sigma voxels, normalised within the axis: [L, L]."""
    voxel = np.arange(length, dtype=np.float32)
    return jax.nn.softmax(-(((voxel[:, np.newaxis] - voxel) / sigma) ** 2) / 2)


def low_resolution_matrix(length: int, zoom: jax.Array | float) -> jax.Array:
    """Nearest sampling of an axis down to zoom · length voxels, then linear sampling up: [L, L].

    Both keep the extent of the axis (half-voxel convention), so that zoom 1 is the identity.
    """
    coarse = jnp.maximum(jnp.round(length * jnp.asarray(zoom, jnp.float32)), 1.0)
    voxel = np.arange(length, dtype=np.float32)
    position = jnp.clip((voxel + 0.5) * coarse / length - 0.5, 0.0, coarse - 1)
    lower = jnp.floor(position)
    fraction = (position - lower)[:, np.newaxis]

    def nearest(coarse_voxel):
        return jax.nn.one_hot(((coarse_voxel + 0.5) * length / coarse).astype(jnp.int32), length)

    upper = jnp.minimum(lower + 1, coarse - 1)
    return (1 - fraction) * nearest(lower) + fraction * nearest(upper)


def _zero_padded(array, coordinates):
    # With a border of zeros, every coordinate outside can be clipped to one that finds 0.
    rank = coordinates.shape[-1]
    size, channels = array.shape[:rank], array.shape[rank:]
    padded = jnp.pad(array, [(1, 1)] * rank + [(0, 0)] * len(channels))
    positions = [jnp.clip(coordinates[..., i] + 1, 0.0, n + 1.0) for i, n in enumerate(size)]
    strides = [math.prod(n + 2 for n in size[axis + 1 :]) for axis in range(rank)]
    return padded.reshape(-1, *channels), positions, strides


def _flat_index(positions, strides):
    return sum(p.astype(jnp.int32) * stride for p, stride in zip(positions, strides, strict=True))


def _take(values, index):
    return values.at[index].get(mode="promise_in_bounds")
