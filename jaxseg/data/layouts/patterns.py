"""Images and labels, volumes or pictures, that belong together by their names."""

from pathlib import Path

from jaxseg.data.cases import Case, Dataset, duplicate_id_problems, whole_or_problems
from jaxseg.data.formats import registry
from jaxseg.data.formats.files import absence
from jaxseg.data.label_values import class_problems
from jaxseg.data.layouts import globs, listing
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
    there = globs.matching(root, wanted.image_glob)
    case_of = {path: globs.case_id_of(root, path, wanted.image_glob) for path in there}
    matched = [path for path, case_id in case_of.items() if case_id and not path.is_dir()]
    named = {
        path: [
            _filled(root, path, case_of[path], pattern)
            for pattern in (wanted.label_pattern, *wanted.other_channels)
        ]
        for path in matched
    }
    used = {file for path, files in named.items() for file in files if file != path}
    broken = listing.broken_links(path for path in matched if path not in used)
    notes = listing.broken_links(path for path in there if not case_of[path])
    files = [path for path in matched if path not in used and path.is_file()]
    images = [path for path in files if registry.is_image(path)]
    left_out = [path for path in files if not registry.is_image(path) and path.suffix != ".json"]
    problems = class_problems(root, wanted.class_names, wanted.coding) + broken
    if not images and not broken:
        wrong = f"no image matches {wanted.image_glob!r}"
        problems += notes or [f"{root}: {wrong}; correct the folder or the glob"]
    problems += _pattern_problems(wanted)
    cases = []
    for path in images:
        label, *channels = named[path]
        problems += _file_problems(path, label, channels, wanted)
        cases.append(Case(case_of[path], tuple(map(str, (path, *channels))), str(label)))
    problems += duplicate_id_problems(cases)
    notes += listing.unused_files(left_out, f"none of {registry.KINDS}, left out")
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


def _pattern_problems(wanted):
    return [
        f"pattern {pattern!r} has no {{case}}; add it, or all images share one file"
        for pattern in (wanted.label_pattern, *wanted.other_channels)
        if "{case}" not in pattern
    ]


def _file_problems(path, label, channels, wanted):
    problems = [
        f"{path}: its channel {channel} is {absence(channel)}; add it, or correct other_channels"
        for channel in channels
        if not channel.is_file()
    ]
    if label == path:
        problems.append(
            f"{path}: is its own label by {wanted.label_pattern!r}; correct the pattern"
        )
    elif not label.is_file():
        mend = f"add it, or narrow {wanted.image_glob!r}"
        problems.append(f"{path}: its label {label} is {absence(label)}; {mend}")
    return problems


def _filled(root, path, case_id, pattern):
    folder = path.parent.relative_to(root).as_posix()
    return root / pattern.replace("{dir}", folder).replace("{case}", case_id)
