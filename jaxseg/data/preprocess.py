"""From the scanner's grid and units to the network's: orient, crop, normalise, resample."""

import dataclasses
import functools
import json
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from jaxseg import geometry
from jaxseg.data import familiarity
from jaxseg.data.cases import Case, Dataset, DatasetProblems
from jaxseg.data.formats import registry
from jaxseg.data.label_values import IGNORED
from jaxseg.data.reading import read_case_image, read_case_label
from jaxseg.planning.normalisation import CONSTANTS, SCHEMES, schemes_of

# Enough voxels per case for stable percentiles, few enough to keep those of every case in memory.
VOXELS_PER_CASE = 10_000
# Spacings that differ by less are equally thick.
_EQUAL_SPACING = 1.01


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to preprocess; made from training cases alone and saved with the model.

    Attributes:
      spacing_mm: target spacing of the RAS+ grid, three floats; 0 where each case keeps its own.
      normalisation: of `planning.normalisation.SCHEMES`, for each channel.
      intensity: for each "ct" channel (low, high, mean, std): clipping bounds, then mean and
        standard deviation, all of the training cases' foreground; () for any other.
      image_order: spline order of image resampling, 1 or 3.
      label_order: 0 nearest, 1 linear of one-hot labels.
      axes: which RAS+ axis each axis of the network's grid runs along; slices are cut across the
        last. (The fields from here on were not in plans of version 0.1, whose rules their defaults
        are.)
      spacing_from: of `formats.placement.place`.
      keep_thin: of `geometry.resample_label_to_shape`.
      typical: what the training images are like, of `familiarity.typical_ranges`.
      crop: whether only the box of what is not 0 in every channel is prepared.
      normalise_first: whether images are normalised before they are resampled.
      coarse_apart: whether a coarse axis is resampled apart, see `geometry.coarse_axis`.
    """

    spacing_mm: tuple[float, ...]
    normalisation: tuple[str, ...]
    intensity: tuple[tuple[float, ...], ...]
    image_order: int
    label_order: int
    axes: tuple[int, ...] = (0, 1, 2)
    spacing_from: str = "sform"
    keep_thin: bool = False
    typical: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    crop: bool = False
    normalise_first: bool = False
    coarse_apart: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
          AttributeError, KeyError, RecursionError, TypeError, ValueError: it is damaged.
        """
        fields = json.loads(text)
        for name in {"spacing_mm", "normalisation", "axes"} & set(fields):
            fields[name] = tuple(fields[name])
        fields["intensity"] = tuple(map(tuple, fields["intensity"]))
        plan = cls(**fields)
        if wrong := [name for name, is_right in _rightness(plan).items() if not is_right]:
            raise ValueError(f"its {wrong[0]!r} is {reprlib.repr(fields[wrong[0]])}")
        return plan


def _rightness(plan: Plan) -> dict[str, bool]:
    """For each field of a plan that was read whether its value is one that a plan can have."""
    spacing = np.asarray(plan.spacing_mm, np.float64)
    statistics = [
        len(of) == (4 if kind == "ct" else 0) and np.isfinite(np.asarray(of, np.float64)).all()
        for of, kind in zip(plan.intensity, plan.normalisation, strict=True)
    ]
    return {
        "spacing_mm": spacing.shape == (3,) and bool((np.isfinite(spacing) & (spacing >= 0)).all()),
        "normalisation": bool(plan.normalisation) and set(plan.normalisation) <= set(SCHEMES),
        "intensity": all(statistics),
        "image_order": plan.image_order in (1, 3),
        "label_order": plan.label_order in (0, 1),
        "axes": repr(sorted(plan.axes)) == "[0, 1, 2]",
        "spacing_from": plan.spacing_from in ("pixdim", "sform"),
        "typical": familiarity.are_ranges(plan.typical),
    } | {
        name: isinstance(getattr(plan, name), bool)
        for name in ("keep_thin", "crop", "normalise_first", "coarse_apart")
    }


def make_plan(
    dataset: Dataset,
    cases: Iterable[Case],
    *,
    axes: Sequence[int],
    slices: bool = False,
    spacing_mm: Sequence[float],
    normalisation: str,
    crop: bool,
    image_order: int,
    label_order: int,
) -> Plan:
    """Derives the plan from training cases.

    Args:
      dataset: that they are of.
      cases: the training cases (`jaxseg.data.cases.Case`), verified.
      axes: as in `Plan`.
      slices: whether the network sees slices.
      spacing_mm: target spacing, or () for the median of `cases`, where slices keep the distance
        between them.
      normalisation: a scheme for all channels, or one for each with commas between them; "auto":
        what the names of the modalities say, see `planning.normalisation.schemes_of`.
      crop, image_order, label_order: as in `Plan`.
    Raises:
      DatasetProblems: CT normalisation, and no foreground in any training label; or another number
        of channels than of schemes.
    """
    spacings, foregrounds, features = [], [], []
    for case in cases:
        image, affine = read_case_image(dataset, case)
        image, canonical_affine = geometry.to_canonical(image, affine)
        spacings.append(geometry.spacing_mm_from_affine(canonical_affine))
        names = dataset.channel_names(image.shape[-1])
        kinds = _schemes(names, normalisation)
        is_picture = not registry.is_volume(case.image_path)
        features.append(
            familiarity.describe_image(image, spacings[-1], kinds, is_picture=is_picture)
        )
        if "ct" in kinds:
            label, _ = geometry.to_canonical(read_case_label(dataset, case), affine)
            voxels = image[(label > 0) & (label != IGNORED)]
            foregrounds.append(voxels[:: 1 + len(voxels) // VOXELS_PER_CASE])
    if "ct" in kinds and not any(map(len, foregrounds)):
        raise DatasetProblems(
            [
                "no training case has a labelled foreground voxel, from which CT intensities are "
                "normalised; check the labels, or set --config.preprocess.normalisation=zscore"
            ]
        )
    median_mm = np.median(spacings, axis=0)
    if slices:
        median_mm[axes[2]] = 0
    return Plan(
        spacing_mm=tuple(spacing_mm) or tuple(map(float, median_mm)),
        normalisation=kinds,
        intensity=tuple(
            _clipped_statistics(np.concatenate(foregrounds)[:, channel]) if kind == "ct" else ()
            for channel, kind in enumerate(kinds)
        ),
        image_order=image_order,
        label_order=label_order,
        axes=tuple(axes),
        spacing_from=dataset.spacing_from,
        keep_thin=True,
        typical=familiarity.typical_ranges(features),
        crop=crop,
        normalise_first=True,
        coarse_apart=True,
    )


def preprocess_image(
    image: np.ndarray, affine: np.ndarray, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Orients, crops, normalises and resamples.

    Args:
      image: [X, Y, Z, C] float32 as read.
      affine: [4, 4] of the file.
      plan: Plan.
    Returns:
      (image, affine): [X', Y', Z', C] float32 on the grid of `plan.spacing_mm` along `plan.axes`,
      its affine.
    """
    box = kept_box(image, affine, plan)
    image, affine = geometry.to_canonical(image, affine)
    image, affine = image[box], geometry.cropped_affine(affine, box)
    shape = image.shape[:3]
    new_shape, coarse = _new_grid(shape, geometry.spacing_mm_from_affine(affine), plan)
    resample = functools.partial(
        geometry.resample_to_shape, shape=new_shape, order=plan.image_order, coarse=coarse
    )
    image = (
        resample(_normalised(image, plan))
        if plan.normalise_first
        else (_normalised(resample(image), plan))
    )
    affine = geometry.resampled_affine(affine, shape, new_shape)[:, [*plan.axes, 3]]
    return image.transpose(*plan.axes, 3), affine


def kept_box(image: np.ndarray, affine: np.ndarray, plan: Plan) -> tuple[slice, slice, slice]:
    """The part of the RAS+ grid that is prepared of an image [X, Y, Z, C] as read."""
    image, _ = geometry.to_canonical(image, affine)
    if plan.crop:
        return geometry.nonzero_box(image)
    first, second, third = (slice(0, size) for size in image.shape[:3])
    return first, second, third


def preprocess_label(
    label: np.ndarray,
    affine: np.ndarray,
    plan: Plan,
    num_classes: int,
    box: tuple[slice, ...] = (),
) -> np.ndarray:
    """Orients, crops and resamples a label [X, Y, Z] uint8 to the grid of `preprocess_image`.

    IGNORED stays what it is, and is resampled by itself.

    Args:
      label: [X, Y, Z] uint8 as read.
      affine: [4, 4] of the file.
      plan: Plan.
      num_classes: background included.
      box: of `kept_box`; () for the whole grid.
    """
    label, affine = geometry.to_canonical(label, affine)
    label = label[box]
    new_shape, coarse = _new_grid(label.shape, geometry.spacing_mm_from_affine(affine), plan)
    ignored = label == IGNORED if num_classes <= IGNORED else np.zeros(label.shape, bool)
    resample = functools.partial(
        geometry.resample_label_to_shape,
        shape=new_shape,
        order=plan.label_order,
        keep_thin=plan.keep_thin,
        coarse=coarse,
    )
    resampled = resample(np.where(ignored, 0, label), num_classes=num_classes)
    if ignored.any():
        away = resample(ignored.astype(np.uint8), num_classes=2)
        resampled[away == 1] = IGNORED
    return resampled.transpose(plan.axes)


def preprocess_instances(
    instances: np.ndarray, affine: np.ndarray, plan: Plan, box: tuple[slice, ...] = ()
) -> np.ndarray:
    """Orients and crops instances [X, Y, Z] int32 and resamples them by nearest neighbour.

    Their numbers lie below 2^24, which float32 holds exactly.
    """
    instances, affine = geometry.to_canonical(instances, affine)
    instances = instances[box]
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    new_shape = target_shape(instances.shape, spacing_mm, plan)
    resampled = geometry.resample_to_shape(instances[..., None], new_shape, order=0)
    return resampled[..., 0].astype(np.int32).transpose(plan.axes)


def target_shape(
    shape: Sequence[int], spacing_mm: Sequence[float] | np.ndarray, plan: Plan
) -> tuple[int, ...]:
    """Voxels along the RAS+ axes of what is prepared of a volume of that shape and spacing."""
    return geometry.resampled_shape(shape, spacing_mm, plan.spacing_mm)


def _new_grid(shape, spacing_mm, plan):
    """(shape, coarse): what a grid is resampled to, and `geometry.coarse_axis`."""
    target_mm = np.asarray(plan.spacing_mm, np.float64)
    coarse = int(geometry.coarse_axis(spacing_mm, target_mm)) if plan.coarse_apart else -1
    return target_shape(shape, spacing_mm, plan), coarse


def slice_axes(
    shapes: Sequence[Sequence[int]], spacings_mm: Sequence[Sequence[float]]
) -> tuple[int, int, int]:
    """How volumes lie for a network of slices: which RAS+ axis is across, and the two in plane.

    The axis across is that of the thickest median spacing, or the one along which every volume has
    a single voxel; of equals the last.

    Args:
      shapes, spacings_mm: of the training cases, along RAS+ axes.
    Returns:
      `Plan.axes`.
    """
    single = np.all(np.asarray(shapes) == 1, axis=0)
    thickness = np.median(spacings_mm, axis=0)
    thickness = np.where(single, np.inf, thickness) if single.any() else thickness
    thickest = thickness >= thickness.max() / _EQUAL_SPACING
    across = int(np.flatnonzero(thickest)[-1])
    first, second = (axis for axis in range(3) if axis != across)
    return first, second, across


def _schemes(names, wanted):
    """The scheme of each channel."""
    schemes = [scheme.strip() for scheme in wanted.split(",")]
    schemes = schemes * len(names) if len(schemes) == 1 else schemes
    if len(schemes) != len(names):
        raise DatasetProblems(
            [
                f"preprocess.normalisation names {len(schemes)} schemes, images have {len(names)} "
                "channels; name one for all, or one for each"
            ]
        )
    by_name = schemes_of(names)
    return tuple(
        known if scheme == "auto" else scheme
        for scheme, known in zip(schemes, by_name, strict=True)
    )


def _clipped_statistics(values):
    low, high = np.percentile(values, [0.5, 99.5])
    clipped = np.clip(values.astype(np.float64), low, high)
    return tuple(map(float, (low, high, clipped.mean(), max(clipped.std(), 1e-8))))


def _normalised(image, plan):
    """[X, Y, Z, C] float32 on the scale of the network."""
    mask = None
    if "zscore_inside" in plan.normalisation:
        mask = ndimage.binary_fill_holes((image != 0).any(-1))
    return np.stack(
        [
            _normalise(image[..., channel], scheme, statistics, mask)
            for channel, (scheme, statistics) in enumerate(
                zip(plan.normalisation, plan.intensity, strict=True)
            )
        ],
        axis=-1,
    )


def _normalise(channel, scheme, statistics, mask=None):
    if scheme == "zscore_inside" and mask.any():
        inside = _normalise(channel[mask], "zscore", ())
        result = np.zeros(channel.shape, np.float32)
        result[mask] = inside
        return result
    if scheme == "ct":
        low, high, mean, std = statistics
    elif scheme in CONSTANTS:
        low, high, mean, std = CONSTANTS[scheme]
    elif scheme == "rescale_to_0_1":
        low, high = channel.min(), channel.max()
        mean, std = low, (high - low) or 1
    else:
        low, high, mean, std = _robust_statistics(channel)
    return ((np.clip(channel, low, high) - mean) / std).astype(np.float32)


def _robust_statistics(channel):
    # A few extreme voxels (vessels, artefacts) must not set the scale of the whole volume.
    statistics = _clipped_statistics(channel)
    if statistics[0] == statistics[1]:  # almost all background: the few others are the image
        channel_64 = channel.astype(np.float64)
        return channel.min(), channel.max(), channel_64.mean(), channel_64.std() or 1.0
    return statistics
