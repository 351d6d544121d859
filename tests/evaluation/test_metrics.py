"""Scores against hand computation and a brute-force loop over voxels."""

import math

import numpy as np
import pytest

from jaxseg.evaluation import metrics
from jaxseg.evaluation.metrics import (
    class_boxes,
    confusion_counts,
    lesion_scores,
    mean_foreground,
    scores_from_counts,
    summarise,
    volumes_from_counts,
)

nan, inf = math.nan, math.inf


def brute_force_counts(prediction, label, num_classes):
    counts = [[0, 0, 0] for _ in range(num_classes)]
    for p, g in zip(prediction.ravel(), label.ravel(), strict=True):
        if p == g:
            counts[g][0] += 1
        else:
            counts[p][1] += 1
            counts[g][2] += 1
    return counts


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 1, 3, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
@pytest.mark.parametrize("num_classes", [2, 5, 200])
def test_counts_match_brute_force(shape, dtype, num_classes):
    rng = np.random.default_rng(0)
    label = rng.integers(0, num_classes, shape).astype(dtype)
    prediction = np.where(rng.random(shape) < 0.5, label, rng.permutation(label))
    counts = confusion_counts(prediction, label, num_classes)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, brute_force_counts(prediction, label, num_classes))


def test_counts_do_not_depend_on_how_many_voxels_are_counted_at_once(monkeypatch):
    rng = np.random.default_rng(3)
    label, prediction = rng.integers(0, 4, (2, 7, 6, 5), dtype=np.uint8)
    label = np.asfortranarray(label)
    whole = confusion_counts(prediction, label, 4)
    monkeypatch.setattr(metrics, "_BLOCK_VOXELS", 64)
    np.testing.assert_array_equal(confusion_counts(prediction, label, 4), whole)
    np.testing.assert_array_equal(whole, brute_force_counts(prediction, label, 4))


def test_counts_by_hand_with_unlike_dtypes():
    label = np.array([[0, 0, 1], [1, 1, 2]], np.uint8)
    prediction = np.array([[0, 1, 1], [1, 0, 0]], np.int64)
    expected = [[1, 2, 1], [2, 1, 1], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_array_equal(confusion_counts(prediction, label, 4), expected)


def test_counts_of_nothing_are_zero():
    empty = np.zeros((0, 3), np.uint8)
    np.testing.assert_array_equal(confusion_counts(empty, empty, 2), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"shape \(2, 3\) but label has \(3, 2\)"),
        (np.zeros(3, int), np.array([0, 1, 2]), "label holds values from 0 to 2"),
        (np.array([0, -1, 1]), np.zeros(3, int), "prediction holds values from -1 to 1"),
        (np.zeros(3), np.zeros(3, int), "prediction is float64"),
        (np.zeros(3, int), np.zeros(3, bool), "label is bool"),
    ],
)
def test_counts_name_the_mistake(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        confusion_counts(prediction, label, 2)


def test_scores_by_hand():
    counts = np.array(
        [
            [6, 2, 1],  # ordinary
            [4, 0, 0],  # perfect
            [0, 3, 2],  # in both, nowhere together
            [0, 0, 0],  # in neither
            [0, 5, 0],  # predicted only
            [0, 0, 7],  # in the reference only
        ]
    )
    scores = scores_from_counts(counts)
    assert set(scores) == {"dice", "iou", "precision", "recall"}
    np.testing.assert_allclose(scores["dice"], [12 / 15, 1, 0, nan, 0, 0])
    np.testing.assert_allclose(scores["iou"], [6 / 9, 1, 0, nan, 0, 0])
    np.testing.assert_allclose(scores["precision"], [6 / 8, 1, 0, nan, 0, nan])
    np.testing.assert_allclose(scores["recall"], [6 / 7, 1, 0, nan, nan, 0])


def test_scores_match_sets_of_voxels():
    rng = np.random.default_rng(1)
    label, prediction = rng.integers(0, 3, (2, 4, 5, 6), dtype=np.uint8)
    scores = scores_from_counts(confusion_counts(prediction, label, 3))
    for c in range(3):
        a = set(zip(*np.nonzero(prediction == c), strict=True))
        b = set(zip(*np.nonzero(label == c), strict=True))
        assert scores["dice"][c] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        assert scores["iou"][c] == pytest.approx(len(a & b) / len(a | b))
        assert scores["precision"][c] == pytest.approx(len(a & b) / len(a))
        assert scores["recall"][c] == pytest.approx(len(a & b) / len(b))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.9, 0.2, 0.6], 0.4), ([0.9, nan, 0.6], 0.6), ([0.9, nan, nan], nan), ([0.9], nan)],
)
def test_mean_foreground(scores, expected):
    mean = mean_foreground(np.array(scores))
    assert isinstance(mean, float)
    assert mean == pytest.approx(expected, nan_ok=True)


def test_summarise_by_hand():
    cases = [
        {"dice": np.array([0.2, nan, nan, 0.5]), "iou": np.array([1.0])},
        {"dice": np.array([0.4, 0.7, nan, 0.5]), "iou": np.array([0.0])},
        {"dice": np.array([0.9, nan, nan, nan]), "iou": np.array([nan])},
    ]
    summary = summarise(cases)
    assert set(summary) == {"dice", "iou"}
    dice, iou = summary["dice"], summary["iou"]
    np.testing.assert_allclose(dice["mean"], [0.5, 0.7, nan, 0.5])
    # (0.3² + 0.1² + 0.4²) / 2 = 0.13
    np.testing.assert_allclose(dice["sd"], [math.sqrt(0.13), nan, nan, 0], atol=1e-12)
    np.testing.assert_array_equal(dice["num"], [3, 1, 0, 2])
    np.testing.assert_allclose(iou["mean"], [0.5])
    np.testing.assert_allclose(iou["sd"], [math.sqrt(0.5)])
    np.testing.assert_array_equal(iou["num"], [2])


def test_infinite_scores_are_counted_beside_the_mean():
    cases = [{"hd": np.array([1.0, inf])}, {"hd": np.array([inf, inf])}, {"hd": np.array([4, nan])}]
    summary = summarise(cases)["hd"]
    np.testing.assert_array_equal(summary["mean"], [2.5, nan])
    np.testing.assert_allclose(summary["sd"], [math.sqrt(4.5), nan])
    np.testing.assert_array_equal(summary["num"], [2, 0])
    np.testing.assert_array_equal(summary["num_infinite"], [1, 2])


def test_summarise_matches_numpy_class_by_class():
    rng = np.random.default_rng(2)
    by_case = np.where(rng.random((9, 4)) < 0.3, nan, rng.random((9, 4)))
    summary = summarise([{"dice": row} for row in by_case])["dice"]
    for c in range(4):
        counted = by_case[:, c][~np.isnan(by_case[:, c])]
        assert summary["mean"][c] == pytest.approx(np.mean(counted))
        assert summary["sd"][c] == pytest.approx(np.std(counted, ddof=1))
        assert summary["num"][c] == len(counted)


def test_summarise_of_no_case_is_refused():
    with pytest.raises(ValueError, match="at least one case"):
        summarise([])


@pytest.mark.parametrize(
    ("step", "voxel_mm3"),
    [
        (np.diag([0.5, 2, 3]), 3),
        ([[0, -2, 0], [1, 0, 0], [0, 0, 4]], 8),
        ([[0, 2, 0], [1, 0, 0], [0, 0, 4]], 8),  # left-handed
        ([[1, 0.5, 0], [0, 2, 0.7], [0, 0, 3]], 6),  # sheared
    ],
)
def test_volumes_by_hand(step, voxel_mm3):
    affine = np.eye(4)
    affine[:3, :3] = step
    volumes = volumes_from_counts([[600, 100, 50], [0, 0, 0], [0, 200, 0]], affine)
    assert set(volumes) == {"volume_ml", "reference_volume_ml", "volume_error_ml"}
    ml = voxel_mm3 / 1000
    np.testing.assert_allclose(volumes["volume_ml"], [700 * ml, 0, 200 * ml])
    np.testing.assert_allclose(volumes["reference_volume_ml"], [650 * ml, 0, 0])
    np.testing.assert_allclose(volumes["volume_error_ml"], [50 * ml, 0, 200 * ml])


def lesions_by_flooding(mask):
    """Sets of voxels that hang together by faces, edges or corners."""
    left, lesions = set(map(tuple, np.argwhere(mask))), []
    while left:
        waiting, lesion = [left.pop()], set()
        while waiting:
            voxel = waiting.pop()
            lesion.add(voxel)
            near = {n for n in left if max(abs(np.subtract(n, voxel))) <= 1}
            left -= near
            waiting += near
        lesions.append(lesion)
    return lesions


def brute_force_lesions(prediction, label, min_overlap):
    """(precision, recall) of one class."""
    found = []
    for mask, other in ((prediction, label), (label, prediction)):
        covering = set(map(tuple, np.argwhere(other)))
        shares = [len(lesion & covering) / len(lesion) for lesion in lesions_by_flooding(mask)]
        met = [share > 0 and share >= min_overlap for share in shares]
        found.append(np.mean(met) if met else nan)
    return found


@pytest.mark.parametrize("min_overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(9, 8, 7), (12, 15, 1)])
def test_lesions_match_flooding(shape, min_overlap):
    rng = np.random.default_rng(4)
    for _ in range(8):
        label = rng.choice(3, shape, p=[0.9, 0.05, 0.05]).astype(np.uint8)
        prediction = np.where(rng.random(shape) < 0.7, label, np.roll(label, 1, axis=1))
        scores = lesion_scores(prediction, label, 3, min_overlap)
        for index in (1, 2):
            p, r = brute_force_lesions(prediction == index, label == index, min_overlap)
            assert scores["lesion_precision"][index] == pytest.approx(p, nan_ok=True)
            assert scores["lesion_recall"][index] == pytest.approx(r, nan_ok=True)
            assert scores["lesion_f1"][index] == pytest.approx(2 * p * r / (p + r))


def line(*ranges):
    """A volume of 40 voxels in a row with ones in the given ranges."""
    volume = np.zeros((1, 1, 40), np.uint8)
    for start, stop in ranges:
        volume[0, 0, start:stop] = 1
    return volume


@pytest.mark.parametrize(
    ("prediction", "label", "min_overlap", "expected"),
    [
        # Both lesions are met, by 1 and 2 of their 4 voxels; of the predicted ones the first two
        # are, by 1 of 3 and 2 of 10.
        ([(3, 6), (12, 22), (30, 32)], [(0, 4), (10, 14)], 0.0, (2 / 3, 1, 0.8)),
        ([(3, 6), (12, 22), (30, 32)], [(0, 4), (10, 14)], 0.5, (0, 1 / 2, 0)),
        ([(0, 4)], [(0, 8)], 0.5, (1, 1, 1)),  # at least the fraction
        ([(0, 4), (5, 8)], [(0, 8)], 0.0, (1, 1, 1)),  # two parts of one lesion
        ([(0, 4)], [(6, 9)], 0.0, (0, 0, 0)),
        ([(0, 4)], [], 0.0, (0, nan, 0)),
        ([], [(0, 4)], 0.0, (nan, 0, 0)),
        ([], [], 0.0, (nan, nan, nan)),
    ],
)
def test_lesions_by_hand(prediction, label, min_overlap, expected):
    scores = lesion_scores(line(*prediction), line(*label), 2, min_overlap)
    names = ("lesion_precision", "lesion_recall", "lesion_f1")
    np.testing.assert_allclose([scores[name][1] for name in names], expected)
    assert all(np.isnan(scores[name][0]) for name in names)


def test_lesions_hang_together_by_corners():
    label = np.zeros((4, 4, 4), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = label[3, 3, 3] = 1
    prediction = np.zeros_like(label)
    prediction[0, 0, 0] = 1
    assert lesion_scores(prediction, label, 2)["lesion_recall"][1] == 1 / 2


def test_boxes_hold_a_class_in_both():
    prediction, label = np.zeros((2, 6, 7, 8), np.uint8)
    prediction[1:3, 4, 0], label[2:5, 2, 7] = 1, 1
    label[5, 6, 7] = 3
    assert list(class_boxes(prediction, label, 5)) == [
        (1, (slice(1, 5), slice(2, 5), slice(0, 8))),
        (3, (slice(5, 6), slice(6, 7), slice(7, 8))),
    ]
