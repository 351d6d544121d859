"""Where patches lie in a case, and the regions around them that augmentation needs."""

from collections.abc import Sequence

import numpy as np

from jaxseg.data.prepared_case import PreparedCase
from jaxseg.geometry import mirrored


def num_around_foreground(batch_size: int, fraction: float) -> int:
    """How many patches of a batch are drawn around a foreground voxel, as in nnU-Net v2.

    Half a patch is rounded to the even number of those that are not: of two patches a third is one.
    """
    return batch_size - round(batch_size * (1 - fraction))


def sample_region(
    case: PreparedCase,
    rng: np.random.Generator,
    region: Sequence[int],
    patch_size: Sequence[int],
    foreground_fraction: float,
    *,
    margin: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a patch of a case and cuts the larger region around it that augmentation needs.

    The patch, without its margin, lies inside the scan where the scan is larger, and is centred on
    it where it is not. Beyond the scan are zeros, or with a margin the mirrored image, as
    Ronneberger et al. 2015 feed a network that labels only the centre of what it sees.

    Args:
      case: PreparedCase.
      rng: numpy Generator.
      region: size to cut, 2 or 3 entries.
      patch_size: of the patch in the region's centre, as many entries.
      foreground_fraction: probability that the patch is drawn around a voxel of a foreground class,
        all classes that are present being equally likely.
      margin: voxels at each side of the patch that get no label from the network, one entry per
        axis; () means none.
    Returns:
      (image [*R, C] float32, label [*R] int32, valid [*R] float32): valid is the voxel's weight, 1
      where the case has none; label and valid are 0 outside the scan.
    """
    shape = case.label.shape
    if case.locations and rng.random() < foreground_fraction:
        voxels = case.locations[rng.integers(len(case.locations))]
        voxel = voxels[rng.integers(len(voxels))]
    else:
        voxel = rng.integers(shape)
    # A slice is a box of one voxel across.
    across = (slice(voxel[2], voxel[2] + 1),) if len(patch_size) == 2 else ()

    def read(array, box):
        values = array[*box, *across]
        return values[:, :, 0] if across else values

    inside, target, spans = [], [], []
    for axis, (patch, width) in enumerate(zip(patch_size, region, strict=True)):
        centre, size, edge = voxel[axis], shape[axis], margin[axis] if margin else 0
        window = patch - 2 * edge
        window_start = (
            np.clip(centre - window // 2, 0, size - window)
            if size > window
            else (size - window) // 2
        )
        start = int(window_start) - edge - (width - patch) // 2
        low, high = max(start, 0), min(start + width, size)
        inside.append(slice(low, high))
        target.append(slice(low - start, high - start))
        spans.append((start, start + width, size))

    if any(margin):
        places = [mirrored(np.arange(start, stop), size) for start, stop, size in spans]
        seen = read(case.image, [slice(p.min(), p.max() + 1) for p in places])
        region_image = seen[np.ix_(*(p - p.min() for p in places))]
    else:
        region_image = np.zeros((*region, case.image.shape[-1]), np.float32)
        region_image[*target] = read(case.image, inside)
    region_label = np.zeros(region, np.int32)
    region_valid = np.zeros(region, np.float32)
    region_label[*target] = read(case.label, inside)
    region_valid[*target] = 1 if case.weight is None else read(case.weight, inside)
    return region_image, region_label, region_valid
