"""How the intensities of each channel are brought to one scale, by the channel's name."""

import math
from collections.abc import Sequence

from jaxseg.config_fields import CHOICES

# By the foreground of all cases; by mean and deviation of the image, or of what is not background
# in it (nnU-Net's use of a mask); from its smallest value to its largest; by constants.
SCHEMES = CHOICES["preprocess.normalisation"][1:]
# Of schemes that look at no image: (low, high, mean, std) to clip to, subtract and divide by.
CONSTANTS = {
    "rgb_to_0_1": (-math.inf, math.inf, 0.0, 255.0),
    "none": (-math.inf, math.inf, 0.0, 1.0),
}
# Names that stand for a scheme, in any case of letters; any other channel gets its z-score.
_BY_NAME = {"nonorm": "none"} | {scheme: scheme for scheme in SCHEMES}
# Images of which less than this is not background are normalised by what is not.
MOSTLY_BACKGROUND = 0.75


def schemes_of(channel_names: Sequence[str]) -> tuple[str, ...]:
    """The scheme of each channel."""
    return tuple(_BY_NAME.get(name.strip().casefold(), "zscore") for name in channel_names)


def masked_normalisation(schemes: Sequence[str], relative_size: float) -> tuple[bool, ...]:
    """For each channel whether it is normalised inside the mask of what is not background.

    Args:
      schemes: of the channels.
      relative_size: median of the voxels that cropping to the mask leaves, as a part of all.
    """
    sparse = relative_size < MOSTLY_BACKGROUND
    return tuple(sparse and scheme == "zscore" for scheme in schemes)
