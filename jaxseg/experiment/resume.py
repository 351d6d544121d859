"""Whether the run in a folder is the one that is asked for."""

import dataclasses
import json
import os
from typing import Any

from ml_collections import ConfigDict

from jaxseg import config as config_lib
from jaxseg.config_planned import decided, undecided
from jaxseg.data.digests import files_of
from jaxseg.experiment.gather import Data
from jaxseg.experiment.saved import saved_config, saved_data, saved_plan
from jaxseg.experiment.setup import RunProblem
from jaxseg.run import identity, writers
from jaxseg.run.log import METRICS_NAME, TRACE_NAME, read_metrics, read_trace
from jaxseg.run.readers import json_object, read_file

SPLIT_NAME = "split.json"

_MAX_LISTED = 10


def refuse_another_experiment(workdir: str, config: ConfigDict) -> None:
    """Raises RunProblem if the saved run in `workdir` has another config."""

    def changes_from(text):
        saved = json_object(text, ("data", "model"))
        return config_lib.differences(json.dumps(saved), config_lib.to_json(config))

    if changes := read_file(workdir, "config.json", changes_from):
        raise RunProblem(_another_run(workdir, changes))


def complete_as_saved(workdir: str, config: ConfigDict) -> ConfigDict:
    """The config, what it leaves open being as it was decided for the run in a folder."""
    if not undecided(config):
        return config
    return decided(config, config_lib.flatten(saved_config(workdir)))


def refuse_other_data(workdir: str, data: Data) -> None:
    """Raises RunProblem if the saved run in `workdir` was trained on other data.

    Its split.json must say nothing else; what it says decides nothing, so that changing it is a
    mistake.
    """
    now = describe_data(data)
    split = now["split"]
    saved = saved_data(workdir, now.keys() - {"files"})
    files = _changed_files(saved.get("files", {}), now.pop("files"), data)
    changes = [
        f"{key}: {saved[key]} -> {now[key]}"
        for key in now
        if saved[key] != now[key] and not (files and key in ("fingerprint", "split"))
    ]
    if changes or files:
        raise RunProblem(_another_run(workdir, changes + files))
    if os.path.exists(os.path.join(workdir, SPLIT_NAME)):
        read_file(workdir, SPLIT_NAME, lambda text: _check_split(text, split))


def _check_split(text, split):
    if json.loads(text) != split:
        raise ValueError("it is not the split that the run was trained with")


def refuse_damaged_files(workdir: str, *, is_new: bool) -> None:
    """Raises FileProblem if a file that the run in a folder goes on from is damaged.

    Args:
      workdir: the run's folder.
      is_new: whether there is no checkpoint yet, so that what is not appended to is written anew.
    """
    if not is_new:
        saved_plan(workdir)
        saved_data(workdir)
    identity.read_sessions(workdir)
    for name, read in ((METRICS_NAME, read_metrics), (TRACE_NAME, read_trace)):
        if os.path.exists(os.path.join(workdir, name)):
            read(workdir)


def _changed_files(saved, now, data):
    """What has become of which file, of many the first."""
    if not saved:
        return []
    cases = {case.case_id: case for case in (*data.dataset.cases, *data.dataset.unlabelled)}
    lines = [f"case {case_id} is gone" for case_id in saved if case_id not in now]
    lines += [f"case {case_id} is new" for case_id in now if case_id not in saved]
    for case_id in saved.keys() & now.keys():
        if wrong := _counted_otherwise(cases[case_id], saved[case_id], now[case_id]):
            lines.append(f"case {case_id} {wrong}")
            continue
        for path, before, after in zip(
            files_of(cases[case_id]), saved[case_id], now[case_id], strict=True
        ):
            if before != after:
                lines.append(f"case {case_id}: {path} has changed")
    more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return sorted(lines)[:_MAX_LISTED] + more


def _counted_otherwise(case, saved, now):
    """How a case has another number of files than a run began with; "" if it has not."""
    images = files_of(dataclasses.replace(case, label_path=None))
    if len(now) == len(saved):
        return ""
    if case.label_path is None and saved[: len(images)] == now:
        return "has no label, the run began with one"
    if case.label_path is not None and saved == now[: len(images)]:
        return f"has a label, {case.label_path}, the run began without one"
    return f"has {len(now)} files, the run began with {len(saved)}"


def describe_data(data: Data) -> dict[str, Any]:
    """What a model must know of the data it was trained on, JSON-ready."""
    return writers.json_ready(
        {
            "class_names": data.dataset.class_names,
            "label_values": data.dataset.coding.values,
            "modalities": data.dataset.modalities,
            "num_channels": data.num_channels,
            "fingerprint": data.sha256,
            "files": data.digests,
            "split": data.split if all(s == data.split for s in data.splits) else data.splits,
        }
    )


def _another_run(workdir, changes):
    lines = "\n".join(f"  - {change}" for change in changes)
    return (
        f"{workdir} holds a run that was started differently; give this one a folder of its own "
        f"with --config.workdir=DIR, or undo:\n{lines}"
    )
