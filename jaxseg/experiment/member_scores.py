"""What the members of a run are worth, each alone, and what they say of the recipe they share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxseg import geometry
from jaxseg.data.label_values import without_ignored
from jaxseg.data.reading import read_case_image, read_case_label
from jaxseg.evaluation import metrics, statistics
from jaxseg.experiment.members import Member, member_alone
from jaxseg.experiment.segmented import CaseFiles
from jaxseg.experiment.setup import Run
from jaxseg.inference import postprocess
from jaxseg.run.writers import json_ready

# Scores of one member: by case id a dict from a score's name to [K] float64.
Scores = dict[str, dict[str, np.ndarray]]


def score_members(
    run: Run, variables: Any, set_name: str, steps: Sequence[dict[str, Any]]
) -> list[Scores]:
    """Dice of every member alone on the same cases.

    Args:
      run: what has been trained.
      variables: from `member_weights`.
      set_name: "val" or "test".
      steps: post-processing.
    Returns:
      For each member a dict from case id to {"dice": [K] float64}.
    """
    alone = [member_alone(variables, index) for index in range(len(run.members))]
    scores_of: list[Scores] = [{} for _ in alone]
    title = f"scoring each member on {set_name} cases"
    for case in run.log.progress(run.data.cases_of(set_name), title=title):
        image, affine = read_case_image(run.data.dataset, case)
        reference = read_case_label(run.data.dataset, case)
        spacing_mm = geometry.spacing_mm_from_affine(affine)
        for scores, member in zip(scores_of, alone, strict=True):
            label = run.segment_fn(member, image, affine)["label"]
            label = postprocess.apply_steps(label, spacing_mm, steps)
            counted = without_ignored(label, reference, run.data.dataset.coding)
            scores[case.case_id] = _dice(*counted, run.data.num_classes)
    return scores_of


def scores_by_fold(run: Run, files: Sequence[CaseFiles]) -> list[Scores]:
    """As `score_members`, of what each fold's member has predicted of its own fold."""
    by_id = {case_files.case.case_id: case_files for case_files in files}
    return [
        {
            case.case_id: _dice(*by_id[case.case_id].read_labels()[:2], run.data.num_classes)
            for case in run.data.cases_of("val", member=index)
        }
        for index in range(len(run.members))
    ]


def best_member(scores_of_members: Sequence[Scores]) -> int:
    """Index of the member with the best mean Dice; the first if none has one."""
    dice = [metrics.mean_dice(scores.values()) for scores in scores_of_members]
    return int(np.argmax(np.nan_to_num(dice, nan=-1.0)))


def summarise_members(
    kind: str,
    set_name: str,
    members: Sequence[Member],
    scores_of_members: Sequence[Scores],
    chosen: int | None = None,
) -> dict[str, Any]:
    """What the members of a run say of the recipe that they share.

    Args:
      kind: "seeds", "folds" or "rates".
      set_name: that they were scored on.
      members: Member of each.
      scores_of_members: as from `score_members`.
      chosen: index of the member that is the result; None where they are averaged.
    Returns:
      Dict, JSON-ready: "kind", "set", "chosen"; "members", for each its fields with "num_cases",
      mean Dice "dice" (over cases) and "dice_by_class" of the foreground; and, but for rates,
      "summary": for "dice" and each of "dice_by_class" what `statistics.t_interval` says of them.
    """
    rows = []
    for member, scores in zip(members, scores_of_members, strict=True):
        by_class = metrics.summarise(list(scores.values()))["dice"]["mean"][1:]
        rows.append(
            dataclasses.asdict(member)
            | {
                "num_cases": len(scores),
                "dice": metrics.mean_dice(scores.values()),
                "dice_by_class": by_class.tolist(),
            }
        )
    found: dict[str, Any] = {"kind": kind, "set": set_name, "chosen": chosen, "members": rows}
    if kind != "rates":  # which are no repetitions of one thing
        of_classes = zip(*(row["dice_by_class"] for row in rows), strict=True)
        found["summary"] = {
            "dice": statistics.t_interval([row["dice"] for row in rows]),
            "dice_by_class": [statistics.t_interval(values) for values in of_classes],
        }
    return json_ready(found)


def _dice(prediction, reference, num_classes):
    counts = metrics.confusion_counts(prediction, reference, num_classes)
    return {"dice": metrics.scores_from_counts(counts)["dice"]}
