"""Which format a file has, by its name, and what predictions of it are written in."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.data.formats import metaimage, mgh, nifti, nrrd, tiff_volume
from jaxseg.data.formats.volume import Header, Volume

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# For messages.
KINDS = "NIfTI, MGH, NRRD, MetaImage, or a picture (.png, .jpg, .jpeg, .bmp, .tif, .tiff)"

Read = Callable[[str | Path, Any, str], Volume]
ReadHeader = Callable[[str | Path, str], Header]
Write = Callable[[str | Path, np.ndarray, np.ndarray, str | Path | None], None]
FilesBeside = Callable[[str | Path], list[str]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of volumes.

    Attributes:
      suffixes: that its files have.
      read: function (path, dtype or None, spacing_from) -> Volume.
      read_header: function (path, spacing_from) -> Header; reads no values.
      write: function (path, values, affine, like).
      files_beside: function (path) -> further files that hold voxels or spacing of a file, there or
        not; raises OSError.
    """

    suffixes: tuple[str, ...]
    read: Read
    read_header: ReadHeader
    write: Write
    files_beside: FilesBeside = lambda path: []


_VOLUMES = (
    Format((".nii.gz", ".nii"), nifti.read, nifti.read_header, nifti.write),
    Format((".mgz", ".mgh"), mgh.read, mgh.read_header, mgh.write),
    Format((".nrrd", ".nhdr"), nrrd.read, nrrd.read_header, nrrd.write, nrrd.files_beside),
    Format(
        (".mha", ".mhd"),
        metaimage.read,
        metaimage.read_header,
        metaimage.write,
        metaimage.files_beside,
    ),
)
_TIFF_VOLUME = Format(
    (".tif", ".tiff"),
    tiff_volume.read,
    tiff_volume.read_header,
    tiff_volume.write,
    tiff_volume.files_beside,
)


def format_of(path: str | Path) -> Format | None:
    """The Format of a volume; None for a picture or what no format is known of."""
    name = os.fspath(path).lower()
    for candidate in _VOLUMES:
        if name.endswith(candidate.suffixes):
            return candidate
    is_stack = name.endswith(_TIFF_VOLUME.suffixes) and tiff_volume.spacing_file(path) is not None
    return _TIFF_VOLUME if is_stack else None


def is_volume(path: str | Path) -> bool:
    """Whether a file is a volume, which has a place in the world, rather than a picture."""
    return format_of(path) is not None


def is_image(path: str | Path) -> bool:
    """Whether the name is that of a volume or a picture that can be read."""
    return is_volume(path) or os.fspath(path).lower().endswith(PICTURE_SUFFIXES)


def files_of(path: str | Path) -> list[str]:
    """All files that an image consists of, the one that names it first.

    The others hold the voxels of a header, or the spacing of a stack; they may be missing. Of a
    file that can not be read, none is known.
    """
    path, found = os.fspath(path), format_of(path)
    try:
        return [path, *(found.files_beside(path) if found else [])]
    except OSError:
        return [path]


def files_written(path: str | Path, like: str | Path) -> list[str]:
    """All files that `write_volume`, or a writer of pictures, makes of `path` for an image."""
    path = os.fspath(path)
    if format_of(like) is _TIFF_VOLUME:
        return [path, tiff_volume.written_spacing_file(path)]
    return [path]


def stem_of(path: str | Path) -> str:
    """A path without the suffix of its format, or what follows its last dot."""
    path = os.fspath(path)
    if found := format_of(path):
        suffix = next(s for s in found.suffixes if path.lower().endswith(s))
        return path[: -len(suffix)]
    return re.sub(r"\.\w+$", "", path)


def output_suffixes(path: str | Path) -> tuple[str, str]:
    """What a label and a map of an image are named: in its own format, which holds its place."""
    found = format_of(path)
    if found is None:
        return ".png", ".tif"
    suffix = found.suffixes[0]
    return suffix, suffix


def write_volume(
    path: str | Path, values: np.ndarray, affine: np.ndarray, like: str | Path | None
) -> bool:
    """Writes a volume in the format that `path` is named by; False if that is none of volumes.

    Args:
      path: in an existing folder; replaced if it is there.
      values: [X, Y, Z] or [X, Y, Z, K].
      affine: voxel to world (mm), [4, 4].
      like: a file on the same grid, whose place is copied to the bit if it is of this format.
    Raises:
      FileProblem: a reader that the format needs is not installed.
      ValueError: the grid is not the one of `like`.
      OSError: the file can not be written.
    """
    source = None if like is None else format_of(like)
    found = next((f for f in _VOLUMES if os.fspath(path).lower().endswith(f.suffixes)), None)
    if found is None and source is _TIFF_VOLUME:
        found = source
    if found is None:
        return False
    found.write(path, values, affine, like if source is found else None)
    return True
