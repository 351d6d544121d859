"""What a dataset is like, in numbers: of each case, and of all together."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from jaxseg import geometry

# The distribution of intensities is kept at these quantiles, which are dense at both ends.
QUANTILES = tuple(((1 - np.cos(np.linspace(0, np.pi, 257))) / 2).tolist())
# Enough voxels of a case to know them by; more are left out at a regular step.
VOXELS_PER_CASE = 100_000


@dataclasses.dataclass(frozen=True)
class Intensities:
    """Of one channel inside the foreground of one case.

    Attributes:
      count: voxels.
      mean, std: of all of them.
      quantiles: those at `QUANTILES`; () where there is no voxel.
    """

    count: int
    mean: float
    std: float
    quantiles: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
    """One class in one case.

    Attributes:
      voxels: number of them.
      components: pieces that do not touch, not even at a corner.
      extent_mm: [3] of the box around all of them, along the axes; zeros where there is none.
      chord_mm: [3] how far it is through the structure, the mean over all lines along an axis;
        likewise (the mean intercept length of stereology).
    """

    voxels: int
    components: int
    extent_mm: tuple[float, ...]
    chord_mm: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class CaseMeasures:
    """One case.

    Attributes:
      shape: [3] voxels.
      spacing_mm: [3].
      cropped_shape: [3] voxels of the box around all that is not 0 in every channel.
      intensities: for each channel, of the foreground; () without label.
      structures: for each class from 1 on; () without label.
      background: voxels of class 0; 0 without label.
    """

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    cropped_shape: tuple[int, ...]
    intensities: tuple[Intensities, ...] = ()
    structures: tuple[Structure, ...] = ()
    background: int = 0

    @property
    def relative_size(self) -> float:
        """Voxels that cropping leaves, as a part of all."""
        return math.prod(self.cropped_shape) / math.prod(self.shape)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CaseMeasures":
        """What `dataclasses.asdict` made, perhaps through JSON; raises KeyError or TypeError."""
        return cls(
            shape=tuple(fields["shape"]),
            spacing_mm=tuple(fields["spacing_mm"]),
            cropped_shape=tuple(fields["cropped_shape"]),
            intensities=tuple(
                Intensities(**(of | {"quantiles": tuple(of["quantiles"])}))
                for of in fields["intensities"]
            ),
            structures=tuple(
                Structure(**(of | {name: tuple(of[name]) for name in ("extent_mm", "chord_mm")}))
                for of in fields["structures"]
            ),
            background=fields["background"],
        )


def measure_case(
    image: np.ndarray,
    label: np.ndarray | None,
    spacing_mm: Sequence[float],
    num_classes: int,
) -> CaseMeasures:
    """Measures a case on its own grid.

    Args:
      image: [X, Y, Z, C] float32.
      label: [X, Y, Z] integer class indices; values from `num_classes` on count for nothing. None
        where nothing is labelled.
      spacing_mm: [3].
      num_classes: background included.
    """
    intensities: tuple[Intensities, ...] = ()
    structures: tuple[Structure, ...] = ()
    if label is not None:
        foreground = (label > 0) & (label < num_classes)
        intensities = tuple(
            _intensities(image[..., channel][foreground]) for channel in range(image.shape[-1])
        )
        boxes = ndimage.find_objects(np.where(foreground, label, 0), num_classes - 1)
        structures = tuple(
            _structure(label, number, box, spacing_mm) for number, box in enumerate(boxes, start=1)
        )
    return CaseMeasures(
        shape=tuple(image.shape[:3]),
        spacing_mm=tuple(map(float, spacing_mm)),
        cropped_shape=tuple(span.stop - span.start for span in geometry.nonzero_box(image)),
        intensities=intensities,
        structures=structures,
        background=0 if label is None else int((label == 0).sum()),
    )


def pooled(cases: Sequence[CaseMeasures], channel: int) -> dict[str, float]:
    """Foreground intensities of a channel over cases that all count alike, as in nnU-Net.

    Returns:
      Dict of count, mean, std, min, max, median, percentile_00_5 and percentile_99_5; empty where
      nothing is labelled.
    """
    found = [case.intensities[channel] for case in cases if case.intensities]
    found = [of for of in found if of.count]
    if not found:
        return {}
    means = np.array([of.mean for of in found])
    squares = np.array([of.std**2 + of.mean**2 for of in found])
    # Between two quantiles of a case every value is equally likely.
    values = np.concatenate([_spread(of.quantiles) for of in found])
    low, median, high = np.percentile(values, [0.5, 50, 99.5])
    return {
        "count": sum(of.count for of in found),
        "mean": float(means.mean()),
        "std": float(np.sqrt(max(squares.mean() - means.mean() ** 2, 0))),
        "min": min(of.quantiles[0] for of in found),
        "max": max(of.quantiles[-1] for of in found),
        "median": float(median),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
    }


def to_json(cases: Mapping[str, CaseMeasures], channel_names: Sequence[str]) -> str:
    """The fingerprint as it is kept with a run: all cases together, then each by its id."""
    every = list(cases.values())
    summary = {
        "num_cases": len(every),
        "median_relative_size": float(np.median([case.relative_size for case in every])),
        "intensities": [  # two channels may have one name
            {"channel": name} | pooled(every, channel) for channel, name in enumerate(channel_names)
        ],
        "cases": {case_id: dataclasses.asdict(case) for case_id, case in cases.items()},
    }
    return json.dumps(summary, indent=1)


def _intensities(values):
    if not values.size:
        return Intensities(0, 0.0, 0.0, ())
    some = values[:: 1 + len(values) // VOXELS_PER_CASE].astype(np.float64)
    quantiles = np.quantile(some, QUANTILES)
    quantiles[[0, -1]] = values.min(), values.max()
    return Intensities(
        count=len(values),
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        quantiles=tuple(float(f"{value:.7g}") for value in quantiles),
    )


def _spread(quantiles):
    """Values that have these quantiles, ten for each."""
    return np.interp(np.linspace(0, 1, 10 * len(QUANTILES)), QUANTILES, quantiles)


def _structure(label, number, box, spacing_mm):
    if box is None:
        return Structure(0, 0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    inside = label[box] == number
    _, components = ndimage.label(inside, np.ones((3, 3, 3)))
    extent = [n * mm for n, mm in zip(inside.shape, spacing_mm, strict=True)]
    voxels = int(inside.sum())
    chords = [voxels / _entries(inside, axis) * mm for axis, mm in enumerate(spacing_mm)]
    return Structure(voxels, int(components), tuple(map(float, extent)), tuple(map(float, chords)))


def _entries(inside, axis):
    """How often lines along an axis enter a mask."""
    along = np.moveaxis(inside, axis, 0)
    return int(along[0].sum() + (along[1:] & ~along[:-1]).sum())
