"""A plan that fits into memory: made smaller until the compiled training step does."""

import dataclasses
import functools

import jax
from ml_collections import ConfigDict

from jaxseg import config_checks
from jaxseg.config import ConfigProblems
from jaxseg.config_planned import decided
from jaxseg.experiment import build
from jaxseg.experiment.gather import Found
from jaxseg.experiment.planned import Planned, plan_for, preset_of, reasons_for, values_of
from jaxseg.experiment.setup import check_fits
from jaxseg.experiment.step_memory import bytes_there, step_bytes
from jaxseg.experiment.targets import described_target
from jaxseg.planning.budget import PRESETS

# Of what a device has; the rest is for batches under way, the evaluation step and fragments.
USABLE = 0.9
# A plan is made smaller by such steps, so that few are tried ...
SMALLER_BY = 0.9
# ... down to this part of what its preset allows.
LEAST = 1e-4


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A plan that was held against memory.

    Attributes:
      planned: that fits.
      config: with every open field decided by it.
      tried: what each plan takes, of the one that fits last.
      usable: bytes of each device.
    """

    planned: Planned
    config: ConfigDict
    tried: list[str]
    usable: float

    @property
    def reason(self) -> tuple[str, str, str]:
        """(decision, value, reason), as of `planning.reasons`."""
        *too_large, fits = self.tried
        why = f"as compiled; {_gib(self.usable)} GiB may be used"
        if too_large:
            why += f", before it: {'; '.join(too_large)}"
        return "memory", fits, why


def fit_to_memory(config: ConfigDict, found: Found) -> Fitted:
    """Plans, compiles the training step, and plans for less until it fits.

    Args:
      config: ConfigDict with a `plan.preset`.
      found: of `find_data`.
    Raises:
      ConfigProblems, RunProblem: even the smallest plan, or what the config sets, does not fit.
      TargetProblem: `plan.target` can not be compiled for.
    """
    layout, usable, options = _devices_of(config)
    parts = layout.num_batch_parts * config.optim.accumulate_steps
    plan = functools.partial(plan_for, config, found, parts=parts)
    scale, tried = _first_scale(config), []
    planned: Planned | None = plan(scale=scale)
    while planned:
        complete = decided(config, values_of(planned))
        config_checks.validate(complete)
        check_fits(complete, layout)
        taken = step_bytes(
            complete,
            len(planned.facts.channel_names),
            len(found.dataset.class_names),
            layout,
            options,
        )
        size = " x ".join(map(str, complete.data.patch_size))
        tried.append(f"{complete.train.batch_size} patches of {size} take {_gib(taken)} GiB")
        if taken <= usable:
            return Fitted(planned, complete, tried, usable)
        scale *= usable / taken
        planned, scale = _smaller(planned, scale, plan)
    raise ConfigProblems(
        [
            f"no plan fits into {_gib(usable)} GiB: {'; '.join(tried)}. Leave more open, or set "
            "optim.accumulate_steps, model.remat or model.dtype=bfloat16"
        ]
    )


def resolved(config: ConfigDict, found: Found) -> tuple[ConfigDict, list[str]]:
    """The config with every open field decided.

    Returns:
      (config, lines): ConfigDict, and what was decided and why, for the log.
    Raises: as `fit_to_memory`.
    """
    fitted = fit_to_memory(config, found)
    planned = fitted.planned
    reasons = [*reasons_for(planned, planned.name), fitted.reason]
    lines = [f"plan: {planned.preset} {planned.name}, {planned.why}"]
    lines += [f"  {what}: {value} ({why})" for what, value, why in reasons]
    if planned.own:
        own = ", ".join(f"{name} {value}" for name, value in planned.own.items())
        lines.append(f"  set by you: {own}")
    return fitted.config, lines


def _smaller(planned, scale, plan):
    """(plan, scale): the first for so much or less that is another; None if there is none."""
    while scale > LEAST:
        scale *= SMALLER_BY
        smaller = plan(scale=scale)
        if smaller.configuration != planned.configuration:
            return smaller, scale
    return None, scale


def _first_scale(config):
    """More, or less, than a preset's own, where the user says how much memory there is."""
    gib = PRESETS[preset_of(config)].gib
    return config.plan.memory_gib / gib if config.plan.memory_gib and gib else 1.0


def _devices_of(config):
    """(layout, bytes, options): what a step is compiled for, may take of each device, and how."""
    wanted = config.plan.memory_gib * 2**30
    if config.plan.target:
        target = described_target(config.plan.target)
        layout = build.create_layout(config, target.devices)
        return layout, wanted or USABLE * target.num_bytes, target.options
    layout = build.create_layout(config)
    if not layout.compiles_ahead:
        layout = build.create_layout(config, jax.devices())
    return layout, wanted or USABLE * bytes_there(), None


def _gib(num_bytes):
    return f"{num_bytes / 2**30:.3g}"
