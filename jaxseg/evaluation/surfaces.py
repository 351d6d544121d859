"""Distances between the surfaces of two segmentations, in millimetres.

The surface of a class is made of its voxels that have a face neighbour (in a picture or a single
slice: an edge neighbour) outside the class; beyond the volume is outside. Distances are between
voxel centres, through the affine, so anisotropic, oblique and sheared grids are right.

Definitions are those of Metrics Reloaded (Maier-Hein et al. 2024, doi:10.1038/s41592-023-02151-z)
as MONAI computes them. Others in use differ: medpy's hd95 is the percentile of both directions
thrown together, and its assd the mean of the two directions' means.
"""

import numpy as np
from scipy.spatial import cKDTree

from jaxseg.evaluation.metrics import class_boxes

# Affines are stored in float32: a neighbour at 1.1 mm may be at 1.10000002 mm.
_ROUNDING = 1e-6
# On a lattice many points are nearly equally near; larger leaves than scipy's 10 measured best.
LEAF_SIZE = 64


def surface_scores(
    prediction: np.ndarray,
    label: np.ndarray,
    affine: np.ndarray,
    num_classes: int,
    tolerance_mm: float,
) -> dict[str, np.ndarray]:
    """Surface distances of each class.

    With the distance of each surface voxel of one to the nearest of the other: hd is the largest,
    hd95 the larger of the two directions' 95th percentiles, assd the mean over the voxels of both
    surfaces, nsd the share of the voxels of both that are no further than the tolerance.

    All are NaN for a class that is in neither. For one that is in only one of them nsd is 0 and the
    distances are infinite: no number of millimetres says how bad it is to miss a structure.

    Args:
      prediction: Class indices in [0, num_classes), [X, Y, Z], integer.
      label: Reference class indices, same shape, integer.
      affine: Voxel to world (mm), [4, 4].
      num_classes: Number of classes K, background included.
      tolerance_mm: Distance that counts as agreement.
    Returns:
      Dict with "hd", "hd95", "assd" (mm) and "nsd" (in [0, 1]): [K] float64 each; NaN for the
      background.
    """
    scores = {name: np.full(num_classes, np.nan) for name in ("hd", "hd95", "assd", "nsd")}
    thin = [size == 1 for size in label.shape]
    for index, box in class_boxes(prediction, label, num_classes):
        predicted, reference = (
            _surface(volume[box] == index, thin) for volume in (prediction, label)
        )
        distances = surface_distances(predicted, reference, affine)
        for name, score in _scores(distances, tolerance_mm).items():
            scores[name][index] = score
    return scores


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each surface voxel to the nearest one of the other surface.

    Args:
      prediction: Voxels of the predicted surface, [X, Y, Z] bool.
      reference: Voxels of the reference's, same shape, bool.
      affine: Voxel to world (mm), [4, 4].
    Returns:
      (of the prediction's [N], of the reference's [M]): float64, in mm, in the order of the voxels;
      infinite if the other surface is empty.
    """
    step = np.asarray(affine, np.float64)[:3, :3]
    points = [np.argwhere(surface) @ step.T for surface in (prediction, reference)]
    distances = []
    for own, other, shared in (
        (points[0], points[1], reference[prediction]),
        (points[1], points[0], prediction[reference]),
    ):
        distance = np.where(shared, 0.0, np.inf)
        if len(other) and not shared.all():
            tree = cKDTree(other, leafsize=LEAF_SIZE)
            distance[~shared] = tree.query(own[~shared], workers=-1)[0]
        distances.append(distance)
    return distances[0], distances[1]


def _surface(mask, thin):
    """The voxels of `mask` with a neighbour outside along an axis that is not thin."""
    inner = mask.copy()
    for axis in np.flatnonzero(~np.asarray(thin)):
        source, result = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        result[1:] &= source[:-1]
        result[:-1] &= source[1:]
        result[[0, -1]] = False
    return mask & ~inner


def _scores(distances, tolerance_mm):
    both = np.concatenate(distances)
    if not all(distance.size for distance in distances):
        return {"hd": np.inf, "hd95": np.inf, "assd": np.inf, "nsd": 0.0}
    return {
        "hd": both.max(),
        "hd95": max(np.percentile(distance, 95) for distance in distances),
        "assd": both.mean(),
        "nsd": np.mean(both <= tolerance_mm * (1 + _ROUNDING)),
    }
