"""Scores segmentations: `python -m jaxseg.evaluate --predictions=DIR --references=DIR`.

A prediction and a reference belong together if their names are equal but for the suffix; both are
label files (NIfTI, or PNG or TIFF pictures) on one grid. Distances are in millimetres and volumes
in millilitres; of pictures, whose pixels have no known size, in pixels and thousand pixels.

Every file is checked before anything is computed. With --output, scores go to evaluation.json and
evaluation.csv there. With --compare, a second folder of predictions is scored too (compared.json,
compared.csv) and the difference of the two tested (comparison.json). Exits with 2 if something
cannot be evaluated.
"""

import dataclasses
import os
import pathlib
import re
import sys

import numpy as np
from absl import flags
from tqdm import tqdm

from jaxseg import command, metrics, statistics, surfaces, writers
from jaxseg.data.volumes import (
    AFFINE_TOLERANCE_MM,
    FileProblem,
    affine_problems,
    decode_label,
    is_nifti,
    read_label,
)

NAME = "jaxseg-evaluate"
# The scores that are shown together; of the first the interval is shown too.
TABLES = (
    ("dice", "iou", "precision", "recall"),
    ("nsd", "hd", "hd95", "assd"),
    ("volume_error_ml", "volume_ml", "reference_volume_ml"),
    ("lesion_f1", "lesion_precision", "lesion_recall"),
)
COMPARED = ("dice", "nsd")
NUM_WORST = 5
MAX_LISTED = 10

_MAX_CLASSES = 256  # class indices are uint8
_PICTURE_SUFFIXES = (".png", ".tif", ".tiff")
# What the predict command writes beside the label of a case.
_MAP = re.compile(
    r"(.+)_(probs|confidence|entropy|mutual_information|grad_cam.*|integrated_gradients.*)"
)


class EvaluationProblems(ValueError):
    """Everything that keeps files from being evaluated; `problems` has one sentence for each."""

    def __init__(self, problems):
        super().__init__(problems)
        self.problems = list(problems)

    def __str__(self):
        noun = "problem" if len(self.problems) == 1 else "problems"
        return "\n- ".join([f"{len(self.problems)} {noun}, nothing is evaluated:", *self.problems])


@dataclasses.dataclass(frozen=True)
class Pair:
    """Label files of one case."""

    case_id: str
    prediction: str
    reference: str


def score_case(prediction, label, affine, num_classes, *, tolerance_mm=1.0, lesions=False):
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


def summarise(scores_of):
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


def save_scores(folder, name, scores_of, *, class_names, about):
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


def format_table(summary, class_names):
    """Lays out mean ± sd over cases and 95 % intervals, a row per foreground class."""
    tables = []
    for names in TABLES:
        shown = [name for name in names if name in summary]
        if not shown:
            continue
        head, *others = shown
        columns = [("class", class_names[1:])]
        columns.append((head, _means(summary, head)))
        columns.append(("95 % interval", [_span(i, head) for i in summary[head]["interval"][1:]]))
        columns += [(name, _means(summary, name)) for name in others]
        columns.append(("cases", summary[head]["num"][1:]))
        if "hd" in shown:
            columns.append(("no distance", summary["hd"]["num_infinite"][1:]))
        tables.append(_aligned(columns))
    return "\n\n".join(tables)


def compare(scores_of, others_of, class_names):
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


def format_comparison(rows):
    """Lays out what `compare` found."""
    return _aligned(
        [
            ("class", [row["class"] for row in rows]),
            ("score", [row["score"] for row in rows]),
            ("difference", [f"{row['difference']:+.4f}" for row in rows]),
            ("95 % interval", [_span(row["interval"], row["score"]) for row in rows]),
            ("p bootstrap", [f"{row['p']:.4f}" for row in rows]),
            ("p Wilcoxon", [f"{row['p_wilcoxon']:.4f}" for row in rows]),
            ("cases", [row["num"] for row in rows]),
        ]
    )


def evaluate_folders(
    predictions,
    references,
    *,
    others=None,
    label_values=None,
    class_names=None,
    tolerance_mm=1.0,
    lesions=False,
    subset=False,
    output=None,
):
    """Scores a folder of predictions, and compares it with a second one.

    Args:
      predictions, references: folders of label files.
      others: folder of another model's predictions of the same cases; None for none.
      label_values: value in the files for each class, background first; None for 0 and those that
        are found in the references. (Masks of 0 and 255 fit predictions of 0 and 1.)
      class_names: of all classes, background first; None for their values.
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
    pairs_of, label_values, class_names = check_folders(
        folders, references, label_values=label_values, class_names=class_names, subset=subset
    )
    if output is not None:
        os.makedirs(output, exist_ok=True)
    unit = "mm" if is_nifti(pairs_of[0][0].reference) else "pixel"
    sections, found = [], []
    for folder, pairs, name in zip(folders, pairs_of, ("evaluation", "compared"), strict=False):
        scores_of = {}
        for pair in _progress(pairs, f"scoring {folder}"):
            prediction, _ = read_label(pair.prediction, label_values)
            label, affine = read_label(pair.reference, label_values)
            scores_of[pair.case_id] = score_case(
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
                "label_values": label_values,
                "tolerance_mm": tolerance_mm,
                "unit": unit,
            }
            save_scores(output, name, scores_of, class_names=class_names, about=about)
    if others is not None:
        rows = compare(*found, class_names)
        sections += [f"{predictions} minus {others}", format_comparison(rows)]
        if output is not None:
            writers.write_json(os.path.join(output, "comparison.json"), rows)
    return "\n\n".join(sections)


def check_folders(folders, references, *, label_values=None, class_names=None, subset=False):
    """Pairs the files of prediction folders with references, and checks every one of them.

    Args:
      folders: folders of predictions.
      references: folder of references.
      label_values, class_names, subset: as for `evaluate_folders`.
    Returns:
      (pairs, label_values, class_names): for each folder its list of Pair in order of case id;
      values and names as they are to be used.
    Raises:
      EvaluationProblems: as `evaluate_folders`.
    """
    problems = []
    wanted = _label_files(references, problems)
    pairs_of = [_pairs(folder, references, wanted, problems, subset) for folder in folders]
    pairs = [pair for pairs in pairs_of for pair in pairs]
    if subset:
        wanted = {pair.case_id: pair.reference for pair in pairs}
        for folder, pairs_there in zip(folders, pairs_of, strict=True):
            if missing := sorted(wanted.keys() - {pair.case_id for pair in pairs_there}):
                problems.append(f"{folder}: no prediction of {_listed(missing)}, to compare with")
    paths = dict.fromkeys([*wanted.values(), *(pair.prediction for pair in pairs)])
    grids, values = {}, {}
    for path in _progress(paths, "checking files"):
        try:
            grids[path], values[path] = _inspect(path)
        except FileProblem as problem:
            problems.append(str(problem))
    for pair in pairs:
        if pair.prediction in grids and pair.reference in grids:
            problems += _grid_problems(pair, grids)
    if label_values is None and len(values) == len(paths):  # else some values are not known yet
        label_values = _found_values(values, set(wanted.values()))
    if label_values is not None:
        problems += _value_problems(values, label_values)
    if problems:
        raise EvaluationProblems(problems)
    shown = ("foreground",) if label_values is None else tuple(map(str, label_values[1:]))
    class_names = tuple(class_names or ("background", *shown))
    if len(class_names) != 1 + len(shown):
        raise EvaluationProblems(
            [
                f"{len(class_names)} class names for {1 + len(shown)} classes (background, "
                f"{', '.join(shown)}); name them all, background first"
            ]
        )
    return pairs_of, label_values, class_names


def _label_files(folder, problems):
    """Paths of the label files in a folder by case id, in its order; appends to `problems`."""
    if not os.path.isdir(folder):
        problems.append(f"{folder}: no such folder; correct its name")
        return {}
    found = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        nifti = is_nifti(path.name)
        if path.name.startswith(".") or not (nifti or path.suffix.lower() in _PICTURE_SUFFIXES):
            continue
        case_id = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I) if nifti else path.stem
        if case_id in found:
            problems.append(f"{path}: {found[case_id]} is the same case; keep one of them")
        found[case_id] = str(path)
    if not found:
        problems.append(f"{folder}: holds no label file (.nii, .nii.gz, .png, .tif); correct it")
    maps = {case_id: _MAP.fullmatch(case_id) for case_id in found}
    return {c: path for c, path in found.items() if not (maps[c] and maps[c][1] in found)}


def _pairs(folder, references, wanted, problems, subset):
    """The Pairs of a prediction folder; appends to `problems`."""
    there = _label_files(folder, problems)
    if there and wanted:
        missing = sorted(wanted.keys() - there.keys())
        if missing and not subset:
            problems.append(
                f"{folder}: no prediction of {_listed(missing)}; add them, or leave these cases "
                "out with --subset"
            )
        if missing := sorted(there.keys() - wanted.keys()):
            problems.append(f"{references}: no reference of {_listed(missing)}; add them")
    return [Pair(c, there[c], wanted[c]) for c in sorted(there.keys() & wanted.keys())]


def _listed(cases):
    """Names of cases, of many the first and their number."""
    more = f" and {len(cases) - MAX_LISTED} more cases" if len(cases) > MAX_LISTED else ""
    return ", ".join(cases[:MAX_LISTED]) + more


def _inspect(path):
    """((shape, affine), values) of a label file, values as a set of int."""
    stored, affine = decode_label(path)
    problems = affine_problems(path, affine)
    if problems:
        raise problems[0]
    if not stored.size:
        raise FileProblem(
            f"{path}: has no voxels, its shape is {list(stored.shape)}; copy it again"
        )
    values = np.unique(stored.ravel(order="K"))
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    if values.size > _MAX_CLASSES or not whole or values.min() < 0:
        raise FileProblem(
            f"{path}: holds {values.size} values from {values.min():g} to {values.max():g}, where "
            f"labels are at most {_MAX_CLASSES} whole numbers from 0; give a label file"
        )
    return (stored.shape, affine), {int(value) for value in values}


def _grid_problems(pair, grids):
    (shape, affine), (reference_shape, reference_affine) = (
        grids[path] for path in (pair.prediction, pair.reference)
    )
    mend = "resample the prediction to the reference's grid"
    if shape != reference_shape:
        return [
            f"{pair.prediction}: its shape is {list(shape)}, that of {pair.reference} "
            f"{list(reference_shape)}; {mend}"
        ]
    difference_mm = np.abs(affine - reference_affine).max()
    if difference_mm > AFFINE_TOLERANCE_MM:
        return [
            f"{pair.prediction}: its affine differs from that of {pair.reference} by up to "
            f"{difference_mm:.3g} mm; {mend}"
        ]
    return []


def _found_values(values, references):
    """0 and the values in the references; None if 1 is a mask on one side and 255 on the other."""
    in_references = {v for path, found in values.items() if path in references for v in found}
    predicted = {v for path, found in values.items() if path not in references for v in found}
    if (in_references - {0}, predicted - {0}) in (({1}, {255}), ({255}, {1})):
        return None
    return tuple(sorted({0} | in_references))


def _value_problems(values, label_values):
    """What the classes leave unexplained; `label_values` may be anything that a user typed."""
    known, allowed = set(label_values), list(label_values)
    if len(known) != len(label_values) or not 2 <= len(known) <= _MAX_CLASSES or min(known) < 0:
        return [
            f"label values {allowed} are no classes; give 2 to {_MAX_CLASSES} different "
            "whole numbers from 0 with --label_values, background first"
        ]
    return [
        f"{path}: label values {sorted(found - known)[:MAX_LISTED]} are not among {allowed}; "
        "correct them, or give the values of all classes with --label_values"
        for path, found in values.items()
        if found - known
    ]


def _describe(scores_of, class_names):
    lines = [format_table(summarise(scores_of), class_names), ""]
    lines.append(f"mean Dice {metrics.mean_dice(scores_of.values()):.4f}; the worst cases:")
    for case_id, scores in list(metrics.worst_first(scores_of).items())[:NUM_WORST]:
        dice = metrics.mean_foreground(scores["dice"])
        lines.append(f"  {case_id}  {dice:.4f}")
    return "\n".join(lines)


def _means(summary, name):
    """mean ± sd of each foreground class."""
    digits = _digits(name)
    return [
        f"{mean:.{digits}f} ± {sd:.{digits}f}"
        for mean, sd in zip(summary[name]["mean"][1:], summary[name]["sd"][1:], strict=True)
    ]


def _span(interval, name):
    low, high = interval
    return f"{low:.{_digits(name)}f} … {high:.{_digits(name)}f}"


def _digits(name):
    """Decimals of a score: millimetres and millilitres have two, shares four."""
    return 2 if name in ("hd", "hd95", "assd") or name.endswith("_ml") else 4


def _aligned(columns):
    """Lays out (heading, cells) columns; the first is flush left."""
    columns = [[heading, *map(str, cells)] for heading, cells in columns]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    )


def _progress(items, title):
    return tqdm(items, desc=title, leave=False, disable=not sys.stderr.isatty())


def main(argv):
    """Evaluates, and turns every expected failure into one clear message."""
    required = ("predictions", "references")
    options = command.parse(NAME, argv, text=__doc__, define=_define_flags, required=required)
    try:
        label_values = options.label_values and tuple(map(int, options.label_values))
    except ValueError as error:
        command.leave(NAME, f"--label_values: {error}")
    folders = (options.predictions, options.references, options.compare, options.output)
    predictions, references, others, output = (f and os.path.expanduser(f) for f in folders)
    try:
        text = evaluate_folders(
            predictions,
            references,
            others=others,
            label_values=label_values,
            class_names=options.class_names,
            tolerance_mm=options.tolerance_mm,
            lesions=options.lesions,
            subset=options.subset,
            output=output,
        )
    except (EvaluationProblems, OSError) as error:
        command.leave(NAME, str(error))
    except KeyboardInterrupt:
        command.leave(NAME, "interrupted", status=130)
    print(text)


def _define_flags(options):
    own = {"flag_values": options}
    flags.DEFINE_string("predictions", "", "folder of predicted label files", **own)
    flags.DEFINE_string("references", "", "folder of reference label files", **own)
    flags.DEFINE_string("compare", None, "folder of another model's predictions", **own)
    flags.DEFINE_string("output", None, "folder for the scores", **own)
    flags.DEFINE_float("tolerance_mm", 1.0, "of the surface Dice (nsd)", lower_bound=0, **own)
    flags.DEFINE_bool("lesions", False, "score the detection of lesions", **own)
    flags.DEFINE_bool("subset", False, "leave out references that have no prediction", **own)
    flags.DEFINE_list("class_names", None, "of all classes, background first", **own)
    flags.DEFINE_list("label_values", None, "in the files, in the order of class_names", **own)


def run():
    """Console script."""
    main(sys.argv)


if __name__ == "__main__":
    run()
