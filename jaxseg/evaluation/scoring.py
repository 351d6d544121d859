"""All scores of a case, and of many cases with their spread and intervals, written to files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.evaluation import metrics, statistics, surfaces
from jaxseg.evaluation.tables import format_table
from jaxseg.run import writers

COMPARED = ("dice", "nsd")


def score_case(
    prediction: np.ndarray,
    label: np.ndarray,
    affine: np.ndarray,
    num_classes: int,
    *,
    tolerance_mm: float = 1.0,
    lesions: bool = False,
) -> dict[str, np.ndarray]:
    """All scores of a case.

    Args:
      prediction: Class indices in [0, num_classes), [X, Y, Z], integer.
      label: Reference class indices, same shape, integer.
      affine: Voxel to world (mm), [4, 4].
      num_classes: Number of classes K, background included.
      tolerance_mm: Of the normalised surface Dice.
      lesions: Whether to score the detection of lesions too.
    Returns:
      Dict from a score's name to [K] float64: those of `metrics.scores_from_counts`,
      `surfaces.surface_scores`, `metrics.volumes_from_counts` and `metrics.lesion_scores`. NaN
      where a class does not count; a distance is infinite where only one of the two has the class.
    Raises:
      ValueError: as `metrics.confusion_counts`.
    """
    if (
        prediction.shape == label.shape
        and prediction.flags.f_contiguous
        and label.flags.f_contiguous
    ):
        # As files are read. No score depends on the order of the axes, but the time does.
        prediction, label, affine = prediction.T, label.T, np.asarray(affine)[:, [2, 1, 0, 3]]
    counts = metrics.confusion_counts(prediction, label, num_classes)
    scores = metrics.scores_from_counts(counts)
    scores |= surfaces.surface_scores(prediction, label, affine, num_classes, tolerance_mm)
    scores |= metrics.volumes_from_counts(counts, affine)
    if lesions:
        scores |= metrics.lesion_scores(prediction, label, num_classes)
    return scores


def summarise(
    scores_of: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    """Mean, spread and 95 % interval of each score over cases, class by class.

    Args:
      scores_of: dict from case id to its scores, as from `score_case`; at least one.
    Returns:
      As `metrics.summarise`, with "interval" [K, 2] of the mean too, as
      `statistics.bootstrap_interval` has it.
    """
    summary = metrics.summarise(list(scores_of.values()))
    for name, of_score in summary.items():
        by_class = np.stack([scores[name] for scores in scores_of.values()], axis=1)
        of_score["interval"] = np.array([statistics.bootstrap_interval(row) for row in by_class])
    return summary


def save_scores(
    folder: str | Path,
    name: str,
    scores_of: Mapping[str, dict[str, np.ndarray]],
    *,
    class_names: Sequence[str],
    about: dict[str, Any],
) -> tuple[str, float]:
    """Writes scores of cases and their summary.

    `NAME.json` holds `about`, "class_names", "mean_dice", "summary" and "cases", worst first;
    `NAME.csv` a row per case and foreground class.

    Args:
      folder: existing folder.
      name: of the evaluated set.
      scores_of: dict from case id to its scores, as from `score_case`; at least one.
      class_names: of all classes, background first.
      about: JSON-ready dict that says what was evaluated on what.
    Returns:
      (table, mean): the summary as a table for the terminal, and `metrics.mean_dice`.
    """
    scores_of = metrics.worst_first(scores_of)
    summary = summarise(scores_of)
    mean = metrics.mean_dice(scores_of.values())
    content = {
        "about": about,
        "rule": "null: the class does not count, being absent from reference and prediction; or, "
        "of a distance, it is infinite, the class being absent from one of them (num_infinite)",
        "class_names": list(class_names),
        "mean_dice": mean,
        "summary": summary,
        "cases": scores_of,
    }
    writers.write_json(os.path.join(folder, f"{name}.json"), content)
    rows = [
        {"case": case_id, "class": class_name} | {s: scores[s][index] for s in scores}
        for case_id, scores in scores_of.items()
        for index, class_name in enumerate(class_names)
        if index > 0
    ]
    writers.write_csv(os.path.join(folder, f"{name}.csv"), rows)
    return format_table(summary, class_names), mean


def compare(
    scores_of: Mapping[str, Mapping[str, np.ndarray]],
    others_of: Mapping[str, Mapping[str, np.ndarray]],
    class_names: Sequence[str],
) -> list[dict[str, Any]]:
    """Differences of two models on the same cases: the first minus the second.

    Args:
      scores_of, others_of: dicts from case id to scores, with the same cases.
      class_names: of all classes, background first.
    Returns:
      List of dicts, one per score of COMPARED and foreground class: "score", "class" and what
      `statistics.paired_bootstrap` and `statistics.wilcoxon` ("p_wilcoxon") say. The p are of one
      comparison each, not corrected for their number.
    """
    rows = []
    for score in COMPARED:
        for index, class_name in enumerate(class_names[1:], start=1):
            a, b = ([of[case][score][index] for case in scores_of] for of in (scores_of, others_of))
            found = statistics.paired_bootstrap(a, b)
            found["p_wilcoxon"] = statistics.wilcoxon(a, b)
            rows.append({"score": score, "class": class_name} | found)
    return rows
