"""FreeSurfer's MGH and MGZ files, through nibabel."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import DATA_OFFSET, MGHHeader, MGHImage

from jaxseg.data.formats.files import (
    COPY_AGAIN,
    STREAM_ERRORS,
    check_length,
    cut_short,
    naming_damage,
    opened,
    replaced,
)
from jaxseg.data.formats.nifti import quiet_nibabel
from jaxseg.data.formats.volume import Header, Remark, Volume
from jaxseg.problem import file_problem

_HAS_PLACE = 28  # where the header says whether it says a place
_NO_PLACE = Remark(
    "the header says neither place nor spacing, 1 mm is taken, as FreeSurfer does",
    "its goodRASFlag is 0",
)


def read_header(path: str | Path, spacing_from: str) -> Header:
    """What an MGH file says of its values.

    Raises:
      FileProblem: The file is missing, damaged or of another kind.
    """
    with _opened_image(path) as (stream, image):
        return _header_of(stream, image)


def read(path: str | Path, dtype: Any, spacing_from: str) -> Volume:
    """The values, frames last, of `dtype` or the file's own; raises as `read_header`."""
    with _opened_image(path) as (stream, image):
        header, num_expected = _header_of(stream, image), _num_bytes(image.header)
        stream.seek(DATA_OFFSET)
        content = stream.read(num_expected - DATA_OFFSET)
        if stream.tell() < num_expected:
            raise cut_short(path, stream, num_expected)
        stream.seek(0, io.SEEK_END)  # where a gzip file has its check sum
        values = np.frombuffer(content, header.dtype).reshape(header.shape, order="F")
        return Volume(values.astype(dtype or header.dtype), header.affine, header.remarks)


def write(
    path: str | Path, values: np.ndarray, affine: np.ndarray, like: str | Path | None
) -> None:
    """Writes [X, Y, Z] or [X, Y, Z, K], in the place of `like` to the bit.

    MGH has no unsigned type of 16 bits: such values are written with 32.

    Raises:
      OSError: The file can not be written.
    """
    if values.dtype not in (np.uint8, np.float32):
        values = values.astype(np.int32)
    if like is None:
        image = MGHImage(values, affine)
    else:
        with _opened_image(like) as (_, source):
            header = source.header.copy()
        header.set_data_dtype(values.dtype)
        image = MGHImage(values, None, header)
    with replaced(path) as file:
        image.to_stream(file)


def _header_of(stream, image):
    shape = image.shape[:3] if image.shape[3:] == (1,) else image.shape
    stream.seek(_HAS_PLACE)  # of which nibabel says nothing any more
    unsaid = not int.from_bytes(stream.read(2), "big")
    remarks = (_NO_PLACE,) if unsaid else ()
    return Header(shape, image.get_data_dtype(), np.asarray(image.affine, np.float64), remarks)


@contextlib.contextmanager
def _opened_image(path: str | Path) -> Iterator[Any]:
    """Yields the bytes of a file and nibabel's image of them."""
    with opened(path) as stream:
        head = stream.read(DATA_OFFSET)
        if not head:
            raise file_problem(path, "the file is empty", COPY_AGAIN)
        if len(head) < DATA_OFFSET:
            raise cut_short(path, stream, DATA_OFFSET)
        reading = naming_damage(path, "MGH", *STREAM_ERRORS)
        with reading, quiet_nibabel(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            check_length(path, stream, _num_bytes(MGHHeader(head)))
            stream.seek(0)
            yield stream, MGHImage.from_stream(stream)


def _num_bytes(header):
    """How long the file of a header is, without what may follow the voxels."""
    size = math.prod(map(int, header.get_data_shape()))
    return DATA_OFFSET + size * header.get_data_dtype().itemsize
