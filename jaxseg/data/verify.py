"""Reads every file of a dataset before training: what is wrong, and what is there."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxseg import geometry
from jaxseg.data import cases, images, labels, memory, workers
from jaxseg.data.formats import registry
from jaxseg.data.formats.volume import Remark, grouped
from jaxseg.planning.measures import CaseMeasures, measure_case
from jaxseg.problem import FileProblem, file_problem

_MAX_LISTED = 5
# Memory that reading and measuring a packed file takes, as a multiple of its size.
_UNPACKED = 20


@dataclasses.dataclass(frozen=True)
class CaseFacts:
    """What is known of a case once it has been read.

    Attributes:
      measures: `CaseMeasures`, along the RAS+ axes.
      content: SHA-256 of the image's values; "" where all are one value.
      remarks: (path, kind, detail) of the Remarks about its files.
    """

    measures: CaseMeasures
    content: str
    remarks: tuple[tuple[str, str, str], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along the RAS+ axes."""
        return self.measures.shape

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Along the RAS+ axes."""
        return self.measures.spacing_mm

    @property
    def voxels(self) -> tuple[int, ...]:
        """Of each class, background included; () where there is no label."""
        structures = self.measures.structures
        return (self.measures.background, *(of.voxels for of in structures)) if structures else ()


Survey = dict[str, CaseFacts]  # by case id


def to_json(survey: Survey) -> str:
    """A survey as a text that `from_json` reads."""
    return json.dumps({case_id: dataclasses.asdict(facts) for case_id, facts in survey.items()})


def from_json(text: str) -> Survey:
    """The survey that `to_json` wrote; raises ValueError, KeyError or TypeError if damaged."""

    return {
        case_id: CaseFacts(
            measures=CaseMeasures.from_dict(fields["measures"]),
            content=fields["content"],
            remarks=tuple((path, kind, detail) for path, kind, detail in fields["remarks"]),
        )
        for case_id, fields in json.loads(text).items()
    }


def verify(
    dataset: cases.Dataset,
    progress: Callable[[Iterable[cases.Case]], Iterable[cases.Case]] | None = None,
    strict: bool = False,
) -> Survey:
    """Reads every image and label once and reports all that is wrong with them.

    What must be so is said in `examine`; and something must be labelled in some case.

    Args:
      dataset: cases.Dataset.
      progress: Called with the cases, returns an iterable over them (such as tqdm); None for none.
      strict: Whether an image that is there twice is a problem.
    Returns:
      Survey of all cases, those without a label included.
    Raises:
      cases.DatasetProblems: One sentence for each problem of each case, in the order of the cases,
        then those that only show between cases.
    """
    survey, problems = examine(dataset, progress, strict)
    if not problems and not any(sum(facts.voxels[1:]) for facts in survey.values()):
        wrong = "no labelled foreground voxel in any case, every label is background"
        problems.append(f"{dataset.root}: {wrong}; check how the labels were converted")
    if problems:
        raise cases.DatasetProblems(problems)
    return survey


def examine(
    dataset: cases.Dataset,
    progress: Callable[[Iterable[cases.Case]], Iterable[cases.Case]] | None = None,
    strict: bool = False,
) -> tuple[Survey, list[str]]:
    """What is known of cases, which may be a part of a dataset, and what is wrong with them.

    Files must be readable, with finite values, varying where something is labelled, an invertible
    affine, known label values, image and label on one grid, and the same channels in every case.

    Args:
      dataset, progress, strict: as for `verify`.
    Returns:
      (survey, problems): survey of the cases that can be read; sentences as `verify` raises.
    """
    everyone = (*dataset.cases, *dataset.unlabelled)
    found = _examined(dataset, everyone, progress or iter)
    problems: list[str] = [problem for one in found for problem in one.problems]
    survey: Survey = {
        case.case_id: one.facts for case, one in zip(everyone, found, strict=True) if one.facts
    }
    num_channels = {
        case.image_path: one.num_channels
        for case, one in zip(everyone, found, strict=True)
        if one.num_channels is not None
    }
    problems += _channel_problems(num_channels, dataset.modalities)
    problems += _kind_problems(everyone)
    if strict:
        problems += [
            f"{' and '.join(twins)} have the same image; remove one of them"
            for twins in twins_of(survey)
        ]
    return survey, problems


@dataclasses.dataclass(frozen=True)
class _Examined:
    """One case: what is wrong with it, its channels and what else is known, None where nothing."""

    problems: list[str]
    num_channels: int | None
    facts: CaseFacts | None


def _examined(dataset, everyone, progress):
    """What is found in each case, which processes share where that is worth it."""
    named = [path for case in everyone for path in (*case.image_paths, case.label_path)]
    paths = [path for path in named if path and os.path.exists(path)]
    largest = max(map(os.path.getsize, paths), default=0)
    most_workers = min(os.cpu_count() or 1, memory.how_often(_UNPACKED * largest))
    num_workers = workers.workers_for(paths, len(everyone), most_workers)
    examine_one = functools.partial(
        _examine_case, dataclasses.replace(dataset, cases=(), unlabelled=())
    )
    if num_workers == 1:
        return [examine_one(case) for case in progress(everyone)]
    shown = iter(progress(everyone))
    next(shown)  # starts the clock of progress: the first cases are being read
    found: list[_Examined | None] = [None] * len(everyone)
    purpose = f"read the cases of {dataset.root}"
    for index, one in workers.in_processes(examine_one, everyone, num_workers, purpose=purpose):
        found[index] = one
        next(shown, None)
    return found


def _examine_case(dataset: cases.Dataset, case: cases.Case) -> _Examined:
    problems: list[FileProblem | str] = []
    num_channels, facts = None, None
    image = _try(problems, _image_of, dataset, case)
    stored = _try(problems, _label_of, dataset, case) if case.label_path else None
    remarks = []
    if image is not None:
        problems += images.affine_problems(case.image_path, image.affine)
        problems += images.image_problems(case.image_path, image.values)
        num_channels = image.values.shape[3]
        remarks += _told(dataset, case.image_path, image.remarks)
    label = None
    if stored is not None and case.label_path is not None:
        problems += images.affine_problems(case.label_path, stored.affine)
        remarks += _told(dataset, case.label_path, stored.remarks)
        label = _try(problems, labels.encode_label, case.label_path, stored, dataset.coding)
    if image is not None and stored is not None:
        near = _try(problems, _grid_remarks, case, image, stored) or ()
        remarks += _told(dataset, case.label_path, near)
    if image is not None and image.values.size:
        content = "" if _is_constant(image.values) else _content_key(image.values)
        if not content and _is_labelled(label, len(dataset.class_names)):
            wrong = f"every value is {image.values.flat[0]:g}, though something is labelled"
            mend = "copy it again from the source or remove the case"
            problems.append(f"{case.image_path}: {wrong}; {mend}")
        if not images.affine_problems("", image.affine):
            measures = _measured(image, label, len(dataset.class_names))
            facts = CaseFacts(measures, content, tuple(remarks))
    return _Examined([str(problem) for problem in problems], num_channels, facts)


def _measured(image, label, num_classes):
    canonical, affine = geometry.to_canonical(image.values, image.affine)
    if label is not None:
        label = geometry.to_canonical(label, image.affine)[0]
        label = label if label.shape == canonical.shape[:3] else None  # which is among the problems
    spacing_mm = geometry.spacing_mm_from_affine(affine).tolist()
    return measure_case(canonical, label, spacing_mm, num_classes)


def twins_of(survey: Survey) -> list[list[str]]:
    """Ids of cases that have the same image, but for images of one value, in lists of two up."""
    by_content = collections.defaultdict(list)
    for case_id, facts in survey.items():
        if facts.content:
            by_content[facts.content].append(case_id)
    return [twins for twins in by_content.values() if len(twins) > 1]


def describe(survey: Survey, class_names: Sequence[str]) -> list[str]:
    """What the user should know of data that can be used, a line for each kind of thing."""
    remarks: dict[str, list[Remark]] = {}
    for facts in survey.values():
        for path, kind, detail in facts.remarks:
            remarks.setdefault(path, []).append(Remark(kind, detail))
    lines = grouped(remarks)
    if twins := twins_of(survey):
        shown = "; ".join(" and ".join(group) for group in twins[:_MAX_LISTED])
        lines.append(
            f"{len(twins)} image(s) are there more than once, those cases count as one subject: "
            f"{shown}"
        )
    if blank := [case_id for case_id, facts in survey.items() if not facts.content]:
        more = " ..." if len(blank) > _MAX_LISTED else ""
        lines.append(
            f"{len(blank)} image(s) have one value everywhere and nothing labelled: "
            f"{', '.join(blank[:_MAX_LISTED])}{more}"
        )
    for index, name in enumerate(class_names):
        if not any(facts.voxels[index] for facts in survey.values() if facts.voxels):
            lines.append(f"no voxel of class {name!r} in any case")
    return lines


def _try(problems: list[Any], function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except FileProblem as problem:
        problems.append(problem)
        return None


def _image_of(dataset, case):
    return _within_memory(images.decode_image, case.image_paths, dataset.spacing_from)


def _label_of(dataset, case):
    return _within_memory(labels.decode_label, case.label_path, dataset.spacing_from)


def _within_memory(read, paths, spacing_from):
    path = images.files_of(paths)[0]
    mend = "cut it into parts, leave it out with --config.data.exclude, or use a larger machine"
    if wrong := memory.too_large(images.bytes_to_read(paths, spacing_from)):
        raise file_problem(path, wrong, mend)
    try:
        return read(paths, spacing_from)
    except MemoryError as error:
        wrong = f"takes more memory than there is ({error})"
        raise file_problem(path, wrong, mend) from error


def _told(dataset, path, remarks):
    """Remarks with the path as the dataset's folder has it, wherever that lies."""
    name = os.path.relpath(path, dataset.root)
    name = path if name.startswith(os.pardir) else name
    return [(name, remark.kind, remark.detail) for remark in remarks]


def _grid_remarks(case, image, stored):
    return images.grid_remarks(case.label_path, stored, case.image_path, image)


def _is_labelled(label, num_classes):
    return label is not None and bool(((label > 0) & (label < num_classes)).any())


def _content_key(image):
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _is_constant(image):
    return bool((image == image.flat[0]).all())


def _kind_problems(everyone: Sequence[cases.Case]) -> list[str]:
    """Pictures beside volumes, whose sizes can not be compared."""
    kinds = {registry.is_volume(case.image_path): case.image_path for case in everyone}
    if len(kinds) < 2:
        return []
    wrong = f"is a picture, which has no spacing, and {kinds[True]} a volume"
    return [f"{kinds[False]}: {wrong}; train on each kind by itself"]


def _channel_problems(num_channels: Mapping[str, int], modalities: Sequence[str]) -> list[str]:
    """Images whose channels are not those declared or, if none are, not those of most images."""
    if not num_channels:
        return []
    if modalities:
        expected = len(modalities)
        source = f"the dataset declares {expected} ({', '.join(modalities)})"
    else:
        expected, num_images = collections.Counter(num_channels.values()).most_common(1)[0]
        source = f"{num_images} of {len(num_channels)} images have {expected}"
    return [
        f"{path}: {number} channels, but {source}; correct the image or the dataset's description"
        for path, number in num_channels.items()
        if number != expected
    ]
