"""Whether the run in a folder is the one that is asked for."""

import json
import os
from typing import Any

from ml_collections import ConfigDict

from jaxseg import config as config_lib
from jaxseg.experiment.gather import Data
from jaxseg.experiment.setup import RunProblem
from jaxseg.run import writers


def refuse_another_experiment(workdir: str, config: ConfigDict) -> None:
    """Raises RunProblem if the saved run in `workdir` has another config."""
    with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
        changes = config_lib.differences(file.read(), config_lib.to_json(config))
    if changes:
        raise RunProblem(_another_run(workdir, changes))


def refuse_other_data(workdir: str, data: Data) -> None:
    """Raises RunProblem if the saved run in `workdir` was trained on other data."""
    with open(os.path.join(workdir, "data.json"), encoding="utf-8") as file:
        saved = json.load(file)
    now = describe_data(data)
    changes = [f"{key}: {saved[key]} -> {now[key]}" for key in now if saved[key] != now[key]]
    if changes:
        raise RunProblem(_another_run(workdir, changes))


def describe_data(data: Data) -> dict[str, Any]:
    """What a model must know of the data it was trained on, JSON-ready."""
    return writers.json_ready(
        {
            "class_names": data.dataset.class_names,
            "label_values": data.dataset.label_values,
            "modalities": data.dataset.modalities,
            "num_channels": data.num_channels,
            "fingerprint": data.fingerprint,
            "split": data.split if all(s == data.split for s in data.splits) else data.splits,
        }
    )


def _another_run(workdir, changes):
    lines = "\n".join(f"  - {change}" for change in changes)
    return (
        f"{workdir} holds a run that was started differently; give this one a folder of its own "
        f"with --config.workdir=DIR, or undo:\n{lines}"
    )
