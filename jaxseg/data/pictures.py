"""PNG, JPEG and TIFF pictures: their pixels as they are stored, and arrays written as such."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from jaxseg.data.files import COPY_AGAIN, opened
from jaxseg.problem import FileProblem, file_problem
from jaxseg.run.writers import replacing

_PICTURE_FORMATS = ("PNG", "JPEG", "TIFF")
_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def load_picture(path: str | Path) -> Image.Image:
    """A decoded PIL image of one frame."""
    with opened(path) as stream:
        content = stream.read()
    if not content:
        raise file_problem(path, "the file is empty", COPY_AGAIN)
    try:
        picture = Image.open(io.BytesIO(content), formats=_PICTURE_FORMATS)
        if isinstance(picture, TiffImageFile) and picture.n_frames > 1:
            raise file_problem(
                path, f"a stack of {picture.n_frames} pictures", "save one picture per file"
            )
        picture.load()
    except Image.DecompressionBombError as error:
        raise file_problem(path, f"too large ({error})", "cut it into tiles") from error
    except FileProblem:
        raise
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, zlib.error) as error:
        kinds = ", ".join(_PICTURE_FORMATS)
        raise file_problem(path, f"not a readable {kinds} file ({error})", COPY_AGAIN) from error
    return picture


def opaque_pixels(path: str | Path, picture: Image.Image) -> np.ndarray:
    """Grey or colour values of a picture without palette, [H, W, 1, 1 or 3]."""
    pixels = np.asarray(picture)
    if picture.mode in ("LA", "RGBA"):
        num_transparent = np.count_nonzero(pixels[..., -1] != 255)
        if num_transparent:
            raise file_problem(
                path,
                f"{num_transparent} transparent pixels, whose value is undefined",
                "save it without an alpha channel",
            )
        pixels = pixels[..., :-1]
    elif picture.mode not in (*_GREY_MODES, "RGB"):
        raise file_problem(path, f"colour mode {picture.mode}", "save it as grey or RGB")
    return pixels.reshape(*pixels.shape[:2], 1, -1)


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
    first, *others = (Image.fromarray(np.ascontiguousarray(page)) for page in pages)
    with replacing(path) as temporary:
        first.save(
            temporary, "TIFF", save_all=True, append_images=others, compression="tiff_deflate"
        )
