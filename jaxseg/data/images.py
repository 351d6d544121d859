"""Reads images and writes maps: NIfTI volumes, and PNG, JPEG and TIFF pictures.

Every image is a volume [X, Y, Z, C] with an affine (voxel to world, mm); a picture of height H and
width W is [H, W, 1, C] with the identity.

`decode_image` only needs a file that can be decoded, so that `verify` can go on and name everything
that is wrong with it; `read_image` refuses such a file.
"""

import os
from pathlib import Path

import numpy as np

from jaxseg import geometry
from jaxseg.data.files import COPY_AGAIN
from jaxseg.data.nifti import is_nifti, load_nifti, write_nifti
from jaxseg.data.pictures import load_picture, opaque_pixels, write_tiff
from jaxseg.problem import FileProblem, file_problem


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image whose every voxel and whose place in the world can be used.

    Args:
      path: NIfTI (3D: one channel; 4D: channels last), or a PNG, JPEG or TIFF picture (grey at its
        full range, palette or RGB, or any of these with alpha 255 throughout).
    Returns:
      (image, affine): [X, Y, Z, C] float32 with the file's scaling applied, and [4, 4] float64 in
      mm. Rows of a picture run along X and columns along Y.
    Raises:
      FileProblem: The file is missing, damaged, of another kind, has no voxels, has NaN or
        infinite values, or an unusable affine.
    """
    image, affine = decode_image(path)
    problems = image_problems(path, image) + affine_problems(path, affine)
    if problems:
        raise problems[0]
    return image, affine


def decode_image(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """`read_image` without its checks of values and affine.

    Raises:
      FileProblem: The file is missing, damaged or of another kind.
    """
    if not is_nifti(path):
        picture = load_picture(path)
        if picture.mode in ("P", "PA"):
            has_alpha = picture.mode == "PA" or "transparency" in picture.info
            picture = picture.convert("RGBA" if has_alpha else "RGB")
        return opaque_pixels(path, picture).astype(np.float32), np.eye(4)
    image, affine = load_nifti(path, np.float32)
    return (image if image.ndim == 4 else image[..., None]), affine


def image_problems(path: str | Path, image: np.ndarray) -> list[FileProblem]:
    """What makes the values of a decoded image unusable.

    Args:
      path: File that the image comes from, for the message.
      image: [X, Y, Z, C] float32.
    Returns:
      List of FileProblem: no voxels, NaN or infinite values (beyond float32 counts as infinite).
    """
    if image.size == 0:
        wrong = f"the image has no voxels, its shape is {list(image.shape)}"
        return [file_problem(path, wrong, COPY_AGAIN)]
    with np.errstate(invalid="ignore"):  # of infinities
        total = image.sum(dtype=np.float64)  # unlike isnan, needs no memory of the image's size
    if np.isfinite(total):
        return []
    num_nan = np.count_nonzero(np.isnan(image))
    num_inf = np.count_nonzero(np.isinf(image))
    wrong = f"{num_nan} NaN and {num_inf} infinite values among {image.size}"
    return [file_problem(path, wrong, "replace them, for example with the air value")]


def affine_problems(path: str | Path, affine: np.ndarray) -> list[FileProblem]:
    """What makes a decoded affine unusable: a list of at most one FileProblem."""
    try:
        geometry.check_affine(affine)
    except ValueError as error:
        return [
            file_problem(path, str(error), "set the header's sform from the scanner's geometry")
        ]
    return []


def write_map(
    path: str | Path, values: np.ndarray, affine: np.ndarray, like: str | Path | None = None
) -> None:
    """Writes real numbers, for example probabilities, as float32, as `write_label` does a label.

    Args:
      path: *.nii, *.nii.gz, *.tif or *.tiff in an existing folder; replaced if it is there. TIFF
        has no affine, and a page per class.
      values: [X, Y, Z] or [X, Y, Z, K], real; for TIFF [H, W, 1] or [H, W, 1, K].
      affine: Voxel to world (mm), [4, 4].
      like: As for `write_label`.
    Raises:
      ValueError: Another suffix, values that the format cannot hold, or a grid that is not the one
        of `like`.
      OSError: The file cannot be written.
    """
    values = np.asarray(values, np.float32)
    if is_nifti(path):
        write_nifti(path, values, affine, like)
    elif os.fspath(path).lower().endswith((".tif", ".tiff")):
        write_tiff(path, values)
    else:
        raise ValueError(f"{path}: a map is written as .nii, .nii.gz, .tif or .tiff")
