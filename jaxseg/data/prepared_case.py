"""A case that is ready to be trained on."""

import dataclasses

import numpy as np

from jaxseg.data.blocked_arrays import BlockedArray


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """A case as the network sees it.

    The arrays are numpy's, or read on demand: sliced by a tuple of slices, one for each axis.

    Attributes:
      image: [X, Y, Z, C] float32, normalised, RAS+ grid of the plan's spacing.
      label: [X, Y, Z] uint8 class indices.
      locations: for each foreground class present, [N, 3] voxels of that class.
      weight: [X, Y, Z] float32, what each voxel counts in the loss; None means 1.
    """

    image: np.ndarray | BlockedArray
    label: np.ndarray | BlockedArray
    locations: tuple[np.ndarray, ...]
    weight: np.ndarray | BlockedArray | None = None
