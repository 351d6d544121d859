"""What a number of cases or of trainings allows to say: intervals, and two models compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

NUM_RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK_VALUES = 1 << 22  # bounds the memory, whatever the number of cases


def bootstrap_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean over cases: 95 % interval, 10,000 resamples.

    Args:
      values: One score per case, [N]; those that are not finite are left out.
      seed: Of the resampling.
    Returns:
      (low, high) floats; NaN if fewer than 2 values are finite.
    Reference: Efron 1979, doi:10.1214/aos/1176344552.
    """
    return _interval(_resampled_means(_finite(values), seed))


def t_interval(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Mean over repeated trainings with its 95 % interval by Student's t.

    For few values that are spread about normally, as scores of trainings are: of 3 a bootstrap
    would see but 10 different means. mean ± t(0.975; n - 1) sd / √n.

    Args:
      values: One score per training, [N]; those that are not finite are left out.
    Returns:
      Dict of "mean", "sd" (of a sample, ddof=1), "interval" (low, high), floats, and "num" (int);
      NaN for the mean of none, for sd and interval of fewer than 2.
    Reference: Student 1908, doi:10.2307/2331554.
    """
    finite = _finite(values)
    num = finite.size
    mean = float(finite.mean()) if num else float("nan")
    sd = half = float("nan")
    if num > 1:
        sd = float(finite.std(ddof=1))
        half = float(stats.t.ppf((1 + LEVEL) / 2, num - 1)) * sd / num**0.5
    return {"mean": mean, "sd": sd, "interval": (mean - half, mean + half), "num": num}


def paired_bootstrap(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Mean difference a - b of two models over the same cases, by resampling cases.

    p is two-sided: twice the smaller share of resampled means at or beyond 0, at most 1, with the
    observed one counted among them; so p > 0, and p < 0.05 where the interval leaves out 0. Of few
    cases a bootstrap is too sure: below about 15, believe `wilcoxon` first.

    Args:
      a, b: One score per case in the same order, [N]; a case counts if both are finite.
      seed: Of the resampling.
    Returns:
      Dict of "difference" (float), "interval" (low, high), "p" and "num" (int, cases that count);
      NaN for the interval and p if fewer than 2 cases count, for the difference if none does.
    Raises:
      ValueError: a and b do not have the same number of cases.
    Reference: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 15.
    """
    difference = _differences(a, b)
    means = _resampled_means(difference, seed)
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p = min(1.0, 2 * (beyond + 1) / (means.size + 1)) if means.size else np.nan
    mean = difference.mean() if difference.size else np.nan
    return {
        "difference": float(mean),
        "interval": _interval(means),
        "p": float(p),
        "num": difference.size,
    }


def wilcoxon(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on pairs; cases without a difference drop out.

    Args:
      a, b: One score per case in the same order, [N]; a case counts if both are finite.
    Returns:
      float: 1 if no case that counts differs, NaN if none counts.
    Raises:
      ValueError: a and b do not have the same number of cases.
    Reference: scipy.stats.wilcoxon with zero_method "wilcox".
    """
    difference = _differences(a, b)
    changed = difference[difference != 0]  # scipy drops them too, but is not exact then
    if not changed.size:
        return 1.0 if difference.size else float("nan")
    return float(stats.wilcoxon(changed).pvalue)


def _finite(values):
    values = np.asarray(values, np.float64)
    return values[np.isfinite(values)]


def _differences(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} scores can not be paired with {b.size}; give the same cases")
    counted = np.isfinite(a) & np.isfinite(b)
    return a[counted] - b[counted]


def _resampled_means(values, seed):
    """Means of resamples, [NUM_RESAMPLES]; none of fewer than 2 values, which say no spread."""
    if values.size < 2:
        return np.empty(0)
    rng = np.random.default_rng(seed)
    at_once = max(1, _BLOCK_VALUES // values.size)
    means = []
    for start in range(0, NUM_RESAMPLES, at_once):
        num = min(at_once, NUM_RESAMPLES - start)
        means.append(values[rng.integers(values.size, size=(num, values.size))].mean(axis=1))
    return np.concatenate(means)


def _interval(means):
    if not means.size:
        return float("nan"), float("nan")
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
