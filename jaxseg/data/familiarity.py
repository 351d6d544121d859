"""Is an image like those a model was trained on? In millimetres and intensities, with the reason.

An image is described by a few numbers; those of the training images give typical ranges; what lies
outside them is said in a sentence. It is a warning, not a proof: an image inside all ranges can
still show something no training image did.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

QUANTILES = (1, 25, 50, 75, 99)
CELLS = 4  # of the layout, along each axis
MAX_VOXELS = 1_000_000  # looked at, of an image of any size
# With fewer training images there is no telling what is typical.
MIN_IMAGES = 3
# Share of images like the training ones that all limits together would flag, were they normal.
FALSE_FLAGS = 0.02
# Of each kind of number: the scale on which it spreads evenly and the way back; the distance from
# the training mean, on that scale, that no network minds however alike the training images are;
# and how to say that one is unusual.
KINDS = {
    "spacing_mm": (np.log, np.exp, math.log(1.25), "voxel spacing along {} is {} mm"),
    "extent_mm": (np.log, np.exp, math.log(1.25), "field of view along {} is {} mm"),
    "extent_px": (np.log, np.exp, math.log(1.25), "size along {} is {} pixels"),
    "intensity_hu": (np.positive, np.positive, 25, "intensity ({}) is {} HU"),
    "intensity_sd": (np.positive, np.positive, 0.2, "intensity ({}) is {} SD from the mean"),
    "layout_sd": (np.arctanh, np.tanh, 0.3, "agreement in where bright and dark lie ({}) is {}"),
}


def describe_image(
    image: np.ndarray,
    spacing_mm: Iterable[float],
    normalisation: Sequence[str],
    *,
    is_picture: bool = False,
) -> dict[str, float | list[float]]:
    """Numbers that tell one kind of image from another.

    Spacing and extent (voxels times spacing) along each axis. For each channel, percentiles of the
    intensity: in Hounsfield units where normalisation is "ct"; otherwise, as the scale of MRI is
    arbitrary, in standard deviations from the mean, both taken between the 0.5 and 99.5 percentiles
    as for the network's input. And its layout: the mean intensity in 4 x 4 x 4 equal parts.

    Args:
      image: Raw intensities in RAS+ axes, [X, Y, Z, C], any real dtype.
      spacing_mm: 3 floats.
      normalisation: scheme of each channel, as in the plan.
      is_picture: whether it is measured in pixels.
    Returns:
      JSON-ready dict: "spacing_mm/x", "extent_mm/x" ("extent_px/x" of a picture) and so on; of each
      channel c "intensity_sd/channel c/percentile 99" ("intensity_hu/...") and so on, all floats,
      and "layout_sd/channel c", a list of 64 floats.
    """
    shape, spacing_mm = image.shape[:3], tuple(map(float, spacing_mm))
    if is_picture:
        features: dict[str, float | list[float]] = {
            f"extent_px/{axis}": float(shape[i]) for i, axis in enumerate("xy")
        }
    else:
        features = {f"spacing_mm/{axis}": spacing_mm[i] for i, axis in enumerate("xyz")}
        features |= {f"extent_mm/{axis}": shape[i] * spacing_mm[i] for i, axis in enumerate("xyz")}
    step = math.ceil((math.prod(shape) / MAX_VOXELS) ** (1 / 3))
    for channel, normalised in enumerate(normalisation):
        raw = image[::step, ::step, ::step, channel].astype(np.float64)
        clipped = np.clip(raw, *np.percentile(raw, [0.5, 99.5]))
        scaled = (clipped - clipped.mean()) / (clipped.std() or 1.0)
        kind, values = ("intensity_hu", raw) if normalised == "ct" else ("intensity_sd", scaled)
        for q, value in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True):
            features[f"{kind}/channel {channel}/percentile {q}"] = float(value)
        features[f"layout_sd/channel {channel}"] = _cell_means(scaled).ravel().tolist()
    return features


def typical_ranges(
    features: Sequence[Mapping[str, float | list[float]]],
) -> dict[str, dict[str, Any]]:
    """What the training images have in common.

    The limits of each number are those between which one more draw from a normal distribution lies
    with probability 1 - FALSE_FLAGS / (how many numbers there are), on the scale of its kind; they
    hold at least the values seen and the tolerance. So few images, or images unlike each other,
    flag little.

    Args:
      features: `describe_image` of each training image, all with the same names.
    Returns:
      JSON-ready dict from each name to a dict of "min" and "max" seen and the limits "low" and
      "high". A layout is measured by its correlation with the sum of all, "template" (that of a
      training image with the sum of the others). Empty for fewer than `MIN_IMAGES` images.
    """
    if len(features) < MIN_IMAGES:
        return {}
    alpha, ranges = FALSE_FLAGS / len(features[0]), {}
    for name in features[0]:
        values, own = np.array([each[name] for each in features]), {}
        if values.ndim == 2:
            template = values.sum(axis=0)
            own = {"template": template.tolist(), "high": 1.0}
            values = np.array([_correlation(template - each, each) for each in values])
        ranges[name] = _range(values, name, alpha) | own
    return ranges


def are_ranges(ranges: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether what a file holds can be of `typical_ranges`; may raise where it is not."""
    return all(
        name.partition("/")[0] in KINDS
        and np.isfinite([limits[each] for each in ("min", "max", "low", "high")]).all()
        and np.isfinite(limits.get("template", [0.0] * CELLS**3)).tolist() == [True] * CELLS**3
        for name, limits in ranges.items()
    )


def unlike_reasons(
    features: Mapping[str, float | list[float]], ranges: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Says what is unusual about an image; of the percentiles of a channel only the worst.

    Args:
      features: `describe_image` of the image.
      ranges: `typical_ranges` of the training images.
    Returns:
      List of sentences, such as "voxel spacing along z is 5 mm, training 0.9 to 1.2"; empty for an
      image that is like them.
    """
    if ranges.keys() - features.keys():
        return ["it is not measured as the training images are: pixels against millimetres"]
    worst: dict[str, tuple[float, str, float]] = {}
    for name, limits in ranges.items():
        value, low, high = features[name], limits["low"], limits["high"]
        if isinstance(value, list):  # a layout
            value = _correlation(np.array(limits["template"]), np.array(value))
        excess = max(low - value, value - high) / (high - low)
        group = name.partition("/percentile")[0]
        if excess > worst.get(group, (0,))[0]:
            worst[group] = excess, name, value
    return [_sentence(name, value, ranges[name]) for _, name, value in worst.values()]


def _cell_means(values):
    """Means of CELLS parts along each of 3 axes; an axis with fewer voxels repeats them."""
    for axis, size in enumerate(values.shape):
        starts = np.arange(CELLS) * size // CELLS
        counts = np.maximum(np.diff(starts, append=size), 1)
        values = np.moveaxis(np.add.reduceat(values, starts, axis), axis, -1) / counts
        values = np.moveaxis(values, -1, axis)
    return values


def _correlation(a, b):
    """Pearson's, short of 1 so that arctanh is finite; 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / norm, -0.999, 0.999)) if norm else 0.0


def _range(values, name, alpha):
    scale, inverse, tolerance, _ = KINDS[name.partition("/")[0]]
    scaled, num = scale(values), len(values)
    width = stats.t.ppf(1 - alpha / 2, num - 1) * scaled.std(ddof=1) * math.sqrt(1 + 1 / num)
    width = max(width, tolerance)
    low, high = inverse([scaled.mean() - width, scaled.mean() + width]).tolist()
    seen = {"min": float(values.min()), "max": float(values.max())}
    return seen | {"low": min(low, seen["min"]), "high": max(high, seen["max"])}


def _sentence(name, value, limits):
    kind, _, where = name.partition("/")
    value, low, high = (
        f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
        for number in (value, limits["min"], limits["max"])
    )
    seen = low if low == high else f"{low} to {high}"
    return f"{KINDS[kind][-1].format(where.replace('/', ', '), value)}, training {seen}"
