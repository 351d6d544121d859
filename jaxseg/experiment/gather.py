"""The data of a run: found, split by subject, prepared or found prepared."""

import dataclasses
import functools
import os

import jax
from ml_collections import ConfigDict

from jaxseg import parallel
from jaxseg.data import cases, demo, prepared, splits
from jaxseg.data.preprocess import Plan
from jaxseg.data.verify import verify
from jaxseg.experiment.members import members_of
from jaxseg.run.log import Log


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run knows of its data.

    Attributes:
      dataset: `jaxseg.data.cases.Dataset`.
      splits: for each member a dict from "train", "val", "test" to case ids.
      store: CaseStore.
      plan: preprocessing Plan.
      fingerprint: SHA-256 of the data.
    """

    dataset: cases.Dataset
    splits: tuple[dict[str, list[str]], ...]
    store: prepared.CaseStore
    plan: Plan
    fingerprint: str

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


def load_data(config: ConfigDict, log: Log) -> Data:
    """Finds the dataset, splits it by subject, prepares it or finds it prepared.

    Args:
      config: validated ConfigDict.
      log: where to say what is done.
    Raises:
      DatasetProblems, SplitProblem, OSError: the data can not be used.
    """
    cache_dir = prepared.local_folder(config.data.cache_dir)
    try:
        dataset = find_dataset(config, cache_dir, log)
    except cases.DatasetProblems as problems:
        raise _with_content_problems(problems, log) from None
    splits_of = {fold: make_split(config, dataset, fold) for fold in _folds_of(config)}
    split = next(iter(splits_of.values()))
    if config.ensemble.folds:
        splits.check_folds(list(splits_of.values()))
    # Folds share one preparation, so none is measured on its own training cases alone.
    planned = split["train"] + (split["val"] if _cross_validates(config, dataset) else [])
    store, plan, fingerprint = prepared.prepare(
        dataset,
        planned,
        cache_dir=os.path.join(cache_dir, "prepared"),
        progress=log.progress,
        border_weight=border_weight_of(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        barrier=parallel.barrier,
        **config.preprocess.to_dict(),
    )
    splits_of_members = tuple(splits_of[member.fold] for member in members_of(config))
    return Data(dataset, splits_of_members, store, plan, fingerprint)


def _folds_of(config):
    return sorted({member.fold for member in members_of(config)})


def _cross_validates(config, dataset):
    if config.split.file:
        return splits.lists_folds(os.path.join(dataset.root, config.split.file))
    return bool(config.split.num_folds or config.ensemble.folds)


def _with_content_problems(missing, log):
    """Adds what is wrong inside the files that are there, so that all is reported at once."""
    if missing.found is None:
        return missing
    try:
        verify(missing.found, progress=functools.partial(log.progress, title="verifying"))
    except cases.DatasetProblems as wrong:
        return cases.DatasetProblems(missing.problems + wrong.problems)
    return missing


def find_dataset(config: ConfigDict, cache_dir: str, log: Log) -> cases.Dataset:
    """The dataset in `data.dir`, or the demonstration cohort, made in `cache_dir` when missing."""
    if not config.data.dir:
        log.text(
            "no --config.data.dir: training on the embedded demonstration cohort (brain tissue, "
            "deformed from the MNI152 templates). A first run, not evidence of quality."
        )
        folder = os.path.join(cache_dir, "demo_brain")
        progress = functools.partial(log.progress, title="making the cohort")
        return cases.find_msd_cases(demo.create_demo_cohort(folder, progress=progress))
    root = os.path.abspath(os.path.expanduser(config.data.dir))
    if config.data.kind == "msd":
        return cases.find_msd_cases(root)
    return cases.find_image_cases(
        root,
        config.data.image_glob,
        config.data.label_pattern,
        tuple(config.data.class_names),
        tuple(config.data.label_values) or None,
    )


def make_split(config: ConfigDict, dataset: cases.Dataset, fold: int) -> dict[str, list[str]]:
    """The train, val and test cases that `config.split` asks for."""
    options = config.split.to_dict() | {"fold": fold}
    file, regex = options.pop("file"), options.pop("subject_regex")
    case_ids = [case.case_id for case in dataset.cases]
    subject_of = splits.subject_from_regex(regex)
    if file:
        path = os.path.join(dataset.root, file)
        return splits.split_from_file(path, case_ids, subject_of=subject_of, fold=fold)
    options["num_folds"] = options["num_folds"] or config.ensemble.folds
    return splits.split_by_subject(case_ids, subject_of=subject_of, **options)


def border_weight_of(config: ConfigDict) -> dict[str, float] | None:
    """Options of the border-weight map, or None when it is not wanted."""
    weight = config.loss.border_weight
    return {"w0": weight.w0, "sigma": weight.sigma_voxels} if weight.w0 > 0 else None
