"""How a configuration is trained: what its patches bear, which are drawn, and by which steps."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxseg.planning.budget import PRESETS
from jaxseg.planning.configurations import Configuration

# Volumes that are so much longer along one axis than along the last turn in plane alone.
FLAT = 3.0
# Slices that are so much longer than wide turn little.
LONG = 1.5
# Patients hardly lie more askew.
TILTED_DEG = 30.0
# Of the patches of volumes those that are drawn around a structure, where there are few steps.
AROUND_STRUCTURES = 0.67
_AXES = "xyz"
# Of networks that are trained for long, as nnU-Net's are, and of those that are not.
_LONG_RUN = {
    "optim.name": "sgd",
    "optim.learning_rate": 1e-2,
    "optim.weight_decay": 3e-5,
}
_SHORT_RUN = {
    "optim.name": "muon",
    "optim.learning_rate": 3e-2,
    "optim.weight_decay": 1e-2,
}


def recipe_of(
    made: Configuration, preset_name: str, *, left_right: int | None, is_scan: bool
) -> dict[str, Any]:
    """Values of config fields, as in nnU-Net; but sides that are classes are never exchanged.

    Scans lie as patients do. A network that is trained for minutes is not asked to know them from
    every side: it would have learnt them from one by then.

    Args:
      made: Configuration.
      preset_name: that it was made with.
      left_right: axis of the patch along which left and right are classes of their own, or None.
      is_scan: whether cases have a direction, as pictures have not.
    """
    is_short = PRESETS[preset_name].is_short
    patch = made.patch_size
    flat = len(patch) == 3 and max(patch) / patch[-1] > FLAT
    if len(patch) == 3:
        most = 180.0 if flat else 30.0
    else:
        most = 15.0 if max(patch) / min(patch) > LONG else 180.0
    mirrored = tuple(axis for axis in range(len(patch)) if axis != left_right)
    if is_short and is_scan:
        most, mirrored = min(most, TILTED_DEG), ()
    return {
        "augment.rotation.range_deg": (-most, most),
        "augment.rotation.in_plane": flat,
        "augment.scaling.in_plane": flat,
        "augment.flip.axes": mirrored,
        "augment.blur.channel_prob": 0.5,
        "augment.low_resolution.channel_prob": 0.5,
        "data.foreground_by_place": True,
        "data.foreground_fraction": AROUND_STRUCTURES if is_short and len(patch) == 3 else 0.33,
        **(_SHORT_RUN if is_short else _LONG_RUN),
    }


def reasons_of_recipe(
    values: Mapping[str, Any],
    made: Configuration,
    preset_name: str,
    *,
    left_right: int | None,
    is_scan: bool,
) -> Iterator[tuple[str, str, str, str]]:
    """Yields (decision, field that would set it, value, reason) of a recipe.

    Args:
      values: of `recipe_of`, with the other arguments.
    """
    is_short = PRESETS[preset_name].is_short
    most = values["augment.rotation.range_deg"][1]
    if values["augment.rotation.in_plane"]:
        why = "in plane alone, since a patch is much shorter across it"
    elif is_short and is_scan:
        why = "patients hardly lie more askew, and minutes are too short to learn more"
    elif len(made.patch_size) == 3:
        why = "about every axis, as in nnU-Net"
    else:
        why = "slices are much longer than wide" if most < TILTED_DEG else "in any direction"
    yield "turns", "augment.rotation.range_deg", f"up to {most:g} degrees", why
    axes = values["augment.flip.axes"]
    if is_short and is_scan:
        why = "scans lie as patients do"
    elif left_right is not None:
        why = f"not along {_AXES[made.axes[left_right]]}, where left and right are classes"
    else:
        why = "no side is a class of its own"
    mirrored = "".join(_AXES[made.axes[axis]] for axis in axes) or "never"
    yield "mirrored", "augment.flip.axes", mirrored, why
    part = f"{values['data.foreground_fraction']:.0%} of a batch"
    is_usual = values["data.foreground_fraction"] < AROUND_STRUCTURES
    why = "as in nnU-Net" if is_usual else "few steps must find what is rare"
    yield "around structures", "data.foreground_fraction", part, why
    steps = "few steps" if is_short else "many steps, as in nnU-Net"
    rate = f"{values['optim.name']}, {values['optim.learning_rate']:g}"
    yield "optimiser", "optim.name", rate, f"for {steps}"
