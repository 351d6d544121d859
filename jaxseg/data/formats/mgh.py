"""FreeSurfer's MGH and MGZ files, through nibabel."""

import contextlib
import gzip
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import MGHImage

from jaxseg.data.formats.files import COPY_AGAIN, naming_damage, opened, replaced
from jaxseg.data.formats.volume import Header, Volume
from jaxseg.problem import file_problem


def read_header(path: str | Path, spacing_from: str) -> Header:
    """What an MGH file says of its values.

    Raises:
      FileProblem: The file is missing, damaged or of another kind.
    """
    with _opened_image(path) as image:
        return _header_of(image)


def read(path: str | Path, dtype: Any, spacing_from: str) -> Volume:
    """The values, frames last, of `dtype` or the file's own; raises as `read_header`."""
    with _opened_image(path) as image:
        header = _header_of(image)
        values = np.asarray(image.dataobj).reshape(header.shape)
        return Volume(values if dtype is None else values.astype(dtype), header.affine)


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
        with _opened_image(like) as source:
            header = source.header.copy()
        header.set_data_dtype(values.dtype)
        image = MGHImage(values, None, header)
    with replaced(path) as file:
        image.to_stream(file)


def _header_of(image):
    shape = image.shape[:3] if image.shape[3:] == (1,) else image.shape
    return Header(shape, image.get_data_dtype(), np.asarray(image.affine, np.float64))


@contextlib.contextmanager
def _opened_image(path: str | Path) -> Iterator[Any]:
    with opened(path) as stream:
        if not stream.read(1):
            raise file_problem(path, "the file is empty", COPY_AGAIN)
        stream.seek(0)
        passed = gzip.BadGzipFile, EOFError
        with naming_damage(path, "MGH", *passed, said=_said), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            yield MGHImage.from_stream(stream)


def _said(error):
    """What nibabel says; of a file that ends too early, that."""
    return "it is cut short" if isinstance(error, OSError) else str(error)
