"""Reads images and writes maps: volumes and pictures of every format.

Every image is a volume [X, Y, Z, C] with an affine (voxel to world, mm); a picture of height H and
width W is [H, W, 1, C] with the identity. Channels may lie in files of their own.

`decode_image` only needs files that can be decoded, so that `verify` can go on and name everything
that is wrong with them; `read_image` refuses such files.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxseg import geometry
from jaxseg.data import memory
from jaxseg.data.formats import registry
from jaxseg.data.formats.files import COPY_AGAIN
from jaxseg.data.formats.pictures import (
    has_grey_palette,
    load_picture,
    opaque_pixels,
    size_of,
    write_tiff,
)
from jaxseg.data.formats.volume import Header, Remark, Volume
from jaxseg.problem import FileProblem, file_problem

# No way of packing makes bytes fewer by more than about this factor.
_MOST_PACKED = 100_000

Paths = str | Path | Sequence[str]


def read_image(paths: Paths, spacing_from: str = "pixdim") -> tuple[np.ndarray, np.ndarray]:
    """Reads an image whose every voxel and whose place in the world can be used.

    Args:
      paths: A volume (3D: one channel; 4D: channels last), or a picture (grey at its full range,
        palette or RGB, or any of these with alpha 255 throughout), or a file for each channel.
      spacing_from: of `formats.placement.place`.
    Returns:
      (image, affine): [X, Y, Z, C] float32 with the file's scaling applied, and [4, 4] float64 in
      mm. Rows of a picture run along X and columns along Y.
    Raises:
      FileProblem: A file is missing, damaged, of another kind, has no voxels, has NaN or
        infinite values, an unusable affine, or another grid than the file of the first channel.
    """
    volume = read_volume(paths, spacing_from)
    return volume.values, volume.affine


def read_volume(paths: Paths, spacing_from: str = "pixdim") -> Volume:
    """`read_image` with what is to be said about the files."""
    decoded = decode_image(paths, spacing_from)
    path = files_of(paths)[0]
    problems = image_problems(path, decoded.values) + affine_problems(path, decoded.affine)
    if problems:
        raise problems[0]
    return decoded


def files_of(paths: Paths) -> tuple[str, ...]:
    """The files of an image, one or a file for each channel."""
    return (os.fspath(paths),) if isinstance(paths, str | Path) else tuple(paths)


def decode_image(paths: Paths, spacing_from: str = "pixdim") -> Volume:
    """`read_image` without its checks of values and affine.

    Raises:
      FileProblem: A file is missing, damaged, of another kind, or on another grid than the first.
    """
    volumes = [_decode_file(path, spacing_from) for path in files_of(paths)]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    remarks: list[Remark] = []
    for path, volume in zip(files_of(paths)[1:], volumes[1:], strict=True):
        remarks += grid_remarks(path, volume, files_of(paths)[0], first)
    values = np.concatenate([volume.values for volume in volumes], axis=-1)
    return Volume(values, first.affine, (*first.remarks, *remarks))


def describe_image(path: str | Path, spacing_from: str = "pixdim") -> Header:
    """What a file says of its values, channels included, without reading them; raises alike."""
    found = registry.format_of(path)
    if found is None:
        height, width, channels = size_of(path)
        return Header((height, width, 1, channels), np.dtype(np.uint8), np.eye(4))
    header = found.read_header(path, spacing_from)
    held = sum(map(os.path.getsize, registry.files_of(path)))
    said = math.prod(header.shape) * header.dtype.itemsize
    if said > held * _MOST_PACKED:  # before memory is asked for
        wrong = f"its header says {said} bytes of voxels, {held} bytes are there"
        raise file_problem(path, wrong, COPY_AGAIN)
    return header


def bytes_to_read(paths: Paths, spacing_from: str = "pixdim") -> int:
    """Memory that an image or label takes while it is read, by its headers; raises alike."""
    shapes = [describe_image(path, spacing_from).shape for path in files_of(paths)]
    return max(memory.bytes_to_prepare(shape, (0,), len(shapes)) for shape in shapes)


def grid_remarks(
    path: str | Path, volume: Volume, other_path: str | Path, other: Volume
) -> list[Remark]:
    """What to say of two files that are on one grid, or nearly.

    Raises:
      FileProblem: They are not.
    """
    shape, other_shape = volume.values.shape[:3], other.values.shape[:3]
    if shape != other_shape:
        raise file_problem(
            path,
            f"shape {list(shape)}, but {other_path} has {list(other_shape)}",
            "resample it to that grid",
        )
    if affine_problems(path, volume.affine) or affine_problems(other_path, other.affine):
        return []  # which is told of by itself
    apart = geometry.grid_difference(other.affine, volume.affine, shape)
    if apart <= geometry.SAME_GRID_VOXELS:
        return []
    where = f"its affine differs from that of {other_path} by up to {apart:.3g} voxels"
    if apart > geometry.NEARLY_SAME_GRID_VOXELS:
        raise file_problem(
            path,
            f"{where} ({_compact(volume.affine)}, there {_compact(other.affine)})",
            "copy that affine if the voxels match, else resample it to that grid",
        )
    kind = "the affine differs from that of its image by less than half a voxel, the image's counts"
    return [Remark(kind, where)]


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
      path: named as a format of volumes, or *.tif, in an existing folder; replaced if it is there.
        A TIFF picture has no affine, and a page per class.
      values: [X, Y, Z] or [X, Y, Z, K], real; for a TIFF picture [H, W, 1] or [H, W, 1, K].
      affine: Voxel to world (mm), [4, 4].
      like: As for `write_label`.
    Raises:
      ValueError: Another suffix, values that the format cannot hold, or a grid that is not the one
        of `like`.
      OSError: The file cannot be written.
    """
    values = np.asarray(values, np.float32)
    if registry.write_volume(path, values, affine, like):
        return
    if not os.fspath(path).lower().endswith((".tif", ".tiff")):
        raise ValueError(f"{path}: a map is written as a volume or as .tif")
    write_tiff(path, values)


def _decode_file(path, spacing_from):
    found = registry.format_of(path)
    if found is not None:
        volume = found.read(path, np.float32, spacing_from)
        values = volume.values if volume.values.ndim == 4 else volume.values[..., None]
        return Volume(values, volume.affine, volume.remarks)
    picture = load_picture(path)
    if picture.image.mode in ("P", "PA"):
        has_alpha = picture.image.mode == "PA" or "transparency" in picture.image.info
        mode = "L" if has_grey_palette(picture.image) else "RGB"
        shown = picture.image.convert("RGBA" if has_alpha else "RGB")
        if mode == "L":
            shown = shown.convert("LA" if has_alpha else "L")
        picture = type(picture)(shown, picture.format)
    return Volume(opaque_pixels(path, picture).astype(np.float32), np.eye(4))


def _compact(affine):
    return np.round(affine[:3], 4).tolist()
