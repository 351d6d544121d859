"""PNG, JPEG, BMP and TIFF pictures: their pixels as a viewer shows them, and arrays as pictures.

Colours of 16 bits, which Pillow cuts to 8, are read by SimpleITK.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxseg.data.formats.extra import needing_extra
from jaxseg.data.formats.files import COPY_AGAIN, naming_damage, opened
from jaxseg.problem import file_problem
from jaxseg.run.writers import replacing

_PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
# By Pillow's mode.
GREY_DTYPES = {"1": "bool", "L": "u1", "I": "i4", "F": "f4", "I;16": "u2"}
GREY_DTYPES |= {"I;16B": "u2", "I;16L": "u2", "I;16N": "u2"}
_ORIENTATION = 0x0112  # EXIF tag


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded picture of one frame.

    Attributes:
      image: Pillow's, turned as its EXIF tag says.
      format: "PNG", "JPEG", "BMP" or "TIFF".
      deep: [H, W, 2, 3 or 4] uint16, where Pillow would have lost bits, else None.
    """

    image: Image.Image
    format: str
    deep: np.ndarray | None = None


@contextlib.contextmanager
def opened_picture(path: str | Path) -> Iterator[Image.Image]:
    """Yields Pillow's picture of a file, whose pixels are decoded on demand.

    Raises:
      FileProblem: The file is missing, damaged or of another kind, also where that shows later.
    """
    with opened(path) as stream:
        content = stream.read()
    if not content:
        raise file_problem(path, "the file is empty", COPY_AGAIN)
    try:
        with naming_damage(path, ", ".join(_PICTURE_FORMATS), Image.DecompressionBombError):
            yield Image.open(io.BytesIO(content), formats=_PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise file_problem(path, f"too large ({error})", "cut it into tiles") from error


def size_of(path: str | Path) -> tuple[int, int, int]:
    """(H, W, channels) of a picture as `load_picture` reads it, which raises alike."""
    with opened_picture(path) as picture:
        width, height = picture.size
        if picture.getexif().get(_ORIENTATION, 1) >= 5:  # a quarter turn
            width, height = height, width
        is_grey = picture.mode in (*GREY_DTYPES, "LA") or has_grey_palette(picture)
        return height, width, 1 if is_grey else 3


def load_picture(path: str | Path) -> Picture:
    """A decoded picture, turned as a viewer turns it.

    Raises:
      FileProblem: The file is missing, damaged, of another kind, or a stack of pages.
    """
    with opened_picture(path) as picture:
        num_frames = getattr(picture, "n_frames", 1)
        if num_frames > 1:
            raise file_problem(
                path,
                f"a stack of {num_frames} pictures",
                f'save one picture per file, or write {{"spacing": [z, y, x]}} to '
                f"{Path(path).stem}.json beside it, which makes a volume of it",
            )
        name, is_deep = picture.format or "", _is_deep(picture)
        if not is_deep:
            turned = ImageOps.exif_transpose(picture)
            turned.load()
            return Picture(turned, name)
        if picture.getexif().get(_ORIENTATION, 1) != 1:
            wrong = "16 bits per colour and an EXIF orientation"
            raise file_problem(path, wrong, "save it upright, without the tag")
        return Picture(picture, name, _deep_pixels(path))


def opaque_pixels(path: str | Path, picture: Picture) -> np.ndarray:
    """Grey or colour values of a picture without palette, [H, W, 1, 1 or 3]."""
    mode, pixels = picture.image.mode, picture.deep
    if pixels is None:
        pixels = np.asarray(picture.image)
    if mode in ("LA", "RGBA"):
        num_transparent = np.count_nonzero(pixels[..., -1] != np.iinfo(pixels.dtype).max)
        if num_transparent:
            raise file_problem(
                path,
                f"{num_transparent} transparent pixels, whose value is undefined",
                "save it without an alpha channel",
            )
        pixels = pixels[..., :-1]
    elif mode not in (*GREY_DTYPES, "RGB"):
        raise file_problem(path, f"colour mode {mode}", "save it as grey or RGB")
    return pixels.reshape(*pixels.shape[:2], 1, -1)


def has_grey_palette(picture: Image.Image) -> bool:
    """Whether a picture has a palette that shows nothing but greys."""
    colours = np.reshape(picture.getpalette("RGB") or [], (-1, 3))
    return picture.mode in ("P", "PA") and bool((colours == colours[:, :1]).all())


def shown_values(path: str | Path, picture: Picture) -> np.ndarray:
    """Label values of a picture with a palette, [H, W, 1].

    They are the greys that it shows or, if it shows colours, its indices, of which 0 is the
    background, as in Pascal VOC.
    """
    indices = np.asarray(picture.image)
    colours = picture.image.getpalette("RGB") or []
    shown = np.reshape(colours, (-1, 3)).astype(np.uint8)
    used = np.unique(indices)
    if used[-1] >= len(shown):
        raise file_problem(path, f"index {used[-1]} is not in its palette", COPY_AGAIN)
    if (shown[used] == shown[used][:, :1]).all():
        return shown[indices][..., :1]
    black = [int(index) for index in used if not shown[index].any()]
    if black and 0 not in black:
        raise file_problem(
            path,
            f"its palette shows index {black[0]} in black, and index 0, which is the background of "
            f"masks with colours, in {shown[0].tolist()}",
            "save it as a grey picture of class values",
        )
    return indices[..., None]


def write_png(path: str | Path, values: np.ndarray) -> None:
    """Writes [H, W, 1] of uint8 or uint16, the whole file or none of it.

    Raises:
      ValueError: PNG does not hold such an array.
      OSError: the file can not be written.
    """
    if values.ndim != 3 or values.shape[2] != 1 or values.dtype.itemsize > 2:
        raise ValueError(
            f"{path}: PNG holds [H, W, 1] of uint8 or uint16, not {list(values.shape)} of "
            f"{values.dtype}; write NIfTI"
        )
    with replacing(path) as temporary:
        Image.fromarray(values[..., 0]).save(temporary, "PNG")


def write_tiff(path: str | Path, values: np.ndarray) -> None:
    """Writes [H, W, 1], or [H, W, 1, K] as K pages; raises as `write_png` does."""
    if values.ndim not in (3, 4) or values.shape[2] != 1:
        raise ValueError(
            f"{path}: TIFF holds [H, W, 1] or [H, W, 1, K], not {list(values.shape)}; write NIfTI"
        )
    height, width = values.shape[:2]
    pages = np.moveaxis(values.reshape(height, width, -1), -1, 0)
    save_pages(path, [Image.fromarray(np.ascontiguousarray(page)) for page in pages])


def save_pages(path: str | Path, pages: Sequence[Image.Image]) -> None:
    """Writes pages as one TIFF file, whole or not at all; raises OSError."""
    first, *others = pages
    with replacing(path) as temporary:
        first.save(
            temporary, "TIFF", save_all=True, append_images=others, compression="tiff_deflate"
        )


def _is_deep(picture):
    """Whether Pillow would cut colours of 16 bits to 8; to be asked before it decodes them."""
    raw_modes = str([tile[3] for tile in picture.tile])
    return picture.mode in ("RGB", "RGBA", "LA") and ";16" in raw_modes


def _deep_pixels(path):
    with needing_extra(path):
        import SimpleITK as sitk
    try:
        return sitk.GetArrayFromImage(sitk.ReadImage(os.fspath(path)))
    except RuntimeError as error:
        raise file_problem(path, "its colours of 16 bits are not readable", COPY_AGAIN) from error
