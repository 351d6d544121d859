"""Scores a folder of predictions against references, and compares it with a second one."""

import os
from collections.abc import Sequence

from jaxseg.data.formats.registry import is_volume
from jaxseg.data.label_values import without_ignored
from jaxseg.data.labels import read_label
from jaxseg.data.pairs import check_folders
from jaxseg.evaluation import metrics, scoring, tables
from jaxseg.run import writers
from jaxseg.run.log import bar_over

NUM_WORST = 5


def evaluate_folders(
    predictions: str,
    references: str,
    *,
    others: str | None = None,
    label_values: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    ignore_values: Sequence[int] = (),
    spacing_from: str = "pixdim",
    tolerance_mm: float = 1.0,
    lesions: bool = False,
    subset: bool = False,
    output: str | None = None,
) -> str:
    """Scores a folder of predictions, and compares it with a second one.

    Args:
      predictions, references: folders of label files.
      others: folder of another model's predictions of the same cases; None for none.
      label_values: value in the files for each class, background first; None for 0 and those that
        are found in the references. (Masks of 0 and 255 fit predictions of 0 and 1.)
      class_names: of all classes, background first; None for their values.
      ignore_values: values in the references of voxels that count for nothing.
      spacing_from: "pixdim" or "sform": what is believed where a header contradicts itself.
      tolerance_mm, lesions: as for `score_case`.
      subset: whether references without a prediction are left out; else they are a problem.
      output: folder for evaluation.json, evaluation.csv and, with `others`, compared.json,
        compared.csv and comparison.json; made if missing. None writes nothing.
    Returns:
      Text for the terminal.
    Raises:
      EvaluationProblems: files that are missing, unreadable, on another grid, or have values of no
        class; nothing has been computed then.
      OSError: the output can not be written.
    """
    folders = [predictions] if others is None else [predictions, others]
    pairs_of, coding, class_names, remarks = check_folders(
        folders,
        references,
        label_values=label_values,
        class_names=class_names,
        ignore_values=ignore_values,
        spacing_from=spacing_from,
        subset=subset,
    )
    if output is not None:
        os.makedirs(output, exist_ok=True)
    unit = "mm" if is_volume(pairs_of[0][0].reference) else "pixel"
    sections, found = [f"note: {remark}" for remark in remarks], []
    for folder, pairs, name in zip(folders, pairs_of, ("evaluation", "compared"), strict=False):
        scores_of = {}
        for pair in bar_over(pairs, f"scoring {folder}"):
            prediction, _ = read_label(pair.prediction, coding, spacing_from)
            label, affine = read_label(pair.reference, coding, spacing_from)
            prediction, label = without_ignored(prediction, label, coding)
            scores_of[pair.case_id] = scoring.score_case(
                prediction,
                label,
                affine,
                len(class_names),
                tolerance_mm=tolerance_mm,
                lesions=lesions,
            )
        found.append(scores_of)
        heading = f"{folder}: {len(pairs)} cases, surface Dice (nsd) at {tolerance_mm:g} {unit}"
        sections += [heading, _describe(scores_of, class_names)]
        if output is not None:
            about = {
                "set": "evaluation",
                "predictions": os.path.abspath(folder),
                "references": os.path.abspath(references),
                "label_values": coding.values,
                "tolerance_mm": tolerance_mm,
                "unit": unit,
            }
            scoring.save_scores(output, name, scores_of, class_names=class_names, about=about)
    if others is not None:
        rows = scoring.compare(found[0], found[1], class_names)
        sections += [f"{predictions} minus {others}", tables.format_comparison(rows)]
        if output is not None:
            writers.write_json(os.path.join(output, "comparison.json"), rows)
    return "\n\n".join(sections)


def _describe(scores_of, class_names):
    lines = [tables.format_table(scoring.summarise(scores_of), class_names), ""]
    lines.append(f"mean Dice {metrics.mean_dice(scores_of.values()):.4f}; the worst cases:")
    for case_id, scores in list(metrics.worst_first(scores_of).items())[:NUM_WORST]:
        dice = metrics.mean_foreground(scores["dice"])
        lines.append(f"  {case_id}  {dice:.4f}")
    return "\n".join(lines)
