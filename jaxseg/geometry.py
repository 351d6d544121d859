"""Voxel grids in the world: spacing, orientation, resampling, and their inverses.

An affine maps voxel indices (i, j, k, 1) to world millimetres in RAS+ axes (x to the right, y to
the front, z to the head), as in NIfTI. Voxel centres lie on whole indices, so a volume of n voxels
reaches from -0.5 to n - 0.5 along an axis; resampling keeps those outer faces where they are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

# Files are on one grid if no voxel of one lies farther from its place in the other, in voxels;
# up to the second limit they can be taken for one, which is then said.
SAME_GRID_VOXELS = 0.01
NEARLY_SAME_GRID_VOXELS = 0.5

# An axis is resampled apart from the others where its voxels are longer by more than this factor.
COARSE = 3.0
# Of spacings, which come as float32 and are divided: what differs by less is equal.
_SPACING_ROUNDING = 1e-5

# Shares of voxels that differ by less are equal but for rounding.
_ROUNDING = 1e-6

# Smallest singular value of the matrix of unit axis directions; 1 means perpendicular axes.
_MIN_INDEPENDENCE = 1e-6


def check_affine(affine: np.ndarray) -> None:
    """Refuses an affine that does not place voxels in three independent directions.

    Args:
      affine: Voxel to world (mm), [4, 4].
    Raises:
      ValueError: The affine is not 4x4, not finite, or singular.
    """
    affine = np.asarray(affine, np.float64)
    if affine.shape != (4, 4):
        raise ValueError(f"the affine has shape {list(affine.shape)}, not [4, 4]")
    if not np.isfinite(affine).all():
        raise ValueError(f"the affine is not finite: {affine.tolist()}")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (
        lengths.min() == 0
        or np.linalg.svd(affine[:3, :3] / lengths, compute_uv=False).min() < _MIN_INDEPENDENCE
    ):
        raise ValueError(f"the affine is singular: its axes are {affine[:3, :3].tolist()}")


def spacing_mm_from_affine(affine: np.ndarray) -> np.ndarray:
    """Distance between neighbouring voxel centres along each voxel axis.

    Args:
      affine: Voxel to world (mm), [4, 4].
    Returns:
      [3] float64, in mm.
    """
    return np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)


def grid_difference(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """How far apart two affines place a voxel of a volume at the most.

    Args:
      affine, other: Voxel to world (mm), [4, 4]; the first usable.
      shape: Voxels along each axis, 3 ints.
    Returns:
      The distance along one axis of the grid of `affine`, in voxels; infinite if it is undefined.
    """
    corners = np.array(np.meshgrid(*((-0.5, n - 0.5) for n in shape[:3]))).reshape(3, -1)
    moved = np.linalg.solve(affine[:3, :3], other[:3, :3] @ corners + (other - affine)[:3, 3:])
    difference = np.abs(moved - corners).max()
    return float(difference) if np.isfinite(difference) else np.inf


def to_canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permutes and flips voxel axes so that they run as closely as possible along RAS+.

    Args:
      array: [X, Y, Z] or [X, Y, Z, C], any dtype.
      affine: Voxel to world (mm) of `array`, [4, 4].
    Returns:
      (array, affine): a view of the same values with each voxel still at its world position, and
      its affine, [4, 4] float64.
    Raises:
      ValueError: `affine` fails `check_affine`.
    Reference: the convention of nibabel.as_closest_canonical.
    """
    source_axes, flips = _canonical_axes(affine)
    shape = np.asarray(array.shape[:3])[source_axes]
    step = np.asarray(affine, np.float64)[:3, source_axes]
    canonical = np.eye(4)
    canonical[:3, :3] = np.where(flips, -step, step)
    canonical[:3, 3] = affine[:3, 3] + step @ np.where(flips, shape - 1, 0)
    array = np.transpose(array, (*source_axes, *range(3, array.ndim)))
    return np.flip(array, tuple(np.flatnonzero(flips).tolist())), canonical


def from_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Undoes `to_canonical`, value for value.

    Args:
      array: In canonical axes, [X, Y, Z] or [X, Y, Z, C], any dtype.
      affine: The affine that was given to `to_canonical`, [4, 4].
    Returns:
      A view of `array` on the original axes.
    Raises:
      ValueError: `affine` fails `check_affine`.
    """
    source_axes, flips = _canonical_axes(affine)
    array = np.flip(array, tuple(np.flatnonzero(flips).tolist()))
    return np.transpose(array, (*np.argsort(source_axes), *range(3, array.ndim)))


def resampled_shape(
    shape: Sequence[int],
    spacing_mm: Sequence[float] | np.ndarray,
    target_spacing_mm: Sequence[float] | np.ndarray,
) -> tuple[int, ...]:
    """Grid size that covers the same extent at another spacing.

    Args:
      shape: Voxels along each axis, 3 ints.
      spacing_mm: Spacing of that grid, 3 floats.
      target_spacing_mm: Wanted spacing, 3 floats; 0 leaves an axis as it is.
    Returns:
      Tuple of 3 ints, each rounded to the nearest and at least 1.
    """
    spacing_mm = np.asarray(spacing_mm, np.float64)
    ratio = spacing_mm / _or_as_it_is(np.asarray(target_spacing_mm, np.float64), spacing_mm)
    return tuple(max(1, int(n)) for n in np.round(np.asarray(shape) * ratio))


def coarse_axis(spacing_mm: Any, target_spacing_mm: Any) -> Any:
    """The axis along which voxels are so long that interpolating would invent what lies between.

    That of the largest spacing, where it is more than COARSE times the smallest before resampling,
    else after it; none if two axes have it.

    Args:
      spacing_mm, target_spacing_mm: [3] floats, NumPy's or JAX's; of the latter 0 leaves an axis as
        it is.
    Returns:
      0, 1 or 2, or -1 for none, as an integer of the same library.
    Reference: resampling in nnU-Net v2 (Isensee et al. 2021).
    """
    target_spacing_mm = _or_as_it_is(target_spacing_mm, spacing_mm)
    most = COARSE * (1 + _SPACING_ROUNDING)
    before = spacing_mm.max() > most * spacing_mm.min()
    spacing_mm = before * spacing_mm + (1 - before) * target_spacing_mm
    largest = spacing_mm.max()
    alone = (spacing_mm > largest * (1 - _SPACING_ROUNDING)).sum() == 1
    return (alone & (largest > most * spacing_mm.min())) * (spacing_mm.argmax() + 1) - 1


def _or_as_it_is(target_spacing_mm, spacing_mm):
    return target_spacing_mm + (target_spacing_mm == 0) * spacing_mm


def nonzero_box(image: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box with every voxel of [X, Y, Z, C] that is not 0 in all channels.

    The whole image if there is none.
    """
    there = (image != 0).any(-1)
    spans = []
    for axis, size in enumerate(there.shape):
        others = tuple(other for other in range(3) if other != axis)
        places = np.flatnonzero(there.any(others))
        spans.append(slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, size))
    first, second, third = spans
    return first, second, third


def cropped_affine(affine: np.ndarray, box: Sequence[slice]) -> np.ndarray:
    """The affine of a part of a grid, [4, 4] float64."""
    result = np.array(affine, np.float64)
    result[:3, 3] += result[:3, :3] @ [span.start for span in box]
    return result


def resample_to_shape(
    array: np.ndarray, shape: Sequence[int], order: int, coarse: int = -1
) -> np.ndarray:
    """Interpolates a volume on a grid of another size that covers the same extent.

    Output voxel o reads the input at (o + 0.5) n_in / n_out - 0.5; beyond the outermost voxel
    centres the edge value continues. Does not smooth before coarsening.

    Args:
      array: [X, Y, Z, C], any real dtype.
      shape: Wanted grid size, 3 ints.
      order: Spline order: 0 nearest, 1 linear, 3 cubic.
      coarse: Of `coarse_axis`: along it each output voxel takes the input voxel that its centre
        lies in.
    Returns:
      [*shape, C] float32; the values of `array` where the size does not change.
    """
    array = np.asarray(array, np.float32)
    if array.shape[:3] == tuple(shape):
        return array.copy()
    channels = np.moveaxis(array, -1, 0)
    return np.stack([_zoom(channel, shape, order, coarse) for channel in channels], -1)


def resample_label_to_shape(
    label: np.ndarray,
    shape: Sequence[int],
    num_classes: int,
    order: int,
    *,
    keep_thin: bool = True,
    coarse: int = -1,
) -> np.ndarray:
    """Resamples class indices without inventing classes, on the grid of `resample_to_shape`.

    A structure that is thinner than the new voxels could vanish. So of equals the higher class is
    taken (as in nnU-Net, where a later label overwrites an earlier one), and a class that keeps
    less than half of its volume gets the voxels that it fills most, until its volume is at least
    what it was.

    Args:
      label: Class indices in [0, num_classes), [X, Y, Z], integer.
      shape: Wanted grid size, 3 ints.
      num_classes: Number of classes, at most 256.
      order: 0 takes the nearest voxel; 1 interpolates each class's indicator linearly and takes
        the largest.
      keep_thin: False takes the lowest class of equals and lets thin structures vanish.
      coarse: As for `resample_to_shape`.
    Returns:
      [*shape] uint8.
    Raises:
      ValueError: `order` is neither 0 nor 1, or a label lies outside [0, num_classes).
    """
    if order not in (0, 1):
        raise ValueError(f"a label is resampled with order 0 or 1, not {order}")
    classes = np.unique(label)
    if classes.size and not 0 <= classes[0] <= classes[-1] < num_classes:
        raise ValueError(f"label values {classes.tolist()} are not all in [0, {num_classes})")
    if label.shape == tuple(shape):
        return label.astype(np.uint8)
    if order == 0:
        result = _zoom(label.astype(np.uint8), shape, order, coarse)
    else:
        result = np.zeros(shape, np.uint8)
        largest = np.zeros(shape, np.float32)
        for index in classes:
            share = _zoom((label == index).astype(np.float32), shape, order, coarse)
            result[share > largest - (_ROUNDING if keep_thin else 0)] = index
            np.maximum(largest, share, out=largest)
    for index in classes[classes > 0] if keep_thin else ():
        _restore_thin(result, label == index, index)
    return result


def resampled_affine(
    affine: np.ndarray, shape: Sequence[int], new_shape: Sequence[int]
) -> np.ndarray:
    """Affine of the grid that `resample_to_shape` makes: the outer faces stay in place.

    Args:
      affine: Voxel to world (mm) of the grid of size `shape`, [4, 4].
      shape: Size of that grid, 3 ints.
      new_shape: Size of the resampled grid, 3 ints.
    Returns:
      [4, 4] float64.
    """
    factor = np.asarray(shape, np.float64) / np.asarray(new_shape, np.float64)
    result = np.array(affine, np.float64)
    result[:3, 3] += result[:3, :3] @ ((factor - 1) / 2)
    result[:3, :3] *= factor
    return result


def mirrored(place: Any, size: Any) -> Any:
    """Continues an axis beyond its ends by mirroring it about its outermost voxels.

    Args:
      place: integers, any shape, NumPy's or JAX's, which may lie outside [0, size).
      size: of the axis.
    Returns:
      The voxel in [0, size) to show at each place; the outermost is not repeated.
    """
    last = size - 1
    period = 2 * last + (last == 0)
    return last - abs(last - place % period)


def _restore_thin(result, mask, index):
    """Gives a class that has lost more than half of its volume the voxels that it fills most."""
    volume = np.count_nonzero(mask) * result.size / mask.size
    if np.count_nonzero(result == index) >= volume / 2:
        return
    share = _mean_in_voxels(mask, result.shape)
    enough = min(max(round(volume), 1), np.count_nonzero(share))
    least = np.partition(share.ravel(), share.size - enough)[share.size - enough]
    result[share >= least - _ROUNDING] = index


def _mean_in_voxels(mask, shape):
    """Share of each voxel of a coarser grid that lies in a mask, float64."""
    share = mask.astype(np.float64)
    for axis, size in enumerate(shape):
        sums = np.cumsum(np.moveaxis(share, axis, 0), axis=0)
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])
        edges = np.arange(size + 1) * (len(sums) - 1) / size
        low = np.minimum(edges.astype(int), len(sums) - 2)
        part = (edges - low).reshape(-1, 1, 1)
        at_edges = sums[low] * (1 - part) + sums[low + 1] * part
        share = np.moveaxis(np.diff(at_edges, axis=0) * size / (len(sums) - 1), 0, axis)
    return share


def _canonical_axes(affine):
    """For each world axis the voxel axis that runs along it, and whether it runs backwards."""
    check_affine(affine)
    axes = np.asarray(affine, np.float64)[:3, :3]
    left, _, right = np.linalg.svd(axes / np.linalg.norm(axes, axis=0))
    rotation = left @ right  # the closest matrix without shear
    source_axes = np.zeros(3, int)
    free = np.abs(rotation)
    # The voxel axis that is most nearly a world axis chooses first, so ties never share one.
    for voxel_axis in np.argsort(-np.square(rotation).max(axis=0), kind="stable"):
        world_axis = np.argmax(free[:, voxel_axis])
        source_axes[world_axis] = voxel_axis
        free[world_axis] = -1
    return source_axes, rotation[range(3), source_axes] < 0


def _zoom(volume, shape, order, coarse=-1):
    if coarse >= 0:
        sizes = list(shape)
        num, there = sizes.pop(coarse), volume.shape[coarse]
        slices = [_zoom(part, sizes, order) for part in np.moveaxis(volume, coarse, 0)]
        taken = (2 * np.arange(num) + 1) * there // (2 * num)
        return np.moveaxis(np.stack(slices)[taken], 0, coarse)
    factors = np.divide(shape, volume.shape)
    return ndimage.zoom(volume, factors, order=order, mode="nearest", grid_mode=True)
