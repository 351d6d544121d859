"""Scores against hand computation and a brute-force loop over voxels."""

import math

import numpy as np
import pytest

from jaxseg.metrics import confusion_counts, mean_foreground, scores_from_counts, summarise

nan = math.nan


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
