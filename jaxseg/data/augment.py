"""Random augmentation as a pure function of (arrays, seed), in TensorFlow graph ops.

A patch is cut from the centre of a larger region. Every spatial transform maps one grid of
coordinates to another, and the region is sampled once, at the end; every intensity transform then
maps one image to another. The same code serves 2D and 3D: the rank of the patch decides.

The transforms and their order are those of nnU-Net v2 (Isensee et al. 2021), but factors are
uniform in their range, the noise range is one of variances, and displacements are cubic B-splines.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from jaxseg.data.graph_sampling import (
    apply_along_axis,
    gaussian_matrix,
    low_resolution_matrix,
    sample_linear,
    sample_nearest,
)
from jaxseg.training.sampling import cubic_spline_basis

fold_in = tf.random.experimental.stateless_fold_in
split = tf.random.experimental.stateless_split

Options = Mapping[str, Any]  # of one transform
Transform = Callable[[tf.Tensor, tf.Tensor, Options], tf.Tensor]


def crop_centre(
    image: tf.Tensor, label: tf.Tensor, valid: tf.Tensor, *, patch_size: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Cuts the patch out of the centre of the region: `augment` with nothing drawn."""
    _check_shapes(image, label, valid, patch_size)
    start = _origin(image, patch_size)
    crop = tuple(slice(s, s + p) for s, p in zip(start, patch_size, strict=True))
    return image[crop], label[crop], valid[crop]


def augment(
    image: tf.Tensor,
    label: tf.Tensor,
    valid: tf.Tensor,
    seed: tf.Tensor,
    *,
    patch_size: Sequence[int],
    params: Mapping[str, Options],
    masked: Sequence[bool] = (),
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Cuts a patch, warped and with altered intensities, out of the centre of the region.

    Each transform has a seed of its own: without one the others draw as before. With prob 0 it adds
    no ops; where it is not drawn its work is skipped.

    Args:
      image: Region, [*R, C] float32, of static shape.
      label: Class indices, [*R] integer.
      valid: Weight of each voxel in the loss, 0 where it does not count, [*R] float32.
      seed: [2] integer; the same seed gives the same result.
      patch_size: Voxels per axis P, a tuple of 2 or 3 ints.
      params: From each transform's name to its options, `prob` among them (see `jaxseg.config`).
      masked: For each channel whether it is 0 outside a mask and stays so; () if none is.
    Returns:
      image [*P, C] (linear interpolation), label [*P] and valid [*P] (nearest neighbour), of the
      dtypes given. Outside the region the warp finds zeros in all three.
    Raises:
      ValueError: the shapes disagree, or the region is smaller than the patch.
    """
    _check_shapes(image, label, valid, patch_size)
    if any(params[name]["prob"] > 0 for name in ("flip", *SPATIAL)):
        centre = (np.array(patch_size, np.float32) - 1) / 2
        grid = tf.constant(np.moveaxis(np.indices(patch_size, np.float32), 0, -1) - centre)
        if params["flip"]["prob"] > 0:  # drawn for each axis, not once
            grid = flip(grid, fold_in(seed, 0), params["flip"])
        for name, (number, transform) in SPATIAL.items():
            grid = _sometimes(transform, grid, seed, number, params[name])
        grid += _origin(image, patch_size) + centre
        image = sample_linear(image, grid)
        label, valid = sample_nearest(label, grid), sample_nearest(valid, grid)
    else:
        image, label, valid = crop_centre(image, label, valid, patch_size=patch_size)
    outside = tf.constant(masked) & (image == 0) if any(masked) else False
    for name, (number, transform) in INTENSITY.items():
        image = _sometimes(transform, image, seed, number, params[name])
    return tf.where(outside, 0.0, image) if any(masked) else image, label, valid


# Spatial transforms: (grid, seed, options) -> grid. A grid [*P, rank] float32 holds, for each voxel
# of the patch, where in the region its value comes from, in voxels from the common centre.


def flip(grid: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Mirrors each of `axes` with probability `prob`."""
    rank = grid.shape[-1]
    drawn = tf.random.stateless_uniform([rank], seed) < options["prob"]
    return grid * tf.where(drawn & np.isin(range(rank), options["axes"]), -1.0, 1.0)


def displace(grid: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Elastic deformation: shifts by a cubic B-spline of random control points.

    Control points lie `spacing_voxels` apart, each coefficient uniform in ± a magnitude drawn from
    `range_magnitude_voxels`, which no shift exceeds. Below 0.4 of the spacing the map does not fold
    (Choi and Lee 2000).
    """
    *patch, rank = grid.shape
    bases = [cubic_spline_basis(length, options["spacing_voxels"]) for length in patch]
    magnitude_seed, control_seed = tf.unstack(split(seed))
    magnitude = _uniform(magnitude_seed, [], options["range_magnitude_voxels"])
    shape = [*(basis.shape[1] for basis in bases), rank]
    shift = magnitude * _uniform(control_seed, shape, (-1.0, 1.0))
    for axis, basis in enumerate(bases):
        shift = apply_along_axis(basis, shift, axis)
    return grid + shift


def scale(grid: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Enlarges what is seen by one factor from `range`, on all axes or all but the last."""
    factor = _uniform(seed, [], options["range"])
    if options["in_plane"] and grid.shape[-1] == 3:
        return grid / tf.stack([factor, factor, 1.0])
    return grid / factor


def rotate(grid: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Turns by an angle from `range_deg` in each plane of axes (i, j), from i towards j.

    With `in_plane` in that of the first two alone.
    """
    rank = grid.shape[-1]
    planes = list(itertools.combinations(range(rank), 2))[: 1 if options["in_plane"] else None]
    angles = tf.unstack(_uniform(seed, [len(planes)], options["range_deg"]) * (np.pi / 180))
    identity = np.eye(rank, dtype=np.float32)
    rotation = identity
    for (i, j), angle in zip(planes, angles, strict=True):
        quarter = np.outer(identity[j], identity[i]) - np.outer(identity[i], identity[j])
        # Rodrigues' formula
        turn = identity + tf.sin(angle) * quarter + (1 - tf.cos(angle)) * (quarter @ quarter)
        rotation = turn @ rotation
    return tf.tensordot(grid, rotation, axes=1)  # its transpose times each coordinate: the inverse


def translate(grid: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Shifts each axis by a fraction of the patch from `range_fraction`."""
    *patch, rank = grid.shape
    return grid - _uniform(seed, [rank], options["range_fraction"]) * np.array(patch, np.float32)


# Intensity transforms: (image, seed, options) -> image, [*P, C] float32. With a `channel_prob` each
# channel is drawn by itself, with that probability.


def add_noise(image: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Adds white Gaussian noise of a variance from `range_variance`."""
    variance_seed, noise_seed = tf.unstack(split(seed))
    variance = _uniform(variance_seed, [], options["range_variance"])
    return image + tf.sqrt(variance) * tf.random.stateless_normal(image.shape, noise_seed)


def blur(image: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Gaussian blur with, for each axis, a standard deviation from `range_sigma_voxels`."""
    return _by_channel(_blur, image, seed, options)


def _blur(image, seed, options):
    *patch, _ = image.shape
    sigmas = tf.unstack(_uniform(seed, [len(patch)], options["range_sigma_voxels"]))
    for axis, (length, sigma) in enumerate(zip(patch, sigmas, strict=True)):
        image = apply_along_axis(gaussian_matrix(length, sigma), image, axis)
    return image


def multiply_brightness(image: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Multiplies each channel by a factor from `range`."""
    return image * _uniform(seed, image.shape[-1:], options["range"])


def scale_contrast(image: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Scales each channel about its mean by a factor from `range`, within its former extremes."""
    voxels = range(image.shape.rank - 1)
    mean = tf.reduce_mean(image, voxels)
    scaled = mean + (image - mean) * _uniform(seed, image.shape[-1:], options["range"])
    return tf.clip_by_value(scaled, tf.reduce_min(image, voxels), tf.reduce_max(image, voxels))


def simulate_low_resolution(image: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Samples the image down by a zoom from `range_zoom`, and up to its size again."""
    return _by_channel(_simulate_low_resolution, image, seed, options)


def _simulate_low_resolution(image, seed, options):
    zoom = _uniform(seed, [], options["range_zoom"])
    for axis, length in enumerate(image.shape[:-1]):
        image = apply_along_axis(low_resolution_matrix(length, zoom), image, axis)
    return image


def apply_gamma(image: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """Raises each channel, mapped to [0, 1], to a power from `range`; keeps mean and deviation."""
    voxels = range(image.shape.rank - 1)
    lowest, highest = tf.reduce_min(image, voxels), tf.reduce_max(image, voxels)
    gamma = _uniform(seed, image.shape[-1:], options["range"])
    powered = tf.math.divide_no_nan(image - lowest, highest - lowest) ** gamma
    deviation, powered_deviation = (tf.math.reduce_std(x, voxels) for x in (image, powered))
    stretch = tf.math.divide_no_nan(deviation, powered_deviation)
    return (powered - tf.reduce_mean(powered, voxels)) * stretch + tf.reduce_mean(image, voxels)


def apply_inverted_gamma(image: tf.Tensor, seed: tf.Tensor, options: Options) -> tf.Tensor:
    """The gamma transform of the negative image."""
    return -apply_gamma(-image, seed, options)


# In order of use. The numbers are folded into the seed: 0 is flip's, and none may ever change.
SPATIAL: dict[str, tuple[int, Transform]] = {
    "elastic": (1, displace),
    "scaling": (2, scale),
    "rotation": (3, rotate),
    "translation": (4, translate),
}
INTENSITY: dict[str, tuple[int, Transform]] = {
    "noise": (5, add_noise),
    "blur": (6, blur),
    "brightness": (7, multiply_brightness),
    "contrast": (8, scale_contrast),
    "low_resolution": (9, simulate_low_resolution),
    "inverted_gamma": (10, apply_inverted_gamma),
    "gamma": (11, apply_gamma),
}


def _sometimes(transform, x, seed, number, options):
    if options["prob"] == 0:
        return x
    decision_seed, transform_seed = tf.unstack(split(fold_in(seed, number)))
    drawn = tf.random.stateless_uniform([], decision_seed) < options["prob"]
    return tf.cond(drawn, lambda: transform(x, transform_seed, options), lambda: x)


def _by_channel(transform, image, seed, options):
    """All channels together, or each with a draw of its own."""
    if not options["channel_prob"]:
        return transform(image, seed, options)
    alone = options | {"prob": options["channel_prob"]}
    channels = [
        _sometimes(transform, channel, seed, number, alone)
        for number, channel in enumerate(tf.split(image, image.shape[-1], axis=-1))
    ]
    return tf.concat(channels, axis=-1)


def _uniform(seed, shape, bounds):
    return tf.random.stateless_uniform(shape, seed, *map(float, bounds))


def _origin(image, patch_size):
    return (np.array(image.shape[:-1]) - patch_size) // 2


def _check_shapes(image, label, valid, patch_size):
    region = image.shape[:-1]
    if not image.shape.is_fully_defined() or region.rank != len(patch_size):
        raise ValueError(
            f"image has shape {image.shape}: a patch of size {tuple(patch_size)} needs a static "
            f"[*R, C] with {len(patch_size)} spatial axes"
        )
    if label.shape != region or valid.shape != region:
        raise ValueError(
            f"label {label.shape} and valid {valid.shape} must have image's spatial shape {region}"
        )
    if any(r < p for r, p in zip(region, patch_size, strict=True)):
        raise ValueError(
            f"the region {region} is smaller than the patch {tuple(patch_size)}: pad it with zeros "
            "to region_size"
        )
