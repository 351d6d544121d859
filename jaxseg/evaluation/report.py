"""The report of an evaluation: one HTML file that needs nothing beside it, and Markdown."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from jaxseg.evaluation import metrics, plots
from jaxseg.evaluation import report_numbers as numbers
from jaxseg.evaluation.report_pictures import planes
from jaxseg.run import writers

BOXES = (("Overlap", "dice"), ("Surface", "nsd"), ("Surface", "hd95"))
MEMBER_CURVES = {"member_loss": "loss", "member_val_dice": "mean validation Dice (whole cases)"}

# Image, label, prediction and spacing, as ReportContent says.
LoadedCase = tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[float] | np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class ReportContent:
    """What there is to report.

    Attributes:
      title: of the report.
      set_name: "test", "val" or "evaluation".
      scores: dict that `scoring.save_scores` writes as JSON. Its "about" may hold the "unit" of
        distances, "mm" if it does not, and "tolerance_mm" of the surface Dice.
      curves: rows of the run's metrics, or empty.
      calibration: dict of `calibration.calibrate`, or None.
      decisions: those of `postprocess.choose_steps`.
      config: JSON text, or "".
      versions: dict from package to version.
      sha256: of the data, or "".
      flags: dict from case id to the reasons why it is unlike the training set.
      members: dict of `jaxseg.experiment.member_scores.summarise_members`, or None for a single
        network.
      load_case: function from a case id to (image [X, Y, Z, C], label [X, Y, Z], prediction
        [X, Y, Z], spacing_mm [3]) in RAS+ axes, or for a picture (Z is 1) with rows along X,
        columns along Y and None as spacing; None shows no overlays.
    """

    title: str
    set_name: str
    scores: dict[str, Any]
    curves: Sequence[Mapping[str, Any]] = ()
    calibration: dict[str, Any] | None = None
    decisions: Sequence[dict[str, Any]] = ()
    config: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    flags: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    members: dict[str, Any] | None = None
    load_case: Callable[[str], LoadedCase] | None = None


def write_report(folder: str | Path, content: ReportContent) -> None:
    """Writes `report.html` and `report.md`, each whole or not at all.

    The Markdown refers to `curves.png` and to the contact sheet of the set where the folder has
    them.

    Args:
      folder: existing folder.
      content: ReportContent.
    """
    shared = _shared_values(content)
    pictures = [
        name
        for name in (f"{content.set_name}.png", "curves.png")
        if os.path.exists(os.path.join(folder, name))
    ]
    html = _HTML.get_template("report.html").render(
        shared,
        charts=_charts(content),
        calibration_chart=_calibration_chart(content.calibration),
        cases=_shown_cases(content),
        colours=plots.CLASS_COLOURS,
    )
    markdown = _MARKDOWN.get_template("report.md").render(shared, pictures=pictures)
    writers.write_text(os.path.join(folder, "report.html"), html)
    writers.write_text(os.path.join(folder, "report.md"), markdown)


def _shared_values(content):
    """What both templates fill in."""
    order = numbers.worst_first(content.scores)
    return {
        "content": content,
        "about": numbers.about(content.set_name, content.members),
        "members": numbers.members(content.members),
        "class_names": content.scores["class_names"][1:],
        "counted": numbers.COUNTED,
        "tables": numbers.tables(content.scores),
        "mean_dice": numbers.number(metrics.mean_dice(content.scores["cases"].values()), 3),
        "case_rows": [
            numbers.case_row(content.scores, content.flags, case_id, dice)
            for case_id, dice in order
        ],
        "decisions": [
            numbers.decision_row(d, content.scores["class_names"]) for d in content.decisions
        ],
    }


def _charts(content):
    """SVG elements: learning curves, then box plots."""
    curves = [
        plots.svg_of(plots.draw_curves, content.curves, names, *how)
        for names, *how in plots.CURVES
        if any(row.get(name) is not None for row in content.curves for name in names)
    ]
    boxes = []
    for table, score in BOXES:
        if score in content.scores["summary"]:
            title = numbers.column_heading(content.scores, numbers.TABLES[table][score][0])
            values = [case[score][1:] for case in content.scores["cases"].values()]
            names = content.scores["class_names"][1:]
            boxes.append(plots.svg_of(plots.draw_boxes, values, names, title))
    return {"curves": curves, "boxes": boxes, "members": _member_charts(content)}


def _member_charts(content):
    """SVG elements: learning curves with a line per member."""
    if content.members is None:
        return []
    name = numbers.MEMBERS[content.members["kind"]][0]
    labels = [f"{name} {numbers.member_name(row, name)}" for row in content.members["members"]]
    charts = []
    for key, title in MEMBER_CURVES.items():
        rows = [
            {"step": row["step"]} | dict(zip(labels, row[key], strict=True))
            for row in content.curves
            if row.get(key) is not None
        ]
        if rows:
            charts.append(plots.svg_of(plots.draw_curves, rows, labels, title))
    return charts


def _calibration_chart(calibration):
    if calibration is None:
        return ""
    curves = {
        when: [
            [b[axis] for b in calibration[f"bins_{when}"]] for axis in ("confidence", "accuracy")
        ]
        for when in ("before", "after")
    }
    return plots.svg_of(plots.draw_reliability, curves)


def _shown_cases(content):
    """The worst, the median and the best case with their planes, one loaded at a time."""
    ranked = [
        (case_id, dice) for case_id, dice in numbers.worst_first(content.scores) if dice == dice
    ]
    if content.load_case is None or not ranked:
        return
    places = {len(ranked) // 2: "Median", len(ranked) - 1: "Best", 0: "Worst"}
    for place, heading in sorted(places.items()):
        case_id, dice = ranked[place]
        image, label, prediction, spacing_mm = content.load_case(case_id)
        num_channels = image.shape[-1]
        is_colour = spacing_mm is None and num_channels == 3
        yield {
            "heading": heading if len(ranked) > 1 else "The only case",
            "case_id": case_id,
            "dice": numbers.number(dice, 3),
            "note": "" if is_colour or num_channels == 1 else f"channel 1 of {num_channels}",
            "planes": planes(image if is_colour else image[..., 0], label, prediction, spacing_mm),
        }


_MARKDOWN_SYNTAX = str.maketrans(
    {c: f"\\{c}" for c in "\\`*_{}[]<>#|~&!$"} | {"\n": " ", "\r": " "}
)


def _escaped_for_markdown(value):
    """Any text as Markdown that shows it as it is, on one line; `| safe` marks what is Markdown."""
    return value if hasattr(value, "__html__") else str(value).translate(_MARKDOWN_SYNTAX)


def _environment(**options):
    return jinja2.Environment(
        loader=jinja2.PackageLoader("jaxseg.evaluation"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


_HTML = _environment(autoescape=True)
_MARKDOWN = _environment(finalize=_escaped_for_markdown)
