"""Raw data folders of nnU-Net v2: dataset.json, imagesTr, labelsTr, perhaps imagesTs, labelsTs.

Reference: nnU-Net's documentation/dataset_format.md.
"""

import os
import re
import reprlib
from pathlib import Path

from jaxseg.data.cases import Case, Dataset, duplicate_id_problems, whole_or_problems
from jaxseg.data.formats.files import absence
from jaxseg.data.formats.registry import PICTURE_SUFFIXES
from jaxseg.data.label_values import LabelCoding, class_problems
from jaxseg.data.layouts import listing
from jaxseg.data.layouts.wanted import Wanted

LAYOUT = "an nnU-Net v2 folder"
SPLIT_FILE = "splits_final.json"


def find(root: str | Path, wanted: Wanted | None = None) -> Dataset:
    """Finds the cases of a folder laid out for nnU-Net v2. No image or label is opened.

    Reads ROOT/dataset.json: "channel_names", "labels" from name to number (an "ignore" among them
    counts for nothing), "file_ending", and perhaps "dataset", a table of paths by case. Without the
    table CASE_0000.ext, CASE_0001.ext ... in imagesTr are the channels of a case and CASE.ext in
    labelsTr is its label.

    Args:
      root: Folder with dataset.json.
      wanted: What the user says; `test_folder` makes the labelled cases of imagesTs the test set,
        those without label are predicted.
    Returns:
      Dataset.
    Raises:
      DatasetProblems: All faults of dataset.json, and all files that are missing.
    """
    wanted = wanted or Wanted()
    path = Path(root, "dataset.json")
    problems: list[str] = []
    notes: list[str] = []
    content = listing.load_json(path, problems) or {}
    names, ignore = _labels(path, content, problems) if content else ({}, ())
    coding = LabelCoding(tuple(names), tuple(sorted({*wanted.coding.ignore, *ignore})))
    if names:
        problems += class_problems(path, list(names.values()), coding)
    channels: dict[int, str] = {}
    cases: list[Case] = []
    if content:
        key = "channel_names" if "channel_names" in content else "modality"
        channels = listing.numbered_names(path, content, key, problems)
        listing.check_channel_numbers(path, key, list(channels), problems)
        cases = _training_cases(path, content, len(channels), problems, notes)
    if wanted.test_folder:
        ending = str(content.get("file_ending", ""))
        cases += _folder_cases(path.parent, "Ts", ending, len(channels), problems, notes)
    problems += duplicate_id_problems(cases)
    return whole_or_problems(
        Dataset(
            root=str(root),
            cases=tuple(case for case in cases if case.label_path is not None),
            class_names=tuple(names.values()),
            coding=coding,
            modalities=tuple(channels.values()),
            layout=LAYOUT,
            unlabelled=tuple(case for case in cases if case.label_path is None),
            split_file=SPLIT_FILE if os.path.lexists(Path(root, SPLIT_FILE)) else "",
            notes=tuple(notes),
            spacing_from=wanted.spacing_from,
        ),
        problems + (notes if wanted.strict else []),
    )


def _labels(path, content, problems):
    """({value: class name}, ignored values)."""
    labels = content.get("labels")
    example = '{"background": 0, "name": 1}'
    if not isinstance(labels, dict) or not labels:
        problems.append(f'{path}: "labels" is missing or empty; write {example}')
        return {}, ()
    regions = [name for name, value in labels.items() if isinstance(value, list | tuple)]
    if regions or content.get("regions_class_order"):
        problems.append(
            f'{path}: "labels" has regions ({", ".join(map(str, regions))}), which jaxseg does not '
            "train; give each label value a class of its own"
        )
        return {}, ()
    try:
        values = {str(name): int(value) for name, value in labels.items()}
        if any(float(labels[name]) != value for name, value in values.items()):
            raise ValueError("not whole")
    except (OverflowError, TypeError, ValueError):
        problems.append(
            f'{path}: "labels" has values {reprlib.repr(list(labels.values()))}; write {example}'
        )
        return {}, ()
    ignore = tuple(value for name, value in values.items() if name == "ignore")
    classes = {value: name for name, value in values.items() if name != "ignore"}
    if len(classes) + len(ignore) < len(values):
        problems.append(f'{path}: "labels" gives one value to several names; correct it')
    if 0 not in classes:
        problems.append(f'{path}: "labels" has no "background": 0; add it')
        return {}, ()
    return dict(sorted(classes.items())), ignore


def _training_cases(path, content, num_channels, problems, notes):
    table = content.get("dataset")
    if isinstance(table, dict):
        cases = _table_cases(path, table, num_channels, problems)
    else:
        ending = content.get("file_ending")
        if not isinstance(ending, str) or not ending.startswith("."):
            problems.append(f'{path}: "file_ending" is missing; write for example ".nii.gz"')
            return []
        cases = _folder_cases(path.parent, "Tr", ending, num_channels, problems, notes)
        if not cases:
            problems += listing.broken_links([path.with_name("imagesTr")]) or [
                f"{path}: imagesTr holds no CASE_0000{ending}; copy the images there, named so"
            ]
    num_training = content.get("numTraining", len(cases))
    if str(num_training) != str(len(cases)):
        notes.append(
            f'{path}: "numTraining" is {num_training}, but there are {len(cases)} cases; correct it'
        )
    return cases


def _table_cases(path, table, num_channels, problems):
    cases = []
    for case_id, files in table.items():
        entry = files if isinstance(files, dict) else {}
        images, label = entry.get("images"), entry.get("label")
        if not isinstance(images, list) or not isinstance(label, str | None):
            problems.append(
                f'{path}: case {case_id} of "dataset" is {reprlib.repr(files)}; write '
                '{"images": [...], "label": ...}'
            )
            continue
        images = [listing.resolved(path.parent, str(name)) for name in images]
        in_one = len(images) == 1 and images[0].lower().endswith(PICTURE_SUFFIXES)
        if not in_one and len(images) != num_channels:
            problems.append(
                f"{path}: case {case_id} lists {len(images)} images for {num_channels} channels; "
                "list one for each"
            )
        files = [*images, *([listing.resolved(path.parent, label)] if label else [])]
        problems += [
            f"{path}: {file} of case {case_id} is {absence(file)}; copy it there or correct it"
            for file in files
            if not os.path.isfile(file)
        ]
        cases.append(Case(case_id, tuple(images), files[-1] if label else None))
    return cases


def _folder_cases(root, suffix, ending, num_channels, problems, notes):
    """The cases of imagesTr or imagesTs; only of the latter may a label be missing."""
    images, labels = root / f"images{suffix}", root / f"labels{suffix}"
    by_case: dict[str, dict[int, str]] = {}
    others = []
    for file in listing.files_in(images):
        match = re.fullmatch(r"(.+)_(\d{4})", file.name.removesuffix(ending))
        if match and file.name.endswith(ending):
            by_case.setdefault(match[1], {})[int(match[2])] = str(file)
        elif not file.name.endswith(".json"):  # which hold the spacing of a TIFF
            others.append(file)
    channels_there = (Path(file) for channels in by_case.values() for file in channels.values())
    problems += listing.broken_links(channels_there)
    notes += listing.unused_files(others, f"not named CASE_0000{ending}, left out")
    cases = []
    for case_id, channels in by_case.items():
        # A picture may hold all of its colours, as nnU-Net has them; their number is verified.
        in_one = ending.lower() in PICTURE_SUFFIXES and list(channels) == [0]
        if not in_one and sorted(channels) != list(range(num_channels)):
            problems.append(
                f"{images}: case {case_id} has channels {sorted(channels)}, where dataset.json "
                f"names {num_channels}; copy those that are missing, or correct dataset.json"
            )
        label = labels / f"{case_id}{ending}"
        is_labelled = suffix == "Tr" or os.path.lexists(label)
        if is_labelled and not label.is_file():
            problems.append(
                f"{label}: the label of case {case_id} is {absence(label)}; copy it there"
            )
        cases.append(
            Case(
                case_id,
                tuple(channels[number] for number in sorted(channels)),
                str(label) if is_labelled else None,
                set_name="test" if suffix == "Ts" and is_labelled else "",
            )
        )
    known = {f"{case_id}{ending}" for case_id in by_case}
    alone = [
        file
        for file in listing.files_in(labels)
        if file.name.endswith(ending) and file.name not in known
    ]
    notes += listing.unused_files(alone, f"a label without CASE_0000{ending}, left out")
    return cases
