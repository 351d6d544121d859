"""All that training needs, made from a config and its data: networks, steps, batches."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxseg import parallel
from jaxseg.config import transforms_of
from jaxseg.data import pipeline
from jaxseg.experiment import build
from jaxseg.experiment.gather import Data
from jaxseg.experiment.members import Member, members_of
from jaxseg.inference import whole_volume
from jaxseg.models.summary import summarise_model
from jaxseg.problem import Problem
from jaxseg.run.log import Log
from jaxseg.training.state import TrainState


class RunProblem(Problem, RuntimeError):
    """The run can not go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last.

    Attributes:
      config: validated ConfigDict.
      workdir: absolute path of the run's folder.
      members: of `members_of`.
      data: of `jaxseg.experiment.gather.load_data`.
      log: RunLog, or SilentLog in all processes but the first.
      layout: of `jaxseg.experiment.build.create_layout`.
      train_step, eval_step: mapped over members and devices.
      keys, learning_rates: what the training step takes besides, on the devices.
      segment_fn: of `jaxseg.inference.whole_volume.create_segment_fn`, for "label" and "sample".
      recipe: that it was made from.
      manager: checkpoints; None when nothing is saved.
    """

    config: ConfigDict
    workdir: str
    members: tuple[Member, ...]
    data: Data
    log: Log
    layout: parallel.Layout
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    keys: jax.Array
    learning_rates: jax.Array
    segment_fn: whole_volume.SegmentFn
    recipe: whole_volume.Recipe
    manager: Any = None


def workdir_of(config: ConfigDict) -> str:
    """The run's folder as an absolute path."""
    return os.path.abspath(os.path.expanduser(config.workdir or os.path.join("runs", config.name)))


def check_fits(config: ConfigDict, layout: parallel.Layout) -> None:
    """Raises RunProblem or ConfigProblems if batch and patch suit neither devices nor network."""
    check_batch_size(config, layout)
    build.check_patch(config)
    build.margin_of(config)


def check_batch_size(config: ConfigDict, layout: parallel.Layout) -> None:
    """Raises RunProblem if the devices can not share the batch."""
    num_parts, virtual_shards = layout.num_batch_parts, config.parallel.virtual_shards
    if virtual_shards and (virtual_shards % num_parts or num_parts & (num_parts - 1)):
        raise RunProblem(
            f"parallel.virtual_shards {virtual_shards} can not be shared by {num_parts} device(s): "
            "use a power of two of each, no more devices than shards"
        )
    parts = num_parts * config.optim.accumulate_steps
    if config.train.batch_size % parts:
        raise RunProblem(
            f"train.batch_size {config.train.batch_size} can not be shared by {num_parts} "
            f"device(s) x {config.optim.accumulate_steps} accumulation step(s); use a multiple of "
            f"{parts}"
        )


def create_run(config: ConfigDict, data: Data, log: Log, *, fresh: bool) -> tuple[Run, TrainState]:
    """Makes all that training needs, but a folder to write to.

    Args:
      config: validated ConfigDict.
      data: of `jaxseg.experiment.gather.load_data`.
      log: RunLog.
      fresh: whether the run begins, perhaps from the weights that `init.checkpoint` names.
    Returns:
      (run, state): Run, and TrainState on the devices.
    """
    image_shape = (*config.data.patch_size, data.num_channels)
    layout = build.create_layout(config)
    model = build.create_model_for(config, data.num_classes)
    tx = build.create_tx(config)
    state, keys, learning_rates = (
        parallel.place(tree, layout)
        for tree in build.create_members(config, model, tx, image_shape, log if fresh else None)
    )
    log.text(summarise_model(model, image_shape))
    counts = ", ".join(f"{len(case_ids)} {name}" for name, case_ids in data.split.items())
    members = members_of(config)
    several = f"{len(members)} members; " if len(members) > 1 else ""
    log.text(
        f"{several}{counts} cases; {jax.device_count()} {jax.default_backend()} device(s) of "
        f"{jax.process_count()} process(es); results in {workdir_of(config)}"
    )
    train_step, eval_step = build.create_steps(config, model, tx, layout, _masked(data))
    recipe = build.create_recipe(
        config,
        data.plan,
        data.dataset.class_names,
        build.margin_of(config),
        outputs=("label", "sample"),
    )
    run = Run(
        config=config,
        workdir="",
        members=members,
        data=data,
        log=log,
        layout=layout,
        train_step=train_step,
        eval_step=eval_step,
        keys=keys,
        learning_rates=learning_rates,
        segment_fn=whole_volume.create_segment_fn(recipe),
        recipe=recipe,
    )
    return run, state


def training_batches(run: Run, first_step: int, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the batches of all members, on the host.

    Leaves have a leading axis of members where there are several. Members with the same seed and
    split share what is read and augmented.
    """
    transforms = transforms_of(run.config)
    augments = run.config.augment.on == "host"
    return _member_batches(run, "train", first_step, num_steps, transforms, augments)


def validation_batches(run: Run) -> Iterator[dict[str, np.ndarray]]:
    """Patches drawn as for training but not augmented, about four of each validation case.

    They are the same at every evaluation, so that their loss can be compared.
    """
    most = max(len(split["val"]) for split in run.data.splits)
    num_steps = -(-4 * most // run.config.train.batch_size)
    transforms = transforms_of(run.config)
    nothing = {name: options | {"prob": 0.0} for name, options in transforms.items()}
    return _member_batches(run, "val", 0, num_steps, nothing)


def _masked(data):
    """For each channel whether it is 0 outside a mask and stays so."""
    return [scheme == "zscore_inside" for scheme in data.plan.normalisation]


def _member_batches(run, set_name, first_step, num_steps, augment_params, augments=True):
    config, streams = run.config, {}
    for member, split in zip(run.members, run.data.splits, strict=True):
        if (member.seed, member.fold) not in streams:
            streams[member.seed, member.fold] = pipeline.train_batches(
                run.data.store,
                split[set_name],
                seed=member.seed,
                start_step=first_step,
                num_steps=num_steps,
                batch_size=config.train.batch_size,
                patch_size=tuple(config.data.patch_size),
                num_channels=run.data.num_channels,
                foreground_fraction=config.data.foreground_fraction,
                foreground_by_place=config.data.foreground_by_place,
                augment_params=augment_params,
                masked=_masked(run.data),
                margin=run.recipe.margin,
                augments=augments,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
    if not run.layout.has_members:
        yield from streams[run.members[0].seed, run.members[0].fold]
        return
    for batches in zip(*streams.values(), strict=True):
        batch_of = dict(zip(streams, batches, strict=True))
        of_members = [batch_of[member.seed, member.fold] for member in run.members]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *of_members)
