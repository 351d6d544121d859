"""What a dataset is: cases with their files, and what the values in them mean."""

import dataclasses
import os
from collections.abc import Sequence

from jaxseg.data.formats.registry import is_volume
from jaxseg.data.label_values import LabelCoding, class_problems
from jaxseg.problem import Problem, name_problems, printable

# Of problems that end alike, so many are shown.
_MAX_ALIKE = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One image with its reference label.

    Attributes:
      case_id: unique within a dataset.
      image_paths: the file of the image, or one for each channel.
      label_path: None for a case that is predicted, not trained on.
      subject: who it is of; "" where the dataset does not say.
      set_name: "train", "val", "test" or "unused"; "" where the dataset does not say.
      fold: of a cross-validation, whose validation set it is in; None where it does not say.
    """

    case_id: str
    image_paths: tuple[str, ...]
    label_path: str | None = None
    subject: str = ""
    set_name: str = ""
    fold: int | None = None

    @property
    def image_path(self) -> str:
        """The file of the image, or of its first channel."""
        return self.image_paths[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the case."""
        return self.image_paths if self.label_path is None else (*self.image_paths, self.label_path)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Cases in order of `case_id`, and what their values mean.

    Attributes:
      root: Folder that the cases were found in.
      cases: The cases that have a label.
      class_names: One per class; class 0 is the background.
      coding: What values in the label files stand for.
      modalities: One name per image channel; empty if the dataset does not say.
      layout: How the folder is laid out, for the log.
      unlabelled: The cases without a label.
      split_file: A file of splits that the folder has, relative to `root`; "" for none.
      notes: What its user should know of the folder.
      excluded: ids of cases that its user leaves out.
      spacing_from: Which of two contradicting spacings is believed, see `formats.placement`.
    """

    root: str
    cases: tuple[Case, ...]
    class_names: tuple[str, ...]
    coding: LabelCoding
    modalities: tuple[str, ...] = ()
    layout: str = ""
    unlabelled: tuple[Case, ...] = ()
    split_file: str = ""
    notes: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    spacing_from: str = "pixdim"

    @property
    def has_volumes(self) -> bool:
        """Whether its cases are scans, which have a place in the world, and not pictures."""
        return is_volume(self.cases[0].image_path)

    def channel_names(self, num_channels: int) -> tuple[str, ...]:
        """The modalities or, where the dataset does not say, the numbers of the channels."""
        return self.modalities or tuple(map(str, range(num_channels)))


class DatasetProblems(Problem):
    """Everything that is wrong with a dataset.

    Attributes:
      problems: one sentence for each, "what: wrong; mend".
      found: the Dataset of the cases that are all there, None where nothing could be made of it.
      all_in: a file that lists all problems, where the message shows but some; "" for none.
    """

    def __init__(self, problems: Sequence[str], found: Dataset | None = None, all_in: str = ""):
        super().__init__(problems)
        self.problems = [printable(problem) for problem in problems]
        self.found = found
        self.all_in = all_in

    def shown(self) -> list[str]:
        """The problems, of many that ask for the same mend the first and their number."""
        by_mend: dict[str, list[str]] = {}
        for problem in self.problems:
            by_mend.setdefault(problem.rpartition("; ")[2], []).append(problem)
        lines = []
        for alike in by_mend.values():
            lines += alike[:_MAX_ALIKE]
            if len(alike) > _MAX_ALIKE:
                lines.append(f"... and {len(alike) - _MAX_ALIKE} more like the last")
        return lines

    def __str__(self) -> str:
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = [f"{len(self.problems)} {noun} in the dataset:", *self.shown()]
        return "\n- ".join(lines) + (f"\nall of them are in {self.all_in}" if self.all_in else "")


def duplicate_id_problems(cases: Sequence[Case]) -> list[str]:
    """One sentence for each case id that several cases have."""
    by_id: dict[str, list[str]] = {}
    for case in cases:
        by_id.setdefault(case.case_id, []).append(str(case.image_path))
    return [
        f"case {case_id} is there {len(paths)} times ({', '.join(paths)}); keep or rename one"
        for case_id, paths in by_id.items()
        if len(paths) > 1
    ]


def whole_or_problems(dataset: Dataset, problems: Sequence[str]) -> Dataset:
    """The dataset with its cases in order, if nothing is wrong with it.

    Raises:
      DatasetProblems: There are problems.
    """
    files = [file for case in (*dataset.cases, *dataset.unlabelled) for file in case.paths]
    problems = [*name_problems(filter(os.path.lexists, files)), *problems]
    dataset = dataclasses.replace(
        dataset, cases=_ordered(dataset.cases), unlabelled=_ordered(dataset.unlabelled)
    )
    if not problems:
        return dataset
    there = tuple(case for case in dataset.cases if all(map(os.path.isfile, case.paths)))
    found = dataclasses.replace(dataset, cases=there)
    # Where classes are wrong, every label would be.
    are_wrong = class_problems(dataset.root, dataset.class_names, dataset.coding)
    raise DatasetProblems(problems, None if are_wrong else found)


def _ordered(cases):
    return tuple(sorted(cases, key=lambda case: case.case_id))
