"""A table of cases, for BIDS and all else that no layout fits."""

import csv
import os
import re
from pathlib import Path

from jaxseg.data.cases import Case, Dataset, duplicate_id_problems, whole_or_problems
from jaxseg.data.formats.files import absence
from jaxseg.data.label_values import class_problems
from jaxseg.data.layouts import listing
from jaxseg.data.layouts.wanted import Wanted
from jaxseg.data.splits import SETS, UNUSED

LAYOUT = "a table of cases"
NAME = "cases.csv"

_COLUMN = re.compile(r"case|image(_.+)?|label|subject|set|fold")


def find(path: str | Path, wanted: Wanted) -> Dataset:
    """Reads a CSV file with a line for each case. No image or label is opened.

    Columns: case; image, or image_NAME for each channel; label, empty for a case that is predicted
    and not trained on; and optionally subject, set (train, val, test, unused) and fold (0, 1 ...:
    whose validation set the case is in). Paths are relative to the table's folder, or whole.

    Args:
      path: The CSV file, or the folder that has it as cases.csv.
      wanted: Of which `class_names` and `coding` say what label values mean.
    Returns:
      Dataset, with the names of the channels as modalities.
    Raises:
      DatasetProblems: All lines that can not be used, with their number.
    """
    path = Path(path, NAME) if os.path.isdir(path) else Path(path)
    problems = class_problems(path, wanted.class_names, wanted.coding)
    columns, rows = _rows(path, problems)
    images = [name for name in columns if name.startswith("image")]
    if columns:
        for needed in ("case", "label"):
            if needed not in columns:
                problems.append(f"{path}: has no column {needed!r}; add it")
        if not images or ("image" in images and len(images) > 1):
            problems.append(
                f"{path}: has the columns {columns}; give image, or image_NAME for each channel"
            )
        problems += [
            f"{path}: column {name!r} is unknown; name it case, image, image_NAME, label, subject, "
            "set or fold"
            for name in columns
            if not _COLUMN.fullmatch(name)
        ]
    cases = []
    if not problems:
        for number, row in rows:
            cases.append(_case(path, number, row, images, problems))
        if not cases:
            problems.append(f"{path}: lists no case; add a line for each")
    problems += duplicate_id_problems(cases)
    return whole_or_problems(
        Dataset(
            root=str(path.parent),
            cases=tuple(case for case in cases if case.label_path is not None),
            class_names=tuple(wanted.class_names),
            coding=wanted.coding,
            modalities=tuple(name[len("image_") :] for name in images if name != "image"),
            layout=LAYOUT,
            unlabelled=tuple(case for case in cases if case.label_path is None),
            spacing_from=wanted.spacing_from,
        ),
        problems,
    )


def _rows(path, problems):
    """(column names, [(number of the line, row)])."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            sample = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=sample.count)
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            names = [_heading(name) for name in reader.fieldnames or []]
            columns = [name or f"number {place}" for place, name in enumerate(names, start=1)]
            reader.fieldnames = columns
            # Spreadsheets leave rows and columns of empty cells behind.
            rows = [(reader.line_num, row) for row in reader if any(row.values())]
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); put the table there")
        return [], []
    except (ValueError, csv.Error) as error:
        problems.append(f"{path}: not a readable table ({error}); save it as CSV in UTF-8")
        return [], []
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        problems.append(f"{path}: several columns are named {', '.join(twice)}; name each once")
        return [], []
    columns = [
        column
        for column, name in zip(columns, names, strict=True)
        if name or any(row[column] for _, row in rows)
    ]
    if not columns:
        problems.append(f"{path}: is empty; write case,image,label and a line for each case")
    return columns, rows


def _heading(name):
    """The name of a column, in small letters but for what names a channel."""
    first, rest, channel = name.strip().partition("_")
    return first.lower() + rest + channel


def _case(path, number, row, images, problems):
    where = f"{path}: line {number}"
    cells = {name: (row.get(name) or "").strip() for name in row if isinstance(name, str)}
    if None in row or None in row.values():
        problems.append(f"{where} has another number of cells than the heading; correct it")
    if not cells["case"] or os.path.basename(cells["case"]) != cells["case"]:
        problems.append(f"{where}: the case {cells['case']!r} is no name for a file; name it anew")
    files = [listing.resolved(path.parent, cells[name]) for name in images]
    label = listing.resolved(path.parent, cells["label"]) if cells["label"] else None
    problems += [
        f"{where}: {file} is {absence(file)}; correct its path, relative to the table's folder"
        for file in (*files, *([label] if label else []))
        if not os.path.isfile(file)
    ]
    set_name, fold = cells.get("set", "").lower(), cells.get("fold", "")
    if set_name and set_name not in (*SETS, UNUSED):
        sets = ", ".join((*SETS, UNUSED))
        problems.append(f"{where}: its set is {set_name!r}; write one of {sets}")
    # Where a cell is empty, tables of pandas write numbers as 0.0.
    is_fold = re.fullmatch(r"(\d+)(\.0*)?", fold, re.ASCII)
    if fold and not is_fold:
        problems.append(f"{where}: its fold is {fold!r}; write 0, 1, 2 ...")
    return Case(
        case_id=cells["case"],
        image_paths=tuple(files),
        label_path=label,
        subject=cells.get("subject", ""),
        set_name=set_name,
        fold=int(is_fold[1]) if is_fold else None,
    )
