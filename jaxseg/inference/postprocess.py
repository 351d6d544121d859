"""Mending of predicted labels by rules about shape, chosen on validation cases; SciPy, on the host.

A step is a dict that JSON holds, such as {"name": "remove_small", "classes": [1, 2],
"min_volume_mm3": 100.0}. Each of its classes is treated by itself, in that order:

  keep_largest  all but the largest region becomes background, the first of equals stays
  remove_small  regions of less than `min_volume_mm3` become background
  fill_holes    background that the class encloses becomes the class
  open          what no ball of `radius_mm` inside the class covers becomes background; a class
                that the edge of the volume cuts goes on beyond it
  close         background that no ball of `radius_mm` outside the class covers becomes the class
  smooth        the class and background exchange voxels: each takes the class of largest
                indicator after a Gaussian of `sigma_mm`; voxels of other classes stay

"together": true lets keep_largest and remove_small see all classes of the step as one. Regions
connect by faces, edges and corners, as in nnU-Net, enclosing background by faces. Distances are
those between voxel centres in mm on perpendicular axes. None reaches
farther than 32 voxels; `shortened` tells which would. An axis of one voxel has no outside, so
pictures and single slices are treated in their plane.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from jaxseg.evaluation import metrics

MIN_VOLUMES_MM3 = (10.0, 100.0, 1000.0)
RADII_MM = (1.0, 2.0)
SIGMA_MM = 1.0
# Where voxels are finer or coarser, sizes are tried in units of a voxel in place of a millimetre.
_USUAL_SPACING_MM = (0.25, 2.0)
# A ball of more is no detail of an outline, and takes for ever.
_MOST_VOXELS = 32

# What is on a limit stays on it when a rotated affine gives a spacing of 0.99999997 mm.
_ROUNDING = 1e-5
_TRUNCATE = 3.0  # a Gaussian reaches this many sigma
# How far a step reaches, per size that it has.
_REACH = {"radius_mm": 1.0, "sigma_mm": _TRUNCATE}
_NEIGHBOURS = np.ones((3, 3, 3), bool)
_BLOCK = 64  # voxels along each axis that are blurred or measured at once

# The largest sizes that a file may ask for: far beyond use.
_LARGEST = {"min_volume_mm3": 1e15, "radius_mm": 1e5, "sigma_mm": 1e5}


def apply_steps(
    label: np.ndarray, spacing_mm: Sequence[float] | np.ndarray, steps: Iterable[Mapping[str, Any]]
) -> np.ndarray:
    """Post-processes one label.

    Args:
      label: Class indices, [X, Y, Z] uint8; 0 is background.
      spacing_mm: Distance between voxel centres along each axis, 3 floats.
      steps: Steps as described above, first to last; `check_steps` says if they are usable.
    Returns:
      [X, Y, Z] uint8, a new array.
    """
    label = label.copy()
    spacing_mm = np.asarray(spacing_mm, np.float64)
    for step in steps:
        fields = {name: value for name, value in step.items() if name != "name"}
        _STEPS[step["name"]](label, spacing_mm, **fields | _bounded(step, spacing_mm))
    return label


def check_steps(steps: Any, num_classes: int) -> None:
    """Refuses steps, as read from a file, that `apply_steps` could not take.

    Args:
      steps: What the file holds, anything that JSON can.
      num_classes: Number of classes K, background included.
    Raises:
      ValueError: Not a list of steps, an unknown name, a missing or unknown field, a class outside
        1 ... K - 1 or given twice, a size that is no use.
    """
    if not isinstance(steps, list):
        raise ValueError(f"post-processing steps must be a list, not {steps!r}")
    for step in steps:
        problem = _problem(step, num_classes)
        if problem:
            raise ValueError(f"post-processing step {step!r}: {problem}")


def shortened(
    steps: Iterable[Mapping[str, Any]], spacing_mm: Sequence[float] | np.ndarray
) -> list[str]:
    """What `apply_steps` does with less reach than a step says, since voxels are so small."""
    return [
        f"{step['name']} reaches {_REACH[name] * size:.4g} mm in place of "
        f"{_REACH[name] * step[name]:.4g}, {_MOST_VOXELS} voxels"
        for step in steps
        for name, size in _bounded(step, spacing_mm).items()
        if size < step[name]
    ]


def _bounded(step, spacing_mm):
    """The sizes of a step that say how far it reaches, none beyond the most voxels."""
    most_mm = _MOST_VOXELS * float(np.min(spacing_mm))
    return {
        name: min(step[name], most_mm / reach) for name, reach in _REACH.items() if name in step
    }


def candidate_steps(num_classes: int, finest_mm: float = 1.0) -> list[dict[str, Any]]:
    """The steps that `choose_steps` tries, in order: gross mistakes first, outlines last.

    Args:
      num_classes: Number of classes K, background included.
      finest_mm: The usual smallest distance of voxels; where it is far from a millimetre, it is the
        unit in which sizes are tried.
    Returns:
      List of steps, each for all foreground classes.
    """
    low, high = _USUAL_SPACING_MM
    unit = 1.0 if low <= finest_mm <= high else float(f"{finest_mm:.3g}")
    classes = list(range(1, num_classes))
    steps: list[dict[str, Any]]
    steps = [{"name": "keep_largest", "together": True}] if num_classes > 2 else []
    steps.append({"name": "keep_largest"})
    steps += [
        {"name": "remove_small", "min_volume_mm3": size * unit**3} for size in MIN_VOLUMES_MM3
    ]
    steps.append({"name": "fill_holes"})
    steps += [{"name": name, "radius_mm": r * unit} for name in ("close", "open") for r in RADII_MM]
    steps.append({"name": "smooth", "sigma_mm": SIGMA_MM * unit})
    return [step | {"classes": classes} for step in steps]


def choose_steps(
    cases: Iterable[tuple[np.ndarray, np.ndarray, Sequence[float] | np.ndarray]], num_classes: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Chooses steps greedily: one is kept if the mean Dice of the cases rises.

    A candidate that helps some classes alone is measured again on those whose own mean Dice rose.
    Each measurement is one pass over `cases`, of which one is in memory at a time.

    Args:
      cases: Re-iterable of (prediction, reference, spacing_mm) of validation cases: [X, Y, Z] uint8
        class indices twice, 3 floats.
      num_classes: Number of classes K, background included.
    Returns:
      (steps, decisions): the kept steps for `apply_steps`, and for each candidate a dict of
      "step", "dice_before", "dice_after" (mean over cases of their mean foreground Dice, NaN where
      no case has one) and "kept".
    Raises:
      ValueError: There is no case.
    Reference: nnU-Net (Isensee et al. 2021) tries its keep_largest in the same way.
    """
    kept: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    finest: list[float] = []
    by_class, before = _measure(cases, num_classes, kept, finest)
    for step in candidate_steps(num_classes, float(np.median(finest))):
        new_by_class, after = _measure(cases, num_classes, [*kept, step])
        helped = [index for index in step["classes"] if new_by_class[index] > by_class[index]]
        if helped and helped != step["classes"] and not step.get("together"):
            step = step | {"classes": helped}
            new_by_class, after = _measure(cases, num_classes, [*kept, step])
        better = after > before
        decisions.append({"step": step, "dice_before": before, "dice_after": after, "kept": better})
        if better:
            kept.append(step)
            by_class, before = new_by_class, after
    return kept, decisions


def _measure(cases, num_classes, steps, finest=None):
    """Mean Dice over cases of each class, [K], and the mean over cases of their foreground's.

    Appends the smallest spacing of each case to `finest`.
    """

    def score(prediction, reference, spacing_mm):
        if finest is not None:
            finest.append(float(np.min(spacing_mm)))
        mended = apply_steps(prediction, spacing_mm, steps)
        counts = metrics.confusion_counts(mended, reference, num_classes)
        dice = metrics.scores_from_counts(counts)["dice"]
        return {"dice": dice, "foreground": [metrics.mean_foreground(dice)]}

    # Unlike a loop's variables, starmap lets go of a case before it asks for the next.
    summary = metrics.summarise(list(itertools.starmap(score, cases)))
    return summary["dice"]["mean"], float(summary["foreground"]["mean"][0])


def _problem(step, num_classes):
    """What is wrong with one step, or None."""
    name = step.get("name") if isinstance(step, dict) else None
    if not isinstance(name, str) or name not in _STEPS:
        return f"its name must be one of {', '.join(_STEPS)}"
    fields = list(inspect.signature(_STEPS[name]).parameters.values())[2:]
    known = {"name", *(field.name for field in fields)}
    required = {field.name for field in fields if field.default is field.empty}
    if not required <= step.keys() <= known:
        return f"its fields must be {', '.join(sorted(known))}"
    classes = step["classes"]
    are_whole = isinstance(classes, list) and all(type(index) is int for index in classes)
    if not are_whole or not 0 < len(set(classes) & set(range(1, num_classes))) == len(classes):
        return f"classes must be different whole numbers from 1 to {num_classes - 1}"
    if type(step.get("together", False)) is not bool:
        return "together must be true or false"
    for field in required - {"classes"}:
        if type(step[field]) not in (int, float) or not 0 < step[field] <= _LARGEST[field]:
            return f"{field} must be a number above 0 and at most {_LARGEST[field]:g}"
    return None


def _keep_largest(label, spacing_mm, classes, together=False):
    _drop(label, classes, together, lambda sizes: np.arange(len(sizes)) != np.argmax(sizes))


def _remove_small(label, spacing_mm, classes, min_volume_mm3, together=False):
    fewest = min_volume_mm3 / np.prod(spacing_mm) * (1 - _ROUNDING)
    _drop(label, classes, together, lambda sizes: sizes < fewest)


def _drop(label, classes, together, choose_fn):
    """Makes those regions background that `choose_fn` picks by their sizes in voxels."""
    for group, box in _boxes(label, classes, together):
        part = label[box]
        mask = np.isin(part, group)
        planes = _busy_planes(mask)
        regions, _ = ndimage.label(mask[planes], _NEIGHBOURS)
        sizes = np.bincount(regions[regions > 0])[1:]
        dropped = np.concatenate([[False], choose_fn(sizes)])
        part[planes] = np.where(dropped[regions], 0, part[planes])


def _fill_holes(label, spacing_mm, classes):
    for (index,), box in _boxes(label, classes):
        part = label[box]
        planes = _busy_planes(part == index)
        busy = part[planes]
        mask, inner = _pad(busy == index, label.shape, (1, 1, 1))
        regions, _ = ndimage.label(~mask)
        enclosed = (regions != regions[0, 0, 0])[inner]
        part[planes] = np.where(enclosed & (busy == 0), index, busy)


def _open(label, spacing_mm, classes, radius_mm):
    for (index,), box in _boxes(label, classes, margin=1):
        part = label[box]
        mask = part == index
        core = mask & ~_is_near(~mask, radius_mm, spacing_mm)
        part[mask & ~_is_near(core, radius_mm, spacing_mm)] = 0


def _close(label, spacing_mm, classes, radius_mm):
    for (index,), box in _boxes(label, classes):
        part = label[box]
        mask, inner = _pad(part == index, label.shape, _reach(radius_mm, spacing_mm))
        far = ~_is_near(mask, radius_mm, spacing_mm)
        part[~_is_near(far, radius_mm, spacing_mm)[inner] & (part == 0)] = index


def _smooth(label, spacing_mm, classes, sigma_mm):
    sigma = sigma_mm / spacing_mm

    def blur(mask):
        mask = mask.astype(np.float32)
        return ndimage.gaussian_filter(mask, sigma, mode="nearest", truncate=_TRUNCATE)

    source = label.copy()
    for block, around, inner in _blocks(label.shape, _reach(_TRUNCATE * sigma_mm, spacing_mm) + 1):
        part = source[around]
        present = np.flatnonzero(np.bincount(part.ravel()))
        if len(present) > 1:
            smoothed = np.zeros_like(part)
            largest = blur(part == 0)
            for index in np.intersect1d(present, classes):
                share = blur(part == index)
                smoothed[share > largest] = index
                np.maximum(share, largest, out=largest)
            label[block] = np.where(np.isin(part, [0, *classes]), smoothed, part)[inner]


_STEPS: dict[str, Callable[..., None]] = {
    "keep_largest": _keep_largest,
    "remove_small": _remove_small,
    "fill_holes": _fill_holes,
    "open": _open,
    "close": _close,
    "smooth": _smooth,
}


def _boxes(label, classes, together=False, margin=0):
    """Yields each class that is there, or all of them as one group, with the slices around it."""
    found = ndimage.find_objects(label)
    for group in [classes] if together else [[index] for index in classes]:
        boxes = [found[index - 1] for index in group if index <= len(found) and found[index - 1]]
        if boxes:
            bounds = np.array([[(side.start, side.stop) for side in box] for box in boxes])
            first = np.maximum(bounds[..., 0].min(axis=0) - margin, 0)
            yield group, tuple(map(slice, first, bounds[..., 1].max(axis=0) + margin))


def _busy_planes(mask):
    """Indices that leave one of several empty planes: the same regions and holes in less space."""
    used = mask.any(axis=(1, 2)), mask.any(axis=(0, 2)), mask.any(axis=(0, 1))
    return np.ix_(*(line | np.roll(line, 1) for line in used))


def _blocks(shape, reach):
    """Yields slices of blocks that stay in the cache, of each with its surroundings, and back."""
    for start in itertools.product(*(range(0, size, _BLOCK) for size in shape)):
        first = np.maximum(0, start - reach)
        yield (
            tuple(slice(side, side + _BLOCK) for side in start),
            tuple(map(slice, first, start + reach + _BLOCK)),
            tuple(slice(skip, skip + _BLOCK) for skip in start - first),
        )


def _pad(mask, shape, widths):
    """Sets a mask into background along the axes that have an outside; and the slices back."""
    widths = [int(width) if size > 1 else 0 for size, width in zip(shape, widths, strict=True)]
    inner = tuple(slice(w, w + size) for w, size in zip(widths, mask.shape, strict=True))
    return np.pad(mask, [(width, width) for width in widths]), inner


def _reach(distance_mm, spacing_mm):
    """Whole voxels within a distance along each axis, [3]."""
    return np.floor(distance_mm * (1 + _ROUNDING) / spacing_mm).astype(int)


def _is_near(mask, radius_mm, spacing_mm):
    """Whether some voxel of the mask lies within `radius_mm`, the mask included."""
    reach = _reach(radius_mm, spacing_mm)
    near = mask.copy()
    for block, around, inner in _blocks(mask.shape, reach):
        part = mask[around]
        if part.any() and not part.all():
            squared_mm = _squared_distance(part, reach, spacing_mm)[inner]
            near[block] = squared_mm <= (radius_mm * (1 + _ROUNDING)) ** 2
    return near


def _squared_distance(mask, reach, spacing_mm):
    """Squared distance to the mask in mm, right within `reach` voxels along each axis.

    A lower envelope of parabolas, axis by axis (Felzenszwalb and Huttenlocher 2012), of which a
    small ball needs the bottom alone: ten times faster than a whole distance transform.
    """
    squared = np.where(mask, np.float32(0), np.float32(np.inf))
    for axis, (spacing, farthest) in enumerate(zip(spacing_mm, reach, strict=True)):
        source = np.moveaxis(squared, axis, 0)
        lowest = source.copy()
        for offset in range(1, min(farthest, len(source) - 1) + 1):
            lifted = source + np.float32((offset * spacing) ** 2)
            np.minimum(lowest[offset:], lifted[:-offset], out=lowest[offset:])
            np.minimum(lowest[:-offset], lifted[offset:], out=lowest[:-offset])
        squared = np.moveaxis(lowest, 0, axis)
    return squared
