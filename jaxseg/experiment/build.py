"""From a config to what it describes: network, loss, optimiser, steps. Configs stop here."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxseg import config as config_lib
from jaxseg import parallel
from jaxseg.config_fields import PUBLISHED_DEPTHS
from jaxseg.data import memory
from jaxseg.data.preprocess import Plan
from jaxseg.experiment.members import learning_rates_of, members_of
from jaxseg.inference import whole_volume
from jaxseg.inference.normalisation import statistics_of
from jaxseg.models.registry import create_model
from jaxseg.run import weights
from jaxseg.run.log import Log
from jaxseg.training import augment, losses, optim, steps, transfer
from jaxseg.training.state import TrainState, create_train_states


def create_model_for(config: ConfigDict, num_classes: int) -> nn.Module:
    """The network that `config.model` describes."""
    return create_model(config.model.name, num_classes, **config_lib.model_options(config))


def check_patch(config: ConfigDict) -> None:
    """Refuses batches that memory can not hold, and patches of which the network sees nothing.

    Raises:
      ConfigProblems: it is such a one.
    """
    patch_size, model = tuple(config.data.patch_size), config.model
    if wrong := memory.too_large(4 * config.train.batch_size * math.prod(patch_size)):
        raise config_lib.ConfigProblems(
            [
                f"a batch of {config.train.batch_size} patches of {patch_size} voxels {wrong}; "
                "lower train.batch_size or data.patch_size"
            ]
        )
    if model.name != "unet" or model.encoder in PUBLISHED_DEPTHS:
        return
    coarsest = patch_size
    for step in model.strides or (2,) * (len(model.features) - 1):
        strides = (step,) * len(coarsest) if isinstance(step, int) else step
        coarsest = tuple(-(-n // stride) for n, stride in zip(coarsest, strides, strict=True))
    if model.norm == "instance" and math.prod(coarsest) == 1:
        raise config_lib.ConfigProblems(
            [
                f"data.patch_size {patch_size}: model.strides leave one voxel of it, of which "
                "model.norm 'instance' leaves nothing; enlarge it, or take fewer resolutions"
            ]
        )


def margin_of(config: ConfigDict) -> tuple[int, ...]:
    """Voxels at each side of the patch that the network sees but does not label, one per axis.

    Raises:
      ConfigProblems: a network without padding can not take such a patch.
    """
    patch_size = tuple(config.data.patch_size)
    model = create_model_for(config, 2)
    image = jax.ShapeDtypeStruct((1, *patch_size, 1), jnp.float32)
    try:
        logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    except ValueError as error:
        raise config_lib.ConfigProblems([f"data.patch_size {patch_size}: {error}"]) from None
    lost = [n - m for n, m in zip(patch_size, logits.shape[1:-1], strict=True)]
    if any(n % 2 for n in lost):
        raise config_lib.ConfigProblems(
            [
                f"data.patch_size {patch_size}: logits {logits.shape[1:-1]} do not lie in its "
                "centre; use odd kernels, or a patch that is one voxel larger"
            ]
        )
    return tuple(n // 2 for n in lost)


def loss_fn_for(config: ConfigDict) -> Callable[..., jax.Array]:
    """The loss that `config.loss` describes, on devices that share the batch."""
    loss_fn = losses.LOSSES[config.loss.name]
    if config.loss.over_batch:
        return functools.partial(loss_fn, over_batch=True, batch_axis=parallel.AXIS_NAME)
    return loss_fn


def described_batch(config: ConfigDict, num_channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what a training step takes: patches, or regions that it augments."""
    on_device = config.augment.on == "device"
    size = tuple(config.data.patch_size)
    size = augment.region_size(size, config_lib.transforms_of(config)) if on_device else size
    voxels = (config.train.batch_size, *size)
    batch = {
        "image": jax.ShapeDtypeStruct((*voxels, num_channels), jnp.float32),
        "label": jax.ShapeDtypeStruct(voxels, jnp.uint8 if on_device else jnp.int32),
        "valid": jax.ShapeDtypeStruct(voxels, jnp.float32),
    }
    if on_device:
        batch["example"] = jax.ShapeDtypeStruct((config.train.batch_size, 1), jnp.int32)
    return batch


def schedule_of(config: ConfigDict) -> optax.Schedule:
    """The schedule that `config.optim` describes over `train.num_steps`, for a rate of 1."""
    return optim.create_schedule(
        config.optim.schedule,
        learning_rate=1.0,
        num_steps=config.train.num_steps,
        warmup_steps=config.optim.warmup_steps,
    )


def create_tx(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser that `config.optim` describes, for a learning rate of 1.

    With `plan.minutes` it knows no schedule: that is stretched over a time, outside of it.
    """
    return optim.create_optimizer(
        config.optim.name,
        optax.constant_schedule(1.0) if config.plan.minutes else schedule_of(config),
        weight_decay=config.optim.weight_decay,
        momentum=config.optim.momentum,
        clip_norm=config.optim.clip_norm,
        groups=config.optim.groups,
    )


def create_members(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    log: Log | None = None,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Fresh members, stacked where there are several.

    Args:
      config: validated ConfigDict.
      model: from `create_model_for`.
      tx: from `create_tx`.
      image_shape: shape of one training image, (*S, C).
      log: where to say what came from `init.checkpoint`; None leaves that unread.
    Returns:
      (state, keys, learning_rates): TrainState and, for each member, the key of its steps and its
      learning rate.
    """
    members = members_of(config)
    init_keys, step_keys = zip(
        *(jax.random.split(jax.random.key(member.seed)) for member in members), strict=True
    )
    states = create_train_states(model, tx, init_keys, image_shape)
    if config.init.checkpoint and log is not None:
        states = load_initial_weights(config, states, log)
    rates = jnp.asarray(learning_rates_of(members))
    if len(members) == 1:
        return states[0], step_keys[0], rates
    stacked, keys = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (states, step_keys)
    )
    return stacked, keys, rates


def check_initial_weights(config: ConfigDict) -> None:
    """Raises WeightsProblem if there is nothing where `config.init` looks for weights."""
    path = os.path.expanduser(config.init.checkpoint)
    if path and not os.path.exists(path):
        weights.read_weights(path)


def load_initial_weights(
    config: ConfigDict, states: Sequence[TrainState], log: Log
) -> list[TrainState]:
    """Puts the weights that `config.init` names into fresh TrainStates; says what fitted.

    Raises:
      WeightsProblem, TransferProblem: the file can not be read, or does not fit.
    """
    source = weights.read_weights(os.path.expanduser(config.init.checkpoint))
    loaded = []
    for state in states:
        target = {"params": state.params, "batch_stats": state.batch_stats}
        variables, report = transfer.adapt(source, target, strict=config.init.strict)
        loaded.append(dataclasses.replace(state, **variables))
    log.text(f"weights from {config.init.checkpoint}\n{report}")
    return loaded


def create_recipe(
    config: ConfigDict,
    plan: Plan,
    class_names: Sequence[str],
    margin: tuple[int, ...],
    **options: Any,
) -> whole_volume.Recipe:
    """How whole volumes are predicted.

    Args:
      config: validated ConfigDict.
      plan: preprocessing Plan.
      class_names: of all classes, background first.
      margin: of `margin_of`.
      **options: fields of `jaxseg.inference.whole_volume.Recipe` that are chosen after training.
    """
    return whole_volume.Recipe(
        model=create_model_for(config, len(class_names)),
        class_names=tuple(class_names),
        patch_size=tuple(config.data.patch_size),
        margin=margin,
        batch_size=max(config.train.batch_size // jax.local_device_count(), 1),
        spacing_mm=plan.spacing_mm,
        image_order=plan.image_order,
        axes=plan.axes,
        statistics=tuple(map(statistics_of, plan.normalisation, plan.intensity)),
        crop=plan.crop,
        normalise_first=plan.normalise_first,
        coarse_apart=plan.coarse_apart,
        buffer_bytes=config.predict.buffer_mib << 20,
        **options,
    )


def create_layout(config: ConfigDict, devices: Sequence[Any] | None = None) -> parallel.Layout:
    """How devices share the work of a run.

    Args:
      config: validated ConfigDict.
      devices: that need not be there, and can not be those of a pmap; None for those that are.
    Raises:
      ConfigProblems: they can not.
    """
    mode = config.parallel.mode if devices is None else "shard_map"
    members, space = len(members_of(config)), config.parallel.space
    try:
        return parallel.create_layout(mode, members, space, devices)
    except ValueError as error:
        raise config_lib.ConfigProblems([str(error)]) from None


def create_steps(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    layout: parallel.Layout,
    masked: Sequence[bool] = (),
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The training and the evaluation step, mapped over members and devices.

    Args:
      config: validated ConfigDict.
      model: from `create_model_for`.
      tx: from `create_tx`.
      layout: from `create_layout`.
      masked: for each channel whether it stays 0 outside a mask.
    """
    axes: dict[str, Any] = {"axis_name": parallel.AXIS_NAME}
    if config.parallel.space > 1:
        axes["space_axis"] = parallel.SPACE_AXIS
    on_devices = {"model": model.clone(**axes), "loss_fn": loss_fn_for(config), **axes}
    virtual_shards = config.parallel.virtual_shards
    train_step: Callable[..., Any] = functools.partial(
        steps.train_step,
        tx=tx,
        accumulate_steps=config.optim.accumulate_steps,
        virtual_shards=virtual_shards,
        augment_fn=_augment_fn(config, masked),
        **(on_devices | {"model": model} if virtual_shards else on_devices),
    )
    eval_step: Callable[..., Any] = functools.partial(steps.eval_step, **on_devices)
    if layout.has_members:
        train_step, eval_step = (
            steps.over_members(step, config.ensemble.by) for step in (train_step, eval_step)
        )
    return parallel.map_train_step(train_step, layout), parallel.map_eval_step(eval_step, layout)


def _augment_fn(config, masked):
    if config.augment.on == "host":
        return None
    return functools.partial(
        augment.augment_batch,
        patch_size=tuple(config.data.patch_size),
        params=config_lib.transforms_of(config),
        masked=tuple(masked),
    )
