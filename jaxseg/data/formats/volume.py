"""What every format is read into."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Remark:
    """Something about a file that its user should know, though it can be used.

    Attributes:
      kind: what files have in common that are told of together, and what is done about it.
      detail: what is so in this file.
    """

    kind: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of its values, without them.

    Attributes:
      shape: (X, Y, Z) or (X, Y, Z, C).
      dtype: as the values are stored.
      affine: voxel to world (mm, RAS+), [4, 4] float64; perhaps unusable.
      remarks: Remarks.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    remarks: tuple[Remark, ...] = ()


@dataclasses.dataclass(frozen=True)
class Volume:
    """The values of a file, [X, Y, Z] or [X, Y, Z, C], their affine [4, 4] (mm) and Remarks."""

    values: np.ndarray
    affine: np.ndarray
    remarks: tuple[Remark, ...] = ()


def grouped(remarks_of: Mapping[str, Iterable[Remark]]) -> list[str]:
    """One line for each kind of remark: how many files, what, and the first of them.

    Args:
      remarks_of: for each file its Remarks.
    """
    by_kind: dict[str, list[str]] = {}
    for path, remarks in remarks_of.items():
        for remark in remarks:
            by_kind.setdefault(remark.kind, []).append(f"{path}: {remark.detail}")
    return [f"{_counted(lines)}: {kind} ({lines[0]})" for kind, lines in by_kind.items()]


def _counted(lines: Sequence[str]) -> str:
    return "1 file" if len(lines) == 1 else f"{len(lines)} files, for example the first"
