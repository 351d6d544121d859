"""What a user should know of how settings and data fit together, before training begins."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from jaxseg.data.cases import Dataset
from jaxseg.data.preprocess import Plan
from jaxseg.data.verify import CaseFacts

# By the RAS+ axis that slices are cut across.
_PLANES = ("sagittal", "coronal", "axial")
_SIDES = {"left", "right", "l", "r", "lt", "rt", "lh", "rh"}
# Slices of a case are cut across where another axis is so much thicker.
_MUCH_THICKER = 1.5


def about_axes(
    config: ConfigDict, dataset: Dataset, facts: Sequence[CaseFacts], plan: Plan
) -> Iterator[str]:
    """Along which axis slices are cut, and whether training takes left for right.

    Args:
      config: validated ConfigDict.
      dataset: Dataset.
      facts: of the training cases.
      plan: preprocessing Plan.
    Returns:
      Iterator of sentences.
    """
    is_picture = not dataset.has_volumes
    if len(config.data.patch_size) == 2 and not is_picture:
        across = plan.axes[2]
        spacing = " x ".join(f"{mm:.4g}" for mm in np.median([f.spacing_mm for f in facts], axis=0))
        yield (
            f"slices are {_PLANES[across]}: of voxels of {spacing} mm in the median (left-right, "
            "back-front, feet-head) the thickest axis is cut across, of equals the last"
        )
        others = sum(max(f.spacing_mm) > _MUCH_THICKER * f.spacing_mm[across] for f in facts)
        if others:
            yield f"slices of {others} training case(s), which lie another way, are cut across"
    flip = config.augment.flip
    left_right = left_right_of(dataset, plan.axes)
    sided = [name for name in dataset.class_names if names_a_side(name)]
    if sided and flip.prob > 0 and left_right in tuple(flip.axes):
        rest = tuple(axis for axis in flip.axes if axis != left_right)
        yield (
            f"classes name a side ({', '.join(sided)}), but training mirrors left and right: "
            f"--config.augment.flip.axes={str(rest).replace(' ', '')} ends that"
        )


def left_right_of(dataset: Dataset, axes: Sequence[int]) -> int:
    """The axis of a grid along which left and right lie; of pictures their columns."""
    return tuple(axes).index(0) if dataset.has_volumes else 1


def names_a_side(class_name: str) -> bool:
    """Whether the name of a class says left or right."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", class_name).lower()
    return bool(_SIDES & set(re.split(r"[^a-z]+", apart)))
