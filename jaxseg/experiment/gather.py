"""The data of a run: found, split by subject, prepared or found prepared."""

import dataclasses
import functools
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxseg import parallel
from jaxseg.config import ConfigProblems
from jaxseg.data import cases, demo, prepared, splits
from jaxseg.data.builder import CaseStore
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.layouts import decathlon
from jaxseg.data.layouts.find import find_dataset as find_layout
from jaxseg.data.layouts.wanted import Wanted
from jaxseg.data.preprocess import Plan
from jaxseg.data.surveyed import survey_once
from jaxseg.data.verify import Survey, describe, examine, twins_of
from jaxseg.experiment import advice
from jaxseg.experiment.members import members_of
from jaxseg.experiment.saved import Beginning
from jaxseg.run.log import Log

_MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run knows of its data.

    Attributes:
      dataset: `jaxseg.data.cases.Dataset`.
      splits: for each member a dict from "train", "val", "test" to case ids.
      store: CaseStore.
      plan: preprocessing Plan.
      sha256: SHA-256 of the data.
      digests: for each case the SHA-256 of its files.
    """

    dataset: cases.Dataset
    splits: tuple[dict[str, list[str]], ...]
    store: CaseStore
    plan: Plan
    sha256: str
    digests: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def split(self) -> dict[str, list[str]]:
        """Of the first member."""
        return self.splits[0]

    def cases_of(self, set_name: str, member: int = 0) -> list[cases.Case]:
        """The cases that are "train", "val" or "test" of a member."""
        chosen = set(self.splits[member][set_name])
        return [case for case in self.dataset.cases if case.case_id in chosen]

    @property
    def num_channels(self) -> int:
        return len(self.plan.normalisation)

    @property
    def num_classes(self) -> int:
        return len(self.dataset.class_names)


@dataclasses.dataclass(frozen=True)
class Found:
    """A dataset that was read once, before it is known how it is prepared.

    Attributes:
      dataset, sha256, digests: of `Data`.
      survey: what was found in each case.
      splits: by fold a dict from "train", "val", "test" to case ids.
      planned: ids of the cases that plans are made from.
    """

    dataset: cases.Dataset
    survey: Survey
    sha256: str
    digests: dict[str, list[str]]
    splits: dict[int, dict[str, list[str]]]
    planned: list[str]


def load_data(config: ConfigDict, log: Log, begun: Beginning | None = None) -> Data:
    """Finds the dataset and splits it, and prepares it or finds it prepared.

    Args:
      config: validated ConfigDict that leaves nothing open.
      log: where to say what is done.
      begun: the run that goes on; None makes a plan and draws a split.
    Raises:
      DatasetProblems, SplitProblem, OSError: the data can not be used.
      ConfigProblems: not by such a network.
    """
    return prepare_data(config, find_data(config, log, begun), log, begun)


def find_data(config: ConfigDict, log: Log, begun: Beginning | None = None) -> Found:
    """Finds the dataset, reads every case once, or knows it, and splits it by subject.

    Args, Raises: as `load_data`, but the config may leave fields open.
    """
    cache_dir = prepared.local_folder(config.data.cache_dir)
    spacing_from = begun.plan.spacing_from if begun else config.data.spacing_from
    dataset = _found(config, cache_dir, spacing_from, log)
    survey, sha256, digests = survey_once(
        dataset, strict=config.data.strict, **_together(config, log)
    )
    for line in describe(survey, dataset.class_names):
        log.text(line)
    splits_of = {
        member.fold: make_split(
            config, dataset, member.fold, survey, begun.split_of(index) if begun else None
        )
        for index, member in enumerate(members_of(config))
    }
    split = next(iter(splits_of.values()))
    used = {case_id for each in splits_of.values() for ids in each.values() for case_id in ids}
    if unused := [case.case_id for case in dataset.cases if case.case_id not in used]:
        shown = ", ".join(unused[:_MAX_LISTED]) + (" ..." if len(unused) > _MAX_LISTED else "")
        log.text(f"{len(unused)} labelled case(s) are in no set of the split: {shown}")
    if config.ensemble.folds:
        splits.check_folds(list(splits_of.values()))
    _check_foreground(dataset, survey, splits_of.values())
    # Folds share one preparation, so none is measured on its own training cases alone.
    planned = split["train"] + (split["val"] if _cross_validates(config, dataset) else [])
    return Found(dataset, survey, sha256, digests, splits_of, planned)


def prepare_data(
    config: ConfigDict, found: Found, log: Log, begun: Beginning | None = None
) -> Data:
    """Prepares a dataset that was found, or finds it prepared; as `load_data`."""
    dataset, survey = found.dataset, found.survey
    if len(config.data.patch_size) == 3 and not dataset.has_volumes:
        raise ConfigProblems(["the data are pictures: data.patch_size must have 2 entries"])
    store, plan = prepared.prepare(
        dataset,
        found.planned,
        survey=survey,
        sha256=found.sha256,
        slices=len(config.data.patch_size) == 2,
        saved_plan=begun.plan if begun else None,
        border_weight=border_weight_of(config),
        process_count=jax.process_count(),
        **_together(config, log),
        **config.preprocess.to_dict(),
    )
    facts = [survey[case_id] for case_id in next(iter(found.splits.values()))["train"]]
    for line in advice.about_axes(config, dataset, facts, plan):
        log.text(line)
    splits_of_members = tuple(found.splits[member.fold] for member in members_of(config))
    return Data(dataset, splits_of_members, store, plan, found.sha256, found.digests)


def _together(config, log):
    """What several processes share their work by."""
    cache_dir = prepared.local_folder(config.data.cache_dir)
    return {
        "cache_dir": os.path.join(cache_dir, "prepared"),
        "progress": log.progress,
        "process_index": jax.process_index(),
        "barrier": parallel.barrier,
    }


def _cross_validates(config, dataset):
    file = config.split.file or (dataset.split_file if _is_told(config, dataset) else "")
    if file:
        return splits.lists_folds(os.path.join(dataset.root, file))
    has_folds = any(case.fold is not None for case in dataset.cases)
    return bool(config.split.num_folds or config.ensemble.folds or has_folds)


def _is_told(config, dataset):
    """Whether the dataset says who is in which set, and the config does not ask for otherwise."""
    asked = config.split.file or config.split.num_folds or config.split.test_regex
    return bool(dataset.split_file) and not asked


def _found(config, cache_dir, spacing_from, log):
    """The dataset; where files are missing, all that is wrong with the others is told too."""
    try:
        dataset = find_dataset(config, cache_dir, log)
    except cases.DatasetProblems as problems:
        if problems.found is None or not problems.found.cases:
            raise
        progress = functools.partial(log.progress, title="verifying")
        _, wrong = examine(problems.found, progress)
        raise cases.DatasetProblems(problems.problems + wrong) from None
    for note in dataset.notes:
        log.text(f"note: {note}")
    if not dataset.cases:
        others = f"{len(dataset.unlabelled)} case(s) without label"
        others += f" and {len(dataset.excluded)} excluded" if dataset.excluded else ""
        raise cases.DatasetProblems(
            [f"{dataset.root}: no case has a label, there are {others}; training needs labels"]
        )
    return dataclasses.replace(dataset, spacing_from=spacing_from)


def find_dataset(config: ConfigDict, cache_dir: str, log: Log) -> cases.Dataset:
    """The dataset in `data.dir`, or the demonstration cohort, made in `cache_dir` when missing.

    Raises:
      DatasetProblems: there is none, or its files are not all there.
    """
    data = config.data
    if not data.dir:
        log.text(
            "no --config.data.dir: training on the embedded demonstration cohort (brain tissue, "
            "deformed from the MNI152 templates). A first run, not evidence of quality."
        )
        folder = os.path.join(cache_dir, "demo_brain")
        progress = functools.partial(log.progress, title="making the cohort")
        return decathlon.find(demo.create_demo_cohort(folder, progress=progress))
    root = os.path.abspath(os.path.expanduser(data.dir))
    wanted = Wanted(
        kind=data.kind,
        image_glob=data.image_glob,
        other_channels=tuple(data.other_channels),
        label_pattern=data.label_pattern,
        class_names=tuple(data.class_names),
        coding=LabelCoding(
            tuple(data.label_values) or None, tuple(data.ignore_values), data.objects
        ),
        exclude=tuple(data.exclude),
        test_folder=data.test_folder,
        strict=data.strict,
        spacing_from=data.spacing_from,
    )
    dataset = find_layout(root, wanted)
    without = f", {len(dataset.unlabelled)} without label" if dataset.unlabelled else ""
    without += f", {len(dataset.excluded)} excluded" if dataset.excluded else ""
    log.text(f"{root}: {dataset.layout}, {len(dataset.cases)} labelled cases{without}")
    return dataset


def make_split(
    config: ConfigDict,
    dataset: cases.Dataset,
    fold: int,
    survey: Survey | None = None,
    drawn: dict[str, list[str]] | None = None,
) -> dict[str, list[str]]:
    """The train, val and test cases that `config.split`, or the dataset itself, asks for.

    Cases with the same image, which `survey` knows, are of one subject. Where chance decides, and
    has decided about these cases before, it is asked no more: `drawn` stays.
    """
    options = config.split.to_dict() | {"fold": fold}
    file, regex = options.pop("file"), options.pop("subject_regex")
    case_ids = [case.case_id for case in dataset.cases]
    named = {case.case_id: case.subject for case in dataset.cases if case.subject}
    by_regex = splits.subject_from_regex(regex)
    belonging: dict[str, Any] = {
        "subject_of": lambda case_id: named.get(case_id) or by_regex(case_id),
        "twins": twins_of(survey or {}),
    }
    if file:
        path = os.path.join(dataset.root, file)
        return splits.split_from_file(
            path, case_ids, fold=fold, excluded=dataset.excluded, **belonging
        )
    told = {case.case_id: (case.set_name, case.fold) for case in dataset.cases}
    test = [case_id for case_id, (set_name, _) in told.items() if set_name == "test"]
    if _is_told(config, dataset):
        path = os.path.join(dataset.root, dataset.split_file)
        return splits.split_from_file(
            path, case_ids, fold=fold, also_test=test, excluded=dataset.excluded, **belonging
        )
    if any(set_name or case_fold is not None for set_name, case_fold in told.values()):
        if not (len(test) == sum(bool(any(entry)) for entry in told.values()) and test):
            return splits.split_as_told(told, fold=fold, **belonging)
        options["test"] = test  # the rest is drawn
    if drawn and sorted(case for ids in drawn.values() for case in ids) == sorted(case_ids):
        return drawn
    options["num_folds"] = options["num_folds"] or config.ensemble.folds
    return splits.split_by_subject(case_ids, **belonging, **options)


def _check_foreground(dataset, survey, folds):
    """Refuses to train where nothing is labelled in any training case."""
    for split in folds:
        if not any(sum(survey[case_id].voxels[1:]) for case_id in split["train"]):
            raise cases.DatasetProblems(
                [
                    f"{dataset.root}: no training case has a labelled foreground voxel; check the "
                    "labels and the split"
                ]
            )


def border_weight_of(config: ConfigDict) -> dict[str, float] | None:
    """Options of the border-weight map, or None when it is not wanted."""
    weight = config.loss.border_weight
    return {"w0": weight.w0, "sigma": weight.sigma_voxels} if weight.w0 > 0 else None
