"""Calibration: hand values, a brute-force reading of the definitions, a known temperature."""

import json

import numpy as np
import pytest
from scipy import special

from jaxseg.evaluation import calibration


def sharpened_sample(sharpness, num=40_000, num_classes=3, seed=0):
    """Logits `sharpness` times those that the labels were drawn from."""
    rng = np.random.default_rng(seed)
    true_logits = rng.normal(0, 1.5, (num, num_classes))
    cumulative = special.softmax(true_logits, axis=1).cumsum(axis=1)
    label = (rng.random((num, 1)) > cumulative).sum(axis=1)
    return (sharpness * true_logits).astype(np.float32), np.minimum(label, num_classes - 1)


def brute_force(logits, label, temperature, num_bins):
    """ECE, mean negative log-likelihood and the bins, voxel by voxel."""
    probs = special.softmax(np.float64(logits) / temperature, axis=1)
    bins = [[] for _ in range(num_bins)]
    for row, truth in zip(probs, label, strict=True):
        index = next(b for b in range(num_bins) if row.max() <= (b + 1) / num_bins + 1e-12)
        bins[index].append((row.max(), row.argmax() == truth))
    occupied = [[*np.mean(values, axis=0), len(values)] for values in bins if values]
    ece = sum(count * abs(acc - conf) for conf, acc, count in occupied) / len(label)
    return ece, -np.mean(np.log(probs[np.arange(len(label)), label])), occupied


def test_reliability_by_hand():
    confidence = np.array([0.6, 0.7, 0.9, 1.0, 0.5])
    correct = np.array([True, False, True, True, False])
    result = calibration.reliability(confidence, correct, num_bins=4)
    expected = [(0.5, 0.0, 1), (0.65, 0.5, 2), (0.95, 1.0, 2)]  # 0.5 belongs to (0.25, 0.5]
    found = [(b["confidence"], b["accuracy"], b["count"]) for b in result["bins"]]
    np.testing.assert_allclose(found, expected)
    assert result["ece"] == pytest.approx((1 * 0.5 + 2 * 0.15 + 2 * 0.05) / 5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_evaluation_equals_brute_force(temperature):
    logits, label = sharpened_sample(2.0, num=700)
    result = calibration.evaluate_calibration(logits, label, temperature)
    ece, nll, bins = brute_force(logits, label, temperature, calibration.NUM_BINS)
    assert result["ece"] == pytest.approx(ece, rel=1e-12)
    assert result["nll"] == pytest.approx(nll, rel=1e-12)
    assert result["num_voxels"] == 700
    found = [[b["confidence"], b["accuracy"], b["count"]] for b in result["bins"]]
    np.testing.assert_allclose(found, bins, rtol=1e-12)


def test_sums_of_cases_are_those_of_the_set():
    logits, label = sharpened_sample(1.5, num=900)
    parts = [slice(0, 10), slice(10, 400), slice(400, 900)]
    total = sum(calibration.calibration_sums(logits[p], label[p], 1.3) for p in parts)
    whole = calibration.evaluate_calibration(logits, label, 1.3)
    assert calibration.from_sums(total)["ece"] == pytest.approx(whole["ece"], rel=1e-12)
    assert calibration.from_sums(total)["nll"] == pytest.approx(whole["nll"], rel=1e-12)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_temperature_undoes_a_known_sharpening(sharpness):
    logits, label = sharpened_sample(sharpness)
    assert calibration.fit_temperature(logits, label) == pytest.approx(sharpness, rel=0.03)


def test_temperature_is_the_minimum_of_a_fine_grid():
    logits, label = sharpened_sample(2.5, num=3000, num_classes=5, seed=4)
    grid = np.geomspace(*calibration.TEMPERATURE_RANGE, 4001)
    nll = [calibration.evaluate_calibration(logits, label, t)["nll"] for t in grid[1500:3000]]
    best = grid[1500 + np.argmin(nll)]
    assert calibration.fit_temperature(logits, label) == pytest.approx(best, rel=2e-3)


def test_extreme_samples_stay_finite():
    logits = np.array([[1.0, -1.0], [-1.0, 1.0]], np.float32)
    wrong = calibration.evaluate_calibration(1000 * logits, np.array([1, 0]))
    assert (wrong["nll"], wrong["ece"]) == (2000.0, 1.0)


def test_voxels_that_are_all_right_tell_no_temperature():
    logits = np.eye(3)[[0, 1, 2, 1]] * 4
    assert calibration.fit_temperature(logits, np.array([0, 1, 2, 1])) == 1
    assert calibration.fit_temperature(logits, np.array([1, 2, 0, 2])) == 1


def test_a_temperature_that_other_voxels_chose_is_taken_as_it_is():
    rng = np.random.default_rng(4)
    logits, label = 3 * rng.normal(size=(200, 3)), rng.integers(0, 3, 200)
    result = calibration.calibrate(logits, label, set_name="test", temperature=2.5)
    assert result["temperature"] == 2.5
    held_out = calibration.evaluate_calibration(logits, label, 2.5)
    assert (result["ece_after"], result["nll_after"]) == (held_out["ece"], held_out["nll"])
    assert result["nll_before"] == calibration.evaluate_calibration(logits, label)["nll"]


def test_calibrate_improves_what_it_was_fitted_to_and_held_out_voxels():
    logits, label = sharpened_sample(3.0)
    result = json.loads(json.dumps(calibration.calibrate(logits, label, set_name="val")))
    assert (result["set"], result["num_voxels"]) == ("val", 40_000)
    assert result["nll_after"] < result["nll_before"]
    assert result["ece_before"] > 0.15 and result["ece_after"] < 0.01
    before = calibration.evaluate_calibration(logits, label)
    assert result["bins_before"] == before["bins"] != result["bins_after"]
    other_logits, other_label = sharpened_sample(3.0, seed=1)
    held_out = calibration.evaluate_calibration(other_logits, other_label, result["temperature"])
    assert held_out["ece"] < 0.015


@pytest.mark.parametrize(
    ("logits", "label", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), r"shape \(3, 2\) and label \(2,\)"),
        (np.zeros((3,)), np.zeros(3, int), r"give \[N, K\] and \[N\]"),
        (np.array([[0.0, np.nan], [np.inf, 0]]), np.zeros(2, int), "2 logits are not finite"),
        (np.zeros((2, 2)), np.array([0, 2]), "from 0 to 2; give class indices from 0 to 1"),
        (np.zeros((0, 2)), np.zeros(0, int), "There is no voxel"),
    ],
)
def test_unusable_input_is_refused(logits, label, message):
    with pytest.raises(ValueError, match=message):
        calibration.calibrate(logits, label, set_name="val")
