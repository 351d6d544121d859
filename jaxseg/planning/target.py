"""The grid that cases are brought to: its spacing, the order of its axes, how large cases are."""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Of one axis over the others: spacing from here on, and as many times fewer voxels.
ANISOTROPY = 3.0
# Of the spacings of a coarse axis, so that few scans lose slices.
COARSE_PERCENTILE = 10


@dataclasses.dataclass(frozen=True)
class Target:
    """The grid of the network.

    Attributes:
      axes: which axis of a case [X, Y, Z] comes where; the coarsest last, unless set otherwise.
      spacing_mm: [3], in that order.
      median_shape: [3] voxels of the median case on it, in that order.
      is_coarse: whether the last axis has the spacing of the finest tenth, not the median.
    """

    axes: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    is_coarse: bool = False


def target_of(
    spacings_mm: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    wanted_mm: Sequence[float] = (),
    wanted_axes: Sequence[int] = (),
) -> Target:
    """The grid for cases.

    The spacing is the median, but along an axis with large steps and few voxels the 10th percentile
    (or hardly more than the other axes, where that is larger). Of axes that are equally coarse the
    last counts.

    Args:
      spacings_mm: [N, 3] of each case.
      shapes: [N, 3] voxels of each, cropped to what is not background.
      wanted_mm: [3] spacing that the user wants, 0 for the median; () for that of the rule.
      wanted_axes: [3] order that the user wants; () for that of the rule.
    """
    spacings, sizes = np.asarray(spacings_mm, np.float64), np.asarray(shapes)
    target = np.percentile(spacings, 50, axis=0)
    size = np.percentile(sizes, 50, axis=0)
    coarsest = 2 - int(np.argmax(target[::-1]))
    others = [axis for axis in range(3) if axis != coarsest]
    most = float(target[others].max())
    is_coarse = bool(
        target[coarsest] > ANISOTROPY * most and ANISOTROPY * size[coarsest] < size[others].min()
    )
    if len(wanted_mm):
        target, is_coarse = np.where(wanted_mm, wanted_mm, target), False
    elif is_coarse:
        found = float(np.percentile(spacings[:, coarsest], COARSE_PERCENTILE))
        target[coarsest] = found if found >= most else most + 1e-5
    # Where rounding decides, as nnU-Net rounds: half to even.
    on_target = np.round(spacings / target * sizes)
    median = np.median(on_target, axis=0)
    # The coarsest may by now not be: nnU-Net orders by what became of it.
    last = 2 - int(np.argmax(target[::-1]))
    first, second = (axis for axis in range(3) if axis != last)
    axes = tuple(wanted_axes) or (first, second, last)
    return Target(
        axes=axes,
        spacing_mm=tuple(target[list(axes)].tolist()),
        median_shape=tuple(median[list(axes)].tolist()),
        is_coarse=is_coarse,
    )
