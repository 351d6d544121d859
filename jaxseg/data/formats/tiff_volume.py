"""Stacks of TIFF pages with the spacing of their voxels in a JSON file beside, as in nnU-Net.

CASE_0000.tif, CASE_0001.tif ... and CASE.tif share CASE.json, {"spacing": [z, y, x]} in mm.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxseg.data.formats import pictures
from jaxseg.data.formats.volume import Header, Volume
from jaxseg.problem import file_problem
from jaxseg.run.writers import write_text


def spacing_file(path: str | Path) -> Path | None:
    """The JSON file that makes a volume of a TIFF file, None where there is none."""
    stem = Path(path).with_suffix("")
    without_channel = stem.with_name(re.sub(r"_\d{4}$", "", stem.name))
    for candidate in (stem, without_channel):
        beside = candidate.with_name(candidate.name + ".json")
        if beside.is_file() and _may_hold_spacing(beside):
            return beside
    return None


def _may_hold_spacing(path):
    """Not so if it is whole and about something else, as annotations are."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return True  # reading it will tell
    return isinstance(content, dict) and "spacing" in content


def files_beside(path: str | Path) -> list[str]:
    """The file of the spacing."""
    beside = spacing_file(path)
    return [] if beside is None else [os.fspath(beside)]


def written_spacing_file(path: str | Path) -> str:
    """Where `write` puts the spacing of a stack."""
    return os.fspath(Path(path).with_suffix(".json"))


def read_header(path: str | Path, spacing_from: str) -> Header:
    """What the files say of their values.

    Raises:
      FileProblem: One of the two is missing, damaged or of another kind.
    """
    with pictures.opened_picture(path) as picture:
        return _header_of(path, picture)


def read(path: str | Path, dtype: Any, spacing_from: str) -> Volume:
    """The values [X, Y, Z] of `dtype` or the file's own; raises as `read_header`."""
    with pictures.opened_picture(path) as picture:
        header = _header_of(path, picture)
        values = np.empty(header.shape, dtype or header.dtype)
        for z in range(header.shape[2]):
            picture.seek(z)
            page = np.asarray(picture)
            if page.shape != header.shape[1::-1]:
                wrong = f"page {z} is {page.shape[1]} x {page.shape[0]}, the first "
                wrong += f"{header.shape[0]} x {header.shape[1]}"
                raise file_problem(path, wrong, "save pages of one size")
            values[:, :, z] = page.T
    return Volume(values, header.affine)


def write(
    path: str | Path, values: np.ndarray, affine: np.ndarray, like: str | Path | None
) -> None:
    """Writes [X, Y, Z], or [X, Y, Z, K] as K x Z pages, and the spacing beside it.

    Raises:
      OSError: A file can not be written.
    """
    pages = np.moveaxis(values.reshape(*values.shape[:3], -1), (3, 2, 1), (0, 1, 2))
    flat = [Image.fromarray(np.ascontiguousarray(page)) for stack in pages for page in stack]
    pictures.save_pages(path, flat)
    source = None if like is None else spacing_file(like)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist()
    text = json.dumps({"spacing": spacing}) if source is None else source.read_text("utf-8")
    write_text(written_spacing_file(path), text)


def _header_of(path, picture):
    if picture.mode not in pictures.GREY_DTYPES:
        raise file_problem(path, f"pages of colour mode {picture.mode}", "save it with grey pages")
    return Header(
        (*picture.size, getattr(picture, "n_frames", 1)),
        np.dtype(pictures.GREY_DTYPES[picture.mode]),
        np.diag([*_spacing_mm(path), 1.0]),
    )


def _spacing_mm(path):
    beside = spacing_file(path)
    if beside is None:
        name = os.path.splitext(os.path.basename(path))[0] + ".json"
        raise file_problem(
            path, "a stack of pages without a spacing", f'write {{"spacing": [z, y, x]}} to {name}'
        )
    try:
        spacing = [float(number) for number in json.loads(beside.read_text("utf-8-sig"))["spacing"]]
        if len(spacing) != 3 or not all(0 < number < np.inf for number in spacing):
            raise ValueError(f"its spacing is {spacing}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        mend = 'write {"spacing": [z, y, x]}, in mm'
        raise file_problem(beside, f"holds no spacing ({error!r})", mend) from error
    return spacing[::-1]
