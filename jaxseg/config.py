"""Configs: made from the fields of `config_fields`, written, read and compared."""

import contextlib
import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from jaxseg.config_fields import (
    CHOICES,
    FIELDS,
    FIELDS_OF_VOLUMES,
    FREE_WHEN_RESUMING,
    MODEL_CHOICES,
    MODEL_DEFAULTS,
)
from jaxseg.problem import Problem


class ConfigProblems(Problem, ValueError):
    """Everything that is wrong with a config, one line each, in `problems`."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"the config has {len(self.problems)} problem(s):\n{lines}")


def base_config(model: str = "unet", rank: int = 2) -> ConfigDict:
    """Every field of an experiment with its default.

    Args:
      model: "unet" or "fcn"; picks the fields of `config.model`.
      rank: 2 trains on slices, 3 on volumes; sets patch size, rotation range and flip axes.
    Returns:
      A locked ConfigDict; existing fields can be changed, new ones can not be added.
    """
    fields = copy.deepcopy(FIELDS) | {"name": model, "model": MODEL_DEFAULTS[model]}
    rate = fields["optim"]["learning_rate"]
    fields["optim"]["learning_rate"] = FieldReference(rate, field_type=object)  # or a list
    config = ConfigDict(fields)
    if rank == 3:
        config.update_from_flattened_dict(FIELDS_OF_VOLUMES)
    return config.lock()


def choices_of(model: str) -> dict[str, tuple[Any, ...]]:
    """The values to choose from, by the full name of the field, for a config of that model."""
    return CHOICES | MODEL_CHOICES.get(model, {})


def model_options(config: ConfigDict) -> dict[str, Any]:
    """Returns `config.model` as a plain dict without its name: the model's keyword arguments."""
    return {name: value for name, value in config.model.items() if name != "name"}


def transforms_of(config: ConfigDict) -> dict[str, Any]:
    """Returns what `config.augment` says of each transform, by its name."""
    return {name: options for name, options in config.augment.to_dict().items() if name != "on"}


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON text, keys sorted: what is saved with a run and compared."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The locked ConfigDict that `to_json` wrote.

    Raises:
      ConfigProblems: its fields are not those of this version.
    """
    saved = with_tuples(json.loads(text))
    try:
        config = base_config(saved["model"]["name"], rank=len(saved["data"]["patch_size"]))
        # Up to version 0.1 every value above 0 in a mask was foreground.
        config.data.objects = not saved["data"]["label_values"]
        config.update(saved)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigProblems([f"it was not written by this version of jaxseg: {error}"]) from None
    return config


def with_tuples(value: Any) -> Any:
    """A value from JSON with tuples for its lists, as configs have them."""
    if isinstance(value, dict):
        return {name: with_tuples(item) for name, item in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value


def differences(saved_json: str, new_json: str) -> list[str]:
    """What changes in a saved run that would make it another experiment.

    Args:
      saved_json, new_json: texts that `to_json` wrote.
    Returns:
      List of lines "field: saved -> new"; empty when the run may be resumed.
    """
    knew_objects = "objects" in json.loads(saved_json).get("data", ())
    with contextlib.suppress(ConfigProblems):  # what does not fit is among the differences
        saved_json = to_json(from_json(saved_json))  # with the fields that it did not have yet
    saved, new = flatten(json.loads(saved_json)), flatten(json.loads(new_json))
    if not knew_objects:  # and of masks it was true whatever was said
        saved["data.objects"] = new.get("data.objects")
    return [
        f"{name}: {saved.get(name, '(absent)')!r} -> {new.get(name, '(absent)')!r}"
        for name in sorted(saved.keys() | new.keys())
        if saved.get(name) != new.get(name) and name not in FREE_WHEN_RESUMING
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a nested config by their full names, such as "optim.learning_rate"."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields
