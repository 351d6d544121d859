"""Overlap scores of hard segmentations, per class and per case; numpy, on the host.

One rule for what is undefined: a score that would be 0 / 0 is NaN, and NaN enters no mean. So a
class that is absent from both reference and prediction scores NaN throughout (as in nnU-Net); one
that is absent from only one of them has Dice and IoU 0.
"""

import numpy as np


def confusion_counts(prediction, label, num_classes):
    """Voxels of each class that are true positive, false positive and false negative.

    Args:
      prediction: Class indices in [0, num_classes), any shape, integer.
      label: Reference class indices, same shape, integer.
      num_classes: Number of classes K, background included.
    Returns:
      [K, 3] int64: tp, fp, fn. Counts of several cases or parts of a case add up.
    Raises:
      ValueError: the shapes differ, a dtype is not integer or an index is out of range.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction has shape {prediction.shape} but label has {label.shape}; "
            "bring both to the same grid."
        )
    for name, array in (("prediction", prediction), ("label", label)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} is {array.dtype}; give class indices in an integer dtype.")
        if array.size and not 0 <= array.min() <= array.max() < num_classes:
            raise ValueError(
                f"{name} holds values from {array.min()} to {array.max()}; "
                f"give class indices from 0 to {num_classes - 1}."
            )
    joint = label.astype(np.int64) * num_classes + prediction.astype(np.int64)
    confusion = np.bincount(joint.ravel(), minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    tp = np.diagonal(confusion)
    return np.stack([tp, confusion.sum(axis=0) - tp, confusion.sum(axis=1) - tp], axis=1)


def scores_from_counts(counts):
    """Overlap scores of each class.

    dice = 2 tp / (2 tp + fp + fn), iou = tp / (tp + fp + fn), precision = tp / (tp + fp),
    recall = tp / (tp + fn). NaN where the denominator is 0: dice and iou where the class is absent
    from both, precision where nothing was predicted, recall where the reference is empty.

    Args:
      counts: tp, fp, fn of each class, [K, 3], as from `confusion_counts`.
    Returns:
      Dict with "dice", "iou", "precision" and "recall": [K] float64 each, in [0, 1] or NaN.
    """
    tp, fp, fn = np.asarray(counts, np.float64).T
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "iou": _ratio(tp, tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
    }


def mean_foreground(scores):
    """Mean of one score of one case over its classes 1, 2, …, without the NaN.

    Args:
      scores: One score per class, [K], class 0 is background.
    Returns:
      float; NaN if no foreground class has a score.
    """
    mean, _, _ = _statistics(np.asarray(scores, np.float64)[1:])
    return float(mean)


def summarise(scores_by_case):
    """Mean and spread of each score over cases, class by class, without the NaN.

    Args:
      scores_by_case: One dict per case from a score's name to [K] numbers, finite or NaN; all with
        the same names.
    Returns:
      Dict from each name to a dict of "mean" [K] float64, "sd" [K] float64 (sample standard
      deviation, ddof=1) and "num" [K] int64, the cases that count. Mean is NaN where num is 0, sd
      where num is less than 2.
    Raises:
      ValueError: there is no case.
    """
    if not scores_by_case:
        raise ValueError("There are no scores to summarise; give at least one case.")
    summary = {}
    for name in scores_by_case[0]:
        by_case = np.stack([scores[name] for scores in scores_by_case]).astype(np.float64)
        mean, sd, num = _statistics(by_case)
        summary[name] = {"mean": mean, "sd": sd, "num": num}
    return summary


def _statistics(values):
    """Mean, sample standard deviation and number of the values along axis 0 that are not NaN."""
    counted = ~np.isnan(values)
    num = counted.sum(axis=0)
    mean = _ratio(np.sum(values, axis=0, where=counted), num)
    squares = np.sum((values - mean) ** 2, axis=0, where=counted)
    sd = np.sqrt(_ratio(squares, np.maximum(num - 1, 0)))
    return mean, sd, num


def _ratio(numerator, denominator):
    """numerator / denominator in float64; NaN where the denominator is 0."""
    undefined = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator) != 0)
