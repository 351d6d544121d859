"""Prepared cases on disk: verified and preprocessed once per (data, preprocessing), then reused."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxseg.data import memory, preprocess
from jaxseg.data import parts as parts_lib
from jaxseg.data.builder import CaseBuilder, CaseStore
from jaxseg.data.cases import Case, Dataset, DatasetProblems
from jaxseg.data.verify import Survey
from jaxseg.run import writers


def prepare(
    dataset: Dataset,
    plan_ids: Sequence[str],
    *,
    survey: Survey,
    sha256: str,
    cache_dir: str,
    slices: bool = False,
    axes: Sequence[int] = (),
    saved_plan: preprocess.Plan | None = None,
    border_weight: Mapping[str, float] | None = None,
    progress: Callable[..., Iterable[Case]] = lambda items, title: items,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> tuple[CaseStore, preprocess.Plan]:
    """Preprocesses a dataset, or finds that done.

    What was finished before an interruption is not done again; what is damaged is. Several
    processes that share a file system share the work: the first plans, then each makes its share of
    the parts.

    Args:
      dataset: `jaxseg.data.cases.Dataset`.
      plan_ids: ids of the cases whose statistics make the plan.
      survey, sha256: of `surveyed.survey_once`.
      cache_dir: folder that holds one prepared set per dataset and plan; local or mounted.
      slices: whether the network is trained on slices.
      axes: of the plan; () for those that suit slices or volumes.
      saved_plan: of the run that goes on, which is kept to; None makes one.
      border_weight: options of `border_weights.border_weights`, to store that map with each case.
      progress: function (iterable, title) -> iterable that shows progress.
      process_index, process_count: which of the processes this is.
      barrier: function (name) that returns when every process has called it.
      **options: `make_plan`'s own: spacing_mm, normalisation, crop, image_order, label_order.
    Returns:
      (store, plan): CaseStore, Plan.
    Raises:
      DatasetProblems: no case has what the plan needs, or one takes more memory than there is.
      OSError: nothing can be kept in `cache_dir`, or a process that prepares was killed.
    """
    cache_dir = local_folder(cache_dir)
    if process_index > 0:
        barrier("plan")  # until the first has made it
    chosen = [case for case in dataset.cases if case.case_id in set(plan_ids)]
    axes = axes or _axes(survey, plan_ids, slices)
    axes = axes if saved_plan is None else saved_plan.axes
    # What plans of versions before did not know is no part of the names of their caches.
    known = sorted(item for item in options.items() if item != ("crop", False))
    wanted = repr((sha256, sorted(plan_ids), known, CaseBuilder.VERSION))
    if border_weight:
        wanted += repr(sorted(border_weight.items()))
    if saved_plan is None or saved_plan.keep_thin:  # else of version 0.1, whose cache is used
        wanted += repr((tuple(axes), dataset.spacing_from, "keep_thin"))
    if saved_plan is None or saved_plan.normalise_first:
        wanted += repr(("normalise_first", "coarse_apart", slices))
    folder = os.path.join(cache_dir, hashlib.sha256(wanted.encode()).hexdigest()[:16])
    plan_path = os.path.join(folder, "plan.json")
    if process_index == 0:
        if (plan := saved_plan or _read_plan(plan_path)) is None:
            shown = progress(chosen, title="planning")
            plan = preprocess.make_plan(dataset, shown, axes=axes, slices=slices, **options)
        os.makedirs(folder, exist_ok=True)
        writers.write_text(plan_path, plan.to_json())
        barrier("plan")
    _check_shared([plan_path])
    found_plan = _read_plan(plan_path)
    if found_plan is None:
        raise OSError(f"{plan_path}: can not be read; delete {folder} and start again")
    plan = found_plan
    most_bytes = _check_memory(dataset, survey, plan)

    parts = parts_lib.cut(dataset, folder)
    own = list(parts)[process_index::process_count]
    parts_lib.make_parts(
        {name: parts[name] for name in own if not parts_lib.is_whole(name)},
        functools.partial(parts_lib.make_part, plan=plan, border_weight=border_weight),
        functools.partial(progress, title="preprocessing"),
        min((os.cpu_count() or 1) // process_count, memory.how_often(most_bytes)),
    )
    barrier("parts")
    _check_shared(parts)
    store = CaseStore({name: [c.case_id for c in part.cases] for name, part in parts.items()})
    return store, plan


def _axes(survey, plan_ids, slices):
    if not slices:
        return 0, 1, 2
    facts = [survey[case_id] for case_id in plan_ids]
    return preprocess.slice_axes([f.shape for f in facts], [f.spacing_mm for f in facts])


def _read_plan(path):
    """The plan in a file, None where there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return preprocess.Plan.from_json(file.read())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _check_memory(dataset, survey, plan):
    """Refuses cases that take more memory than there is; the bytes that the largest takes."""
    problems, most = [], 0
    for case in dataset.cases:
        facts = survey[case.case_id]
        kept = facts.measures.cropped_shape if plan.crop else facts.shape
        shape = preprocess.target_shape(kept, facts.spacing_mm, plan)
        num_channels = len(plan.normalisation)
        most = max(most, memory.bytes_to_prepare(facts.shape, shape, num_channels))
        if wrong := memory.grid_too_large(kept, facts.spacing_mm, shape, num_channels):
            problems.append(
                f"{case.image_path}: {wrong}; correct its spacing, leave it out with "
                "--config.data.exclude, or set a coarser --config.preprocess.spacing_mm"
            )
    if problems:
        raise DatasetProblems(problems)
    return most


def local_folder(path: str) -> str:
    """The absolute form of the path of a folder that prepared cases can be kept in.

    ArrayRecord reads and writes through file descriptors, which object stores do not have.

    Raises:
      OSError: it is the address of an object store.
    """
    if "://" in path:
        raise OSError(
            f"{path}: prepared cases are read in small pieces, which needs a file system; set "
            "--config.data.cache_dir to a local folder (or one where the bucket is mounted)"
        )
    return os.path.abspath(os.path.expanduser(path))


def _check_shared(paths):
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise OSError(
            f"{missing[0]}: not there ({len(missing)} of {len(paths)} missing), though another "
            "process made it; set --config.data.cache_dir to a folder that all hosts share"
        )
