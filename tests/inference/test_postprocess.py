"""Steps against hand-made labels and brute-force float64 distances; the choice by hand."""

import itertools
import json
import weakref

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from jaxseg.inference import postprocess
from jaxseg.inference.postprocess import (
    apply_steps,
    candidate_steps,
    check_steps,
    choose_steps,
    shortened,
)

ISOTROPIC = (1.0, 1.0, 1.0)
ANISOTROPIC = (0.7, 1.3, 2.9)
SHAPES = [(9, 8, 7), (12, 11, 1), (1, 9, 10)]


def random_label(shape, num_classes=4, seed=0, sigma=1.2, salt=0.1):
    """Blobs of every class with ragged outlines, holes, islands and cuts by the edge."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(num_classes, *shape))
    label = np.argmax(ndimage.gaussian_filter(noise, (0, *(sigma,) * 3)), axis=0)
    return np.where(rng.random(shape) < salt, 0, label).astype(np.uint8)


def plane(*rows):
    """A one-slice label, [H, W, 1], from its rows of digits."""
    return np.array([[int(value) for value in row] for row in rows], np.uint8)[..., None]


def step(name, *classes, **fields):
    return {"name": name, "classes": list(classes)} | fields


def test_steps_come_one_after_the_other_and_leave_the_input_alone():
    label = plane("1101", "0000", "2220", "2020", "2220")
    before = label.copy()
    steps = [step("keep_largest", 1), step("fill_holes", 2)]
    expected = plane("1100", "0000", "2220", "2220", "2220")
    np.testing.assert_array_equal(apply_steps(label, ISOTROPIC, steps), expected)
    np.testing.assert_array_equal(label, before)
    same = apply_steps(label, ISOTROPIC, [])
    np.testing.assert_array_equal(same, before)
    assert not np.shares_memory(same, label)


# Regions: keep_largest, remove_small


def brute_force_regions(mask):
    """Sets of voxels that hang together by faces, edges and corners, in scan order."""
    left, regions = set(map(tuple, np.argwhere(mask).tolist())), []
    for seed in map(tuple, np.argwhere(mask).tolist()):
        if seed in left:
            left.remove(seed)
            region, queue = [], [seed]
            while queue:
                voxel = queue.pop()
                region.append(voxel)
                near = {
                    tuple(np.add(voxel, move).tolist())
                    for move in itertools.product((-1, 0, 1), repeat=3)
                }
                queue += near & left
                left -= near
            regions.append(region)
    return regions


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", ["keep_largest", "remove_small"])
def test_regions_match_brute_force(shape, together, name):
    label = random_label(shape, sigma=0.6, num_classes=14)
    label[label > 5] = 0
    volume_mm3 = 0.7 * 1.3 * 2.9
    minimum = {"min_volume_mm3": 5.5 * volume_mm3} if name == "remove_small" else {}
    expected = label.copy()
    for classes in [[1, 3, 5]] if together else [[1], [3], [5]]:
        regions = brute_force_regions(np.isin(label, classes))
        largest = max(regions, key=len)
        for region in regions:
            if (len(region) < 5.5) if minimum else (region is not largest):
                expected[tuple(np.transpose(region))] = 0
    result = apply_steps(label, ANISOTROPIC, [step(name, 1, 3, 5, together=together) | minimum])
    assert (result != label).any()
    np.testing.assert_array_equal(result, expected)


def test_first_of_equal_regions_stays_and_corners_connect():
    label = plane("11000", "00100", "00000", "00011", "00001")
    expected = plane("11000", "00100", "00000", "00000", "00000")
    result = apply_steps(label, ISOTROPIC, [step("keep_largest", 1)])
    np.testing.assert_array_equal(result, expected)


def test_together_an_organ_keeps_the_tumour_that_it_touches():
    label = plane("1102", "1120", "0000", "2200")
    alone = plane("1102", "1120", "0000", "0000")
    touching = step("keep_largest", 1, 2, together=True)
    np.testing.assert_array_equal(apply_steps(label, ISOTROPIC, [touching]), alone)
    apart = apply_steps(label, ISOTROPIC, [step("keep_largest", 1, 2)])
    np.testing.assert_array_equal(apart, alone)  # first of equals
    label[3, 2] = 2
    apart = apply_steps(label, ISOTROPIC, [step("keep_largest", 1, 2)])
    np.testing.assert_array_equal(apart, plane("1100", "1100", "0000", "2220"))
    np.testing.assert_array_equal(apply_steps(label, ISOTROPIC, [touching]), alone)


@pytest.mark.parametrize("spacing_mm", [(0.1, 1.0, 10.0), (0.0999999999, 1.0, 10.0)])
def test_a_region_of_just_the_smallest_volume_stays(spacing_mm):
    label = plane("1110", "0000", "1100")
    result = apply_steps(label, spacing_mm, [step("remove_small", 1, min_volume_mm3=3)])
    np.testing.assert_array_equal(result, plane("1110", "0000", "0000"))


# Holes


@pytest.mark.parametrize("shape", SHAPES)
def test_holes_match_scipy_on_the_whole_volume(shape):
    label = random_label(shape, num_classes=3, seed=1, sigma=2.0)
    expected = label.copy()
    plane_axes = [axis for axis, size in enumerate(shape) if size == 1]
    for index in (2, 1):
        mask = np.squeeze(label == index, tuple(plane_axes))
        filled = np.expand_dims(ndimage.binary_fill_holes(mask), plane_axes)
        expected[filled & (expected == 0)] = index
    result = apply_steps(label, ISOTROPIC, [step("fill_holes", 2, 1)])
    assert (result != label).any()
    np.testing.assert_array_equal(result, expected)


def test_holes_open_to_the_edge_stay_and_other_classes_in_them_too():
    label = plane("11111", "10201", "11111", "10001", "10001")
    expected = plane("11111", "11211", "11111", "10001", "10001")
    result = apply_steps(label, ISOTROPIC, [step("fill_holes", 1)])
    np.testing.assert_array_equal(result, expected)


# Opening and closing


def brute_force_near(mask, radius_mm, spacing_mm):
    voxels = np.stack(np.indices(mask.shape), -1).reshape(-1, 3) * np.asarray(spacing_mm)
    distance_mm = cdist(voxels, voxels[mask.ravel()])
    return (distance_mm <= radius_mm + 1e-9).any(axis=1).reshape(mask.shape)


def brute_force_open(mask, radius_mm, spacing_mm):
    core = mask & ~brute_force_near(~mask, radius_mm, spacing_mm)
    return brute_force_near(core, radius_mm, spacing_mm)


def brute_force_close(mask, radius_mm, spacing_mm):
    """On a grid that goes on beyond the volume, save along axes of one voxel."""
    widths = [(3, 3) if size > 1 else (0, 0) for size in mask.shape]
    inner = tuple(
        slice(before, before + n) for (before, _), n in zip(widths, mask.shape, strict=True)
    )
    far = ~brute_force_near(np.pad(mask, widths), radius_mm, spacing_mm)
    return ~brute_force_near(far, radius_mm, spacing_mm)[inner]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("spacing_mm", "radius_mm"),
    [(ISOTROPIC, 1.0), (ISOTROPIC, 2.0), (ANISOTROPIC, 1.4), (ANISOTROPIC, 1.5), ((3, 1, 1), 2.3)],
)
def test_opening_and_closing_match_brute_force(shape, spacing_mm, radius_mm):
    label = random_label(shape, sigma=0.8, num_classes=3)
    expected = label.copy()
    for index in (1, 2):
        opened = brute_force_open(expected == index, radius_mm, spacing_mm)
        expected[(expected == index) & ~opened] = 0
    opening = step("open", 1, 2, radius_mm=radius_mm)
    np.testing.assert_array_equal(apply_steps(label, spacing_mm, [opening]), expected)

    expected = label.copy()
    for index in (2, 1):
        closed = brute_force_close(expected == index, radius_mm, spacing_mm)
        expected[closed & (expected == 0)] = index
    closing = step("close", 2, 1, radius_mm=radius_mm)
    result = apply_steps(label, spacing_mm, [closing])
    assert (result != label).any()
    np.testing.assert_array_equal(result, expected)


def test_blocks_do_not_show(monkeypatch):
    label = random_label((16, 13, 12), sigma=1.5)
    steps = [
        step("open", 1, 2, radius_mm=1.0),
        step("close", 3, radius_mm=2.0),
        step("smooth", 1, 2, 3, sigma_mm=0.7),
    ]
    for tried in steps:
        whole = apply_steps(label, ISOTROPIC, [tried])
        assert (whole != label).any()
        with monkeypatch.context() as patch:
            patch.setattr(postprocess, "_BLOCK", 5)
            np.testing.assert_array_equal(apply_steps(label, ISOTROPIC, [tried]), whole)


@pytest.mark.parametrize("spacing", [1.4, 1.4 * (1 - 1e-7), 1.4 * (1 + 1e-7)])
def test_a_voxel_at_just_the_radius_counts_whatever_the_rounding(spacing):
    spur = plane("00000", "01110", "01111", "01110", "00000")
    result = apply_steps(spur, (spacing, spacing, 9.0), [step("open", 1, radius_mm=1.4)])
    np.testing.assert_array_equal(result, plane("00000", "00110", "01111", "00110", "00000"))


def test_millimetres_not_voxels():
    bridge = np.zeros((5, 1, 9), np.uint8)
    bridge[1:4] = 1
    steps = [step("open", 1, radius_mm=2.0)]
    assert apply_steps(bridge, (2.5, 1.0, 1.0), steps).sum() == 27
    assert apply_steps(bridge, (1.0, 1.0, 1.0), steps).sum() == 0


def test_opening_keeps_what_the_edge_of_the_volume_cuts():
    cut = np.zeros((8, 8, 8), np.uint8)
    cut[2:6, 2:6, :2] = 1  # 2 mm thick here, an organ that goes on below
    opened = apply_steps(cut, ISOTROPIC, [step("open", 1, radius_mm=1.5)])
    assert opened[3:5, 3:5, 0].all()
    full = np.ones((4, 4, 4), np.uint8)
    np.testing.assert_array_equal(
        apply_steps(full, ISOTROPIC, [step("open", 1, radius_mm=1.5)]), full
    )


def test_closing_does_not_stick_to_the_edge_of_the_volume():
    square = np.zeros((9, 9, 9), np.uint8)
    square[1:5, 2:6, 1:8] = 1
    closed = apply_steps(square, ISOTROPIC, [step("close", 1, radius_mm=3.0)])
    np.testing.assert_array_equal(closed, square)


# Smoothing


def blur_matrix(size, sigma_mm, spacing_mm):
    """Gaussian weights along one axis, the edge going on; cut off where SciPy cuts at 3 sigma."""
    sigma = sigma_mm / spacing_mm
    reach = int(3 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    matrix = np.zeros((size, size))
    for row in range(size):
        columns = np.clip(np.arange(row - reach, row + reach + 1), 0, size - 1)
        np.add.at(matrix[row], columns, weights / weights.sum())
    return matrix


@pytest.mark.parametrize("shape", [(24, 9, 7), *SHAPES])
@pytest.mark.parametrize("spacing_mm", [ISOTROPIC, ANISOTROPIC])
def test_smoothing_matches_float64(shape, spacing_mm):
    label = random_label(shape, sigma=0.7, num_classes=5)
    label[12:] = 0  # a box that is not the whole volume
    label[16:18] = 4
    classes = [1, 3]
    matrices = [blur_matrix(n, 1.1, s) for n, s in zip(shape, spacing_mm, strict=True)]
    share = np.stack(
        [
            np.einsum("ai,bj,ck,ijk->abc", *matrices, (label == index).astype(np.float64))
            for index in (0, *classes)
        ]
    )
    second, first = np.sort(share, axis=0)[-2:]
    clear = first - second > 1e-5
    assert clear.mean() > 0.9
    expected = np.where(np.isin(label, [2, 4]), label, np.array([0, *classes])[share.argmax(0)])
    result = apply_steps(label, spacing_mm, [step("smooth", *classes, sigma_mm=1.1)])
    assert result.dtype == np.uint8
    assert (result != label).any()
    np.testing.assert_array_equal(result[clear], expected[clear])


def test_smoothing_gives_an_islet_to_the_class_around_it():
    label = np.ones((7, 7, 7), np.uint8)
    label[3, 3, 3] = 2
    smoothed = apply_steps(label, ISOTROPIC, [step("smooth", 1, 2, sigma_mm=1.0)])
    assert (smoothed == 1).all()
    kept = apply_steps(label, ISOTROPIC, [step("smooth", 1, sigma_mm=1.0)])
    np.testing.assert_array_equal(kept, label)


# All steps


@pytest.mark.parametrize("tried", candidate_steps(4), ids=lambda tried: tried["name"])
def test_every_candidate_treats_axes_alike_and_a_larger_volume_too(tried):
    label = random_label((14, 13, 12), sigma=1.6)
    label[[0, -1]] = label[:, [0, -1]] = label[:, :, [0, -1]] = 0
    label[7] = 0
    expected = apply_steps(label, ANISOTROPIC, [tried])
    assert (expected != label).any()

    permuted = apply_steps(label.transpose(2, 0, 1), np.take(ANISOTROPIC, [2, 0, 1]), [tried])
    np.testing.assert_array_equal(permuted.transpose(1, 2, 0), expected)
    padded = apply_steps(np.pad(label, 7), ANISOTROPIC, [tried])
    np.testing.assert_array_equal(padded[7:-7, 7:-7, 7:-7], expected)
    assert np.count_nonzero(padded) == np.count_nonzero(expected)


@pytest.mark.parametrize("tried", candidate_steps(3), ids=lambda tried: tried["name"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 1), (1, 1, 1)])
def test_an_absent_class_and_one_that_fills_the_volume_are_left_alone(tried, shape):
    tried = tried | {"min_volume_mm3": 1.0} if "min_volume_mm3" in tried else tried
    for value in (0, 1, 7):
        label = np.full(shape, value, np.uint8)
        np.testing.assert_array_equal(apply_steps(label, ISOTROPIC, [tried]), label)


# Choosing


class Cases:
    """Hands out copies of each case; remembers how many were alive at once."""

    def __init__(self, pairs):
        self.pairs = pairs
        self.handed_out = []
        self.most_alive = 0

    def __iter__(self):
        for prediction, reference in self.pairs:
            yield self.remember(prediction.copy()), reference, ISOTROPIC

    def remember(self, array):
        self.handed_out.append(weakref.ref(array))
        alive = sum(handed() is not None for handed in self.handed_out)
        self.most_alive = max(self.most_alive, alive)
        return array


def test_choice_by_hand():
    # Class 1 has a stray voxel; class 2 is in two parts and rightly so.
    reference = plane("111000222", "111000222", "111000000", "000000022", "000000000")
    prediction = plane("111010222", "111000222", "111000000", "000000022", "000000000")
    steps, decisions = choose_steps([(prediction, reference, ISOTROPIC)], 3)
    assert steps[0] == {"name": "keep_largest", "classes": [1]}
    assert decisions[0]["step"] == {"name": "keep_largest", "classes": [1, 2], "together": True}
    assert not decisions[0]["kept"]
    assert decisions[0]["dice_before"] == pytest.approx((18 / 19 + 1) / 2)
    # Together the first region stays, class 1's: it is perfect then and class 2 gone.
    assert decisions[0]["dice_after"] == pytest.approx((1 + 0) / 2)
    assert decisions[1]["kept"]
    assert decisions[1]["dice_after"] == 1.0
    assert all(d["dice_before"] == 1.0 and not d["kept"] for d in decisions[2:])
    assert len(decisions) == len(candidate_steps(3))
    assert len(steps) == 1
    check_steps(json.loads(json.dumps(steps)), 3)


def test_a_step_is_judged_after_those_kept_and_on_the_classes_it_helps():
    reference = plane("11111000", "11111000", "11111022", "11111022", "00000000")
    prediction = plane("11111000", "10111000", "11111022", "11111022", "00000001")
    prediction[4, 6] = 1
    steps, decisions = choose_steps([(prediction, reference, ISOTROPIC)] * 2, 3)
    assert steps[:2] == [step("keep_largest", 1), step("fill_holes", 1)]
    dice = [(decision["dice_before"], decision["dice_after"]) for decision in decisions]
    spoilt, no_island, perfect = (38 / 41 + 1) / 2, (38 / 39 + 1) / 2, 1.0
    np.testing.assert_allclose(dice[1], (spoilt, no_island))
    assert decisions[2]["step"] == step("remove_small", 1, 2, min_volume_mm3=10.0)
    np.testing.assert_allclose(dice[2], (no_island, (38 / 39 + 0) / 2))
    np.testing.assert_allclose(dice[5], (no_island, perfect))
    assert decisions[6]["step"] == step("close", 1, 2, radius_mm=1.0)
    np.testing.assert_allclose(dice[6], (perfect, perfect))


def test_mean_is_over_cases_of_their_foreground_and_a_false_alarm_counts_until_removed():
    reference = plane("1111", "1111", "0000", "0000")
    false_alarm = plane("1111", "1111", "0000", "0002")
    half = plane("1111", "0000", "0000", "0000")
    cases = [(false_alarm, reference, ISOTROPIC), (half, reference, ISOTROPIC)]
    steps, decisions = choose_steps(cases, 3)
    assert decisions[0]["dice_before"] == pytest.approx(((1 + 0) / 2 + 8 / 12) / 2)
    assert decisions[0]["dice_after"] == pytest.approx((1 + 8 / 12) / 2)
    assert steps == [{"name": "keep_largest", "classes": [1, 2], "together": True}]


def test_dice_never_falls_and_decisions_follow_from_each_other():
    pairs = []
    for seed in range(3):
        reference = random_label((10, 9, 8), seed=seed, sigma=2.0, salt=0)
        salt = np.random.default_rng(seed).integers(0, 4, reference.shape)
        pairs.append((np.where(salt == 3, salt, reference).astype(np.uint8), reference))
    cases = Cases(pairs)
    steps, decisions = choose_steps(cases, 4)
    assert cases.most_alive == 1
    assert steps == [decision["step"] for decision in decisions if decision["kept"]]
    assert {decision["kept"] for decision in decisions} == {True, False}
    dice = decisions[0]["dice_before"]
    for decision in decisions:
        assert decision["dice_before"] == dice
        assert decision["kept"] == (decision["dice_after"] > dice)
        dice = max(dice, decision["dice_after"])
    by_case = []
    for prediction, reference in pairs:
        mended = apply_steps(prediction, ISOTROPIC, steps)
        by_class = [
            2
            * np.sum((mended == c) & (reference == c))
            / np.sum((mended == c) + 0.0 + (reference == c))
            for c in (1, 2, 3)
        ]
        by_case.append(np.mean(by_class))
    assert dice == pytest.approx(np.mean(by_case))


def test_nothing_is_kept_where_nothing_can_be_scored():
    empty = np.zeros((4, 4, 1), np.uint8)
    steps, decisions = choose_steps([(empty, empty, ISOTROPIC)], 2)
    assert steps == []
    assert not any(decision["kept"] for decision in decisions)
    with pytest.raises(ValueError, match="at least one case"):
        choose_steps([], 2)


# Reading


def test_candidates_survive_json():
    for num_classes in (2, 3, 21):
        steps = candidate_steps(num_classes)
        check_steps(json.loads(json.dumps(steps)), num_classes)
        assert all(tried["classes"] == list(range(1, num_classes)) for tried in steps)
    names = {tried["name"] for tried in candidate_steps(3)}
    assert names == {"keep_largest", "remove_small", "fill_holes", "open", "close", "smooth"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("keep_largest", "its name must be one of keep_largest, remove_small, fill_holes"),
        ({"classes": [1]}, "its name must be one of"),
        ({"name": ["open"], "classes": [1]}, "its name must be one of"),
        (step("dilate", 1), "its name must be one of"),
        (step("keep_largest", 1, radius_mm=1.0), "fields must be classes, name, together"),
        (step("open", 1), "fields must be classes, name, radius_mm"),
        (step("fill_holes", 1, together=True), "fields must be classes, name"),
        ({"name": "fill_holes"}, "fields must be classes, name"),
        (step("fill_holes"), "classes must be different whole numbers from 1 to 2"),
        (step("fill_holes", 0), "classes must be"),
        (step("fill_holes", 3), "classes must be"),
        (step("fill_holes", 1, 1), "classes must be"),
        (step("fill_holes", True), "classes must be"),
        (step("fill_holes", 1.0), "classes must be"),
        (step("fill_holes", [1]), "classes must be"),
        ({"name": "fill_holes", "classes": 1}, "classes must be"),
        (step("keep_largest", 1, together=1), "together must be true or false"),
        (step("open", 1, radius_mm=0), "radius_mm must be a number above 0 and at most 100000"),
        (step("open", 1, radius_mm=True), "radius_mm must be a number"),
        (step("open", 1, radius_mm="1"), "radius_mm must be a number"),
        (step("close", 1, radius_mm=1e6), "radius_mm must be a number"),
        (step("smooth", 1, sigma_mm=float("nan")), "sigma_mm must be a number"),
        (step("remove_small", 1, min_volume_mm3=10**400), "min_volume_mm3 must be a number"),
    ],
)
def test_a_step_that_can_not_be_taken_is_named(bad, message):
    with pytest.raises(ValueError, match=f"post-processing step .*{message}"):
        check_steps([step("fill_holes", 1), bad], 3)


def test_steps_must_be_a_list():
    with pytest.raises(ValueError, match=r"must be a list, not \{'name'"):
        check_steps(step("fill_holes", 1), 3)


@pytest.mark.parametrize(
    ("finest_mm", "unit"),
    [(0.25, 1.0), (1.0, 1.0), (2.0, 1.0), (0.01, 0.01), (5.0, 5.0), (2e3, 2e3)],
)
def test_sizes_are_tried_in_millimetres_or_where_voxels_are_no_such_size_in_voxels(finest_mm, unit):
    steps = candidate_steps(2, finest_mm)
    radii = {s["radius_mm"] for s in steps if "radius_mm" in s}
    assert radii == {unit, 2 * unit}
    volumes = [s["min_volume_mm3"] for s in steps if "min_volume_mm3" in s]
    np.testing.assert_allclose(volumes, np.multiply((10, 100, 1000), unit**3))
    check_steps(steps, 2)


def test_the_same_voxels_are_treated_alike_from_micrometres_to_metres():
    label = random_label((14, 13, 12), sigma=1.6)
    expected = [apply_steps(label, (1, 1, 2), [s]) for s in candidate_steps(4)]
    for scale in (1e-3, 1e-2, 10.0, 1e3):
        spacing_mm = np.multiply((1, 1, 2), scale)
        for s, result in zip(candidate_steps(4, scale), expected, strict=True):
            np.testing.assert_array_equal(apply_steps(label, spacing_mm, [s]), result)
    prediction, reference = label, apply_steps(label, (1, 1, 2), [step("close", 1, radius_mm=1.0)])
    kept = [
        choose_steps([(prediction, reference, np.multiply((1, 1, 2), scale))], 4)[1]
        for scale in (1.0, 0.01)
    ]
    assert [d["kept"] for d in kept[0]] == [d["kept"] for d in kept[1]]


def test_a_reach_of_very_many_voxels_is_bounded_and_told():
    label = random_label((14, 13, 12), sigma=1.6)
    fine = (0.01, 0.01, 0.01)
    steps = [step("close", 1, radius_mm=2.0), step("smooth", 1, sigma_mm=1.0)]
    bounded = [step("close", 1, radius_mm=0.32), step("smooth", 1, sigma_mm=0.32 / 3)]
    np.testing.assert_array_equal(
        apply_steps(label, fine, steps), apply_steps(label, fine, bounded)
    )
    assert shortened(steps, fine) == [
        "close reaches 0.32 mm in place of 2, 32 voxels",
        "smooth reaches 0.32 mm in place of 3, 32 voxels",
    ]
    assert shortened(steps, (0.5, 0.5, 3.0)) == []
