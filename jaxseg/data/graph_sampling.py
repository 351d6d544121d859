"""Linear maps of images and their axes, as TensorFlow graph ops: sampling and filters."""

import itertools
import math

import numpy as np
import tensorflow as tf


def sample_linear(image: tf.Tensor, coordinates: tf.Tensor) -> tf.Tensor:
    """Interpolates linearly (bi- or trilinearly) in an image that is 0 outside.

    Args:
      image: [*R, C] float32.
      coordinates: In voxels, [*P, rank] float32.
    Returns:
      [*P, C] float32.
    """
    values, positions, strides = _zero_padded(image, coordinates)
    lower = [
        tf.minimum(tf.floor(p), float(n)) for p, n in zip(positions, image.shape[:-1], strict=True)
    ]
    upper_weights = [p - low for p, low in zip(positions, lower, strict=True)]
    weights = [1 - weight for weight in upper_weights], upper_weights
    first = _flat_index(lower, strides)
    total = 0
    for corner in itertools.product((0, 1), repeat=len(strides)):
        weight = math.prod(weights[step][axis] for axis, step in enumerate(corner))
        total += weight[..., tf.newaxis] * tf.gather(values, first + np.dot(corner, strides))
    return total


def sample_nearest(array: tf.Tensor, coordinates: tf.Tensor) -> tf.Tensor:
    """Takes the nearest value of an array [*R] of any dtype that is 0 outside, at [*P, rank]."""
    values, positions, strides = _zero_padded(array, coordinates)
    return tf.gather(values, _flat_index([tf.round(p) for p in positions], strides))


def apply_along_axis(matrix: tf.Tensor | np.ndarray, x: tf.Tensor, axis: int) -> tf.Tensor:
    """Multiplies every line of x along one axis by a matrix [M, L], so that its length L becomes M.

    A separable linear filter is one such product per axis.
    """
    axes = "abcd"[: x.shape.rank]
    line = axes[axis]
    return tf.einsum(f"z{line},{axes}->{axes.replace(line, 'z')}", matrix, x)


def gaussian_matrix(length: int, sigma: tf.Tensor | float) -> tf.Tensor:
    """Gaussian filter of standard deviation sigma voxels, normalised within the axis: [L, L]."""
    voxel = np.arange(length, dtype=np.float32)
    return tf.nn.softmax(-(((voxel[:, np.newaxis] - voxel) / sigma) ** 2) / 2)


def low_resolution_matrix(length: int, zoom: tf.Tensor | float) -> tf.Tensor:
    """Nearest sampling of an axis down to zoom · length voxels, then linear sampling up: [L, L].

    Both keep the extent of the axis (half-voxel convention), so that zoom 1 is the identity.
    """
    coarse = tf.maximum(tf.round(length * zoom), 1.0)
    voxel = np.arange(length, dtype=np.float32)
    position = tf.clip_by_value((voxel + 0.5) * coarse / length - 0.5, 0.0, coarse - 1)
    lower = tf.floor(position)
    fraction = (position - lower)[:, tf.newaxis]

    def nearest(coarse_voxel):
        return tf.one_hot(tf.cast((coarse_voxel + 0.5) * length / coarse, tf.int32), length)

    upper = tf.minimum(lower + 1, coarse - 1)
    return (1 - fraction) * nearest(lower) + fraction * nearest(upper)


def _zero_padded(array, coordinates):
    # With a border of zeros, every coordinate outside can be clipped to one that finds 0.
    rank = coordinates.shape[-1]
    size, channels = array.shape[:rank], array.shape[rank:]
    values = tf.reshape(tf.pad(array, [(1, 1)] * rank + [(0, 0)] * channels.rank), [-1, *channels])
    positions = [
        tf.clip_by_value(c + 1, 0.0, n + 1.0)
        for c, n in zip(tf.unstack(coordinates, axis=-1), size, strict=True)
    ]
    strides = [math.prod(n + 2 for n in size[axis + 1 :]) for axis in range(rank)]
    return values, positions, strides


def _flat_index(positions, strides):
    return sum(tf.cast(p, tf.int32) * stride for p, stride in zip(positions, strides, strict=True))
