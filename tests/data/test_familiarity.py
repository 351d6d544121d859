"""Typical ranges: values by hand, the share of false flags, and what must not pass unflagged."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from jaxseg import geometry
from jaxseg.data import familiarity
from jaxseg.data.familiarity import describe_image, typical_ranges, unlike_reasons
from jaxseg.data.images import read_image


def blob_image(rng, shape=(20, 24, 18), noise=0.3):
    """A bright blob off the centre in noise, at an arbitrary scale, [*shape, 1]."""
    axes = [(np.arange(n) + 0.5) / n for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    blob = np.exp(-(((x - 0.3) / 0.2) ** 2) - ((y - 0.6) / 0.3) ** 2 - ((z - 0.4) / 0.2) ** 2)
    image = 10 ** rng.uniform(0, 4) * (blob + noise * rng.random(shape))
    return image[..., None].astype(np.float32)


def blob_features(num=12, shape=(20, 24, 18), spacing_mm=(1.0, 1.0, 2.0), seed=0):
    rng = np.random.default_rng(seed)
    return [describe_image(blob_image(rng, shape), spacing_mm, ("zscore",)) for _ in range(num)]


def numbers(name, values):
    return [{name: float(value)} for value in values]


def test_geometry_in_millimetres_or_pixels():
    volume = describe_image(np.zeros((4, 5, 6, 1)), (0.5, 2.0, 3.0), ("ct",))
    assert [volume[f"spacing_mm/{axis}"] for axis in "xyz"] == [0.5, 2, 3]
    assert [volume[f"extent_mm/{axis}"] for axis in "xyz"] == [2, 10, 18]
    picture = describe_image(np.zeros((4, 5, 1, 1)), np.ones(3), ("zscore",), is_picture=True)
    assert [picture[f"extent_px/{axis}"] for axis in "xy"] == [4, 5]
    assert not [name for name in picture if "mm" in name]


def test_ct_is_described_in_its_own_units_and_mri_whatever_its_scale():
    image = np.random.default_rng(0).gamma(2.0, 50.0, (9, 8, 7, 2))
    features = describe_image(image, (1, 1, 1), ("ct", "zscore"))
    rescaled = describe_image(3e4 * image + 500, (1, 1, 1), ("ct", "zscore"))
    low, high = np.percentile(image[..., 1], [0.5, 99.5])
    clipped = np.clip(image[..., 1], low, high)
    for q in (1, 50, 99):
        found = features[f"intensity_hu/channel 0/percentile {q}"]
        assert found == pytest.approx(np.percentile(image[..., 0], q))
        name = f"intensity_sd/channel 1/percentile {q}"
        expected = (np.percentile(clipped, q) - clipped.mean()) / clipped.std()
        assert features[name] == pytest.approx(expected)
        assert rescaled[name] == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(4, 4, 4), (9, 6, 1), (7, 3, 13)])
def test_layout_is_the_mean_of_equal_parts(shape):
    image = np.random.default_rng(0).normal(size=(*shape, 1))
    layout = describe_image(image, (2, 2, 2), ("ct",))["layout_sd/channel 0"]
    clipped = np.clip(image[..., 0], *np.percentile(image, [0.5, 99.5]))
    scaled = (clipped - clipped.mean()) / clipped.std()
    parts = [[(i * n // 4, max((i + 1) * n // 4, i * n // 4 + 1)) for i in range(4)] for n in shape]
    expected = [
        scaled[x0:x1, y0:y1, z0:z1].mean()
        for x0, x1 in parts[0]
        for y0, y1 in parts[1]
        for z0, z1 in parts[2]
    ]
    np.testing.assert_allclose(layout, expected)


def test_a_large_image_is_described_by_some_of_its_voxels(monkeypatch):
    image = blob_image(np.random.default_rng(0), (60, 48, 40))
    monkeypatch.setattr(familiarity, "MAX_VOXELS", 5000)
    features = describe_image(image, (1, 1, 1), ("zscore",))
    every_third = describe_image(image[::3, ::3, ::3], (3, 3, 3), ("zscore",))
    assert features["extent_mm/x"] == 60
    names = [name for name in features if "channel" in name]
    assert [features[name] for name in names] == [every_third[name] for name in names]


def test_limits_are_a_prediction_interval_that_holds_what_was_seen_and_tolerated():
    heights = [100.0, 130.0, 90.0, 170.0]
    alpha = familiarity.FALSE_FLAGS  # a single number is looked at
    logs = np.log(heights)
    t = stats.t.ppf(1 - alpha / 2, 3) * logs.std(ddof=1) * math.sqrt(1.25)
    wide = typical_ranges(numbers("extent_mm/z", heights))["extent_mm/z"]
    assert (wide["min"], wide["max"]) == (90, 170)
    assert wide["low"] == pytest.approx(math.exp(logs.mean() - t))
    assert wide["high"] == pytest.approx(math.exp(logs.mean() + t))
    alike = typical_ranges(numbers("spacing_mm/z", [2, 2, 2]))["spacing_mm/z"]
    assert (alike["low"], alike["high"]) == pytest.approx((1.6, 2.5))
    odd = typical_ranges(numbers("intensity_hu/channel 0/percentile 50", [0.0] * 50 + [400.0]))
    assert odd["intensity_hu/channel 0/percentile 50"]["high"] == 400


def test_a_layout_is_held_against_the_sum_of_the_others():
    layouts = np.random.default_rng(0).normal(size=(4, 64)) + np.linspace(-2, 2, 64)
    features = [{"layout_sd/channel 0": layout.tolist()} for layout in layouts]
    limits = typical_ranges(features)["layout_sd/channel 0"]
    total = layouts.sum(axis=0)
    others = [np.corrcoef(total - layout, layout)[0, 1] for layout in layouts]
    assert (limits["min"], limits["max"]) == pytest.approx((min(others), max(others)))
    assert limits["low"] < limits["min"] and limits["high"] == 1
    np.testing.assert_allclose(limits["template"], total)


@pytest.mark.parametrize("num", [4, 8, 30])
def test_share_of_false_flags_is_the_one_promised(num):
    rng = np.random.default_rng(0)
    names = [f"intensity_hu/channel {c}/percentile 50" for c in range(8)]
    flagged = 0
    for _ in range(400):
        cohort = [dict(zip(names, row, strict=True)) for row in rng.normal(0, 300, (num + 1, 8))]
        flagged += bool(unlike_reasons(cohort[-1], typical_ranges(cohort[:-1])))
    assert 0.001 < flagged / 400 < 2 * familiarity.FALSE_FLAGS


def test_reasons_name_what_is_unusual_and_what_is_usual():
    ramp = np.linspace(40, 140, 11)[:, None, None, None]

    def scan(num_slices, mm):
        return describe_image(np.tile(ramp, (1, 10, num_slices, 1)), (1, 1, mm), ("ct",))

    training = [scan(100, 0.9), scan(90, 1.0), scan(75, 1.2), scan(92, 1.0), scan(80, 1.1)]
    ranges = typical_ranges(training)
    assert unlike_reasons(scan(18, 5), ranges) == [
        "voxel spacing along z is 5 mm, training 0.9 to 1.2"
    ]
    short = dict(training[0]) | {"extent_mm/z": 30.0}
    assert unlike_reasons(short, ranges) == ["field of view along z is 30 mm, training 88 to 92"]
    bright = dict(training[0]) | {
        "intensity_hu/channel 0/percentile 75": 500.0,
        "intensity_hu/channel 0/percentile 99": 1234.5,
    }
    reason = "intensity (channel 0, percentile 99) is 1234 HU, training 140"
    assert unlike_reasons(bright, ranges) == [reason]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda image: -image, "agreement in where bright and dark lie (channel 0) is -0.99"),
        (lambda image: image[::-1], "agreement in where bright and dark lie (channel 0) is "),
        (lambda image: image[10:], "field of view along x is 10 mm, training 20"),
        (lambda image: np.zeros_like(image), "intensity (channel 0, percentile 99) is 0 SD"),
    ],
)
def test_inverted_turned_cropped_and_empty_images_are_flagged(change, reason):
    ranges = json.loads(json.dumps(typical_ranges(blob_features()), allow_nan=False))
    image = blob_image(np.random.default_rng(99))
    assert unlike_reasons(describe_image(image, (1, 1, 2), ("zscore",)), ranges) == []
    reasons = unlike_reasons(describe_image(change(image), (1, 1, 2), ("zscore",)), ranges)
    assert any(found.startswith(reason) for found in reasons), reasons


def test_slices_of_one_mm_are_no_pictures():
    rng = np.random.default_rng(0)
    slices = [(rng.random((20, 24, 1, 1)), (mm, mm, 1.0)) for mm in (0.9, 1.0, 1.0, 1.1)]
    features = [describe_image(image, spacing, ("zscore",)) for image, spacing in slices]
    ranges = typical_ranges(features)
    assert {f"spacing_mm/{axis}" for axis in "xyz"} <= ranges.keys()
    assert "pixels" not in " ".join(unlike_reasons(features[1], ranges))


def test_a_picture_among_volumes_is_flagged():
    ranges = typical_ranges(blob_features())
    picture = describe_image(
        np.random.default_rng(0).random((20, 24, 1, 1)), np.ones(3), ("zscore",), is_picture=True
    )
    assert "pixels" in unlike_reasons(picture, ranges)[0]


def test_too_few_images_flag_nothing():
    few = blob_features(num=familiarity.MIN_IMAGES - 1)
    assert typical_ranges(few) == {}
    assert unlike_reasons(blob_features(num=1, spacing_mm=(9, 9, 9))[0], {}) == []


def test_real_images_of_held_out_people_pass_and_altered_ones_do_not(shared_data):
    root = shared_data("Task04_Hippocampus")
    split = json.loads((root / "subject_split.json").read_text())

    def features_of(case, change=lambda image, spacing_mm: (image, spacing_mm)):
        image, affine = read_image(root / "imagesTr" / f"{case}.nii.gz")
        image, affine = geometry.to_canonical(image, affine)
        spacing_mm = geometry.spacing_mm_from_affine(affine)
        return describe_image(*change(image, spacing_mm), ("zscore",))

    ranges = typical_ranges([features_of(case) for case in sorted(split["train"])[:20]])
    held_out = sorted(split["val"])[:20]
    assert sum(bool(unlike_reasons(features_of(case), ranges)) for case in held_out) <= 1
    for change in (
        lambda image, spacing_mm: (-image, spacing_mm),
        lambda image, spacing_mm: (image, 10 * spacing_mm),
        lambda image, spacing_mm: (image[: len(image) // 2], spacing_mm),
        lambda image, spacing_mm: (np.where(image > np.median(image), 40, -1000), spacing_mm),
    ):
        assert all(unlike_reasons(features_of(case, change), ranges) for case in held_out)
