"""NRRD files, attached and detached, through pynrrd; their geometry is kept as the text says it."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.data.formats.extra import needing_extra
from jaxseg.data.formats.files import COPY_AGAIN, naming_damage, opened, refuse_missing
from jaxseg.data.formats.volume import Header, Remark, Volume
from jaxseg.problem import file_problem
from jaxseg.run.writers import replacing

# From the directions of a space to RAS+.
_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
_SHORT = {"ras": "right-anterior-superior", "las": "left-anterior-superior"}
_SHORT["lps"] = "left-posterior-superior"
_MM = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1000.0, "meter": 1000.0, "": 1.0}
_MM |= {"um": 0.001, "µm": 0.001, "micron": 0.001, "microns": 0.001}
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DATA_FILE = re.compile(rb"data ?file:\s*(.+?)\s*$")
_GEOMETRY_FIELDS = ("space", "space dimension", "space origin", "space units", "measurement frame")


def files_beside(path: str | Path) -> list[str]:
    """The file of the voxels, where the header is detached from them; raises OSError."""
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                break
            if found := _DATA_FILE.match(line):
                return [os.path.join(os.path.dirname(path), os.fsdecode(found[1]))]
    return []


def read_header(path: str | Path, spacing_from: str) -> Header:
    """What an NRRD file says of its values.

    Raises:
      FileProblem: The file is missing, damaged, of another kind, or pynrrd is not installed.
    """
    with _reading(path) as nrrd:
        fields = nrrd.read_header(os.fspath(path))
        return _header_of(path, fields)


def read(path: str | Path, dtype: Any, spacing_from: str) -> Volume:
    """The values, channels last, of `dtype` or the file's own; raises as `read_header`."""
    with _reading(path) as nrrd:
        values, fields = nrrd.read(os.fspath(path))
        header = _header_of(path, fields)
        if values.ndim > len(_volume_axes(fields)):
            values = np.moveaxis(values, _channel_axis(path, fields), -1)
        values = values.reshape(header.shape).astype(dtype or values.dtype, copy=False)
        return Volume(values, header.affine, header.remarks)


def write(
    path: str | Path, values: np.ndarray, affine: np.ndarray, like: str | Path | None
) -> None:
    """Writes [X, Y, Z] or [X, Y, Z, K], attached, with the geometry fields of `like` as they are.

    Raises:
      FileProblem: pynrrd is not installed.
      OSError: The file can not be written.
    """
    with needing_extra(path):
        import nrrd
    fields: dict[str, Any] = {"space": "left-posterior-superior"}
    if like is None:
        to_lps = np.diag([-1.0, -1.0, 1.0])
        directions = (to_lps @ affine[:3, :3]).T
        fields["space origin"] = to_lps @ affine[:3, 3]
    else:
        source = nrrd.read_header(os.fspath(like))
        fields = {name: source[name] for name in _GEOMETRY_FIELDS if name in source}
        axes = _volume_axes(source)
        if len(axes) == 2:
            values = values[:, :, 0]
        if "space directions" in source:
            directions = np.asarray(source["space directions"], np.float64)[axes]
        else:
            spacings = source.get("spacings", np.ones(source["dimension"]))
            fields["spacings"] = [spacings[axis] for axis in axes]
            directions = None
    num_axes = len(fields["spacings"] if directions is None else directions)
    others = values.ndim - num_axes
    fields["kinds"] = ["domain"] * num_axes + ["list"] * others
    if directions is None:
        fields["spacings"] += [np.nan] * others
    else:
        nothing = np.full((others, len(directions[0])), np.nan)
        fields["space directions"] = np.concatenate([directions, nothing])
    content = io.BytesIO()
    nrrd.write(content, values, fields, compression_level=1)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        head, data = content.getvalue().split(b"\n\n", 1)
        # Without comments, which tell the time, equal volumes make equal files.
        lines = [line for line in head.split(b"\n") if not line.startswith(b"#")]
        file.write(b"\n".join(lines) + b"\n\n" + data)


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[Any]:
    with needing_extra(path):
        import nrrd
    with opened(path) as stream:
        if stream.read(4) != b"NRRD":
            raise file_problem(path, "not an NRRD file, it does not start with NRRD", COPY_AGAIN)
    refuse_missing(path, files_beside(path))
    with naming_damage(path, "NRRD"):
        yield nrrd


def _spatial_axes(fields):
    """The axes that have a place in the world."""
    if "space directions" in fields:
        rows = fields["space directions"]
        return [
            axis
            for axis, row in enumerate(rows)
            if row is not None and np.isfinite(np.asarray(row, np.float64)).all()
        ]
    return [
        axis
        for axis, kind in enumerate(fields.get("kinds", ["domain"] * fields["dimension"]))
        if kind in ("domain", "space")
    ]


def _volume_axes(fields):
    """The spatial axes; of a file that names none, all."""
    axes = _spatial_axes(fields)
    return axes if len(axes) > 1 or fields["dimension"] > 3 else list(range(fields["dimension"]))


def _channel_axis(path, fields):
    """The one axis that is not spatial."""
    others = sorted(set(range(fields["dimension"])) - set(_spatial_axes(fields)))
    if len(others) != 1:
        raise file_problem(
            path,
            f"{fields['dimension']} axes, of which {fields['dimension'] - len(others)} are spatial",
            "save it with three spatial axes and at most one of channels",
        )
    return others[0]


def _header_of(path, fields):
    sizes = [int(size) for size in fields["sizes"]]
    axes = _volume_axes(fields)
    if len(axes) not in (2, 3):
        _channel_axis(path, fields)
    shape = ([sizes[axis] for axis in axes] + [1])[:3]
    if len(sizes) > len(axes):
        shape.append(sizes[_channel_axis(path, fields)])
    dtype = np.dtype(_dtype_of(path, fields))
    space = fields.get("space", "left-posterior-superior").lower()
    space = _SHORT.get(space, space)
    if space not in _SPACES:
        raise file_problem(
            path, f"its space is {space!r}", f"save it in one of {', '.join(sorted(_SPACES))}"
        )
    affine = np.eye(4)
    if "space directions" in fields:
        directions = np.asarray(fields["space directions"], np.float64)[axes]
        affine[: directions.shape[1], : len(axes)] = directions.T
        if directions.shape == (2, 3):  # a slice in space: the third axis stands upright on it
            normal = np.cross(*directions)
            affine[:3, 2] = normal / (np.linalg.norm(normal) or 1)
    else:
        spacings = fields.get("spacings", np.ones(len(sizes)))
        affine[range(len(axes)), range(len(axes))] = [spacings[axis] for axis in axes]
    origin = fields.get("space origin", (0, 0, 0))
    affine[: len(origin), 3] = origin
    affine[:3] *= np.array(_SPACES[space], np.float64)[:, None]
    factor, remarks = _unit(path, fields)
    affine[:3] *= factor
    return Header(tuple(shape), dtype, affine, remarks)


def _unit(path, fields):
    units = {str(unit).strip().lower() for unit in fields.get("space units", ["mm"])}
    unit = units.pop()
    if units or unit not in _MM:
        raise file_problem(path, f"its space units are {fields['space units']}", "save it in mm")
    if _MM[unit] == 1:
        return 1.0, ()
    return _MM[unit], (Remark(f"the unit is {unit}, sizes are converted to mm", unit),)


def _dtype_of(path, fields):
    for dtype, names in _TYPES.items():
        if fields["type"].lower() in names:
            return dtype
    wrong = f"voxels are {fields['type']}, not real numbers"
    raise file_problem(path, wrong, "save it with an integer or float type")
