"""Whether the run in a folder is the one that is asked for."""

import json
import os
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from jaxseg import config as config_lib
from jaxseg.config_planned import decided, undecided
from jaxseg.data.digests import files_of
from jaxseg.data.preprocess import Plan
from jaxseg.experiment.gather import Data
from jaxseg.experiment.setup import RunProblem
from jaxseg.run import writers

_MAX_LISTED = 10


def refuse_another_experiment(workdir: str, config: ConfigDict) -> None:
    """Raises RunProblem if the saved run in `workdir` has another config."""
    saved = json.dumps(read_json(os.path.join(workdir, "config.json"), ("data", "model")))
    changes = config_lib.differences(saved, config_lib.to_json(config))
    if changes:
        raise RunProblem(_another_run(workdir, changes))


def complete_as_saved(workdir: str, config: ConfigDict) -> ConfigDict:
    """The config, what it leaves open being as it was decided for the run in a folder."""
    if not undecided(config):
        return config
    content = read_json(os.path.join(workdir, "config.json"), ("data", "model"))
    saved = config_lib.from_json(json.dumps(content))
    return decided(config, config_lib.flatten(saved))


def refuse_other_data(workdir: str, data: Data) -> None:
    """Raises RunProblem if the saved run in `workdir` was trained on other data."""
    now = describe_data(data)
    saved = read_json(os.path.join(workdir, "data.json"), now.keys() - {"files"})
    files = _changed_files(saved.get("files", {}), now.pop("files"), data)
    changes = [
        f"{key}: {saved[key]} -> {now[key]}"
        for key in now
        if saved[key] != now[key] and not (files and key in ("fingerprint", "split"))
    ]
    if changes or files:
        raise RunProblem(_another_run(workdir, changes + files))


def read_json(path: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The object in a JSON file of a run, which has these keys.

    Raises:
      RunProblem: the file is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"it has no {missing[0]!r}")
        return content
    except (OSError, ValueError) as error:
        raise RunProblem(
            f"{path}: damaged, a file of the run can not be read ({error}); copy it from a backup, "
            "or from beside a run of the same command, or train anew in another --config.workdir"
        ) from None


def saved_plan(workdir: str) -> Plan | None:
    """The plan of the run in a folder, None if it has not come so far.

    Raises:
      RunProblem: it is damaged.
    """
    path = os.path.join(workdir, "plan.json")
    if not os.path.exists(path):
        return None
    try:
        return Plan.from_json(json.dumps(read_json(path)))
    except (KeyError, TypeError, ValueError) as error:
        raise RunProblem(f"{path}: damaged ({error!r}); copy it from a backup") from None


def _changed_files(saved, now, data):
    """What has become of which file, of many the first."""
    if not saved:
        return []
    cases = {case.case_id: case for case in (*data.dataset.cases, *data.dataset.unlabelled)}
    lines = [f"case {case_id} is gone" for case_id in saved if case_id not in now]
    lines += [f"case {case_id} is new" for case_id in now if case_id not in saved]
    for case_id in saved.keys() & now.keys():
        for path, before, after in zip(
            files_of(cases[case_id]), saved[case_id], now[case_id], strict=False
        ):
            if before != after:
                lines.append(f"case {case_id}: {path} has changed")
    more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return sorted(lines)[:_MAX_LISTED] + more


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
