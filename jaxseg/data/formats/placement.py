"""Where a volume lies in the world, from all that its header says of that.

NIfTI says it up to four times: sform, qform, pixdim and a unit. Where they agree, the sform is
taken. Where they do not, directions and origin are the sform's, and distances between voxels those
of pixdim, as ITK and with it nnU-Net have it, or the sform's if the user says so.
"""

from collections.abc import Sequence

import numpy as np

from jaxseg import geometry
from jaxseg.data.formats.volume import Remark

# Spacings that differ by less are equal but for rounding.
SPACING_TOLERANCE = 1e-3
# mm per unit, and its name, by the code in a NIfTI header.
UNITS = {1: (1000.0, "metre"), 2: (1.0, "mm"), 3: (0.001, "micrometre")}
SPACING_FROM = ("pixdim", "sform")


def place(
    *,
    sform: np.ndarray | None,
    qform: np.ndarray | None,
    same_code: bool,
    pixdim: Sequence[float] | np.ndarray,
    unit: int,
    default: np.ndarray,
    shape: Sequence[int],
    spacing_from: str,
) -> tuple[np.ndarray, tuple[Remark, ...]]:
    """Decides where a volume lies.

    Args:
      sform, qform: [4, 4] in the header's unit; None where its code says that there is none.
      same_code: whether both claim to lead to the same space.
      pixdim: 3 floats, in the header's unit.
      unit: code of `UNITS`; any other is taken for mm.
      default: [4, 4], what holds where neither form is there.
      shape: of the volume, 3 ints.
      spacing_from: "pixdim" or "sform": which is believed where they contradict each other.
    Returns:
      (affine, remarks): [4, 4] float64 in mm, unusable if nothing in the header is usable.
    """
    remarks: list[Remark] = []
    usable = {
        name: form
        for name, form in (("sform", sform), ("qform", qform))
        if form is not None and _is_usable(form)
    }
    if not usable and (sform is not None or qform is not None):
        return np.asarray(qform if sform is None else sform, np.float64), ()
    name = next(iter(usable), "default")
    affine = np.array(usable.get(name, default), np.float64)
    if sform is not None and name == "qform":
        remarks.append(
            Remark("the sform is unusable, the qform is taken", f"its sform is {_text(sform[:3])}")
        )
    if qform is not None and "qform" not in usable:
        remarks.append(
            Remark("the qform is unusable, the sform is taken", "its quaternion is none")
        )
    unsized = [axis for axis in range(3) if not pixdim[axis] and shape[axis] > 1]
    if name == "default" and unsized:
        remarks.append(
            Remark(
                "the header says neither place nor spacing, 1 mm is taken, as ITK does",
                f"pixdim {_text(pixdim)}, no sform and no qform",
            )
        )
    if len(usable) == 2 and same_code:
        apart = geometry.grid_difference(affine, usable["qform"], shape)
        if apart > geometry.SAME_GRID_VOXELS and not _differ(affine, usable["qform"]):
            remarks.append(
                Remark(
                    "sform and qform lead to one space but differ, the sform is taken",
                    f"they are up to {apart:.3g} voxels apart",
                )
            )
    if name != "default":
        affine, remark = _with_spacing(affine, name, np.asarray(pixdim, np.float64), spacing_from)
        remarks += remark
    factor, unit_name = UNITS.get(unit, UNITS[2])
    if factor != 1:
        remarks.append(
            Remark(
                f"the unit is {unit_name}, sizes are converted to mm",
                f"voxels of {_text(geometry.spacing_mm_from_affine(affine))} {unit_name}",
            )
        )
        affine[:3] *= factor
    return affine, tuple(remarks)


def _with_spacing(affine, name, pixdim, spacing_from):
    """The affine with the spacing that is believed, and the Remarks about that."""
    spacing = geometry.spacing_mm_from_affine(affine)
    if not (np.isfinite(pixdim) & (pixdim > 0)).all():
        return affine, [
            Remark(f"pixdim is no spacing, that of the {name} is taken", f"pixdim {_text(pixdim)}")
        ]
    if np.allclose(spacing, pixdim, rtol=SPACING_TOLERANCE, atol=0):
        return affine, []
    other = {"pixdim": "sform", "sform": "pixdim"}[spacing_from]
    kind = (
        f"{name} and pixdim contradict each other in spacing, "
        f"{spacing_from if spacing_from == 'pixdim' else name} is taken"
        f"{', as ITK does' if spacing_from == 'pixdim' else ''}; the other with "
        f"spacing_from={other}"
    )
    if spacing_from == "pixdim":
        affine = affine.copy()
        affine[:3, :3] *= pixdim / spacing
    return affine, [Remark(kind, f"{name} {_text(spacing)}, pixdim {_text(pixdim)}")]


def _differ(affine, other):
    """Whether spacings differ, which is said of pixdim, from which the qform has its own."""
    mine, theirs = map(geometry.spacing_mm_from_affine, (affine, other))
    return not np.allclose(mine, theirs, rtol=SPACING_TOLERANCE, atol=0)


def _is_usable(affine):
    try:
        geometry.check_affine(affine)
    except ValueError:
        return False
    return True


def _text(numbers):
    return " x ".join(f"{number:.4g}" for number in np.ravel(numbers))
