"""Random augmentation as a pure function of (region, key), for the compiled training step.

The counterpart of `jaxseg.data.augment`, which does the same on the host: the same transforms, in
the same order, with the same distributions. Here a transform is a function of what was drawn for
it, and all of them are computed for every example: one that was not drawn leaves its input as it
was. So nothing depends on an example's draws but values, as suits accelerators.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.training.sampling import (
    apply_along_axis,
    cubic_spline_basis,
    gaussian_matrix,
    low_resolution_matrix,
    sample_linear,
    sample_nearest,
)

Options = Mapping[str, Any]  # of one transform
Params = Mapping[str, Options]


def region_size(patch_size: Sequence[int], params: Params) -> tuple[int, ...]:
    """Computes the size of the region in which a warped patch still fits.

    An axis tilted by an angle a reaches over cos a · P_i + sin a · |P_others| voxels, at most the
    diagonal. This is exact in 2D. In 3D, three turns together can tilt an axis by more than the
    largest single angle: the few corners that then leave the region come out as zeros.

    Args:
      patch_size: Voxels per axis, a tuple of 2 or 3 ints.
      params: As in `augment`; transforms with prob 0 do not count.
    Returns:
      Tuple of ints, each at least the patch's and of its parity, so that their centres coincide.
    """

    def largest(name, option):
        return np.max(np.abs(params[name][option])) if params[name]["prob"] > 0 else 0

    patch = np.array(patch_size)

    def moved(name, all_axes):
        """The axes that a transform moves: all, or the first two."""
        return slice(2 if params[name]["in_plane"] else all_axes)

    reach = patch - 1 + 2 * largest("elastic", "range_magnitude_voxels")
    turned = moved("rotation", len(patch))
    inside = reach[turned]
    across = np.sqrt(np.sum(inside**2) - inside**2)
    tilt = np.minimum(np.deg2rad(largest("rotation", "range_deg")), np.arctan2(across, inside))
    reach = reach.astype(float)
    reach[turned] = inside * np.cos(tilt) + across * np.sin(tilt)
    if params["scaling"]["prob"] > 0:
        reach[moved("scaling", len(patch))] /= min(1, *params["scaling"]["range"])
    reach = reach + 2 * largest("translation", "range_fraction") * patch
    margin = np.ceil((reach - (patch - 1)) / 2).astype(int)
    return tuple((patch + 2 * margin).tolist())


def augment_batch(
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    patch_size: Sequence[int],
    params: Params,
    masked: Sequence[bool] = (),
) -> dict[str, jax.Array]:
    """Augments each example by draws of (key, its number in the run) alone.

    Args:
      batch: regions: image [B, *R, C] float32, label [B, *R] of any integer type, valid [B, *R]
        float32, and example [B, 1] int32, the number in the run.
      key: of the run.
      patch_size, params, masked: as for `augment`.
    Returns:
      A batch as `jaxseg.training.steps` takes them: image [B, *P, C], label [B, *P] int32 and valid
      [B, *P].
    """

    def one(image, label, valid, example):
        own = jax.random.fold_in(key, example[0])
        return augment(
            image, label, valid, own, patch_size=patch_size, params=params, masked=masked
        )

    names = ("image", "label", "valid")
    arrays = jax.vmap(one)(*(batch[name] for name in (*names, "example")))
    return dict(zip(names, arrays, strict=True))


def augment(
    image: jax.Array,
    label: jax.Array,
    valid: jax.Array,
    key: jax.Array,
    *,
    patch_size: Sequence[int],
    params: Params,
    masked: Sequence[bool] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts a patch, warped and with altered intensities, out of the centre of the region.

    Each transform has a key of its own: without one the others draw as before.

    Args:
      image: Region, [*R, C] float32.
      label: Class indices, [*R] of any integer type.
      valid: Weight of each voxel in the loss, 0 where it does not count, [*R] float32.
      key: The same key gives the same result.
      patch_size: Voxels per axis P, a tuple of 2 or 3 ints.
      params: From each transform's name to its options, `prob` among them (see `jaxseg.config`).
      masked: For each channel whether it is 0 outside a mask and stays so; () if none is.
    Returns:
      image [*P, C] (linear interpolation), label [*P] int32 and valid [*P] (nearest neighbour).
      Outside the region the warp finds zeros in all three.
    """
    start = (np.array(image.shape[:-1]) - patch_size) // 2
    if any(params[name]["prob"] > 0 for name in ("flip", *SPATIAL)):
        centre = (np.array(patch_size, np.float32) - 1) / 2
        grid = jnp.asarray(np.moveaxis(np.indices(patch_size, np.float32), 0, -1) - centre)
        if params["flip"]["prob"] > 0:  # drawn for each axis, not once
            grid = flip(grid, jax.random.fold_in(key, 0), params["flip"])
        for name, (number, transform) in SPATIAL.items():
            grid = _sometimes(transform, grid, key, number, params[name])
        grid += start.astype(np.float32) + centre
        image = sample_linear(image, grid)
        label, valid = sample_nearest(label, grid), sample_nearest(valid, grid)
    else:
        crop = tuple(slice(s, s + p) for s, p in zip(start, patch_size, strict=True))
        image, label, valid = image[crop], label[crop], valid[crop]
    outside = np.array(masked) & (image == 0) if any(masked) else None
    for name, (number, transform) in INTENSITY.items():
        image = _sometimes(transform, image, key, number, params[name])
    image = image if outside is None else jnp.where(outside, 0.0, image)
    return image, label.astype(jnp.int32), valid


# Spatial transforms map one grid to another: [*P, rank] float32 holds, for each voxel of the patch,
# where in the region its value comes from, in voxels from the common centre.


def flip(grid: jax.Array, key: jax.Array, options: Options) -> jax.Array:
    """Mirrors each of `axes` with probability `prob`."""
    rank = grid.shape[-1]
    drawn = jax.random.uniform(key, (rank,)) < options["prob"]
    return mirror(grid, drawn & np.isin(range(rank), options["axes"]))


def mirror(grid: jax.Array, axes: jax.Array) -> jax.Array:
    """Mirrors the axes for which `axes` [rank] is true."""
    return grid * jnp.where(axes, -1.0, 1.0)


def displace(grid: jax.Array, controls: jax.Array, spacing_voxels: float) -> jax.Array:
    """Elastic deformation: shifts by a cubic B-spline of control points, [*N, rank] in voxels.

    They lie `spacing_voxels` apart; no shift exceeds the largest of them. Below 0.4 of the spacing
    the map does not fold (Choi and Lee 2000).
    """
    shift = controls
    for axis, length in enumerate(grid.shape[:-1]):
        shift = apply_along_axis(cubic_spline_basis(length, spacing_voxels), shift, axis)
    return grid + shift


def scale(grid: jax.Array, factor: jax.Array, in_plane: bool) -> jax.Array:
    """Enlarges what is seen by a factor, on all axes or all but the last of three."""
    if in_plane and grid.shape[-1] == 3:
        return grid / jnp.stack([factor, factor, jnp.ones_like(factor)])
    return grid / factor


def rotate(grid: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns by an angle in radians in each plane of axes (i, j), from i towards j.

    With fewer angles than planes, in the first ones alone.
    """
    rank = grid.shape[-1]
    planes = list(itertools.combinations(range(rank), 2))[: len(angles)]
    identity = np.eye(rank, dtype=np.float32)
    rotation = jnp.asarray(identity)
    for (i, j), angle in zip(planes, angles, strict=True):
        quarter = np.outer(identity[j], identity[i]) - np.outer(identity[i], identity[j])
        # Rodrigues' formula
        turn = identity + jnp.sin(angle) * quarter + (1 - jnp.cos(angle)) * (quarter @ quarter)
        rotation = _product(turn, rotation)
    return _product(grid, rotation)  # its transpose times each coordinate: the inverse


def translate(grid: jax.Array, fractions: jax.Array) -> jax.Array:
    """Shifts each axis by a fraction of the patch."""
    return grid - fractions * np.array(grid.shape[:-1], np.float32)


# Intensity transforms map one image to another, [*P, C] float32.


def blur(image: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Gaussian blur with a standard deviation in voxels for each axis."""
    for axis, sigma in enumerate(sigmas):
        matrix = gaussian_matrix(image.shape[axis], sigma)
        image = apply_along_axis(matrix, image, axis)
    return image


def scale_contrast(image: jax.Array, factors: jax.Array) -> jax.Array:
    """Scales each channel about its mean by a factor, within its former extremes."""
    voxels = tuple(range(image.ndim - 1))
    mean = image.mean(voxels)
    return jnp.clip(mean + (image - mean) * factors, image.min(voxels), image.max(voxels))


def simulate_low_resolution(image: jax.Array, zoom: jax.Array) -> jax.Array:
    """Samples the image down by a zoom, and up to its size again."""
    for axis, length in enumerate(image.shape[:-1]):
        image = apply_along_axis(low_resolution_matrix(length, zoom), image, axis)
    return image


def apply_gamma(image: jax.Array, gammas: jax.Array) -> jax.Array:
    """Raises each channel, mapped to [0, 1], to a power; keeps mean and deviation."""
    voxels = tuple(range(image.ndim - 1))
    lowest, highest = image.min(voxels), image.max(voxels)
    powered = _divide_or_0(image - lowest, highest - lowest) ** gammas
    stretch = _divide_or_0(image.std(voxels), powered.std(voxels))
    return (powered - powered.mean(voxels)) * stretch + image.mean(voxels)


# What is drawn for a transform, and the transform of it: (array, key, options) -> array.


def _displaced(grid, key, options):
    *patch, rank = grid.shape
    spacing = options["spacing_voxels"]
    shape = (*(cubic_spline_basis(length, spacing).shape[1] for length in patch), rank)
    magnitude_key, control_key = jax.random.split(key)
    magnitude = _uniform(magnitude_key, (), options["range_magnitude_voxels"])
    return displace(grid, magnitude * _uniform(control_key, shape, (-1.0, 1.0)), spacing)


def _scaled(grid, key, options):
    return scale(grid, _uniform(key, (), options["range"]), options["in_plane"])


def _rotated(grid, key, options):
    rank = grid.shape[-1]
    num_planes = 1 if options["in_plane"] else rank * (rank - 1) // 2
    return rotate(grid, _uniform(key, (num_planes,), options["range_deg"]) * (np.pi / 180))


def _translated(grid, key, options):
    return translate(grid, _uniform(key, grid.shape[-1:], options["range_fraction"]))


def _noisy(image, key, options):
    variance_key, noise_key = jax.random.split(key)
    variance = _uniform(variance_key, (), options["range_variance"])
    return image + jnp.sqrt(variance) * jax.random.normal(noise_key, image.shape)


def _blurred(image, key, options):
    def of(part, part_key):
        return blur(part, _uniform(part_key, (part.ndim - 1,), options["range_sigma_voxels"]))

    return _by_channel(of, image, key, options)


def _brighter(image, key, options):
    return image * _uniform(key, image.shape[-1:], options["range"])


def _with_contrast(image, key, options):
    return scale_contrast(image, _uniform(key, image.shape[-1:], options["range"]))


def _coarse(image, key, options):
    def of(part, part_key):
        return simulate_low_resolution(part, _uniform(part_key, (), options["range_zoom"]))

    return _by_channel(of, image, key, options)


def _with_gamma(image, key, options):
    return apply_gamma(image, _uniform(key, image.shape[-1:], options["range"]))


def _with_inverted_gamma(image, key, options):
    return -_with_gamma(-image, key, options)


Transform = Callable[[jax.Array, jax.Array, Options], jax.Array]

# In order of use. The numbers are folded into the key: 0 is flip's, and none may ever change.
SPATIAL: dict[str, tuple[int, Transform]] = {
    "elastic": (1, _displaced),
    "scaling": (2, _scaled),
    "rotation": (3, _rotated),
    "translation": (4, _translated),
}
INTENSITY: dict[str, tuple[int, Transform]] = {
    "noise": (5, _noisy),
    "blur": (6, _blurred),
    "brightness": (7, _brighter),
    "contrast": (8, _with_contrast),
    "low_resolution": (9, _coarse),
    "inverted_gamma": (10, _with_inverted_gamma),
    "gamma": (11, _with_gamma),
}


def _sometimes(transform, x, key, number, options):
    if options["prob"] == 0:
        return x
    decision_key, own_key = jax.random.split(jax.random.fold_in(key, number))
    drawn = jax.random.uniform(decision_key) < options["prob"]
    return jnp.where(drawn, transform(x, own_key, options), x)


def _by_channel(transform, image, key, options):
    """All channels together, or each with a draw of its own."""
    if not options["channel_prob"]:
        return transform(image, key)
    alone = {"prob": options["channel_prob"]}
    channels = [
        _sometimes(lambda x, k, _: transform(x, k), channel, key, number, alone)
        for number, channel in enumerate(jnp.split(image, image.shape[-1], axis=-1))
    ]
    return jnp.concatenate(channels, axis=-1)


def _uniform(key, shape, bounds):
    low, high = map(float, bounds)
    return jax.random.uniform(key, shape, minval=low, maxval=high)


def _product(a, b):
    # Accelerators would round what coordinates are made of to a third of its digits.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _divide_or_0(a, b):
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
