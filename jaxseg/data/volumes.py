"""Reads and writes images and labels: NIfTI volumes, and PNG, JPEG and TIFF pictures.

Every image is a volume [X, Y, Z, C] with an affine (voxel to world, mm); a picture of height H and
width W is [H, W, 1, C] with the identity. Labels are class indices [X, Y, Z] uint8.

`decode_image` and `decode_label` only need a file that can be decoded, so that `verify` can go on
and name everything that is wrong with it; `read_image` and `read_label` refuse such a file.
"""

import contextlib
import gzip
import io
import math
import os
import zlib

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError
from PIL import Image
from scipy import ndimage

from jaxseg import geometry
from jaxseg.writers import replacing

# Largest difference of any entry between the affines of files on one grid.
AFFINE_TOLERANCE_MM = 1e-3

# NIfTI is read so many voxels at a time: no second copy of a volume is ever held.
_VOXELS_AT_ONCE = 1 << 22
_MOST_BYTES_PER_GZIP_BYTE = 1032  # what deflate can reach
_COPY_AGAIN = "copy it again from the source"
_NIFTI_ERRORS = (
    ImageFileError,
    HeaderDataError,
    HeaderTypeError,
    WrapStructError,
    ValueError,
    OverflowError,
)
_PICTURE_FORMATS = ("PNG", "JPEG", "TIFF")
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_PLACEMENT_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)


class FileProblem(ValueError):
    """One file cannot be used; the message names it, says what is wrong and how to mend it."""


def is_nifti(path):
    """Whether the file name ends in .nii or .nii.gz."""
    return os.fspath(path).lower().endswith((".nii", ".nii.gz"))


def read_image(path):
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


def read_label(path, label_values):
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


def read_instances(path, label_values):
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


def decode_image(path):
    """`read_image` without its checks of values and affine.

    Raises:
      FileProblem: The file is missing, damaged or of another kind.
    """
    if not is_nifti(path):
        picture = _load_picture(path)
        if picture.mode in ("P", "PA"):
            has_alpha = picture.mode == "PA" or "transparency" in picture.info
            picture = picture.convert("RGBA" if has_alpha else "RGB")
        return _opaque_pixels(path, picture).astype(np.float32), np.eye(4)
    image, affine = _load_nifti(path, np.float32)
    return (image if image.ndim == 4 else image[..., None]), affine


def decode_label(path):
    """The values of a label file as they are stored, and its affine unchecked.

    Args:
      path: As for `read_label`.
    Returns:
      (values, affine): [X, Y, Z] of the file's type (scaling applied), and [4, 4] float64 in mm.
    Raises:
      FileProblem: The file is missing, damaged or of another kind.
    """
    if is_nifti(path):
        values, affine = _load_nifti(path)
        if values.ndim == 4 and values.shape[3] != 1:
            raise _problem(
                path,
                f"a label has one value per voxel, this one has {values.shape[3]}",
                "save it with shape [X, Y, Z]",
            )
        return values.reshape(values.shape[:3]), affine
    picture = _load_picture(path)
    if picture.format == "JPEG":
        raise _problem(path, "JPEG changes label values", "save the original label as PNG")
    if picture.mode == "P":
        return np.asarray(picture)[..., None], np.eye(4)
    values = _opaque_pixels(path, picture)
    if (values != values[..., :1]).any():
        raise _problem(
            path,
            "a label has one value per pixel, this one has colours",
            "save it as a grey picture of class values",
        )
    return values[..., 0], np.eye(4)


def encode_label(path, values, label_values):
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
        raise _problem(
            path,
            f"unknown label values {listing}{more}, where the classes have {allowed}",
            "correct these voxels or the dataset's label values",
        )
    return label


def image_problems(path, image):
    """What makes the values of a decoded image unusable.

    Args:
      path: File that the image comes from, for the message.
      image: [X, Y, Z, C] float32.
    Returns:
      List of FileProblem: no voxels, NaN or infinite values (beyond float32 counts as infinite).
    """
    if image.size == 0:
        wrong = f"the image has no voxels, its shape is {list(image.shape)}"
        return [_problem(path, wrong, _COPY_AGAIN)]
    with np.errstate(invalid="ignore"):  # of infinities
        total = image.sum(dtype=np.float64)  # unlike isnan, needs no memory of the image's size
    if np.isfinite(total):
        return []
    num_nan = np.count_nonzero(np.isnan(image))
    num_inf = np.count_nonzero(np.isinf(image))
    wrong = f"{num_nan} NaN and {num_inf} infinite values among {image.size}"
    return [_problem(path, wrong, "replace them, for example with the air value")]


def affine_problems(path, affine):
    """What makes a decoded affine unusable: a list of at most one FileProblem."""
    try:
        geometry.check_affine(affine)
    except ValueError as error:
        return [_problem(path, str(error), "set the header's sform from the scanner's geometry")]
    return []


def write_label(path, label, affine, label_values, like=None):
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
        _write_nifti(path, values, affine, like)
    elif os.fspath(path).lower().endswith(".png"):
        _write_png(path, values)
    else:
        raise ValueError(f"{path}: a label is written as .nii, .nii.gz or .png")


def write_map(path, values, affine, like=None):
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
        _write_nifti(path, values, affine, like)
    elif os.fspath(path).lower().endswith((".tif", ".tiff")):
        _write_tiff(path, values)
    else:
        raise ValueError(f"{path}: a map is written as .nii, .nii.gz, .tif or .tiff")


def _problem(path, wrong, mend):
    return FileProblem(f"{path}: {wrong}; {mend}")


def _decode_placed_label(path):
    """`decode_label` of a file whose affine can be used."""
    values, affine = decode_label(path)
    problems = affine_problems(path, affine)
    if problems:
        raise problems[0]
    return values, affine


def _load_nifti(path, dtype=None):
    """Scaled values, [X, Y, Z] or [X, Y, Z, C], and affine of a NIfTI file.

    The values are of `dtype`, None for what the file holds; too large ones become infinite.
    """
    with _opened(path) as stream:
        mark = stream.read(348)
        if not mark:
            raise _problem(path, "the file is empty", _COPY_AGAIN)
        if mark[344:347] == b"n+1":
            image_class = nibabel.Nifti1Image
        elif mark[4:7] == b"n+2":
            image_class = nibabel.Nifti2Image
        else:
            raise _problem(path, "not a NIfTI file, its header has no NIfTI mark", _COPY_AGAIN)
        stream.seek(0)
        try:
            image = image_class.from_stream(stream)
            _check_kind(path, image.shape, image.get_data_dtype())
            values = _read_voxels(path, stream, image, dtype)
        except _NIFTI_ERRORS as error:
            if isinstance(error, FileProblem):
                raise
            raise _problem(path, f"not a readable NIfTI file ({error})", _COPY_AGAIN) from error
        return values, np.asarray(image.affine, np.float64)


def _check_kind(path, shape, dtype):
    if dtype.fields or dtype.kind not in "iufb":
        raise _problem(
            path,
            f"voxels are {'colours' if dtype.fields else dtype.name}, not real numbers",
            "save it with an integer or float type, colours as a fourth axis",
        )
    if len(shape) not in (3, 4):
        raise _problem(
            path,
            f"{len(shape)} axes, shape {list(shape)}, where 3 or 4 are expected",
            "save it as [X, Y, Z] or [X, Y, Z, C]",
        )


def _read_voxels(path, stream, image, dtype):
    """The values of a nibabel image whose file is open as `stream`, in the file's order."""
    stored, scaling = image.get_data_dtype(), (image.dataobj.slope, image.dataobj.inter)
    size = math.prod(image.shape)
    num_expected = image.dataobj.offset + size * stored.itemsize
    num_possible = os.path.getsize(path) * (_MOST_BYTES_PER_GZIP_BYTE if _is_packed(path) else 1)
    if num_expected > num_possible:  # before memory is asked for
        raise _cut_short(path, stream, num_expected)
    values = np.empty(size, dtype or apply_read_scaling(np.zeros(1, stored), *scaling).dtype)
    stream.seek(image.dataobj.offset)
    for start in range(0, size, _VOXELS_AT_ONCE):
        piece = values[start : start + _VOXELS_AT_ONCE]
        content = stream.read(piece.size * stored.itemsize)
        if len(content) < piece.size * stored.itemsize:
            raise _cut_short(path, stream, num_expected)
        with np.errstate(over="ignore"):
            piece[:] = apply_read_scaling(np.frombuffer(content, stored), *scaling)
    stream.seek(0, io.SEEK_END)  # where a gzip file has its check sum
    return values.reshape(image.shape, order="F")


def _cut_short(path, stream, num_expected):
    num_held = stream.seek(0, io.SEEK_END)
    return _problem(path, f"cut short, it holds {num_held} of {num_expected} bytes", _COPY_AGAIN)


def _is_packed(path):
    return os.fspath(path).lower().endswith(".gz")


@contextlib.contextmanager
def _opened(path):
    """The bytes of a file, decompressed if its name ends in .gz."""
    try:
        with gzip.open(path) if _is_packed(path) else open(path, "rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise _problem(path, "no such file", "restore it or correct its name") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _problem(path, f"damaged gzip file ({error})", _COPY_AGAIN) from error
    except OSError as error:
        raise _problem(path, f"cannot be read ({error.strerror})", "check the disk") from error


def _load_picture(path):
    """A decoded PIL image of one frame."""
    with _opened(path) as stream:
        content = stream.read()
    if not content:
        raise _problem(path, "the file is empty", _COPY_AGAIN)
    try:
        picture = Image.open(io.BytesIO(content), formats=_PICTURE_FORMATS)
        if picture.format == "TIFF" and picture.n_frames > 1:
            raise _problem(
                path, f"a stack of {picture.n_frames} pictures", "save one picture per file"
            )
        picture.load()
    except Image.DecompressionBombError as error:
        raise _problem(path, f"too large ({error})", "cut it into tiles") from error
    except FileProblem:
        raise
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, zlib.error) as error:
        kinds = ", ".join(_PICTURE_FORMATS)
        raise _problem(path, f"not a readable {kinds} file ({error})", _COPY_AGAIN) from error
    return picture


def _opaque_pixels(path, picture):
    """Grey or colour values of a picture without palette, [H, W, 1, 1 or 3]."""
    pixels = np.asarray(picture)
    if picture.mode in ("LA", "RGBA"):
        num_transparent = np.count_nonzero(pixels[..., -1] != 255)
        if num_transparent:
            raise _problem(
                path,
                f"{num_transparent} transparent pixels, whose value is undefined",
                "save it without an alpha channel",
            )
        pixels = pixels[..., :-1]
    elif picture.mode not in (*_GREY_MODES, "RGB"):
        raise _problem(path, f"colour mode {picture.mode}", "save it as grey or RGB")
    return pixels.reshape(*pixels.shape[:2], 1, -1)


@contextlib.contextmanager
def _replaced(path):
    """A file to write, gzip if it is named so, that takes the place of `path` once it is whole."""
    with replacing(path) as temporary, open(temporary, "w+b") as file:  # TIFF is read back
        if not _is_packed(path):
            yield file
            return
        # Without name and time, equal volumes make equal files.
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            yield packed


def _write_nifti(path, values, affine, like):
    image = _nifti_image(path, _in_file_order(values), affine, like)
    with _replaced(path) as file:
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


def _nifti_image(path, values, affine, like):
    if like is None or not is_nifti(like):
        image = nibabel.Nifti1Image(values, affine, dtype=values.dtype)
        image.header.set_xyzt_units("mm")
        return image
    source = nibabel.load(like)
    if source.shape[:3] != values.shape[:3] or np.abs(source.affine - affine).max() > (
        AFFINE_TOLERANCE_MM
    ):
        raise ValueError(
            f"{path}: the volume (shape {list(values.shape)}, affine "
            f"{np.asarray(affine).tolist()}) is not on the grid of {like} (shape "
            f"{list(source.shape[:3])}, affine {source.affine.tolist()})"
        )
    image = type(source)(values, source.affine, dtype=values.dtype)
    for field in _PLACEMENT_FIELDS:
        image.header[field] = source.header[field]
    return image


def _write_png(path, values):
    if values.ndim != 3 or values.shape[2] != 1 or values.dtype.itemsize > 2:
        raise ValueError(
            f"{path}: PNG holds [H, W, 1] of uint8 or uint16, not {list(values.shape)} of "
            f"{values.dtype}; write NIfTI"
        )
    with _replaced(path) as file:
        Image.fromarray(values[..., 0]).save(file, "PNG")


def _write_tiff(path, values):
    if values.ndim not in (3, 4) or values.shape[2] != 1:
        raise ValueError(
            f"{path}: TIFF holds [H, W, 1] or [H, W, 1, K], not {list(values.shape)}; write NIfTI"
        )
    height, width = values.shape[:2]
    pages = np.moveaxis(values.reshape(height, width, -1), -1, 0)
    first, *others = (Image.fromarray(np.ascontiguousarray(page)) for page in pages)
    with _replaced(path) as file:
        first.save(file, "TIFF", save_all=True, append_images=others, compression="tiff_deflate")
