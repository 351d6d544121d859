"""Which files are a dataset: a Medical Segmentation Decathlon folder, or pairs of pictures."""

import codecs
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from jaxseg.data.nifti import is_nifti
from jaxseg.problem import Problem

_MAX_CLASSES = 256  # class indices are stored as uint8


@dataclasses.dataclass(frozen=True)
class Case:
    """One image with its reference label; `case_id` is unique within a dataset."""

    case_id: str
    image_path: str
    label_path: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Cases in order of `case_id`, and what their values mean.

    Attributes:
      root: Folder that the cases were found in.
      cases: The cases.
      class_names: One per class; class 0 is the background.
      label_values: Value in the label files for each class; None: every value above 0 is class 1.
      modalities: One name per image channel; empty if the dataset does not say.
    """

    root: str
    cases: tuple[Case, ...]
    class_names: tuple[str, ...]
    label_values: tuple[int, ...] | None
    modalities: tuple[str, ...]


class DatasetProblems(Problem):
    """Everything that is wrong with a dataset; `problems` has one sentence for each.

    `found` is the Dataset of the cases that are all there, None where nothing could be made of it.
    """

    def __init__(self, problems: Sequence[str], found: Dataset | None = None):
        super().__init__(problems)
        self.problems = list(problems)
        self.found = found

    def __str__(self) -> str:
        noun = "problem" if len(self.problems) == 1 else "problems"
        return "\n- ".join([f"{len(self.problems)} {noun} in the dataset:", *self.problems])


def find_msd_cases(root: str | Path) -> Dataset:
    """Finds the labelled cases of a folder laid out as in the Medical Segmentation Decathlon.

    Reads ROOT/dataset.json: "training" lists pairs of "image" and "label" paths relative to ROOT,
    "labels" maps values in the label files to class names ("0" is the background), "modality" maps
    channel numbers to names. No image or label is opened.

    Args:
      root: Folder with dataset.json, imagesTr and labelsTr.
    Returns:
      Dataset; a case id is the image's file name without .nii or .nii.gz.
    Raises:
      DatasetProblems: All faults of dataset.json, and all files that are missing, listed twice,
        outside `root`, or in imagesTr without being listed.
    Reference: Simpson et al. 2019, arXiv:1902.09063.
    """
    path = Path(root, "dataset.json")
    problems: list[str] = []
    label_names, modalities, entries = {}, {}, []
    content = _load_json(path, problems)
    if content is not None:
        label_names = _numbered_names(path, content, "labels", problems)
        modalities = _numbered_names(path, content, "modality", problems)
        entries = _training_entries(path, content, problems)
    if label_names:
        problems += _class_problems(path, list(label_names.values()), list(label_names))
        if 0 not in label_names:
            problems.append(f'{path}: "labels" has no "0"; add it as the background')
    if list(modalities) != list(range(len(modalities))):
        problems.append(
            f'{path}: "modality" numbers its channels {list(modalities)}; count from 0 without gaps'
        )
    cases = []
    for image, label in entries:
        for name in filter(None, (image, label)):
            problems += _listed_file_problems(path, name)
        if label is None:
            problems.append(f'{path}: image {image} has no "label"; add its label or remove it')
        else:
            paths = (os.path.normpath(os.path.join(root, name)) for name in (image, label))
            cases.append(Case(_case_id(image), *paths))
    if content is not None:
        problems += _unlisted_file_problems(path, [image for image, _ in entries])
    problems += _duplicate_id_problems([(_case_id(image), image) for image, _ in entries])
    return _whole_or_problems(
        Dataset(
            root=str(root),
            cases=tuple(sorted(cases, key=lambda case: case.case_id)),
            class_names=tuple(label_names.values()),
            label_values=tuple(label_names),
            modalities=tuple(modalities.values()),
        ),
        problems,
    )


def find_image_cases(
    root: str | Path,
    image_glob: str,
    label_pattern: str,
    class_names: Sequence[str],
    label_values: Sequence[int] | None,
) -> Dataset:
    """Finds pairs of an image and a label file by their names. No file is opened.

    Hidden files, and files that are the label of another image, are not images.

    Args:
      root: Folder that the glob and the pattern start from.
      image_glob: The images, for example "images/*.png" or "**/*_SEM.png".
      label_pattern: The label of an image, where {case} stands for the image's file name without
        its suffix and {dir} for its folder relative to `root`; for example "masks/{case}.png".
      class_names: One per class; class 0 is the background.
      label_values: Value in the label files for each class; None: every value above 0 is class 1.
    Returns:
      Dataset with no modalities; a case id is what {case} stands for.
    Raises:
      DatasetProblems: No image is matched, labels are missing, two images have the same case id,
        or the classes and their values do not fit together.
    """
    root = Path(root)
    matched = sorted(
        path for path in root.glob(image_glob) if path.is_file() and not path.name.startswith(".")
    )
    label_of = {path: _label_path(root, path, label_pattern) for path in matched}
    labels = {label for path, label in label_of.items() if label != path}
    images = [path for path in matched if path not in labels]
    problems = _class_problems(root, class_names, label_values)
    if "{case}" not in label_pattern:
        problems.append(
            f"label pattern {label_pattern!r} has no {{case}}; add it, or all images "
            "share one label"
        )
    if not images:
        problems.append(f"{root}: no image matches {image_glob!r}; correct the folder or the glob")
    for path in images:
        if label_of[path] == path:
            problems.append(f"{path}: is its own label by {label_pattern!r}; correct the pattern")
        elif not label_of[path].is_file():
            problems.append(
                f"{path}: its label {label_of[path]} is missing; add it, or narrow {image_glob!r}"
            )
    problems += _duplicate_id_problems([(_case_id(path), path) for path in images])
    cases = [Case(_case_id(path), str(path), str(label_of[path])) for path in images]
    return _whole_or_problems(
        Dataset(
            root=str(root),
            cases=tuple(sorted(cases, key=lambda case: case.case_id)),
            class_names=tuple(class_names),
            label_values=None if label_values is None else tuple(label_values),
            modalities=(),
        ),
        problems,
    )


def _whole_or_problems(dataset, problems):
    if not problems:
        return dataset
    there = [
        c for c in dataset.cases if os.path.isfile(c.image_path) and os.path.isfile(c.label_path)
    ]
    found = dataclasses.replace(dataset, cases=tuple(there)) if dataset.class_names else None
    raise DatasetProblems(problems, found)


def _case_id(path):
    name = PurePath(path).name
    return PurePath(name.removesuffix(".gz") if is_nifti(name) else name).stem


def _label_path(root, image_path, label_pattern):
    folder = image_path.parent.relative_to(root).as_posix()
    return root / label_pattern.replace("{dir}", folder).replace("{case}", _case_id(image_path))


def _load_json(path, problems):
    """The object in a JSON file, or None; appends to `problems`, as do the functions below."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.append(
            f"{path}: cannot be read ({error.strerror}); give the folder that holds dataset.json"
        )
        return None
    if raw.startswith(codecs.BOM_UTF8):
        problems.append(f"{path}: starts with a byte order mark; save it as UTF-8 without BOM")
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:
        problems.append(f"{path}: not valid JSON ({error}); correct it there")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path}: holds a {type(content).__name__}, not an object; correct it")
        return None
    return content


def _numbered_names(path, content, key, problems):
    """The object under `key` as a dict from int to name, in order of the ints."""
    names = content.get(key)
    example = '{"0": "name", "1": "name"}'
    if not isinstance(names, dict) or not names:
        problems.append(f'{path}: "{key}" is missing or empty; write {example}')
        return {}
    try:
        return {number: str(names[text]) for number, text in sorted((int(t), t) for t in names)}
    except ValueError:
        problems.append(f'{path}: "{key}" has keys {list(names)}, not numbers; write {example}')
        return {}


def _training_entries(path, content, problems):
    """(image, label or None) of each well-formed entry of "training"."""
    training = content.get("training")
    if not isinstance(training, list) or not training:
        problems.append(
            f'{path}: "training" is missing or empty; list {{"image": …, "label": …}} for each case'
        )
        return []
    num_training = content.get("numTraining", len(training))
    if num_training != len(training):
        problems.append(
            f'{path}: "numTraining" is {num_training}, but "training" lists {len(training)} cases; '
            "correct the one that is wrong"
        )
    entries = []
    for position, entry in enumerate(training):
        names = [entry.get(key) for key in ("image", "label")] if isinstance(entry, dict) else [0]
        if isinstance(names[0], str) and isinstance(names[-1], str | None):
            entries.append(tuple(names))
        else:
            problems.append(
                f'{path}: entry {position} of "training" is {json.dumps(entry)}; '
                'write {"image": "imagesTr/…", "label": "labelsTr/…"}'
            )
    return entries


def _listed_file_problems(path, name):
    normal = os.path.normpath(name)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        return [f"{path}: {name} leaves the dataset's folder; move the file into it"]
    if not is_nifti(name):
        return [f"{path}: {name} is not named .nii or .nii.gz; convert it to NIfTI"]
    if not (path.parent / normal).is_file():
        return [f"{path}: {name} is listed but missing; copy it there or take it off the list"]
    return []


def _unlisted_file_problems(path, listed):
    listed = {os.path.normpath(name) for name in listed}
    found = sorted((path.parent / "imagesTr").glob("*"))
    return [
        f"{path}: imagesTr/{file.name} is not listed; list it or move it away"
        for file in found
        if is_nifti(file.name)
        and not file.name.startswith(".")
        and os.path.join("imagesTr", file.name) not in listed
    ]


def _duplicate_id_problems(named_paths):
    by_id: dict[str, list[str]] = {}
    for case_id, path in named_paths:
        by_id.setdefault(case_id, []).append(str(path))
    return [
        f"case {case_id} is there {len(paths)} times ({', '.join(paths)}); keep or rename one"
        for case_id, paths in by_id.items()
        if len(paths) > 1
    ]


def _class_problems(source, class_names, label_values):
    num_classes = len(class_names)
    problems = []
    if not 2 <= num_classes <= _MAX_CLASSES:
        problems.append(
            f"{source}: {num_classes} classes; name 2 to {_MAX_CLASSES}, background first"
        )
    if label_values is None:
        if num_classes != 2:
            problems.append(
                f"{source}: {num_classes} class names, but without label values there are "
                "2 classes (background and any value above 0); give the label values"
            )
    elif len(label_values) != num_classes or len(set(label_values)) != num_classes:
        problems.append(
            f"{source}: label values {list(label_values)} for {num_classes} class names; "
            "give one value for each name, all different"
        )
    elif min(label_values, default=0) < 0:
        problems.append(f"{source}: negative label values in {list(label_values)}; recode them")
    return problems
