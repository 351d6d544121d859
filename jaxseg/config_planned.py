"""Fields of a config that are left to a plan: None until the data are known."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from jaxseg.config import base_config, flatten

# What a plan may decide; of these a config leaves open what it likes.
PLANNED = (
    "data.patch_size",
    "preprocess.spacing_mm",
    "preprocess.axes",
    "augment.rotation.range_deg",
    "augment.rotation.in_plane",
    "augment.scaling.in_plane",
    "augment.flip.axes",
    "model.encoder",
    "model.features",
    "model.num_convs",
    "model.decoder_convs",
    "model.kernel_sizes",
    "model.strides",
    "model.deep_supervision",
    "loss.over_batch",
    "train.batch_size",
)


def leave_to_plan(config: ConfigDict) -> None:
    """Leaves every field of `PLANNED` open; each can still be set, here or on the command line."""
    with config.unlocked():
        for name in PLANNED:
            section, _, field = name.rpartition(".")
            inner = _section(config, section)
            inner[field] = config_dict.placeholder(type(inner[field]))


def undecided(config: ConfigDict) -> list[str]:
    """The names of the fields that are left open."""
    return [name for name, value in flatten(config).items() if value is None]


def decided(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with values for the fields that are left open; others stay as they are.

    Args:
      config: ConfigDict.
      values: by the full name of the field.
    """
    copy = ConfigDict(config.copy_and_resolve_references())
    with copy.unlocked():
        for name in undecided(config):
            if name in values:
                section, _, field = name.rpartition(".")
                _section(copy, section)[field] = values[name]
    # A list of learning rates may take the place of a number.
    rate = copy.optim.learning_rate
    with copy.unlocked():
        del copy.optim["learning_rate"]
        copy.optim.learning_rate = FieldReference(rate, field_type=object)
    return copy.lock()


def with_stand_ins(config: ConfigDict, rank: int) -> ConfigDict:
    """The config with the defaults of slices (rank 2) or volumes (3) for what is left open."""
    return decided(config, flatten(base_config(config.model.name, rank)))


def _section(config, name):
    for part in filter(None, name.split(".")):
        config = config[part]
    return config
