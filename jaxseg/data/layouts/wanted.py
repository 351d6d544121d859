"""What a user says of a folder, where the folder does not say it itself."""

import dataclasses
import fnmatch
from collections.abc import Sequence

from jaxseg.data.cases import Dataset, DatasetProblems
from jaxseg.data.label_values import LabelCoding


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The settings of `config.data` that say which files are the dataset.

    Attributes:
      kind: "auto", or the layout.
      image_glob, other_channels, label_pattern: of `patterns.find`.
      class_names, coding: where no dataset.json has them; its ignored values count everywhere.
      exclude: names of cases that are left out, or patterns with * and ?.
      test_folder: whether the labelled cases of imagesTs are the test set.
      strict: whether files that nothing lists are a problem.
      spacing_from: of `Dataset`.
    """

    kind: str = "auto"
    image_glob: str = "images/*"
    other_channels: tuple[str, ...] = ()
    label_pattern: str = "masks/{case}.png"
    class_names: tuple[str, ...] = ("background", "foreground")
    coding: LabelCoding = dataclasses.field(default_factory=LabelCoding)
    exclude: tuple[str, ...] = ()
    test_folder: bool = False
    strict: bool = False
    spacing_from: str = "pixdim"


def without_excluded(dataset: Dataset, exclude: Sequence[str]) -> Dataset:
    """The dataset without the cases whose name is in `exclude` or matches a pattern there.

    Raises:
      DatasetProblems: a name or pattern leaves out nothing.
    """
    case_ids = {case.case_id for case in (*dataset.cases, *dataset.unlabelled)}
    matched = {pattern: _matched(case_ids, pattern) for pattern in exclude}
    idle = [
        f"--config.data.exclude: {pattern!r} is no case of {dataset.root}; correct it"
        for pattern, found in matched.items()
        if not found
    ]
    if idle:
        raise DatasetProblems(idle, dataset)
    excluded = set().union(*matched.values())
    return dataclasses.replace(
        dataset,
        cases=tuple(case for case in dataset.cases if case.case_id not in excluded),
        unlabelled=tuple(case for case in dataset.unlabelled if case.case_id not in excluded),
        excluded=tuple(sorted(excluded)),
    )


def _matched(case_ids, pattern):
    """The case of that name; if there is none, those that match it."""
    if pattern in case_ids:
        return {pattern}
    return {case_id for case_id in case_ids if fnmatch.fnmatchcase(case_id, pattern)}
