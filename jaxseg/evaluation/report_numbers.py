"""The report's words and numbers: what scores are worth, tables of them, rows of cases."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxseg.evaluation import metrics

# By table: the scores shown there, their headings and digits.
TABLES = {
    "Overlap": {
        "dice": ("Dice", 3),
        "iou": ("IoU", 3),
        "precision": ("precision", 3),
        "recall": ("recall", 3),
    },
    "Surface": {
        "nsd": ("surface Dice{tolerance}", 3),
        "hd95": ("HD95 ({unit})", 2),
        "hd": ("HD ({unit})", 2),
        "assd": ("ASSD ({unit})", 2),
    },
    "Volume": {
        "volume_ml": ("predicted (ml)", 1),
        "reference_volume_ml": ("reference (ml)", 1),
        "volume_error_ml": ("error (ml)", 1),
    },
    "Lesions": {
        "lesion_precision": ("precision", 3),
        "lesion_recall": ("recall", 3),
        "lesion_f1": ("F1", 3),
    },
}
CHOICES = (
    "choices of the training were made by them, so a new hospital should expect less. Scores and "
    "masks are those before post-processing, which these cases chose."
)
ABOUT_SET = {
    "test": "Held-out test subjects: nothing was trained on them or chosen by them.",
    "val": f"Held-out validation subjects: none of them was trained on, but {CHOICES}",
    "evaluation": (
        "Predictions from files compared with references; the files do not tell whether these "
        "subjects were held out."
    ),
}
CROSS_VALIDATED = (
    "Cross-validated: each case was predicted by the member that was not trained on it, but "
    f"{CHOICES}"
)
ABOUT_NETWORK = {
    "seeds": "A prediction is the average of {num} networks that differ in their seed.",
    "folds": "A prediction is the average of {num} networks, one of each fold.",
    "rates": "The network has the best of {num} learning rates, by validation Dice.",
}
# By kind of members: what they differ in, and what their spread is worth.
MEMBERS = {
    "seeds": (
        "seed",
        "Each member alone, on the same subjects and with the same post-processing: the interval "
        "is of the randomness of training alone, and says nothing about other subjects.",
    ),
    "folds": (
        "fold",
        "Each member alone, on the validation subjects of its fold, which it was not trained on, "
        "before post-processing: the interval is of the randomness of training and of other "
        "subjects too. It is rather too narrow, since folds share training subjects.",
    ),
    "rates": (
        "learning rate",
        "Each member alone, before post-processing. The choice was made on these very cases, so "
        "the best figure is a little too good; these are no repetitions, so there is no interval.",
    ),
}
COUNTED = (
    "A class that is absent from reference and prediction does not count; then n says how many "
    "cases do. Where only one of them is empty, distances are infinite: such cases are counted as "
    "without distance."
)

Row = tuple[str, list[dict[str, str]]]  # class name and cells


def describe_members(members: dict[str, Any]) -> str:
    """What the members of a run say, as a line for the terminal.

    Args:
      members: dict of `jaxseg.experiment.member_scores.summarise_members`.
    """
    name, rows = MEMBERS[members["kind"]][0], members["members"]
    if "summary" in members:
        found = _interval_cell(members["summary"]["dice"], 4)
        return (
            f"mean {members['set']} Dice of a member alone {found['mean']} (95 % interval "
            f"{found['interval']}) over {len(rows)} {name}s"
        )
    shown = ", ".join(f"{member_name(row, name)}: {number(row['dice'], 4)}" for row in rows)
    chosen = member_name(rows[members["chosen"]], name)
    return f"mean {members['set']} Dice of each {name}: {shown}; {chosen} is used"


def about(set_name: str, members: dict[str, Any] | None) -> str:
    """What the scores of a set are worth; `members` as for `members`."""
    of_set = ABOUT_SET[set_name]
    if members is None:
        return of_set
    if (members["kind"], set_name) == ("folds", "val"):
        return CROSS_VALIDATED
    return f"{of_set} {ABOUT_NETWORK[members['kind']].format(num=len(members['members']))}"


def members(members: dict[str, Any] | None) -> dict[str, Any] | None:
    """Table of the members: its note, heading, rows (cells, whether chosen) and summary cells."""
    if members is None:
        return None
    name, note = MEMBERS[members["kind"]]
    rows = []
    for index, row in enumerate(members["members"]):
        dice = [number(value, 3) for value in (row["dice"], *row["dice_by_class"])]
        cells = [index, member_name(row, name), row["num_cases"], *dice]
        rows.append((cells, index == members["chosen"]))
    summary = members.get("summary", {})
    found = [summary["dice"], *summary["dice_by_class"]] if summary else []
    return {
        "set": members["set"],
        "name": name,
        "note": note,
        "rows": rows,
        "summary": [_interval_cell(value, 3) for value in found],
    }


def member_name(row: Mapping[str, Any], name: str) -> str:
    """What tells a member from the others, as text; `name` is what they differ in."""
    value = row[name.replace(" ", "_")]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval_cell(found, digits):
    """Texts of what `statistics.t_interval` found."""
    mean, sd, low, high = (
        number(value, digits) for value in (found["mean"], found["sd"], *found["interval"])
    )
    return {"mean": f"{mean} ± {sd}", "interval": f"{low} to {high}", "num": found["num"]}


def worst_first(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """(case id, mean foreground Dice), in the order of `metrics.worst_first`."""
    ranked = metrics.worst_first(scores["cases"])
    return [(case_id, metrics.mean_foreground(case["dice"])) for case_id, case in ranked.items()]


def tables(scores: dict[str, Any]) -> list[tuple[str, list[str], list[Row]]]:
    """List of (heading, column headings, rows); a row is (class name, cells)."""
    tables = []
    for heading, columns in TABLES.items():
        columns = {name: column for name, column in columns.items() if name in scores["summary"]}
        if heading == "Volume" and _unit_of(scores) != "mm":
            continue  # a picture has none
        if columns:
            rows = [
                (
                    class_name,
                    [_cell(scores, name, i, digits) for name, (_, digits) in columns.items()],
                )
                for i, class_name in enumerate(scores["class_names"][1:], start=1)
            ]
            tables.append((heading, [column_heading(scores, c) for c, _ in columns.values()], rows))
    return tables


def _unit_of(scores):
    return scores["about"].get("unit", "mm")


def column_heading(scores: dict[str, Any], template: str) -> str:
    """A heading of TABLES with the unit and the tolerance of these scores."""
    unit, tolerance = _unit_of(scores), scores["about"].get("tolerance_mm")
    at = "" if tolerance is None else f" at {tolerance:g} {unit}"
    return template.format(unit=unit, tolerance=at)


def _cell(scores, name, index, digits):
    """Texts of one class's score: "mean ± sd", the interval, and what does not count."""
    summary = scores["summary"][name]
    mean, sd, low, high = (
        number(value, digits)
        for value in (summary["mean"][index], summary["sd"][index], *summary["interval"][index])
    )
    num, num_infinite = summary["num"][index], summary["num_infinite"][index]
    notes = [f"n = {num}"] if num < len(scores["cases"]) else []
    notes += [f"{num_infinite} without distance"] if num_infinite else []
    return {"mean": f"{mean} ± {sd}", "interval": f"{low} to {high}", "num": ", ".join(notes)}


def number(value: float | None, digits: int) -> str:
    """A number as text; what is None (null in JSON) or not finite is a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def case_row(
    scores: dict[str, Any], flags: Mapping[str, Sequence[str]], case_id: str, dice: float
) -> dict[str, Any]:
    """A case with its mean Dice, that of each class, and why it is unlike the training set."""
    by_class = scores["cases"][case_id]["dice"][1:]
    return {
        "case_id": case_id,
        "dice": [number(value, 3) for value in (dice, *by_class)],
        "flags": flags.get(case_id, ()),
    }


def decision_row(decision: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Texts of a step of post-processing that was tried."""
    fields = []
    for name, value in decision["step"].items():
        if name == "classes":
            fields.append(", ".join(class_names[index] for index in value))
        elif name == "together":
            fields.append("together" if value else "each")
        elif name != "name":
            fields.append(f"{name} {value:g}")
    return {
        "step": decision["step"]["name"].replace("_", " "),
        "fields": "; ".join(fields),
        "before": number(decision["dice_before"], 4),
        "after": number(decision["dice_after"], 4),
        "kept": decision["kept"],
    }
