"""The report of an evaluation: one HTML file that needs nothing beside it, and Markdown.

Overlays are shown as radiologists look at them: the patient's right on the left, the front or the
head up. Each plane is one sprite per layer, a grid of slices, of which the page shows one at a
time: the image as JPEG, the labels as exact PNG. A 512x512x600 CT so takes no more than a brain.
"""

import base64
import collections.abc
import dataclasses
import io
import math
import os

import jinja2
import numpy as np
from PIL import Image
from scipy import ndimage

from jaxseg import metrics, plots, writers

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
BOXES = (("Overlap", "dice"), ("Surface", "nsd"), ("Surface", "hd95"))
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
MEMBER_CURVES = {"member_loss": "loss", "member_val_dice": "mean validation Dice (whole cases)"}
COUNTED = (
    "A class that is absent from reference and prediction does not count; then n says how many "
    "cases do. Where only one of them is empty, distances are infinite: such cases are counted as "
    "without distance."
)

# A plane of a volume shows this many slices, this many pixels along the longer side; a picture is
# larger. Three cases of pure noise then stay below 8 MB.
NUM_SLICES = 40
SIDE = 192
PICTURE_SIDE = 640
JPEG_QUALITY = 75
JPEG_BLOCK = 8  # slices of whole blocks do not bleed into their neighbours
MARGIN_MM = 20.0  # shown around the structures

# The axis that is scrolled along, the one that runs down and the one that runs to the right.
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
PICTURE_PLANES = {"picture": (2, 0, 1)}
# Where the ends of each axis point, the far one first, since volumes are shown flipped.
ENDS = ("RL", "AP", "SI")


@dataclasses.dataclass(frozen=True)
class ReportContent:
    """What there is to report.

    Attributes:
      title: of the report.
      set_name: "test", "val" or "evaluation".
      scores: dict that `evaluate.save_scores` writes as JSON. Its "about" may hold the "unit" of
        distances, "mm" if it does not, and "tolerance_mm" of the surface Dice.
      curves: rows of the run's metrics, or empty.
      calibration: dict of `calibration.calibrate`, or None.
      decisions: those of `postprocess.choose_steps`.
      config: JSON text, or "".
      versions: dict from package to version.
      fingerprint: of the data, or "".
      flags: dict from case id to the reasons why it is unlike the training set.
      members: dict of `finish.summarise_members`, or None for a single network.
      load_case: function from a case id to (image [X, Y, Z, C], label [X, Y, Z], prediction
        [X, Y, Z], spacing_mm [3]) in RAS+ axes, or for a picture (Z is 1) with rows along X,
        columns along Y and None as spacing; None shows no overlays.
    """

    title: str
    set_name: str
    scores: dict
    curves: tuple | list = ()
    calibration: dict | None = None
    decisions: tuple | list = ()
    config: str = ""
    versions: dict = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    flags: dict = dataclasses.field(default_factory=dict)
    members: dict | None = None
    load_case: collections.abc.Callable | None = None


def write_report(folder, content):
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


def describe_members(members):
    """What the members of a run say, as a line for the terminal.

    Args:
      members: dict of `finish.summarise_members`.
    """
    name, rows = MEMBERS[members["kind"]][0], members["members"]
    if "summary" in members:
        found = _interval_cell(members["summary"]["dice"], 4)
        return (
            f"mean {members['set']} Dice of a member alone {found['mean']} (95 % interval "
            f"{found['interval']}) over {len(rows)} {name}s"
        )
    shown = ", ".join(f"{_member_name(row, name)}: {_number(row['dice'], 4)}" for row in rows)
    chosen = _member_name(rows[members["chosen"]], name)
    return f"mean {members['set']} Dice of each {name}: {shown}; {chosen} is used"


def _shared_values(content):
    """What both templates fill in."""
    order = _worst_first(content.scores)
    return {
        "content": content,
        "about": _about(content),
        "members": _members(content.members),
        "class_names": content.scores["class_names"][1:],
        "counted": COUNTED,
        "tables": _tables(content.scores),
        "mean_dice": _number(metrics.mean_dice(content.scores["cases"].values()), 3),
        "case_rows": [_case_row(content, case_id, dice) for case_id, dice in order],
        "decisions": [_decision_row(d, content.scores["class_names"]) for d in content.decisions],
    }


def _about(content):
    """What the scores are worth."""
    members, of_set = content.members, ABOUT_SET[content.set_name]
    if members is None:
        return of_set
    if (members["kind"], content.set_name) == ("folds", "val"):
        return CROSS_VALIDATED
    return f"{of_set} {ABOUT_NETWORK[members['kind']].format(num=len(members['members']))}"


def _members(members):
    """Table of the members: its note, heading, rows (cells, whether chosen) and summary cells."""
    if members is None:
        return None
    name, note = MEMBERS[members["kind"]]
    rows = []
    for index, row in enumerate(members["members"]):
        dice = [_number(value, 3) for value in (row["dice"], *row["dice_by_class"])]
        cells = [index, _member_name(row, name), row["num_cases"], *dice]
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


def _member_name(row, name):
    value = row[name.replace(" ", "_")]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval_cell(found, digits):
    """Texts of what `statistics.t_interval` found."""
    mean, sd, low, high = (
        _number(value, digits) for value in (found["mean"], found["sd"], *found["interval"])
    )
    return {"mean": f"{mean} ± {sd}", "interval": f"{low} to {high}", "num": found["num"]}


def _worst_first(scores):
    """(case id, mean foreground Dice), in the order of `metrics.worst_first`."""
    ranked = metrics.worst_first(scores["cases"])
    return [(case_id, metrics.mean_foreground(case["dice"])) for case_id, case in ranked.items()]


def _tables(scores):
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
            tables.append(
                (heading, [_column_heading(scores, c) for c, _ in columns.values()], rows)
            )
    return tables


def _unit_of(scores):
    return scores["about"].get("unit", "mm")


def _column_heading(scores, template):
    unit, tolerance = _unit_of(scores), scores["about"].get("tolerance_mm")
    at = "" if tolerance is None else f" at {tolerance:g} {unit}"
    return template.format(unit=unit, tolerance=at)


def _cell(scores, name, index, digits):
    """Texts of one class's score: "mean ± sd", the interval, and what does not count."""
    summary = scores["summary"][name]
    mean, sd, low, high = (
        _number(value, digits)
        for value in (summary["mean"][index], summary["sd"][index], *summary["interval"][index])
    )
    num, num_infinite = summary["num"][index], summary["num_infinite"][index]
    notes = [f"n = {num}"] if num < len(scores["cases"]) else []
    notes += [f"{num_infinite} without distance"] if num_infinite else []
    return {"mean": f"{mean} ± {sd}", "interval": f"{low} to {high}", "num": ", ".join(notes)}


def _number(value, digits):
    """A number as text; what is None (null in JSON) or not finite is a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _case_row(content, case_id, dice):
    by_class = content.scores["cases"][case_id]["dice"][1:]
    return {
        "case_id": case_id,
        "dice": [_number(value, 3) for value in (dice, *by_class)],
        "flags": content.flags.get(case_id, ()),
    }


def _decision_row(decision, class_names):
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
        "before": _number(decision["dice_before"], 4),
        "after": _number(decision["dice_after"], 4),
        "kept": decision["kept"],
    }


def _charts(content):
    """SVG elements: learning curves, then box plots."""
    curves = [
        plots.svg_of(plots.draw_curves, content.curves, names, title)
        for names, title in plots.CURVES
        if any(row.get(name) is not None for row in content.curves for name in names)
    ]
    boxes = []
    for table, score in BOXES:
        if score in content.scores["summary"]:
            title = _column_heading(content.scores, TABLES[table][score][0])
            values = [case[score][1:] for case in content.scores["cases"].values()]
            names = content.scores["class_names"][1:]
            boxes.append(plots.svg_of(plots.draw_boxes, values, names, title))
    return {"curves": curves, "boxes": boxes, "members": _member_charts(content)}


def _member_charts(content):
    """SVG elements: learning curves with a line per member."""
    if content.members is None:
        return []
    name = MEMBERS[content.members["kind"]][0]
    labels = [f"{name} {_member_name(row, name)}" for row in content.members["members"]]
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
    ranked = [(case_id, dice) for case_id, dice in _worst_first(content.scores) if dice == dice]
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
            "dice": _number(dice, 3),
            "note": "" if is_colour or num_channels == 1 else f"channel 1 of {num_channels}",
            "planes": _planes(image if is_colour else image[..., 0], label, prediction, spacing_mm),
        }


def _planes(image, label, prediction, spacing_mm):
    """Yields what the template needs of each plane of one case.

    Args:
      image: [X, Y, Z] or, of a picture, [X, Y, Z, 3].
      label, prediction: [X, Y, Z], class indices.
      spacing_mm: [3], or None for a picture.
    """
    planes, side, box = PLANES, SIDE, (slice(None),) * 3
    is_picture = spacing_mm is None
    if is_picture:
        planes, side, spacing_mm = PICTURE_PLANES, PICTURE_SIDE, (1, 1, 1)
    else:
        box = _box_of((label > 0) | (prediction > 0), spacing_mm)
    total = label.shape
    image, label, prediction = image[box], label[box], prediction[box]
    low, span = _window_of(image)
    extent = [n * spacing for n, spacing in zip(label.shape, spacing_mm, strict=True)]

    for name, order in planes.items():
        axis, down, right = order
        if label.shape[down] == 1 or label.shape[right] == 1:
            continue  # a line, not a plane
        count = label.shape[axis]
        slices = np.linspace(0, count - 1, min(count, NUM_SLICES)).round().astype(int)
        grey, reference, predicted = (
            _frames(array, slices, order, flipped=not is_picture)
            for array in (image, label, prediction)
        )
        grey = np.uint8(np.round(255 * np.clip((grey - low) / span, 0, 1)))
        longest = max(extent[down], extent[right])
        size = [
            max(1, round(side * extent[a] / longest / JPEG_BLOCK)) * JPEG_BLOCK
            for a in (right, down)
        ]
        columns = math.ceil(math.sqrt(len(slices)))
        outlined = _outlines(_resized(predicted, size, Image.Resampling.NEAREST))
        filled = _resized(reference, size, Image.Resampling.NEAREST)
        yield {
            "name": name,
            "ends": () if is_picture else (*ENDS[right], *ENDS[down]),
            "aspect": f"{extent[right] / extent[down]:.5f}",
            "columns": columns,
            "rows": math.ceil(len(slices) / columns),
            "slices": [int(n) + 1 + (box[axis].start or 0) for n in slices],
            "total": total[axis],
            "start": _most_wrong(reference, predicted),
            "layers": {
                "image": _jpeg(_sprite(_resized(grey, size, Image.Resampling.BILINEAR), columns)),
                "reference": _png(_sprite(filled, columns)),
                "prediction": _png(_sprite(outlined, columns)),
            },
        }


def _frames(array, slices, order, flipped):
    """Slices of [X, Y, Z, ...] along order[0] as pictures, [N, H, W, ...]."""
    frames = np.take(array, slices, order[0])
    frames = np.flip(frames, order[1:]) if flipped else frames
    return frames.transpose(*order, *range(3, array.ndim))


def _box_of(foreground, spacing_mm):
    """Slices that hold the foreground and `MARGIN_MM` around it; everything if there is none."""
    box = []
    for axis, spacing in enumerate(spacing_mm):
        others = tuple(a for a in range(3) if a != axis)
        places = np.flatnonzero(foreground.any(others))
        margin = math.ceil(MARGIN_MM / spacing)
        first, last = (places[0], places[-1]) if places.size else (0, foreground.shape[axis])
        box.append(slice(max(0, int(first) - margin), int(last) + 1 + margin))
    return tuple(box)


def _window_of(image):
    """The value that is shown black, and how far above it is white: nearly all lie between."""
    steps = tuple(slice(None, None, max(1, n // 128)) for n in image.shape[:3])
    low, high = np.percentile(image[steps], [0.5, 99.5])
    return low, (high - low) or 1.0


def _most_wrong(reference, predicted):
    """The frame with most voxels wrong; if none is, that with most foreground."""
    wrong, present = ((a != b).sum((1, 2)) for a, b in ((reference, predicted), (reference, 0)))
    return int(np.lexsort((present, wrong))[-1])


def _resized(frames, size, resampling):
    """Frames [N, H, W] or [N, H, W, 3] uint8 at (width, height) pixels."""
    return np.stack([Image.fromarray(frame).resize(size, resampling) for frame in frames])


def _outlines(frames):
    """Keeps of each region of class indices [N, H, W] the pixels that touch another class."""
    lowest, highest = (
        extremum(frames, (1, 3, 3)) for extremum in (ndimage.minimum_filter, ndimage.maximum_filter)
    )
    return np.where(lowest != highest, frames, 0).astype(np.uint8)


def _sprite(frames, columns):
    """Frames [N, H, W, ...] side by side in rows, [rows * H, columns * W, ...]."""
    rows = math.ceil(len(frames) / columns)
    height, width = frames.shape[1:3]
    blank = np.zeros((rows * columns - len(frames), *frames.shape[1:]), frames.dtype)
    grid = np.concatenate([frames, blank]).reshape(rows, columns, *frames.shape[1:])
    return grid.swapaxes(1, 2).reshape(rows * height, columns * width, *frames.shape[3:])


def _jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return _data_uri("image/jpeg", buffer)


def _png(classes):
    """Class indices [H, W] as a picture in their colours; background is transparent."""
    codes = "000000" + "".join(colour[1:] for colour in plots.CLASS_COLOURS)
    indices = np.where(classes > 0, (classes - 1) % len(plots.CLASS_COLOURS) + 1, 0)
    picture = Image.fromarray(indices.astype(np.uint8))
    picture.putpalette(bytes.fromhex(codes))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=0, bits=4)
    return _data_uri("image/png", buffer)


def _data_uri(kind, buffer):
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


_MARKDOWN_SYNTAX = str.maketrans(
    {c: f"\\{c}" for c in "\\`*_{}[]<>#|~&!$"} | {"\n": " ", "\r": " "}
)


def _escaped_for_markdown(value):
    """Any text as Markdown that shows it as it is, on one line; `| safe` marks what is Markdown."""
    return value if hasattr(value, "__html__") else str(value).translate(_MARKDOWN_SYNTAX)


def _environment(**options):
    return jinja2.Environment(
        loader=jinja2.PackageLoader("jaxseg"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


_HTML = _environment(autoescape=True)
_MARKDOWN = _environment(finalize=_escaped_for_markdown)
