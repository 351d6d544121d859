"""Images and labels, volumes or pictures, that belong together by their names."""

import os
import re
from pathlib import Path

from jaxseg.data.cases import Case, Dataset, duplicate_id_problems, whole_or_problems
from jaxseg.data.formats import registry
from jaxseg.data.label_values import class_problems
from jaxseg.data.layouts import listing
from jaxseg.data.layouts.wanted import Wanted

LAYOUT = "images and labels by pattern"


def find(root: str | Path, wanted: Wanted) -> Dataset:
    """Finds pairs of an image and a label file by their names. No file is opened.

    Hidden files, and files that are the label or another channel of an image, are not images.

    Args:
      root: Folder that the patterns start from.
      wanted: Of which `image_glob` says where the images are, for example "images/*.png",
        "**/*_SEM.png" or "images/{case}_t1.nii.gz"; `other_channels` where further channels are,
        ("images/{case}_t2.nii.gz",); `label_pattern` where the label is, "masks/{case}.png".
        {case} stands for the image's file name without its suffix or, where `image_glob` has it,
        for what stands there in the name; {dir} for its folder relative to `root`.
    Returns:
      Dataset with no modalities; a case id is what {case} stands for.
    Raises:
      DatasetProblems: No image is matched, labels are missing, two images have the same case id,
        or the classes and their values do not fit together.
    """
    root = Path(root)
    glob = wanted.image_glob.replace("{case}", "*")
    matched = [
        path
        for path in sorted(root.glob(glob))
        if path.is_file() and not path.name.startswith(".") and _case_id(path, wanted.image_glob)
    ]
    named = {
        path: [
            _filled(root, path, wanted.image_glob, pattern)
            for pattern in (wanted.label_pattern, *wanted.other_channels)
        ]
        for path in matched
    }
    used = {file for path, files in named.items() for file in files if file != path}
    images = [path for path in matched if path not in used and registry.is_image(path)]
    left_out = [path for path in matched if path not in used and not registry.is_image(path)]
    left_out = [path for path in left_out if path.suffix != ".json"]
    problems = class_problems(root, wanted.class_names, wanted.coding)
    problems += _pattern_problems(root, images, wanted)
    cases = []
    for path in images:
        label, *channels = named[path]
        problems += _file_problems(path, label, channels, wanted)
        case_id = _case_id(path, wanted.image_glob)
        cases.append(Case(case_id, tuple(map(str, (path, *channels))), str(label)))
    problems += duplicate_id_problems(cases)
    notes = listing.unused_files(left_out, f"none of {registry.KINDS}, left out")
    return whole_or_problems(
        Dataset(
            root=str(root),
            cases=tuple(cases),
            class_names=tuple(wanted.class_names),
            coding=wanted.coding,
            layout=LAYOUT,
            notes=tuple(notes),
            spacing_from=wanted.spacing_from,
        ),
        problems + (notes if wanted.strict else []),
    )


def _pattern_problems(root, images, wanted):
    problems = [
        f"pattern {pattern!r} has no {{case}}; add it, or all images share one file"
        for pattern in (wanted.label_pattern, *wanted.other_channels)
        if "{case}" not in pattern
    ]
    if not images:
        problems.append(
            f"{root}: no image matches {wanted.image_glob!r}; correct the folder or the glob"
        )
    return problems


def _file_problems(path, label, channels, wanted):
    problems = [
        f"{path}: its channel {channel} is missing; add it, or correct other_channels"
        for channel in channels
        if not channel.is_file()
    ]
    if label == path:
        problems.append(
            f"{path}: is its own label by {wanted.label_pattern!r}; correct the pattern"
        )
    elif not label.is_file():
        problems.append(
            f"{path}: its label {label} is missing; add it, or narrow {wanted.image_glob!r}"
        )
    return problems


def _case_id(path, image_glob):
    """What {case} stands for; "" if the name does not fit the glob."""
    if "{case}" not in image_glob:
        return os.path.basename(registry.stem_of(path))
    name = image_glob.rpartition("/")[2]
    literal = re.escape(name).replace(r"\*", ".*").replace(r"\?", ".")
    match = re.fullmatch(literal.replace(r"\{case\}", "(.+)", 1), path.name)
    return match[1] if match else ""


def _filled(root, path, image_glob, pattern):
    folder = path.parent.relative_to(root).as_posix()
    return root / pattern.replace("{dir}", folder).replace("{case}", _case_id(path, image_glob))
