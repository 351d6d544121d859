"""Why a plan is as it is, a sentence for each decision."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxseg.planning.budget import PRESETS
from jaxseg.planning.configurations import LOW_RESOLUTION_BELOW, Configuration, DatasetFacts
from jaxseg.planning.normalisation import MOSTLY_BACKGROUND
from jaxseg.planning.recipe import reasons_of_recipe, recipe_of
from jaxseg.planning.target import ANISOTROPY, target_of

_AXES = "xyz"
_SCHEMES = {
    "ct": "clipped to the foreground's percentiles 0.5 and 99.5, then its mean and deviation: "
    "Hounsfield units mean the same in every scan",
    "zscore": "each scan by its own mean and deviation: units differ from scan to scan",
    "rescale_to_0_1": "each scan from its smallest to its largest value",
    "rgb_to_0_1": "8-bit colours to [0, 1]",
    "none": "left as it is",
}


def reasons_of(
    name: str,
    made: Configuration,
    facts: DatasetFacts,
    preset_name: str,
    own: Mapping[str, Any],
    *,
    left_right: int | None = None,
    is_scan: bool = True,
) -> Iterator[tuple[str, str, str]]:
    """Yields (decision, value, reason) for a configuration.

    Args:
      name: "2d", "3d_fullres" or "3d_lowres".
      made: the configuration of that name.
      facts: that it was made from.
      preset_name: that it was made with.
      own: what the user has set, by the full name of the field; obeyed, whatever was made.
      left_right, is_scan: of `recipe.recipe_of`.
    """
    sides: dict[str, Any] = {"left_right": left_right, "is_scan": is_scan}
    values = recipe_of(made, preset_name, **sides)
    for decision, field, value, why in (
        *_decisions(name, made, facts, preset_name, own, "mm" if is_scan else "pixels"),
        *reasons_of_recipe(values, made, preset_name, **sides),
    ):
        if field in own and _suits(field, own[field], len(made.patch_size)):
            yield decision, str(own[field]), "set by you"
        else:
            yield decision, value, why


def _decisions(name, made, facts, preset_name, own, unit):
    """Yields (decision, field that would set it, value, reason) as planned."""
    yield (
        "spacing",
        "preprocess.spacing_mm",
        f"{_by(made.spacing_mm)} {unit}",
        _why_spacing(name, made, facts, PRESETS[preset_name].voxels_across),
    )
    axes = "".join(_AXES[axis] for axis in made.axes)
    yield "axes", "preprocess.axes", axes, _why_axes(made)
    yield (
        "median case",
        "",
        f"{_by(made.median_shape)} voxels",
        f"of {facts.num_training} training cases on that grid",
    )
    sizes = zip(made.patch_size, made.median_shape, strict=True)
    shown = math.prod(min(seen / whole, 1) for seen, whole in sizes)
    yield (
        "patch",
        "data.patch_size",
        f"{_by(made.patch_size)} voxels",
        f"the largest of equal sides in {unit} within the budget, {_percent(shown)} of the median "
        "case"
        if shown < 1
        else "shows the whole median case",
    )
    seen = _percent(facts.relative_size)
    yield "crop", "preprocess.crop", "to what is not 0", f"which is {seen} of a scan"
    yield "batch", "train.batch_size", str(made.batch_size), _why_batch(made, preset_name)
    halved = "axes are halved together once their spacings are alike"
    if max(made.strides[0]) > 1:
        halved += "; the first stage is coarser than the image, at a fraction of the cost"
    if own.get("model.features"):
        halved += f", for the {len(own['model.features'])} resolutions you set at most"
    yield "strides", "model.strides", _stages(made.strides), halved
    yield "kernels", "model.kernel_sizes", _stages(made.kernels), _why_kernels(made)
    yield (
        "features",
        "model.features",
        ", ".join(map(str, made.features)),
        "doubled with every halving, up to a bound",
    )
    dice = "the whole batch" if made.batch_dice else "each patch"
    seen = "slice" if name == "2d" else "patch"
    why = f"a {seen} shows {'little' if made.batch_dice else 'much'} of a case"
    yield "dice", "loss.over_batch", f"over {dice}", why
    for channel, scheme, inside in zip(
        facts.channel_names, made.normalisation, made.inside_mask, strict=True
    ):
        why = _SCHEMES[scheme] + _why_mask(inside, facts)
        yield f"channel {channel}", "preprocess.normalisation", scheme, why


def _suits(field, value, rank):
    """Whether a configuration of slices (rank 2) or volumes (3) could have a value."""
    return field != "data.patch_size" or len(value) == rank


def _why_spacing(name, made, facts, voxels_across):
    target = target_of(facts.spacings_mm, facts.shapes)
    if name == "3d_lowres":
        return (
            f"coarser until a patch shows {_percent(LOW_RESOLUTION_BELOW)} of a case, which has "
            f"{_by(target.median_shape)} voxels at full resolution"
        )
    if voxels_across and facts.chords_mm and made.spacing_mm[0] > target.spacing_mm[0]:
        through = np.asarray(facts.chords_mm)[:, list(target.axes[:2])].min()
        return (
            f"coarser than the median, {_by(target.spacing_mm[: len(made.spacing_mm)])} mm: the "
            f"thinnest structure, {through:.3g} mm through, keeps {voxels_across:g} voxels"
        )
    if target.is_coarse and len(made.spacing_mm) == 3:
        across = _AXES[target.axes[2]]
        median = np.median(np.asarray(facts.spacings_mm)[:, target.axes[2]])
        return (
            f"the median, but along {across} (median {median:.4g} mm, more than {ANISOTROPY:g} "
            "times the others) the finest tenth, so that few scans lose slices"
        )
    return "the median of the training cases"


def _why_axes(made):
    across = _AXES[made.axes[2]]
    return f"the coarsest axis, {across}, comes last; slices are cut across it"


def _why_batch(made, preset_name):
    most = _percent(PRESETS[preset_name].most_of_dataset)
    millions = f"{made.activations / 1e6:.3g}"
    return {
        "budget": f"fills the budget of {preset_name}: {millions} million numbers a patch",
        "dataset": f"more than {most} of all voxels in a step teach little",
        "fewest": "no step has fewer",
        "devices": "the next number that devices, or parts of a step, can share",
    }[made.batch_limit]


def _why_kernels(made):
    flat = sum(1 in kernel for kernel in made.kernels)
    if not flat:
        return "spacings are alike along all axes"
    ratio = max(made.spacing_mm) / min(made.spacing_mm)
    coarse = [_AXES[axis] for axis, n in zip(made.axes, made.kernels[0], strict=False) if n == 1]
    return (
        f"{ratio:.3g} x coarser along {' and '.join(coarse)}, where the first {flat} stage(s) do "
        "not look"
    )


def _why_mask(inside, facts):
    if not inside:
        return ""
    return (
        "; inside the mask of what is not 0, since that is "
        f"{_percent(facts.relative_size)} of a scan, less than {_percent(MOSTLY_BACKGROUND)}"
    )


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.5g}" for number in numbers)


def _stages(stages: Sequence[Sequence[int]]) -> str:
    return " ".join("".join(map(str, stage)) for stage in stages)


def _percent(part: float) -> str:
    return f"{100 * part:.3g} %"
