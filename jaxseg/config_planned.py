"""Fields of a config that are left to a plan: None until the data are known."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxseg.config import base_config, flatten

# What a plan may decide; of these a config leaves open what it likes.
PLANNED = (
    "data.patch_size",
    "data.foreground_by_place",
    "data.foreground_fraction",
    "preprocess.spacing_mm",
    "preprocess.axes",
    "preprocess.crop",
    "preprocess.normalisation",
    "preprocess.image_order",
    "augment.rotation.range_deg",
    "augment.rotation.in_plane",
    "augment.scaling.in_plane",
    "augment.flip.axes",
    "augment.blur.channel_prob",
    "augment.low_resolution.channel_prob",
    "model.encoder",
    "model.features",
    "model.num_convs",
    "model.decoder_convs",
    "model.kernel_sizes",
    "model.strides",
    "model.deep_supervision",
    "loss.over_batch",
    "optim.name",
    "optim.learning_rate",
    "optim.weight_decay",
    "train.batch_size",
)


def open_config() -> ConfigDict:
    """A U-Net's config that leaves every field of `PLANNED` open; each can still be set."""
    config = base_config("unet")
    config.plan.preset = "auto"
    for name in PLANNED:
        section, _, field = name.rpartition(".")
        inner = functools.reduce(getattr, section.split("."), config)
        inner[field] = config_dict.placeholder(inner.get_type(field))
    return config


def undecided(config: ConfigDict) -> list[str]:
    """The names of the fields that are left open."""
    return [name for name, value in flatten(config).items() if value is None]


def decided(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with values for the fields that are left open; others stay as they are.

    Args:
      config: ConfigDict.
      values: by the full name of the field.
    """
    made = copy.deepcopy(config)
    made.update_from_flattened_dict(
        {name: values[name] for name in undecided(config) if name in values}
    )
    return made


def with_stand_ins(config: ConfigDict, rank: int) -> ConfigDict:
    """The config with the defaults of slices (rank 2) or volumes (3) for what is left open."""
    return decided(config, flatten(base_config(config.model.name, rank)))
