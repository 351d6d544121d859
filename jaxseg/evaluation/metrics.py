"""Overlap, volume and lesions of hard segmentations, per class and per case; numpy, on the host.

One rule for what is undefined: a score that would be 0 / 0 is NaN, and NaN enters no mean. So a
class that is absent from both reference and prediction scores NaN throughout (as in nnU-Net); one
that is absent from only one of them has Dice and IoU 0. A distance to something that is not there
is infinite: it enters no mean either, but is counted beside it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from scipy import ndimage

_BLOCK_VOXELS = 1 << 22  # bounds the memory for counting, whatever the volume


def confusion_counts(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
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
    prediction, label = prediction.ravel(), label.ravel()
    pairs = np.zeros(num_classes**2, np.int64)
    for start in range(0, label.size, _BLOCK_VOXELS):
        block = slice(start, start + _BLOCK_VOXELS)
        joint = label[block].astype(np.int64) * num_classes + prediction[block].astype(np.int64)
        pairs += np.bincount(joint, minlength=num_classes**2)
    confusion = pairs.reshape(num_classes, num_classes)
    tp = np.diagonal(confusion)
    return np.stack([tp, confusion.sum(axis=0) - tp, confusion.sum(axis=1) - tp], axis=1)


def scores_from_counts(counts: np.ndarray) -> dict[str, np.ndarray]:
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


def volumes_from_counts(counts: np.ndarray, affine: np.ndarray) -> dict[str, np.ndarray]:
    """Volume of each class in millilitres (1000 mm³).

    Args:
      counts: tp, fp, fn of each class, [K, 3], as from `confusion_counts`.
      affine: Voxel to world (mm), [4, 4]; may be oblique, sheared or left-handed.
    Returns:
      Dict of [K] float64 each: "volume_ml" of the prediction, "reference_volume_ml", and
      "volume_error_ml", the first minus the second.
    """
    tp, fp, fn = np.asarray(counts, np.float64).T
    voxel_ml = abs(np.linalg.det(np.asarray(affine, np.float64)[:3, :3])) / 1000
    return {
        "volume_ml": (tp + fp) * voxel_ml,
        "reference_volume_ml": (tp + fn) * voxel_ml,
        "volume_error_ml": (fp - fn) * voxel_ml,
    }


def lesion_scores(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, min_overlap: float = 0.0
) -> dict[str, np.ndarray]:
    """Detection of lesions: a lesion is what hangs together by faces, edges or corners.

    A lesion of the reference is found if at least one of its voxels, and at least the fraction
    `min_overlap` of them, are predicted; a predicted lesion is true if the same holds the other way
    round. recall = found / lesions of the reference, precision = true / predicted lesions, f1 is
    their harmonic mean. NaN as for voxels: recall without a reference, precision without a
    prediction; f1 is 0 without one of them, NaN without both.

    Args:
      prediction: Class indices in [0, num_classes), [X, Y, Z], integer.
      label: Reference class indices, same shape, integer.
      num_classes: Number of classes K, background included.
      min_overlap: In [0, 1].
    Returns:
      Dict with "lesion_precision", "lesion_recall" and "lesion_f1": [K] float64 each, in [0, 1] or
      NaN; NaN for the background.
    Reference: Commowick et al. 2018, doi:10.1038/s41598-018-31911-7, for scores by lesion.
    """
    counts = np.zeros((num_classes, 4))
    for index, box in class_boxes(prediction, label, num_classes):
        predicted, reference = prediction[box] == index, label[box] == index
        counts[index, :2] = _count_met(reference, predicted, min_overlap)
        counts[index, 2:] = _count_met(predicted, reference, min_overlap)
    found, num_reference, true, num_predicted = counts.T
    recall, precision = _ratio(found, num_reference), _ratio(true, num_predicted)
    denominator = found * num_predicted + true * num_reference
    f1 = np.where(num_reference + num_predicted > 0, 0.0, np.nan)
    np.divide(2 * found * true, denominator, out=f1, where=denominator > 0)
    return {"lesion_precision": precision, "lesion_recall": recall, "lesion_f1": f1}


def class_boxes(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Smallest box that holds a class in both volumes, for each class but the background.

    Args:
      prediction: Class indices, [X, Y, Z], integer.
      label: Class indices, same shape, integer.
      num_classes: Number of classes K, background included.
    Yields:
      (index, box): a class that is there, and one slice per axis.
    """
    found = [ndimage.find_objects(a, num_classes - 1) for a in (prediction, label)]
    for index, boxes in enumerate(zip(*found, strict=True), start=1):
        there = [box for box in boxes if box is not None]
        if there:
            yield (
                index,
                tuple(
                    slice(min(s.start for s in axis), max(s.stop for s in axis))
                    for axis in zip(*there, strict=True)
                ),
            )


def mean_foreground(scores: Sequence[float | None] | np.ndarray) -> float:
    """Mean of one score of one case over its classes 1, 2, …, without the NaN.

    Args:
      scores: One score per class, [K], class 0 is background.
    Returns:
      float; NaN if no foreground class has a score.
    """
    mean, _, _ = _statistics(np.asarray(scores, np.float64)[1:])
    return float(mean)


def mean_dice(scores_by_case: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Mean over cases of each case's mean foreground Dice; NaN if no case has one."""
    by_case = np.array([mean_foreground(scores["dice"]) for scores in scores_by_case])
    counted = by_case[~np.isnan(by_case)]
    return float(counted.mean()) if counted.size else float("nan")


def worst_first(scores_of: Mapping[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Sorts cases by mean foreground Dice, from the lowest; those without one come last."""

    def rank(item):
        dice = mean_foreground(item[1]["dice"])
        return np.isnan(dice), dice, item[0]

    return dict(sorted(scores_of.items(), key=rank))


def summarise(
    scores_by_case: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    """Mean and spread of each score over cases, class by class, of the finite scores.

    Args:
      scores_by_case: One dict per case from a score's name to [K] numbers; all with the same names.
    Returns:
      Dict from each name to a dict of "mean" [K] float64, "sd" [K] float64 (sample standard
      deviation, ddof=1), "num" [K] int64, the finite scores, and "num_infinite" [K] int64, the
      cases that the mean is silent about (a distance to a structure that was missed). Mean is NaN
      where num is 0, sd where num is less than 2.
    Raises:
      ValueError: there is no case.
    """
    if not scores_by_case:
        raise ValueError("There are no scores to summarise; give at least one case.")
    summary = {}
    for name in scores_by_case[0]:
        by_case = np.stack([scores[name] for scores in scores_by_case]).astype(np.float64)
        mean, sd, num = _statistics(by_case)
        num_infinite = np.isinf(by_case).sum(axis=0)
        summary[name] = {"mean": mean, "sd": sd, "num": num, "num_infinite": num_infinite}
    return summary


def _statistics(values):
    """Mean, sample standard deviation and number of the finite values along axis 0."""
    counted = np.isfinite(values)
    num = counted.sum(axis=0)
    mean = _ratio(np.sum(values, axis=0, where=counted), num)
    squares = np.sum(np.square(values - mean, where=counted, out=np.zeros_like(values)), axis=0)
    sd = np.sqrt(_ratio(squares, np.maximum(num - 1, 0)))
    return mean, sd, num


def _count_met(lesions, others, min_overlap):
    """How many lesions are covered by the others as far as asked, and how many there are."""
    objects, num = ndimage.label(lesions, structure=np.ones((3,) * lesions.ndim))
    size = np.bincount(objects[lesions], minlength=num + 1)[1:]
    covered = np.bincount(objects[lesions & others], minlength=num + 1)[1:]
    return np.count_nonzero((covered > 0) & (covered >= min_overlap * size)), num


def _ratio(numerator, denominator):
    """numerator / denominator in float64; NaN where the denominator is 0."""
    undefined = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator) != 0)
