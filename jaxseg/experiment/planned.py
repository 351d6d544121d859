"""What a config leaves open, decided by a plan for the data, each decision with its reason."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxseg.config import ConfigProblems, flatten
from jaxseg.config_planned import PLANNED
from jaxseg.data.cases import Dataset
from jaxseg.experiment.advice import left_right_of, names_a_side
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
      own: what the user has set of what a plan decides or explains, by its full name.
      dataset: that it is for.
    """

    preset: str
    name: str
    why: str
    facts: DatasetFacts
    configurations: dict[str, Configuration]
    own: dict[str, Any]
    dataset: Dataset

    def sides_of(self, name: str) -> dict[str, Any]:
        """What `planning.recipe` must know of directions, for a configuration."""
        sided = any(names_a_side(of) for of in self.dataset.class_names)
        axes = self.configurations[name].axes
        return {
            "left_right": left_right_of(self.dataset, axes) if sided else None,
            "is_scan": self.dataset.has_volumes,
        }

    @property
    def configuration(self) -> Configuration:
        return self.configurations[self.name]


def preset_of(config: ConfigDict) -> str:
    """The preset of `plan.preset`, where that is "auto" the one that suits the devices."""
    if config.plan.preset != "auto":
        return config.plan.preset
    is_slow = jax.default_backend() == "cpu" and not config.plan.target
    return "compact" if is_slow else "nnunet"


def plan_for(config: ConfigDict, found: Found, *, scale: float = 1.0, parts: int = 1) -> Planned:
    """Plans for the training cases; what the config sets is obeyed.

    Args:
      config: ConfigDict with a `plan.preset`.
      found: of `find_data`.
      scale: of what the preset allows.
      parts: that a batch is divided into.
    Raises:
      ConfigProblems: There is no such configuration for the data.
    """
    preset = preset_of(config)
    facts = _facts_of(found)
    wishes = Wishes(
        spacing_mm=tuple(config.preprocess.spacing_mm or ()),
        patch_size=tuple(config.data.patch_size or ()),
        batch_size=config.train.batch_size,
        axes=tuple(config.preprocess.axes or ()),
        num_stages=len(config.model.features or ()) or None,
        parts=parts,
    )
    made = configurations_of(facts, preset, scale=scale, wishes=wishes)
    wanted = config.plan.configuration
    if wanted not in ("auto", *made):
        coarser = wanted == "3d_lowres" and wishes.spacing_mm
        own = "; it has a spacing of its own, unset preprocess.spacing_mm" if coarser else ""
        raise ConfigProblems(
            [
                f"plan.configuration is {wanted!r}, but {preset} has for these data "
                f"{', '.join(made)}{own}"
            ]
        )
    name, why = choose(made, wanted, preset, wishes, facts)
    return Planned(preset, name, why, facts, made, _set_by_user(config), found.dataset)


def _set_by_user(config):
    fields = flatten(config)
    return {name: fields[name] for name in PLANNED if fields[name] is not None}


def reasons_for(planned: Planned, name: str) -> list[tuple[str, str, str]]:
    """(decision, value, reason) for a configuration that was planned."""
    made = planned.configurations[name]
    sides = planned.sides_of(name)
    return [*reasons_of(name, made, planned.facts, planned.preset, planned.own, **sides)]


def _facts_of(found):
    dataset = found.dataset
    measures = [found.survey[case_id].measures for case_id in found.planned]
    return facts_from(
        measures,
        channel_names=dataset.channel_names(max(len(case.intensities) for case in measures)),
        num_labels=len(dataset.class_names) + bool(dataset.coding.ignore),
    )


def values_of(planned: Planned) -> dict[str, Any]:
    """The value of every field that a plan decides, by its full name."""
    made = planned.configuration
    # Along an axis that slices are cut across, cases keep the steps that they have.
    spacing_mm = {axis: 0.0 for axis in range(3)} | dict(
        zip(made.axes, made.spacing_mm, strict=False)
    )
    return {
        "data.patch_size": made.patch_size,
        "preprocess.spacing_mm": tuple(spacing_mm[axis] for axis in range(3)),
        "preprocess.axes": made.axes,
        "preprocess.crop": True,
        "preprocess.normalisation": ",".join(
            "zscore_inside" if inside else scheme
            for scheme, inside in zip(made.normalisation, made.inside_mask, strict=True)
        ),
        "preprocess.image_order": 3,
        "model.encoder": "residual" if made.residual else "plain",
        "model.features": made.features,
        "model.num_convs": made.convs,
        "model.decoder_convs": made.decoder_convs,
        "model.kernel_sizes": made.kernels,
        "model.strides": made.strides[1:] if max(made.strides[0]) == 1 else made.strides,
        "model.deep_supervision": len(made.features) > 3,
        "loss.over_batch": made.batch_dice,
        "train.batch_size": made.batch_size,
        **recipe_of(made, planned.preset, **planned.sides_of(planned.name)),
    }


def fingerprint_json(found: Found) -> str:
    """What is kept of the cases that plans are made from, as JSON."""
    measures = {case_id: found.survey[case_id].measures for case_id in found.planned}
    return to_json(measures, _facts_of(found).channel_names)
