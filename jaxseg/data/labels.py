"""Reads and writes labels: volumes and pictures whose values stand for classes.

A label is an array of class indices [X, Y, Z] uint8; a picture of height H and width W is
[H, W, 1]. What counts for nothing is `label_values.IGNORED`.

`decode_label` only needs a file that can be decoded, so that `verify` can go on and name everything
that is wrong with it; `read_label` refuses such a file.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from jaxseg.data import label_values as values_lib
from jaxseg.data.formats import registry
from jaxseg.data.formats.pictures import (
    Picture,
    load_picture,
    opaque_pixels,
    shown_values,
    write_png,
)
from jaxseg.data.formats.volume import Remark, Volume
from jaxseg.data.images import affine_problems
from jaxseg.data.label_values import IGNORED, LabelCoding
from jaxseg.problem import file_problem

JPEG_REMARK = Remark(
    "a JPEG mask, whose every pixel is taken for the nearest label value", "read so"
)


@dataclasses.dataclass(frozen=True)
class StoredLabel(Volume):
    """The values of a label file; `is_lossy` if compression has changed them."""

    is_lossy: bool = False


def read_label(
    path: str | Path, coding: LabelCoding, spacing_from: str = "pixdim"
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map as class indices.

    Args:
      path: A volume (3D, or 4D with a last axis of 1), or a picture with one value per pixel (grey,
        equal colours, or a palette, see `formats.pictures.shown_values`).
      coding: What the values stand for.
      spacing_from: of `formats.placement.place`.
    Returns:
      (label, affine): [X, Y, Z] uint8, IGNORED where a voxel does not count, and [4, 4] float64 in
      mm.
    Raises:
      FileProblem: The file is missing, damaged, of another kind, has an unusable affine, or holds
        other values.
    """
    stored = _decode_placed_label(path, spacing_from)
    return encode_label(path, stored, coding), stored.affine


def read_instances(
    path: str | Path, coding: LabelCoding, spacing_from: str = "pixdim"
) -> tuple[np.ndarray, np.ndarray]:
    """Reads which object each voxel belongs to.

    If `coding.objects`, and there are several values above 0 in the file, they are the objects (an
    instance map). Otherwise an object is what hangs together by faces within one class.

    Args:
      path, coding, spacing_from: As for `read_label`.
    Returns:
      (instances, affine): [X, Y, Z] int32, 0 in the background and where a voxel does not count,
      objects numbered from 1 without gaps, those of an instance map in the order of its values; and
      [4, 4] float64 in mm.
    Raises:
      FileProblem: As `read_label`.
    """
    stored = _decode_placed_label(path, spacing_from)
    label = encode_label(path, stored, coding)
    label[label == IGNORED] = 0
    instances = np.zeros(label.shape, np.int32)
    if coding.values is None:
        found, order = np.unique(stored.values[label > 0], return_inverse=True)
        if found.size > 1:
            instances[label > 0] = order + 1
            return instances, stored.affine
    for index in range(1, label.max(initial=0) + 1):
        objects, _ = ndimage.label(label == index)
        instances += np.where(objects > 0, objects + instances.max(), 0)
    return instances, stored.affine


def decode_label(path: str | Path, spacing_from: str = "pixdim") -> StoredLabel:
    """The values of a label file as they are stored, but for rounding, and its affine unchecked.

    Args:
      path, spacing_from: As for `read_label`.
    Returns:
      StoredLabel: values [X, Y, Z] of the file's type (scaling applied), or integers where that
      type holds whole numbers but for rounding.
    Raises:
      FileProblem: The file is missing, damaged or of another kind.
    """
    found = registry.format_of(path)
    if found is not None:
        volume = found.read(path, None, spacing_from)
        values = volume.values
        if values.ndim == 4:
            raise file_problem(
                path,
                f"a label has one value per voxel, this one has {values.shape[3]}",
                "save it with shape [X, Y, Z]",
            )
        return StoredLabel(values_lib.whole_numbers(values), volume.affine, volume.remarks)
    picture = load_picture(path)
    if picture.image.mode == "P":
        return StoredLabel(shown_values(path, picture), np.eye(4))
    is_lossy = picture.format == "JPEG"
    if is_lossy:
        picture = Picture(picture.image.convert("L"), picture.format)
    values = opaque_pixels(path, picture)
    if (values != values[..., :1]).any():
        raise file_problem(
            path,
            "a label has one value per pixel, this one has colours",
            "save it as a grey picture of class values",
        )
    remarks = (JPEG_REMARK,) if is_lossy else ()
    return StoredLabel(values_lib.whole_numbers(values[..., 0]), np.eye(4), remarks, is_lossy)


def encode_label(path: str | Path, stored: StoredLabel, coding: LabelCoding) -> np.ndarray:
    """Turns the values of a label file into class indices.

    Args:
      path: File that the values come from, for the message.
      stored: of `decode_label`.
      coding: LabelCoding.
    Returns:
      uint8 of the shape of the values, IGNORED where a voxel does not count.
    Raises:
      FileProblem: There are values that stand for no class; names them and counts their voxels.
    """
    try:
        return values_lib.encode(settled_values(path, stored, coding), coding)
    except ValueError as error:
        wrong, _, mend = str(error).partition("; ")
        raise file_problem(path, wrong, mend) from None


def settled_values(path: str | Path, stored: StoredLabel, coding: LabelCoding) -> np.ndarray:
    """The values of a label file as they were before a lossy compression changed them.

    Raises:
      FileProblem: They can not be told any more.
    """
    if not stored.is_lossy:
        return stored.values
    try:
        return values_lib.nearest_values(stored.values, coding)
    except ValueError as error:
        raise file_problem(path, str(error), "save the original label as PNG") from None


def write_label(
    path: str | Path,
    label: np.ndarray,
    affine: np.ndarray,
    label_values: Sequence[int] | None,
    like: str | Path | None = None,
) -> None:
    """Writes class indices as a label file; a reader sees the old file or the new one, never half.

    The type is the smallest unsigned integer that holds the values. A volume is written with no
    scaling and, without `like`, in mm with the affine; PNG is grey and has no affine. Equal
    arguments make equal bytes.

    Args:
      path: named as a format of volumes, or *.png, in an existing folder; replaced if it is there.
      label: Class indices, [X, Y, Z], integer; for PNG [H, W, 1].
      affine: Voxel to world (mm), [4, 4].
      label_values: Value to write for each class index; None writes the index.
      like: File on the same grid, usually the source image, whose units, affine and other words
        about its place are copied bit for bit if it is of the same format; None for none.
    Raises:
      ValueError: Another suffix, a class index without a value, values that the format cannot hold,
        or a grid that is not the one of `like`.
      OSError: The file cannot be written.
    """
    if label_values is None:
        label_values = range(int(label.max(initial=0)) + 1)
    if not 0 <= label.min(initial=0) <= label.max(initial=0) < len(label_values):
        raise ValueError(
            f"{path}: label has class indices from {label.min()} to {label.max()}, but there are "
            f"{len(label_values)} label values"
        )
    if min(label_values) < 0:
        raise ValueError(f"{path}: label values {list(label_values)} are not all at least 0")
    table = np.asarray(label_values, np.min_scalar_type(max(label_values)))
    values = table[label]
    if registry.write_volume(path, values, affine, like):
        return
    if not os.fspath(path).lower().endswith(".png"):
        raise ValueError(f"{path}: a label is written as a volume or as .png")
    write_png(path, values)


def _decode_placed_label(path, spacing_from):
    """`decode_label` of a file whose affine can be used."""
    stored = decode_label(path, spacing_from)
    problems = affine_problems(path, stored.affine)
    if problems:
        raise problems[0]
    return stored
