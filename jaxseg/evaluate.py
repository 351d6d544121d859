"""Scores of whole cases, on the grid of the files they came from."""

import dataclasses
import json
import os

import numpy as np

from jaxseg import geometry, inference, metrics, plots, writers
from jaxseg.data.preprocess import restore_probs
from jaxseg.data.volumes import is_nifti, read_image, read_label, write_label

SCORES = ("dice", "iou", "precision", "recall")
CASES_ON_SHEET = 6


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """A predicted case.

    Attributes:
      case: `jaxseg.data.cases.Case`.
      label, prediction: [X, Y, Z] uint8 on the file's grid.
      affine: [4, 4] of the file.
      scores: dict from score to [num_classes]; NaN where a class does not count.
    """

    case: object
    label: np.ndarray
    prediction: np.ndarray
    affine: np.ndarray
    scores: dict


def evaluate_cases(predict_fn, store, cases, *, label_values, num_classes, **tiling):
    """Predicts whole cases and compares them with their reference files, one at a time.

    Args:
      predict_fn: as for `inference.predict_case`.
      store: CaseStore.
      cases: iterable of `jaxseg.data.cases.Case`.
      label_values: file value of each class, or None.
      num_classes: background included.
      **tiling: patch_size, batch_size and margin of `inference.predict_case`.
    Yields:
      CaseResult.
    """
    for case in cases:
        prepared = store[case.case_id]
        probs = inference.predict_case(predict_fn, prepared.image, prepared.label, **tiling)
        probs = restore_probs(probs, prepared.original_shape, prepared.original_affine)
        prediction = probs.argmax(-1).astype(np.uint8)
        label, affine = read_label(case.label_path, label_values)
        counts = metrics.confusion_counts(prediction, label, num_classes)
        yield CaseResult(case, label, prediction, affine, metrics.scores_from_counts(counts))


def mean_dice(scores_by_case):
    """Mean over cases of each case's mean foreground Dice; NaN if no case has one."""
    by_case = np.array([metrics.mean_foreground(scores["dice"]) for scores in scores_by_case])
    counted = by_case[~np.isnan(by_case)]
    return float(counted.mean()) if counted.size else float("nan")


def save_evaluation(folder, name, results, *, class_names, label_values, about):
    """Writes scores, predictions and a contact sheet.

    Args:
      folder: existing folder; gets `NAME.json`, `NAME.csv`, `NAME.png` and `NAME/` with one
        prediction file per case, in the format, grid and header of the case's image.
      name: of the evaluated set.
      results: iterable of CaseResult; each is written before the next is asked for.
      class_names, label_values: as in the dataset.
      about: JSON-ready dict that says which model was evaluated on what.
    Returns:
      (table, mean): the scores as a table for the terminal, and `mean_dice`.
    """
    predictions = os.path.join(folder, name)
    os.makedirs(predictions, exist_ok=True)
    scores_of, panels = {}, []
    for result in results:
        suffix = ".nii.gz" if is_nifti(result.case.image_path) else ".png"
        write_label(
            os.path.join(predictions, result.case.case_id + suffix),
            result.prediction,
            result.affine,
            label_values,
            like=result.case.image_path,
        )
        scores_of[result.case.case_id] = result.scores
        if len(panels) < CASES_ON_SHEET:
            panels.append(_panel(result))
    summary = metrics.summarise(list(scores_of.values()))
    mean = mean_dice(scores_of.values())
    content = {
        "about": about,
        "rule": "a class absent from reference and prediction does not count (null)",
        "class_names": list(class_names),
        "mean_dice": mean,
        "summary": summary,
        "cases": scores_of,
    }
    text = json.dumps(writers.json_ready(content), indent=1)
    writers.write_text(os.path.join(folder, f"{name}.json"), text)
    rows = [
        {"case": case_id, "class": class_name} | {s: scores[s][index] for s in SCORES}
        for case_id, scores in scores_of.items()
        for index, class_name in enumerate(class_names)
        if index > 0
    ]
    writers.write_csv(os.path.join(folder, f"{name}.csv"), rows)
    plots.save_contact_sheet(os.path.join(folder, f"{name}.png"), panels, class_names)
    return format_table(summary, class_names), mean


def format_table(summary, class_names):
    """Lays out mean ± sd over cases, a row per foreground class."""
    width = max(len(name) for name in (*class_names, "class"))
    lines = [f"{'class':<{width}}" + "".join(f"  {score:^15}" for score in SCORES) + "  cases"]
    for index, class_name in enumerate(class_names[1:], start=1):
        cells = "".join(
            f"  {summary[s]['mean'][index]:6.4f} ± {summary[s]['sd'][index]:6.4f}" for s in SCORES
        )
        lines.append(f"{class_name:<{width}}{cells}  {summary['dice']['num'][index]:>5}")
    return "\n".join(lines)


def _panel(result):
    image, _ = read_image(result.case.image_path)
    image = image if image.shape[-1] == 3 else image[..., 0]
    label, prediction = result.label, result.prediction
    aspect = 1.0
    if is_nifti(result.case.image_path):
        spacing_mm = geometry.spacing_mm_from_affine(result.affine)
        aspect = spacing_mm[1] / spacing_mm[0]
        # Shown as on a light box: first axis to the right, second upwards.
        image, label, prediction = (np.rot90(a, axes=(0, 1)) for a in (image, label, prediction))
    z = int(np.argmax((label > 0).sum((0, 1))))
    dice = metrics.mean_foreground(result.scores["dice"])
    case_id = result.case.case_id
    shown_id = case_id if len(case_id) <= 24 else f"{case_id[:23]}…"
    title = f"{shown_id}: Dice {dice:.3f}"
    return title, image[:, :, z], label[:, :, z], prediction[:, :, z], aspect
