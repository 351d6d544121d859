"""Images and labels, volumes or pictures, that belong together by their names."""

import os
import re
from pathlib import Path

from jaxseg.data.cases import (
    Case,
    Dataset,
    DatasetProblems,
    duplicate_id_problems,
    whole_or_problems,
)
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
        "**/*_SEM.png", "images/{case}_t1.nii.gz" or "{case}/image.nii.gz"; `other_channels` where
        further channels are, ("images/{case}_t2.nii.gz",); `label_pattern` where the label is,
        "masks/{case}.png".
        {case} stands for the image's file name without its suffix or, where `image_glob` has it,
        for what stands there; {dir} for its folder relative to `root`.
    Returns:
      Dataset with no modalities; a case id is what {case} stands for.
    Raises:
      DatasetProblems: No image is matched, labels are missing, two images have the same case id,
        or the classes and their values do not fit together.
    """
    root = Path(root)
    there = [
        path
        for path in matching(root, wanted.image_glob)
        if not path.name.startswith(".") and _case_id(root, path, wanted.image_glob)
    ]
    matched = [path for path in there if path.is_file()]
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
    problems += listing.broken_links(there)
    problems += _pattern_problems(root, images, wanted)
    cases = []
    for path in images:
        label, *channels = named[path]
        problems += _file_problems(path, label, channels, wanted)
        case_id = _case_id(root, path, wanted.image_glob)
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


def matching(root: Path, image_glob: str) -> list[Path]:
    """What a glob with or without {case} matches, in order.

    Raises:
      DatasetProblems: It is none.
    """
    try:
        return sorted(root.glob(image_glob.replace("{case}", "*")))
    except (ValueError, NotImplementedError) as error:
        raise DatasetProblems(
            [
                f"data.image_glob {image_glob!r} matches nothing ({error}); write for example "
                "images/*.nii.gz or, for folders of any depth, **/*.nii.gz"
            ]
        ) from None


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


def _case_id(root, path, image_glob):
    """What {case} stands for; "" if the name does not fit the glob."""
    if "{case}" not in image_glob:
        return os.path.basename(registry.stem_of(path))
    match = re.fullmatch(_as_regex(image_glob), path.relative_to(root).as_posix())
    return match["case"] if match else ""


# Parts of a glob, and what they match in a path.
_GLOB = re.compile(
    r"(?P<folders>\*\*/)|(?P<any>\*)|(?P<one>\?)|(?P<set>\[[^\]]+\])|(?P<case>{case})"
)
_REGEX = {"folders": "(?:.*/)?", "any": "[^/]*", "one": "[^/]"}


def _as_regex(image_glob):
    """The regular expression of a glob in which every {case} stands for the same."""
    parts, place = [], 0
    for match in _GLOB.finditer(image_glob):
        parts.append(re.escape(image_glob[place : match.start()]))
        place = match.end()
        if match["set"]:
            parts.append("[" + match["set"][1:].replace("!", "^", 1))
        elif match["case"]:
            parts.append("(?P=case)" if "(?P<case>[^/]+)" in parts else "(?P<case>[^/]+)")
        else:
            parts.append(_REGEX[str(match.lastgroup)])
    return "".join(parts) + re.escape(image_glob[place:])


def _filled(root, path, image_glob, pattern):
    folder = path.parent.relative_to(root).as_posix()
    return root / pattern.replace("{dir}", folder).replace(
        "{case}", _case_id(root, path, image_glob)
    )
