"""Folders of the Medical Segmentation Decathlon, and of nnU-Net v1, whose channels are files.

Reference: Simpson et al. 2019, arXiv:1902.09063.
"""

import os
import reprlib
from pathlib import Path

from jaxseg.data.cases import Case, Dataset, duplicate_id_problems, whole_or_problems
from jaxseg.data.formats import registry
from jaxseg.data.formats.files import absence
from jaxseg.data.label_values import LabelCoding, class_problems
from jaxseg.data.layouts import listing
from jaxseg.data.layouts.wanted import Wanted

LAYOUT = "a Medical Segmentation Decathlon folder"


def find(root: str | Path, wanted: Wanted | None = None) -> Dataset:
    """Finds the labelled cases of a folder laid out as in the Medical Segmentation Decathlon.

    Reads ROOT/dataset.json: "training" lists pairs of "image" and "label" paths relative to ROOT,
    "labels" maps values in the label files to class names ("0" is the background), "modality" maps
    channel numbers to names. Where CASE.nii.gz is listed and CASE_0000.nii.gz ... are there, these
    are its channels, as in nnU-Net v1. No image or label is opened.

    Args:
      root: Folder with dataset.json, imagesTr and labelsTr.
      wanted: What the user says.
    Returns:
      Dataset; a case id is the image's file name without the suffix of its format.
    Raises:
      DatasetProblems: All faults of dataset.json, and all files that are missing, listed twice or
        outside `root`.
    """
    wanted = wanted or Wanted()
    path = Path(root, "dataset.json")
    problems: list[str] = []
    label_names: dict[int, str] = {}
    modalities: dict[int, str] = {}
    entries: list[tuple[str, str | None]] = []
    content = listing.load_json(path, problems)
    if content is not None:
        label_names = listing.numbered_names(path, content, "labels", problems)
        modalities = listing.numbered_names(path, content, "modality", problems)
        entries = _training_entries(path, content, problems)
    coding = LabelCoding(tuple(label_names), wanted.coding.ignore)
    if label_names:
        problems += class_problems(path, list(label_names.values()), coding)
        if 0 not in label_names:
            problems.append(f'{path}: "labels" has no "0"; add it as the background')
            label_names = {}
    listing.check_channel_numbers(path, "modality", list(modalities), problems)
    cases = []
    for image, label in entries:
        images = _image_files(path, image, len(modalities), problems)
        if label is None:
            problems.append(f'{path}: image {image} has no "label"; add its label or remove it')
        else:
            _check_listed(path, label, problems)
            stem = os.path.basename(registry.stem_of(image.replace("\\", "/")))
            cases.append(Case(stem, images, listing.resolved(root, label)))
    problems += duplicate_id_problems(cases)
    notes = []
    if content is not None:
        listed = {Path(file) for case in cases for file in case.image_paths}
        listed |= {Path(listing.resolved(root, image)) for image, _ in entries}
        found = filter(registry.is_image, listing.files_in(Path(root, "imagesTr")))
        unlisted = [file for file in found if file not in listed]
        notes = listing.unused_files(unlisted, "not listed in dataset.json, left out")
    return whole_or_problems(
        Dataset(
            root=str(root),
            cases=tuple(cases),
            class_names=tuple(label_names.values()),
            coding=coding,
            modalities=tuple(modalities.values()),
            layout=LAYOUT,
            notes=tuple(notes),
            spacing_from=wanted.spacing_from,
        ),
        problems + (notes if wanted.strict else []),
    )


def _training_entries(path, content, problems):
    """(image, label or None) of each well-formed entry of "training"."""
    training = content.get("training")
    if not isinstance(training, list) or not training:
        problems.append(
            f'{path}: "training" is missing or empty; list {{"image": …, "label": …}} for each case'
        )
        return []
    num_training = content.get("numTraining", len(training))
    if str(num_training) != str(len(training)):
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
                f'{path}: entry {position} of "training" is {reprlib.repr(entry)}; '
                'write {"image": "imagesTr/…", "label": "labelsTr/…"}'
            )
    return entries


def _image_files(path, name, num_channels, problems):
    """The file of an image, or those of its channels."""
    file = listing.resolved(path.parent, name)
    stem = registry.stem_of(file)
    channels = [f"{stem}_{number:04d}{file[len(stem) :]}" for number in range(num_channels)]
    if not os.path.exists(file) and channels and os.path.exists(channels[0]):
        problems += [
            f"{path}: {name} has no channel {os.path.basename(channel)}; copy it there"
            for channel in channels
            if not os.path.exists(channel)
        ]
        return tuple(channels)
    _check_listed(path, name, problems)
    return (file,)


def _check_listed(path, name, problems):
    file = listing.resolved(path.parent, name)
    if listing.leaves(path.parent, file):
        problems.append(
            f"{path}: {name} leads out of the dataset's folder; copy the file there, or list the "
            "files of several folders in a table, see configs/README.md"
        )
    elif not registry.is_volume(name):
        problems.append(
            f"{path}: {name} is not named as a volume (.nii.gz, .nii, .mgz, .nrrd, .mha ...); "
            "convert it to NIfTI"
        )
    elif not os.path.isfile(file):
        problems.append(
            f"{path}: {name} is listed but {absence(file)}; copy it there or take it off the list"
        )
