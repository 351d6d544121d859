"""Reads and writes labels: NIfTI volumes and pictures whose values stand for classes.

A label is an array of class indices [X, Y, Z] uint8; a picture of height H and width W is
[H, W, 1].

`decode_label` only needs a file that can be decoded, so that `verify` can go on and name everything
that is wrong with it; `read_label` refuses such a file.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from jaxseg.data.images import affine_problems
from jaxseg.data.nifti import is_nifti, load_nifti, write_nifti
from jaxseg.data.pictures import load_picture, opaque_pixels, write_png
from jaxseg.problem import file_problem


def read_label(
    path: str | Path, label_values: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map as class indices.

    Args:
      path: NIfTI (3D, or 4D with a last axis of 1), or a PNG or TIFF picture with one value per
        pixel (grey, equal colours, or a palette, whose indices are the values).
      label_values: Value in the file for each class index; None makes every value above 0 class 1.
    Returns:
      (label, affine): [X, Y, Z] uint8 and [4, 4] float64 in mm.
    Raises:
      FileProblem: The file is missing, damaged, of another kind, has an unusable affine, or holds
        other values.
    """
    values, affine = _decode_placed_label(path)
    return encode_label(path, values, label_values), affine


def read_instances(
    path: str | Path, label_values: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads which object each voxel belongs to.

    With `label_values` None and several values above 0 in the file, they are the objects (an
    instance map). Otherwise an object is what hangs together by faces within one class.

    Args:
      path, label_values: As for `read_label`.
    Returns:
      (instances, affine): [X, Y, Z] int32, 0 in the background, objects numbered from 1 without
      gaps, those of an instance map in the order of its values; and [4, 4] float64 in mm.
    Raises:
      FileProblem: As `read_label`.
    """
    values, affine = _decode_placed_label(path)
    label = encode_label(path, values, label_values)
    instances = np.zeros(label.shape, np.int32)
    if label_values is None:
        found, order = np.unique(values[label > 0], return_inverse=True)
        if found.size > 1:
            instances[label > 0] = order + 1
            return instances, affine
    for index in range(1, label.max(initial=0) + 1):
        objects, _ = ndimage.label(label == index)
        instances += np.where(objects > 0, objects + instances.max(), 0)
    return instances, affine


def decode_label(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The values of a label file as they are stored, and its affine unchecked.

    Args:
      path: As for `read_label`.
    Returns:
      (values, affine): [X, Y, Z] of the file's type (scaling applied), and [4, 4] float64 in mm.
    Raises:
      FileProblem: The file is missing, damaged or of another kind.
    """
    if is_nifti(path):
        values, affine = load_nifti(path)
        if values.ndim == 4 and values.shape[3] != 1:
            raise file_problem(
                path,
                f"a label has one value per voxel, this one has {values.shape[3]}",
                "save it with shape [X, Y, Z]",
            )
        return values.reshape(values.shape[:3]), affine
    picture = load_picture(path)
    if picture.format == "JPEG":
        raise file_problem(path, "JPEG changes label values", "save the original label as PNG")
    if picture.mode == "P":
        return np.asarray(picture)[..., None], np.eye(4)
    values = opaque_pixels(path, picture)
    if (values != values[..., :1]).any():
        raise file_problem(
            path,
            "a label has one value per pixel, this one has colours",
            "save it as a grey picture of class values",
        )
    return values[..., 0], np.eye(4)


def encode_label(
    path: str | Path, values: np.ndarray, label_values: Sequence[int] | None
) -> np.ndarray:
    """Turns the values of a label file into class indices.

    Args:
      path: File that the values come from, for the message.
      values: Any shape, any real dtype.
      label_values: Value for each class index, at most 256; None makes every value above 0 class 1.
    Returns:
      uint8 of the same shape.
    Raises:
      FileProblem: There are values that stand for no class; names them and counts their voxels.
    """
    if label_values is None:
        label = (values > 0).astype(np.uint8)
        unknown = ~np.isfinite(values)
    else:
        label = np.zeros_like(values, np.uint8)  # in the file's order of axes: much faster
        unknown = np.ones_like(values, bool)
        for index, value in enumerate(label_values):
            of_class = values == value
            label[of_class] = index
            unknown &= ~of_class
    if unknown.any():
        found, counts = np.unique(values[unknown], return_counts=True)
        listing = ", ".join(
            f"{value:.10g} ({count} voxels)"
            for value, count in zip(found[:10].tolist(), counts[:10].tolist(), strict=True)
        )
        more = f" and {found.size - 10} more values" if found.size > 10 else ""
        allowed = "finite values" if label_values is None else f"only {list(label_values)}"
        raise file_problem(
            path,
            f"unknown label values {listing}{more}, where the classes have {allowed}",
            "correct these voxels or the dataset's label values",
        )
    return label


def write_label(
    path: str | Path,
    label: np.ndarray,
    affine: np.ndarray,
    label_values: Sequence[int] | None,
    like: str | Path | None = None,
) -> None:
    """Writes class indices as a label file; a reader sees the old file or the new one, never half.

    The type is the smallest unsigned integer that holds the values. NIfTI is written with no
    scaling and, without `like`, in mm with the affine as sform; PNG is grey and has no affine.
    Equal arguments make equal bytes.

    Args:
      path: *.nii, *.nii.gz or *.png in an existing folder; replaced if it is there.
      label: Class indices, [X, Y, Z], integer; for PNG [H, W, 1].
      affine: Voxel to world (mm), [4, 4].
      label_values: Value to write for each class index; None writes the index.
      like: NIfTI file on the same grid, usually the source image, whose units, sform, qform and
        their codes are copied bit for bit; None or a picture for none.
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
    if is_nifti(path):
        write_nifti(path, values, affine, like)
    elif os.fspath(path).lower().endswith(".png"):
        write_png(path, values)
    else:
        raise ValueError(f"{path}: a label is written as .nii, .nii.gz or .png")


def _decode_placed_label(path):
    """`decode_label` of a file whose affine can be used."""
    values, affine = decode_label(path)
    problems = affine_problems(path, affine)
    if problems:
        raise problems[0]
    return values, affine
