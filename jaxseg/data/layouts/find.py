"""Recognises how a folder is laid out."""

import os
from pathlib import Path

from jaxseg.data.cases import Dataset, DatasetProblems
from jaxseg.data.layouts import decathlon, globs, listing, nnunet, patterns, table
from jaxseg.data.layouts.wanted import Wanted, without_excluded


def find_dataset(root: str | Path, wanted: Wanted) -> Dataset:
    """Finds the cases of a folder, or of a table.

    Args:
      root: The folder, or a CSV file.
      wanted: What the user says; its `kind` "auto" lets the folder tell.
    Returns:
      Dataset without what `wanted.exclude` leaves out.
    Raises:
      DatasetProblems: The folder has no known layout, or all that is wrong with it.
    """
    kind = kind_of(root, wanted) if wanted.kind == "auto" else wanted.kind
    if kind == "msd":
        dataset = decathlon.find(root, wanted)
    elif kind == "nnunet":
        dataset = nnunet.find(root, wanted)
    elif kind == "table":
        dataset = table.find(root, wanted)
    else:
        dataset = patterns.find(root, wanted)
    return without_excluded(dataset, wanted.exclude)


def kind_of(root: str | Path, wanted: Wanted) -> str:
    """The layout of a folder: "msd", "nnunet", "table" or "images".

    Raises:
      DatasetProblems: It is none of them.
    """
    if os.path.isfile(root):
        return "table"
    if not os.path.isdir(root):
        raise DatasetProblems([f"{root}: no such folder; correct --config.data.dir"])
    description = Path(root, "dataset.json")
    if os.path.lexists(description):
        problems: list[str] = []
        content = listing.load_json(description, problems)
        if content is None:
            raise DatasetProblems(problems)
        is_nnunet = "training" not in content and bool(
            {"channel_names", "file_ending", "dataset"} & set(content)
        )
        return "nnunet" if is_nnunet else "msd"
    if os.path.lexists(Path(root, table.NAME)):
        return "table"
    if globs.matching(Path(root), wanted.image_glob):
        return "images"
    raise DatasetProblems(
        [
            f"{root}: no layout is recognised: it has no dataset.json (Decathlon, nnU-Net), no "
            f"{table.NAME}, and no image {wanted.image_glob!r}; correct --config.data.dir, or say "
            "where images and labels are with --config.data.image_glob and "
            "--config.data.label_pattern"
        ]
    )
