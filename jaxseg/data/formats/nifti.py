"""NIfTI files: volumes as they are stored, and written into the place of another volume."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import DTypeLike

from jaxseg import geometry
from jaxseg.data.formats.files import (
    COPY_AGAIN,
    STREAM_ERRORS,
    check_length,
    cut_short,
    naming_damage,
    opened,
    replaced,
)
from jaxseg.data.formats.placement import SPACING_FROM, place
from jaxseg.data.formats.volume import Header, Remark, Volume
from jaxseg.problem import file_problem

# NIfTI is read so many voxels at a time: no second copy of a volume is ever held.
_VOXELS_AT_ONCE = 1 << 22
_PLACEMENT_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)


def read_header(path: str | Path, spacing_from: str) -> Header:
    """What a NIfTI file says of its values.

    Raises:
      FileProblem: The file is missing, damaged, of another kind, or holds no real numbers.
    """
    with _opened_image(path) as (_, image, raw):
        return _header_of(path, image, raw, spacing_from)


def read(path: str | Path, dtype: DTypeLike | None, spacing_from: str) -> Volume:
    """Scaled values of `dtype`, None for what the file holds; too large ones become infinite.

    Raises:
      FileProblem: As `read_header`, also if values are missing.
    """
    with _opened_image(path) as (stream, image, raw):
        header = _header_of(path, image, raw, spacing_from)
        values = _read_voxels(path, stream, image, dtype)
        return Volume(values.reshape(header.shape, order="F"), header.affine, header.remarks)


@contextlib.contextmanager
def _opened_image(path):
    """Yields the bytes of a file, nibabel's image of them, and the header as it was before."""
    with opened(path) as stream:
        mark = stream.read(348)
        if not mark:
            raise file_problem(path, "the file is empty", COPY_AGAIN)
        if mark[344:347] == b"n+1":
            image_class = nibabel.Nifti1Image
        elif mark[4:7] == b"n+2":
            image_class = nibabel.Nifti2Image
        else:
            raise file_problem(path, "not a NIfTI file, its header has no NIfTI mark", COPY_AGAIN)
        stream.seek(0)
        with naming_damage(path, "NIfTI", *STREAM_ERRORS):
            raw = image_class.header_class.from_fileobj(stream, check=False)
            stream.seek(0)
            with quiet_nibabel():
                image = image_class.from_stream(stream)
            check_length(path, stream, _num_bytes(image))
            yield stream, image, raw


@contextlib.contextmanager
def quiet_nibabel() -> Iterator[None]:
    """Keeps back what nibabel says of headers, which names no file; what matters is said by us."""
    logger = nibabel.imageglobals.logger
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _header_of(path, image, raw, spacing_from):
    dtype, shape = image.get_data_dtype(), _plain_shape(image.shape)
    if dtype.fields or dtype.kind not in "iufb":
        raise file_problem(
            path,
            f"voxels are {'colours' if dtype.fields else dtype.name}, not real numbers",
            "save it with an integer or float type, colours as a fourth axis",
        )
    if len(shape) not in (3, 4):
        raise file_problem(
            path,
            f"{len(shape)} axes, shape {list(shape)}, where 3 or 4 are expected",
            "save it as [X, Y, Z] or [X, Y, Z, C]",
        )
    affine, remarks = _placement(image, raw, spacing_from)
    return Header(shape, dtype, affine, remarks)


def _plain_shape(shape):
    """(X, Y, Z) or (X, Y, Z, C), without axes of one at the end, or in place of time.

    NIfTI keeps the components of a vector on its fifth axis.
    """
    shape = tuple(shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    return (*shape, 1) if len(shape) == 2 else shape


def _placement(image, raw, spacing_from):
    header = image.header
    sform, sform_code = header.get_sform(coded=True)
    qform_code = int(header["qform_code"])
    affine, remarks = place(
        sform=sform,  # None where the code is 0
        qform=_qform(header) if qform_code > 0 else None,
        same_code=sform_code == qform_code,
        pixdim=np.abs(raw["pixdim"][1:4]),
        unit=int(header["xyzt_units"]) & 7,
        default=header.get_base_affine(),
        shape=(*image.shape, 1, 1)[:3],
        spacing_from=spacing_from,
    )
    dropped = [name for name in ("sform_code", "qform_code") if raw[name] != header[name]]
    if dropped:
        detail = ", ".join(f"{name} {raw[name]}" for name in dropped)
        kind = "a code that NIfTI does not know, what it stands beside is not taken, as ITK does"
        remarks = (Remark(kind, detail), *remarks)
    return affine, remarks


def _qform(header):
    """The qform, of NaN where its quaternion is none."""
    try:
        return header.get_qform()
    except (HeaderDataError, ValueError):
        return np.full((4, 4), np.nan)


def write(
    path: str | Path, values: np.ndarray, affine: np.ndarray, like: str | Path | None
) -> None:
    """Writes a volume of `values` [X, Y, Z] or [X, Y, Z, K], the whole file or none of it.

    Args:
      path: .nii or .nii.gz.
      values: of a dtype that NIfTI knows.
      affine: [4, 4], from voxel index to mm.
      like: the NIfTI file whose header it takes over, if any.
    Raises:
      OSError: the file can not be written.
    """
    image = _nifti_image(path, _in_file_order(values), affine, like)
    with replaced(path) as file:
        image.to_stream(file)


def _in_file_order(values):
    """The same values, the first axis running fastest in memory as it does in the file.

    Plane by plane, both sides of the transposition stay in the cache: ten times as fast as at once.
    """
    if values.flags.f_contiguous:
        return values
    result = np.empty(values.shape, values.dtype, order="F")
    for y in range(values.shape[1]):
        result[:, y] = np.asfortranarray(np.ascontiguousarray(values[:, y]))
    return result


def _read_voxels(path, stream, image, dtype):
    """The values of a nibabel image whose file is open as `stream`, in the file's order."""
    stored, scaling = image.get_data_dtype(), (image.dataobj.slope, image.dataobj.inter)
    size = math.prod(image.shape)
    values = np.empty(size, dtype or apply_read_scaling(np.zeros(1, stored), *scaling).dtype)
    stream.seek(image.dataobj.offset)
    for start in range(0, size, _VOXELS_AT_ONCE):
        piece = values[start : start + _VOXELS_AT_ONCE]
        content = stream.read(piece.size * stored.itemsize)
        if len(content) < piece.size * stored.itemsize:
            raise cut_short(path, stream, _num_bytes(image))
        with np.errstate(over="ignore"):
            piece[:] = apply_read_scaling(np.frombuffer(content, stored), *scaling)
    stream.seek(0, io.SEEK_END)  # where a gzip file has its check sum
    return values


def _num_bytes(image):
    """How long the file of a nibabel image is."""
    return image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize


def _nifti_image(path, values, affine, like):
    if like is None:
        image = nibabel.Nifti1Image(values, affine, dtype=values.dtype)
        image.header.set_xyzt_units("mm")
        return image
    with _opened_image(like) as (_, source, raw):
        places = [_placement(source, raw, spacing_from)[0] for spacing_from in SPACING_FROM]
    if _plain_shape(source.shape)[:3] != values.shape[:3] or all(
        geometry.grid_difference(place, affine, values.shape) > geometry.SAME_GRID_VOXELS
        for place in places
    ):
        raise ValueError(
            f"{path}: the volume (shape {list(values.shape)}, affine "
            f"{np.asarray(affine).tolist()}) is not on the grid of {like} (shape "
            f"{list(source.shape[:3])}, affine {places[0].tolist()})"
        )
    if len(source.shape) == 2 and values.ndim == 3:
        values = values[:, :, 0]
    image = type(source)(values, None, dtype=values.dtype)  # not the affine, which may be unusable
    for field in _PLACEMENT_FIELDS:
        image.header[field] = source.header[field]
    return image
