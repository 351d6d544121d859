"""What a run has saved of itself, read again: its settings, its preprocessing, its data."""

import dataclasses
import reprlib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from jaxseg import config as config_lib
from jaxseg import config_checks
from jaxseg.data.preprocess import Plan
from jaxseg.run.readers import json_object, read_file


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What was decided when a run began, and stays as it is when it goes on.

    Attributes:
      plan: of its preprocessing.
      splits: for each member a dict from "train", "val", "test" to case ids, or one for all.
    """

    plan: Plan
    splits: tuple[dict[str, list[str]], ...]

    def split_of(self, member: int) -> dict[str, list[str]]:
        """Of one member."""
        return self.splits[member if len(self.splits) > 1 else 0]


def saved_beginning(workdir: str) -> Beginning:
    """The beginning of the run in a folder; raises FileProblem if a file is missing or damaged."""
    split = saved_data(workdir, ["split"])["split"]
    splits = split if isinstance(split, list) else [split]
    return Beginning(saved_plan(workdir), tuple(splits))


def saved_config(workdir: str) -> ConfigDict:
    """The settings of the run in a folder; raises FileProblem if they are missing or damaged."""
    return read_file(workdir, "config.json", _config_in)


def saved_plan(workdir: str) -> Plan:
    """The plan of the run in a folder; raises FileProblem if it is missing or damaged."""
    return read_file(workdir, "plan.json", Plan.from_json)


def saved_data(workdir: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """What the run in a folder knew of its data.

    Args:
      workdir: the run's folder.
      keys: what must be known besides what a prediction needs.
    Raises:
      FileProblem: the file is missing or damaged.
    """
    return read_file(workdir, "data.json", lambda text: _data_in(text, keys))


def _config_in(text):
    config = config_lib.from_json(text)
    config_checks.validate(config)
    return config


def _data_in(text, keys):
    data = json_object(text, ("class_names", "label_values", "num_channels", *keys))
    names, values, num_channels = (
        data[name] for name in ("class_names", "label_values", "num_channels")
    )
    files = data.get("files", {})  # version 0.1 did not know them
    rightness = {
        "class_names": _are(str, names) and len(names) > 1,
        "label_values": values is None or (_are(int, values) and len(values) == len(names)),
        "num_channels": isinstance(num_channels, int) and num_channels > 0,
        "files": isinstance(files, dict) and all(_are(str, of) for of in files.values()),
    }
    if wrong := [name for name, is_right in rightness.items() if not is_right]:
        raise ValueError(f"its {wrong[0]!r} is {reprlib.repr(data[wrong[0]])}")
    return data


def _are(kind, values):
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
