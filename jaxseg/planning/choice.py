"""Which of the configurations of a dataset is trained, where nobody says."""

from collections.abc import Mapping

import numpy as np

from jaxseg.planning.budget import PRESETS, Wishes
from jaxseg.planning.configurations import Configuration, DatasetFacts

# Slices this much thicker than wide show little of what is above and below.
MUCH_THICKER = 3.0


def choose(
    made: Mapping[str, Configuration],
    wanted: str,
    preset_name: str,
    wishes: Wishes,
    facts: DatasetFacts,
) -> tuple[str, str]:
    """Returns (name, why) of the configuration to train.

    Args:
      made: of `configurations_of`.
      wanted: one of the names in `made`, or "auto".
      preset_name: that they were made with.
      wishes: of the user; the rank of a patch decides.
      facts: that they were made from.
    """
    if wanted != "auto":
        return wanted, "as you set"
    if wishes.patch_size:
        is_flat = len(wishes.patch_size) == 2 or "3d_fullres" not in made
        return ("2d" if is_flat else "3d_fullres"), "for a patch of the size you set"
    if "3d_fullres" not in made:
        return "2d", "since cases are single slices"
    spacing = np.median(np.asarray(facts.spacings_mm), axis=0)[list(made["3d_fullres"].axes)]
    ratio = spacing[2] / max(spacing[:2])
    if PRESETS[preset_name].is_short and ratio > MUCH_THICKER:
        return "2d", f"since slices are {ratio:.3g} times as thick as their voxels are wide"
    return "3d_fullres", "volumes at their own resolution"
