"""From the values that a label file holds to class indices: pure functions of arrays.

A value stands for a class, or for nothing that counts, or it is an error: none is ever taken for a
class that it is merely near, but for two stated exceptions. Values within 0.001 of a whole number
are that number, which is what is left of it after a conversion to floating point and back. And the
values of a JPEG mask are the nearest ones that stand for something, if almost all lie close to one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# What a voxel that counts for nothing becomes among class indices.
IGNORED = 255
MAX_CLASSES = 256

_ROUNDING = 1e-3
_MASK_VALUES = (0, 255)
# Label values in a JPEG file must be this far apart; of all pixels, so many must lie within a
# quarter of that from one.
_JPEG_GAP = 32
_JPEG_SHARE = 0.95
_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class LabelCoding:
    """What the values in label files stand for.

    Attributes:
      values: value of each class; None: a mask, 0 and one other value, which is class 1.
      ignore: values of voxels that count for nothing.
      objects: of a mask: every value above 0 is an object of class 1.
    """

    values: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = ()
    objects: bool = False


def whole_numbers(values: np.ndarray) -> np.ndarray:
    """The integers that values of floating point are but for rounding, or the values themselves."""
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        return values
    rounded = np.rint(values)
    if values.size and np.abs(values - rounded).max() > _ROUNDING:
        return values
    largest = np.abs(rounded).max(initial=0)
    return rounded.astype(np.int64 if largest >= 2**31 else np.int32)


def nearest_values(values: np.ndarray, coding: LabelCoding) -> np.ndarray:
    """The values of a JPEG mask before compression changed them.

    Raises:
      ValueError: Compression may have made one of another; the message says why.
    """
    wanted = sorted({*(coding.values or _MASK_VALUES), *coding.ignore})
    gaps = np.diff(wanted)
    if gaps.min() < _JPEG_GAP:
        raise ValueError(f"JPEG changes label values, and {wanted} lie too close to tell apart")
    borders = np.array(wanted[:-1]) + gaps / 2
    nearest = np.array(wanted)[np.searchsorted(borders, values, side="right")]
    share = np.mean(np.abs(values.astype(np.float32) - nearest) <= gaps.min() / 4)
    if share < _JPEG_SHARE:
        raise ValueError(
            f"JPEG changes label values, and only {100 * share:.1f} % of the pixels are near one "
            f"of {wanted}"
        )
    return nearest.astype(values.dtype)


def encode(values: np.ndarray, coding: LabelCoding) -> np.ndarray:
    """Turns values into class indices.

    Args:
      values: Any shape, any real dtype.
      coding: LabelCoding.
    Returns:
      uint8 of the same shape, IGNORED where a voxel does not count.
    Raises:
      ValueError: There are values that stand for nothing; counts their voxels and says what can be
        done about them.
    """
    if coding.values is None:
        return _encode_mask(values, coding)
    label = np.zeros_like(values, np.uint8)  # in the file's order of axes: much faster
    unknown = np.ones_like(values, bool)
    for index, value in [*enumerate(coding.values), *((IGNORED, value) for value in coding.ignore)]:
        of_class = values == value
        label[of_class] = index
        unknown &= ~of_class
    if unknown.any():
        raise ValueError(
            f"unknown label values {listing(values[unknown])}, where the classes have only "
            f"{list(coding.values)}; {_mends(values[unknown])}"
        )
    return label


def _encode_mask(values, coding):
    ignored = np.isin(values, coding.ignore)
    foreground = (values != 0) & ~ignored
    found = np.unique(values[foreground])
    if not np.isfinite(found.astype(np.float64)).all() or (found < 0).any():
        bad = values[foreground & ~(values > 0)]
        bad = bad if bad.size else values[~np.isfinite(values)]
        raise ValueError(
            f"unknown label values {listing(bad)}, where the classes have finite values from 0; "
            "correct these voxels"
        )
    if found.size > 1 and not coding.objects:
        raise ValueError(
            f"a mask has 0 and one other value, this one has label values "
            f"{listing(values[foreground])}; say what they are: "
            "--config.data.label_values for several classes, --config.data.objects=True for "
            "objects of one class, --config.data.ignore_values for those that count for nothing; "
            "of a mask with blurred edges, save the values above and below the middle as two"
        )
    label = foreground.astype(np.uint8)
    label[ignored] = IGNORED
    return label


def without_ignored(
    prediction: np.ndarray, reference: np.ndarray, coding: LabelCoding
) -> tuple[np.ndarray, np.ndarray]:
    """Both labels with background where the reference does not count, so that no score sees it."""
    if not coding.ignore:
        return prediction, reference
    ignored = reference == IGNORED
    return np.where(ignored, 0, prediction), np.where(ignored, 0, reference)


def listing(values: np.ndarray) -> str:
    """The first values, and how many voxels have each."""
    found, counts = np.unique(values, return_counts=True)
    text = ", ".join(
        f"{value:.10g} ({count} voxels)"
        for value, count in zip(
            found[:_MAX_LISTED].tolist(), counts[:_MAX_LISTED].tolist(), strict=True
        )
    )
    more = found.size - _MAX_LISTED
    return text + (f" and {more} more values" if more > 0 else "")


def _mends(unknown):
    found = np.unique(unknown)
    whole = np.isfinite(found.astype(np.float64)).all() and (found == np.round(found)).all()
    if not whole or found.size > _MAX_LISTED or (found < 0).any():
        return "correct these voxels or the dataset's label values"
    values = ",".join(f"{value:.0f}" for value in found.tolist())
    return (
        "correct these voxels or the dataset's label values, or, if they are to count for nothing, "
        f"--config.data.ignore_values=({values},)"
    )


def class_problems(source: object, class_names: Sequence[str], coding: LabelCoding) -> list[str]:
    """What is wrong with class names and their values, one sentence each."""
    num_classes, label_values = len(class_names), coding.values
    most = MAX_CLASSES - bool(coding.ignore)
    problems = []
    if not 2 <= num_classes <= most:
        problems.append(f"{source}: {num_classes} classes; name 2 to {most}, background first")
    if label_values is None:
        if num_classes != 2:
            problems.append(
                f"{source}: {num_classes} class names, but without label values there are "
                "2 classes (background and foreground); give the label values"
            )
    elif len(label_values) != num_classes or len(set(label_values)) != num_classes:
        problems.append(
            f"{source}: label values {list(label_values)} for {num_classes} class names; "
            "give one value for each name, all different"
        )
    elif min(label_values, default=0) < 0:
        problems.append(f"{source}: negative label values in {list(label_values)}; recode them")
    if both := sorted(set(coding.ignore) & set(label_values or (0,))):
        problems.append(
            f"{source}: {both} are label values of classes and are to be ignored; "
            "correct --config.data.ignore_values"
        )
    return problems
