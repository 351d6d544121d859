"""What a config leaves open, decided by a plan for the data, each decision with its reason."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxseg.config import ConfigProblems, flatten
from jaxseg.config_planned import decided, undecided
from jaxseg.data.cases import Dataset
from jaxseg.data.formats.registry import is_volume
from jaxseg.data.verify import Survey
from jaxseg.experiment.advice import names_a_side
from jaxseg.experiment.gather import Found
from jaxseg.planning.budget import Wishes
from jaxseg.planning.choice import choose
from jaxseg.planning.configurations import (
    Configuration,
    DatasetFacts,
    configurations_of,
    facts_from,
)
from jaxseg.planning.measures import to_json
from jaxseg.planning.reasons import reasons_of
from jaxseg.planning.recipe import recipe_of


@dataclasses.dataclass(frozen=True)
class Planned:
    """What was planned for a dataset.

    Attributes:
      preset: of `jaxseg.planning.budget.PRESETS`.
      name: of the configuration, such as "3d_fullres".
      why: a sentence why it is this one.
      facts: that it was planned from.
      configurations: all that the preset has for the data, by name.
    """

    preset: str
    name: str
    why: str
    facts: DatasetFacts
    configurations: dict[str, Configuration]

    @property
    def configuration(self) -> Configuration:
        return self.configurations[self.name]


def plan_for(
    config: ConfigDict, dataset: Dataset, survey: Survey, case_ids: Sequence[str]
) -> Planned:
    """Plans for the training cases; what the config sets is obeyed.

    Args:
      config: ConfigDict with a `plan.preset`.
      dataset: Dataset.
      survey: of `verify`.
      case_ids: that plans are made from.
    """
    preset = config.plan.preset
    if preset == "auto":
        preset = "compact" if jax.default_backend() == "cpu" else "nnunet"
    measures = [survey[case_id].measures for case_id in case_ids]
    facts = _facts_of(dataset, measures)
    wishes = Wishes(
        spacing_mm=tuple(config.preprocess.spacing_mm or ()),
        patch_size=tuple(config.data.patch_size or ()),
        batch_size=config.train.batch_size,
        num_stages=len(config.model.features or ()) or None,
    )
    made = configurations_of(facts, preset, wishes=wishes)
    name, why = choose(made, config.plan.configuration, preset, wishes)
    return Planned(preset, name, why, facts, made)


def _facts_of(dataset, measures):
    return facts_from(
        measures,
        channel_names=dataset.modalities,
        num_labels=len(dataset.class_names) + bool(dataset.coding.ignore),
    )


def values_of(planned: Planned, dataset: Dataset) -> dict[str, Any]:
    """The value of every field that a plan decides, by its full name."""
    made = planned.configuration
    volumes = len(made.patch_size) == 3
    picture = not is_volume(dataset.cases[0].image_path)
    left_right = 1 if picture else made.axes.index(0)
    sided = any(names_a_side(name) for name in dataset.class_names)
    spacing_mm = dict(zip(made.axes, made.spacing_mm, strict=False))
    return {
        "data.patch_size": made.patch_size,
        # Along an axis that slices are cut across, cases keep about the steps that they have.
        "preprocess.spacing_mm": tuple(spacing_mm[axis] for axis in range(3)) if volumes else (),
        "preprocess.axes": made.axes,
        "model.encoder": "residual" if made.residual else "plain",
        "model.features": made.features,
        "model.num_convs": made.convs,
        "model.decoder_convs": made.decoder_convs,
        "model.kernel_sizes": made.kernels,
        "model.strides": made.strides[1:],
        "model.deep_supervision": len(made.features) > 3,
        "loss.over_batch": made.batch_dice,
        "train.batch_size": made.batch_size,
        **recipe_of(made, left_right=left_right if sided else None),
    }


def fingerprint_json(found: Found) -> str:
    """What is kept of the cases that plans are made from, as JSON."""
    measures = {case_id: found.survey[case_id].measures for case_id in found.planned}
    facts = _facts_of(found.dataset, list(measures.values()))
    return to_json(measures, facts.channel_names)


def resolved(
    config: ConfigDict, dataset: Dataset, survey: Survey, case_ids: Sequence[str]
) -> tuple[ConfigDict, list[str]]:
    """The config with every open field decided.

    Returns:
      (config, lines): ConfigDict, and what was decided and why, for the log.
    """
    if config.plan.file:
        values = read_decisions(os.path.expanduser(config.plan.file))
        lines = [f"plan: {config.plan.file}", *(f"  {name}: {values[name]}" for name in values)]
    else:
        planned = plan_for(config, dataset, survey, case_ids)
        values = values_of(planned, dataset)
        lines = [f"plan: {planned.preset} {planned.name}, {planned.why}"]
        reasons = reasons_of(planned.name, planned.configuration, planned.facts, planned.preset)
        lines += [f"  {what}: {value} ({why})" for what, value, why in reasons]
    complete = decided(config, values)
    fields = flatten(config)
    obeyed = [name for name in values if fields[name] is not None]
    if obeyed:
        lines.append(f"  set by you: {', '.join(f'{name} {fields[name]}' for name in obeyed)}")
    if missing := undecided(complete):
        raise ConfigProblems(
            f"{name} is decided neither by the config nor by plan.file" for name in missing
        )
    return complete, lines


def read_decisions(path: str) -> dict[str, Any]:
    """The decisions in a file that `plan_folder` wrote.

    Raises:
      ConfigProblems: It can not be read as such.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return {name: _tuples(value) for name, value in json.load(file)["decisions"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigProblems(
            [f"plan.file {path!r}: no plan can be read ({error!r}); write one with jaxseg.plan"]
        ) from None


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
