"""MetaImage files (.mha, .mhd), through SimpleITK."""

import contextlib
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.data.formats.extra import needing_extra
from jaxseg.data.formats.files import COPY_AGAIN, naming_damage, opened, refuse_missing
from jaxseg.data.formats.volume import Header, Volume
from jaxseg.problem import file_problem
from jaxseg.run.writers import replacing

_DATA_FILE = re.compile(rb"^ElementDataFile\s*[=:]\s*(.+?)\s*$", re.MULTILINE)
_PACKED = re.compile(rb"^CompressedData\s*[=:]\s*[Tt1]", re.MULTILINE)
# Names with a number, its first, last and step.
_SLICES = re.compile(r"([^%\s]*%\d*d[^%\s]*)\s+(\d+)\s+(\d+)(?:\s+([1-9]\d*))?")
_MAX_HEADER = 1 << 20
_BYTES_AT_ONCE = 1 << 16
_TO_RAS = np.array([-1.0, -1.0, 1.0])  # ITK's world has its axes to the left and to the back


def files_beside(path: str | Path) -> list[str]:
    """The files of the voxels, where the header is not in theirs; raises OSError."""
    with open(path, "rb") as file:
        header = file.read(_MAX_HEADER)
    found = _DATA_FILE.search(header)
    value = os.fsdecode(found[1]) if found else "LOCAL"
    if value.upper() == "LOCAL":
        return []
    names = [value]
    if found and value.upper().startswith("LIST"):
        names = os.fsdecode(header[found.end() :]).split()
    elif slices := _SLICES.fullmatch(value):
        first, last, step = (int(number or 1) for number in slices.groups()[1:])
        names = [slices[1] % number for number in range(first, last + 1, step)]
    return [os.path.join(os.path.dirname(path), name) for name in names]


def read_header(path: str | Path, spacing_from: str) -> Header:
    """What a MetaImage file says of its values.

    Raises:
      FileProblem: The file is missing, damaged, of another kind, or SimpleITK is not installed.
    """
    with _reading(path) as (_, header):
        return header


def read(path: str | Path, dtype: Any, spacing_from: str) -> Volume:
    """The values, channels last, of `dtype` or the file's own; raises as `read_header`."""
    with _reading(path) as (values_of, header):
        values = values_of()
        has_channels = len(header.shape) > 3
        spatial = values.ndim - has_channels
        values = values.transpose(*reversed(range(spatial)), *range(spatial, values.ndim))
        values = values.reshape(header.shape)
        return Volume(values if dtype is None else values.astype(dtype), header.affine)


def write(
    path: str | Path, values: np.ndarray, affine: np.ndarray, like: str | Path | None
) -> None:
    """Writes [X, Y, Z] or, as components, [X, Y, Z, K], in the place of `like` to the bit.

    Raises:
      FileProblem: SimpleITK is not installed.
      OSError: The file can not be written.
    """
    with needing_extra(path):
        import SimpleITK as sitk
    axes = (2, 1, 0, *range(3, values.ndim))
    image = sitk.GetImageFromArray(
        np.ascontiguousarray(values.transpose(axes)), isVector=values.ndim > 3
    )
    if like is None:
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((_TO_RAS[:, None] * affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin((_TO_RAS * affine[:3, 3]).tolist())
    else:
        reader = sitk.ImageFileReader()
        reader.SetFileName(os.fspath(like))
        reader.ReadImageInformation()
        if reader.GetDimension() == 2:
            image = image[:, :, 0]
        image.SetSpacing(reader.GetSpacing())
        image.SetDirection(reader.GetDirection())
        image.SetOrigin(reader.GetOrigin())
    with replacing(path) as temporary:
        try:
            sitk.WriteImage(image, temporary, useCompression=True)
        except RuntimeError as error:
            raise OSError(f"{path}: can not be written ({_last_line(error)})") from error


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[tuple[Callable[[], np.ndarray], Header]]:
    """Yields a function that reads the values, as ITK orders them, and the Header."""
    with needing_extra(path):
        import SimpleITK as sitk
    with opened(path) as stream:
        head = stream.read(_MAX_HEADER)
    if not head:
        raise file_problem(path, "the file is empty", COPY_AGAIN)
    data_line = _DATA_FILE.search(head)
    if data_line is None:
        wrong = "not a MetaImage file or cut short, its header has no ElementDataFile"
        raise file_problem(path, wrong, COPY_AGAIN)
    others = files_beside(path)
    refuse_missing(path, others)
    with naming_damage(path, "MetaImage", said=_last_line):
        reader = sitk.ImageFileReader()
        reader.SetFileName(os.fspath(path))
        reader.SetImageIO("MetaImageIO")
        reader.ReadImageInformation()
        shape = reader.GetSize()
        if len(shape) not in (2, 3):
            wrong = f"{len(shape)} axes, shape {list(shape)}"
            raise file_problem(path, wrong, "save it with three axes and channels as components")
        channels = reader.GetNumberOfComponents()
        plain = sitk.GetArrayFromImage(sitk.Image([1] * len(shape), reader.GetPixelID())).dtype
        header = Header(
            (*shape, 1)[:3] + ((channels,) if channels > 1 else ()),
            plain,
            _affine(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin()),
        )

        def values_of():
            if _PACKED.search(head[: data_line.start()]):
                start = 0 if others else head.index(b"\n", data_line.start(1)) + 1
                for packed in others or [os.fspath(path)]:
                    _check_packed(packed, start)
            return sitk.GetArrayFromImage(reader.Execute())

        yield values_of, header


def _check_packed(path, start):
    """Refuses packed voxels that are damaged, of which ITK makes other voxels without an error."""
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # with the mark of zlib or of gzip
    with open(path, "rb") as file:
        file.seek(start)
        while not unpack.eof and (content := file.read(_BYTES_AT_ONCE)):
            unpack.decompress(content)
    if not unpack.eof:
        raise file_problem(path, "cut short, its packed voxels have no end", COPY_AGAIN)


def _affine(direction, spacing, origin):
    dimension = len(spacing)
    affine = np.eye(4)
    affine[:dimension, :dimension] = np.reshape(direction, (dimension, dimension)) * spacing
    affine[:dimension, 3] = origin
    affine[:3] *= _TO_RAS[:, None]
    return affine


def _last_line(error):
    """What ITK says, without the addresses in its memory."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[-1].rpartition(": ")[2]
    return "its data is cut short" if said == "Success" else said  # of the call before the failure
