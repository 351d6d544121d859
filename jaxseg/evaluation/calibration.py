"""How far confidence can be believed, and the one number that mends it; numpy, on the host.

A voxel's confidence is the probability of the class it gets. Probabilities are calibrated if of the
voxels with confidence p a share p is right. Sums over voxels add up, so a set of cases of any size
is measured one case at a time: add the arrays of `calibration_sums`, then call `from_sums`.

Which voxels enter decides what the figures mean: the air around a patient is always right and makes
any network look calibrated. Say beside a figure whether it was of all voxels or of a region.
"""

from typing import Any

import numpy as np
from scipy import optimize, special

NUM_BINS = 15
# Beyond these a temperature says that the sample was all right or all wrong, not how sure to be.
TEMPERATURE_RANGE = (0.05, 20.0)


def reliability(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS
) -> dict[str, Any]:
    """Accuracy of voxels of like confidence, and the expected calibration error (ECE).

    ECE = Σ_b n_b / N |accuracy_b - confidence_b| over bins ((b - 1) / B, b / B] of equal width.

    Args:
      confidence: Probability of the predicted class, [N], in [0, 1].
      correct: Whether the prediction is right, [N], bool.
      num_bins: Number of bins B.
    Returns:
      JSON-ready dict of "ece" and "bins": of each bin that holds a voxel, in order, a dict of mean
      "confidence", "accuracy" and "count".
    Raises:
      ValueError: There is no voxel.
    Reference: Naeini et al. 2015; Guo et al. 2017.
    """
    return _reliability_of(_bin_sums(num_bins, confidence, correct))


def calibration_sums(logits: np.ndarray, label: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """What a case adds to the calibration of a set.

    Args:
      logits: Unnormalised scores, [N, K], any float; computed in float64.
      label: Class indices in [0, K), [N], integer.
      temperature: The logits are divided by it.
    Returns:
      [NUM_BINS, 4] float64, sums over the voxels of each bin of `reliability`: of 1, of confidence,
      of right ones and of negative log-likelihood (nats).
    Raises:
      ValueError: Shapes do not match, a logit is not finite, or a label is no class index.
    """
    margins, of_label = _margins(logits, label)
    log_normaliser = special.logsumexp(margins / temperature, axis=1)
    confidence = np.exp(-log_normaliser)  # the largest margin is 0
    correct = np.argmax(margins, axis=1) == label
    return _bin_sums(NUM_BINS, confidence, correct, log_normaliser - of_label / temperature)


def from_sums(sums: np.ndarray) -> dict[str, Any]:
    """`reliability` of a set from the sum of its `calibration_sums`, [B, 4].

    Besides "ece" and "bins" it holds "nll", the mean negative log-likelihood in nats per voxel, and
    "num_voxels".
    """
    num_voxels = int(sums[:, 0].sum())
    result = _reliability_of(sums)
    return result | {"nll": float(sums[:, 3].sum() / num_voxels), "num_voxels": num_voxels}


def evaluate_calibration(
    logits: np.ndarray, label: np.ndarray, temperature: float = 1.0
) -> dict[str, Any]:
    """`from_sums` of one set of voxels: what to report of those the temperature has not seen."""
    return from_sums(calibration_sums(logits, label, temperature))


def fit_temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """The temperature T that makes the labels likeliest under softmax(logits / T).

    The mean negative log-likelihood is convex in 1 / T. T does not change which class is largest,
    so no segmentation changes.

    Args, Raises: As `calibration_sums`.
    Returns:
      float in `TEMPERATURE_RANGE`, above 1 if the network was too sure of itself; 1 if the best
      lies at the end of the range: all voxels are right, or all wrong, and tell nothing.
    Reference: Guo et al. 2017, section 4.2.
    """
    margins, of_label = _margins(logits, label)

    def negative_log_likelihood(log_temperature):
        scale = np.exp(-log_temperature)
        return np.mean(special.logsumexp(scale * margins, axis=1) - scale * of_label)

    bounds = np.log(TEMPERATURE_RANGE)
    best = optimize.minimize_scalar(
        negative_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    at_end = min(best.x - bounds[0], bounds[1] - best.x) < 1e-3
    return 1.0 if at_end else float(np.exp(best.x))


def calibrate(
    logits: np.ndarray, label: np.ndarray, *, set_name: str, temperature: float | None = None
) -> dict[str, Any]:
    """Says what a temperature changes on a set of voxels.

    Args:
      logits, label: As for `calibration_sums`, at least one voxel; errors raised too.
      set_name: Where the voxels come from, for example "val".
      temperature: What other voxels chose; None fits it to these.
    Returns:
      JSON-ready dict of "set", "num_voxels", "temperature", and "ece", "nll" and "bins" of
      `from_sums`, each as "..._before" and "..._after".
    """
    before = evaluate_calibration(logits, label)
    temperature = temperature or fit_temperature(logits, label)
    after = evaluate_calibration(logits, label, temperature)
    result = {"set": set_name, "num_voxels": before["num_voxels"], "temperature": temperature}
    for name in ("ece", "nll", "bins"):
        result |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    return result


def _margins(logits, label):
    """Logits below the largest one, [N, K] float64, and those of the label, [N]."""
    logits, label = np.asarray(logits, np.float64), np.asarray(label)
    if logits.ndim != 2 or label.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {logits.shape} and label {label.shape}; give [N, K] and [N]."
        )
    num_infinite = np.count_nonzero(~np.isfinite(logits))
    if num_infinite:
        raise ValueError(f"{num_infinite} logits are not finite; the network has diverged.")
    if label.size and not 0 <= label.min() <= label.max() < logits.shape[1]:
        raise ValueError(
            f"label holds values from {label.min()} to {label.max()}; give class indices from 0 "
            f"to {logits.shape[1] - 1}."
        )
    margins = logits - logits.max(axis=1, keepdims=True)
    return margins, np.take_along_axis(margins, label[:, None].astype(np.int64), axis=1)[:, 0]


def _bin_sums(num_bins, confidence, *others):
    """Sums of 1, of confidence and of other values [N] in each bin, [B, 2 + len(others)]."""
    confidence = np.asarray(confidence, np.float64)
    index = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence)
    weights = (np.ones(confidence.size), confidence, *others)
    return np.stack([np.bincount(index, weight, num_bins) for weight in weights], axis=1)


def _reliability_of(sums):
    count, confidence, correct = sums.T[:3]
    if not count.any():
        raise ValueError("There is no voxel to measure calibration on; give at least one.")
    bins = [
        {"confidence": sum_confidence / num, "accuracy": num_right / num, "count": int(num)}
        for num, sum_confidence, num_right in sums[count > 0, :3].tolist()
    ]
    return {"ece": float(np.abs(correct - confidence).sum() / count.sum()), "bins": bins}
