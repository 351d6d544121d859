"""Which label files belong together, a prediction and its reference, and what stands against it.

A prediction and a reference belong together if their names are equal but for the suffix; both are
label files on one grid.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxseg.data.formats import registry
from jaxseg.data.formats.volume import Volume, grouped
from jaxseg.data.images import affine_problems, grid_remarks
from jaxseg.data.label_values import MAX_CLASSES, LabelCoding
from jaxseg.data.labels import decode_label, settled_values
from jaxseg.problem import FileProblem, Problem, name_problems
from jaxseg.run.log import bar_over

MAX_LISTED = 10

# What a mask may have in place of 1.
_MASK_VALUES = {1, 255, 65535}
# What the predict command writes beside the label of a case.
_MAP = re.compile(
    r"(.+)_(probs|confidence|entropy|mutual_information|grad_cam.*|integrated_gradients.*)"
)


class EvaluationProblems(Problem, ValueError):
    """Everything that keeps files from being evaluated; `problems` has one sentence for each."""

    def __init__(self, problems: Sequence[str]):
        super().__init__(problems)
        self.problems = list(problems)

    def __str__(self) -> str:
        noun = "problem" if len(self.problems) == 1 else "problems"
        return "\n- ".join([f"{len(self.problems)} {noun}, nothing is evaluated:", *self.problems])


@dataclasses.dataclass(frozen=True)
class Pair:
    """Label files of one case."""

    case_id: str
    prediction: str
    reference: str


def check_folders(
    folders: Sequence[str | Path],
    references: str | Path,
    *,
    label_values: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    ignore_values: Sequence[int] = (),
    spacing_from: str = "pixdim",
    subset: bool = False,
) -> tuple[list[list[Pair]], LabelCoding, tuple[str, ...], list[str]]:
    """Pairs the files of prediction folders with references, and checks every one of them.

    Args:
      folders: folders of predictions.
      references: folder of references.
      label_values, class_names, ignore_values, spacing_from, subset: as for `evaluate_folders`.
    Returns:
      (pairs, coding, class_names, remarks): for each folder its list of Pair in order of case id;
      values and names as they are to be used; what the user should know of the files.
    Raises:
      EvaluationProblems: as `evaluate_folders`.
    """
    problems: list[str] = []
    wanted = _label_files(references, problems)
    pairs_of = [_pairs(folder, references, wanted, problems, subset) for folder in folders]
    pairs = [pair for pairs in pairs_of for pair in pairs]
    if subset:
        wanted = {pair.case_id: pair.reference for pair in pairs}
        for folder, pairs_there in zip(folders, pairs_of, strict=True):
            if missing := sorted(wanted.keys() - {pair.case_id for pair in pairs_there}):
                problems.append(f"{folder}: no prediction of {_listed(missing)}, to compare with")
    paths = dict.fromkeys([*wanted.values(), *(pair.prediction for pair in pairs)])
    grids, values, remarks = {}, {}, {}
    given = LabelCoding(None if label_values is None else tuple(label_values), tuple(ignore_values))
    for path in bar_over(paths, "checking files"):
        try:
            grids[path], values[path] = _inspect(path, given, spacing_from)
            remarks[path] = grids[path].remarks
        except FileProblem as problem:
            problems.append(str(problem))
    for pair in pairs:
        if pair.prediction in grids and pair.reference in grids:
            try:
                near = grid_remarks(
                    pair.prediction, grids[pair.prediction], pair.reference, grids[pair.reference]
                )
                remarks[pair.prediction] = (*remarks[pair.prediction], *near)
            except FileProblem as problem:
                problems.append(str(problem))
    if label_values is None and len(values) == len(paths):  # else some values are not known yet
        label_values = _found_values(values, set(wanted.values()))
    if label_values is not None:
        problems += _value_problems(values, label_values)
    if problems:
        raise EvaluationProblems(problems)
    coding = LabelCoding(None if label_values is None else tuple(label_values), given.ignore)
    shown = ("foreground",) if label_values is None else tuple(map(str, label_values[1:]))
    class_names = tuple(class_names or ("background", *shown))
    if len(class_names) != 1 + len(shown):
        raise EvaluationProblems(
            [
                f"{len(class_names)} class names for {1 + len(shown)} classes (background, "
                f"{', '.join(shown)}); name them all, background first"
            ]
        )
    return pairs_of, coding, class_names, grouped(remarks)


def _label_files(folder, problems):
    """Paths of the label files in a folder by case id, in its order; appends to `problems`."""
    if not os.path.isdir(folder):
        problems.append(f"{folder}: no such folder; correct its name")
        return {}
    found: dict[str, str] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(".") or not registry.is_image(path):
            continue
        case_id = os.path.basename(registry.stem_of(path))
        if case_id in found:
            problems.append(f"{path}: {found[case_id]} is the same case; keep one of them")
        found[case_id] = str(path)
    problems += name_problems(found.values())
    if not found:
        problems.append(f"{folder}: holds no label file ({registry.KINDS}); correct it")
    case_of_map = {c: match[1] for c in found if (match := _MAP.fullmatch(c))}
    return {c: path for c, path in found.items() if case_of_map.get(c) not in found}


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


def _inspect(path, coding, spacing_from):
    """(Volume that stands for the grid, values) of a label file, values as a set of int."""
    stored = decode_label(path, spacing_from)
    problems = affine_problems(path, stored.affine)
    if problems:
        raise problems[0]
    if not stored.values.size:
        raise FileProblem(
            f"{path}: has no voxels, its shape is {list(stored.values.shape)}; copy it again"
        )
    values = np.unique(settled_values(path, stored, coding).ravel(order="K"))
    values = values[~np.isin(values, coding.ignore)]
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    if values.size > MAX_CLASSES or not whole or values.min(initial=0) < 0:
        raise FileProblem(
            f"{path}: holds {values.size} values from {values.min():g} to {values.max():g}, where "
            f"labels are at most {MAX_CLASSES} whole numbers from 0; give a label file"
        )
    shape_only = np.broadcast_to(np.uint8(0), stored.values.shape)
    grid = Volume(shape_only, stored.affine, stored.remarks)
    return grid, {int(value) for value in values}


def _found_values(values, references):
    """0 and the values in the references; None if both are masks and differ in what is not 0."""
    in_references = {v for path, found in values.items() if path in references for v in found}
    predicted = {v for path, found in values.items() if path not in references for v in found}
    of_masks = [found - {0} for found in (in_references, predicted)]
    if all(len(found) == 1 and found <= _MASK_VALUES for found in of_masks) and (
        of_masks[0] != of_masks[1]
    ):
        return None
    return tuple(sorted({0} | in_references))


def _value_problems(values, label_values):
    """What the classes leave unexplained; `label_values` may be anything that a user typed."""
    known, allowed = set(label_values), list(label_values)
    if len(known) != len(label_values) or not 2 <= len(known) <= MAX_CLASSES or min(known) < 0:
        return [
            f"label values {allowed} are no classes; give 2 to {MAX_CLASSES} different "
            "whole numbers from 0 with --label_values, background first"
        ]
    return [
        f"{path}: label values {sorted(found - known)[:MAX_LISTED]} are not among {allowed}; "
        "correct them, or give the values of all classes with --label_values"
        for path, found in values.items()
        if found - known
    ]
