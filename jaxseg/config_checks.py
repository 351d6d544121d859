"""What makes a config valid: every problem, in words, before data or devices are touched."""

import math

from ml_collections import ConfigDict

from jaxseg.config import ConfigProblems, flatten
from jaxseg.config_checks_fields import (
    choice_problems,
    entries,
    is_number,
    kind_problems,
    regex_problems,
    sign_problems,
)
from jaxseg.config_checks_models import model_problems
from jaxseg.config_fields import PUBLISHED_DEPTHS
from jaxseg.config_planned import undecided, with_stand_ins


def validate(config: ConfigDict) -> None:
    """Checks a whole config before data or devices are touched.

    Raises:
      ConfigProblems: lists every problem found, not just the first.
    """
    if open_fields := undecided(config):
        if not config.plan.preset:
            raise ConfigProblems(
                f"{name} is not set: give it a value, or let a plan decide with plan.preset"
                for name in open_fields
            )
        # For slices or for volumes? What is wrong with both is wrong.
        problems = min((_problems_of(with_stand_ins(config, n)) for n in (2, 3)), key=len)
    else:
        problems = _problems_of(config)
    if problems:
        raise ConfigProblems(problems)


def _problems_of(config):
    fields = flatten(config)
    return [
        *choice_problems(config.model.name, fields),
        *model_problems(config),
        *sign_problems(fields),
        *(problem for name, value in fields.items() for problem in kind_problems(name, value)),
        *_data_problems(config),
        *_plan_problems(config),
        *_split_problems(config),
        *_training_problems(config),
        *_parallel_problems(config),
        *_ensemble_problems(config),
    ]


def _data_problems(config):
    problems = [
        f"{name} {path!r} is the address of an object store: mount it, and give that folder"
        for name, path in (("workdir", config.workdir), ("data.dir", config.data.dir))
        if "://" in path
    ]
    data = config.data
    rank = len(data.patch_size)
    if rank not in (2, 3):
        problems.append(f"data.patch_size needs 2 (slices) or 3 (volumes) entries, not {rank}")
    if any(axis not in range(rank) for axis in config.augment.flip.axes):
        problems.append(f"augment.flip.axes {config.augment.flip.axes} lie outside a {rank}D patch")
    if config.preprocess.axes and sorted(map(repr, config.preprocess.axes)) != [*"012"]:
        problems.append(f"preprocess.axes must hold 0, 1 and 2: {config.preprocess.axes!r}")
    if len(config.preprocess.spacing_mm) not in (0, 3):
        problems.append("preprocess.spacing_mm needs 3 entries, or () for the training median")
    if data.kind in ("nnunet", "images", "table") and not data.dir:
        problems.append(f"data.kind is {data.kind!r}: say where it is with --config.data.dir=DIR")
    for name in ("label_pattern", "other_channels"):
        patterns = [data[name]] if isinstance(data[name], str) else data[name]
        if not all(isinstance(pattern, str) and "{case}" in pattern for pattern in patterns):
            problems.append(f"data.{name} {data[name]!r} must contain {{case}}")
    if not all(isinstance(pattern, str) for pattern in data.exclude):
        problems.append(f"data.exclude must be names of cases, not {data.exclude!r}")
    if not all(isinstance(name, str) for name in data.class_names):
        problems.append(f"data.class_names must be text, not {data.class_names!r}")
    for name in ("label_values", "ignore_values"):
        if not all(isinstance(v, int) and v >= 0 for v in data[name]):
            problems.append(f"data.{name} must be whole and not negative: {data[name]!r}")
    if data.objects and data.label_values:
        problems.append("data.objects says what masks hold: unset data.label_values")
    if not data.image_glob or data.image_glob.startswith("/"):
        problems.append(f"data.image_glob {data.image_glob!r} must be relative to data.dir")
    if len(data.class_names) < 2:
        problems.append("data.class_names needs the background and at least one class")
    if data.label_values and len(data.label_values) != len(data.class_names):
        problems.append(
            f"data.label_values has {len(data.label_values)} entries, "
            f"data.class_names {len(data.class_names)}: they must agree"
        )
    return problems


def _plan_problems(config):
    wanted, patch_size = config.plan.configuration, tuple(config.data.patch_size)
    is_free = not config.plan.preset or wanted == "auto"
    if is_free or (wanted == "2d") == (len(patch_size) == 2):
        return []
    return [f"plan.configuration {wanted!r} takes no data.patch_size {patch_size}: set one of them"]


def _split_problems(config):
    split, problems = config.split, []
    if split.fold and not (split.num_folds or split.file or config.data.dir):
        problems.append(
            f"split.fold {split.fold} is missing: there are 0 folds, set split.num_folds too"
        )
    if split.file and (split.num_folds or split.test_regex):
        problems.append("split.file already says who is where: unset num_folds and test_regex")
    if split.num_folds == 1 or split.num_folds < 0:
        problems.append("split.num_folds must be 0 (no cross-validation) or at least 2")
    elif split.num_folds and split.fold not in range(split.num_folds):
        problems.append(
            f"split.fold {split.fold} is missing: there are {split.num_folds} folds, from 0"
        )
    if split.val_fraction + split.test_fraction >= 1:
        problems.append("split.val_fraction + split.test_fraction leave no training cases")
    return problems


def _group_problems(entry):
    if not (
        isinstance(entry, tuple)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and is_number(entry[1])
        and entry[1] >= 0
        and isinstance(entry[2], int)
        and entry[2] >= 0
    ):
        return [
            "optim.groups must hold (pattern, learning-rate factor, first step), for example "
            f"('encoder/.*', 0.1, 0), not {entry!r}"
        ]
    return regex_problems("optim.groups", entry[0])


def _training_problems(config):
    problems = []
    optim, train = config.optim, config.train
    if config.init.strict and not config.init.checkpoint:
        problems.append("init.strict needs an init.checkpoint")
    for entry in optim.groups:
        problems += _group_problems(entry)
    if config.loss.over_batch and "dice" not in config.loss.name:
        problems.append(f"loss.over_batch needs a Dice loss, not {config.loss.name!r}")
    if config.loss.over_batch and (optim.accumulate_steps > 1 or config.parallel.virtual_shards):
        problems.append(
            "loss.over_batch needs the whole batch at once: set optim.accumulate_steps to 1 and "
            "parallel.virtual_shards to 0"
        )
    if not 0 <= config.seed < 2**31:
        problems.append(f"seed {config.seed} must lie in [0, 2147483647]")
    if optim.warmup_steps < 0 or optim.warmup_steps >= train.num_steps:
        problems.append(
            f"optim.warmup_steps {optim.warmup_steps} must lie in [0, train.num_steps = "
            f"{train.num_steps})"
        )
    if optim.accumulate_steps > 0 and train.batch_size % optim.accumulate_steps:
        problems.append(
            f"train.batch_size {train.batch_size} must be divisible by optim.accumulate_steps "
            f"{optim.accumulate_steps}"
        )
    return problems


def _parallel_problems(config):
    problems = []
    parallel, model, train = config.parallel, config.model, config.train
    shards, space = parallel.virtual_shards, parallel.space
    if shards & (shards - 1):
        problems.append(f"parallel.virtual_shards {shards} must be a power of two, or 0")
    elif shards and train.batch_size % shards:
        problems.append(
            f"train.batch_size {train.batch_size} must be divisible by parallel.virtual_shards "
            f"{shards}"
        )
    if shards and config.optim.accumulate_steps > 1:
        problems.append(
            "parallel.virtual_shards are computed one by one already: set "
            "optim.accumulate_steps to 1"
        )
    has_batch_norm = model.norm == "batch" or "resnet" in model.encoder
    if shards and has_batch_norm and not model.freeze_batch_stats:
        problems.append(
            "parallel.virtual_shards can not share the statistics of batch normalisation: use "
            "another model.norm, or model.freeze_batch_stats"
        )
    return problems + (_space_problems(config) if space > 1 else [])


def _space_problems(config):
    """What stands against devices that share each image."""
    problems = []
    parallel, model = config.parallel, config.model
    if config.augment.on == "device":
        problems.append("parallel.space splits images that are augmented: set augment.on to 'host'")
    if parallel.mode != "shard_map":
        problems.append("parallel.space needs parallel.mode 'shard_map'")
    if parallel.virtual_shards:
        problems.append("parallel.space can not be had together with parallel.virtual_shards")
    whole = {"padding": "same", "up": "conv", "attention": False}
    if (
        model.name != "unet"
        or model.encoder in PUBLISHED_DEPTHS
        or any(model[name] != value for name, value in whole.items())
    ):
        return [
            *problems,
            "parallel.space needs a U-Net with model.encoder 'plain' or 'residual', model.padding "
            "'same', model.up 'conv', and no model.attention",
        ]
    steps = model.strides or (2,) * (len(model.features) - 1)
    parts = parallel.space * math.prod(entries(step)[0] for step in steps)
    if config.data.patch_size[0] % parts:
        problems.append(
            f"data.patch_size {tuple(config.data.patch_size)} must begin with a multiple of "
            f"{parts}, so that parallel.space {parallel.space} parts stay aligned at all "
            "resolutions"
        )
    return problems


def _ensemble_problems(config):
    problems = []
    ensemble, rate = config.ensemble, config.optim.learning_rate
    is_sweep = isinstance(rate, tuple | list)
    if is_sweep and len(rate) < 2:
        problems.append(f"optim.learning_rate {rate!r} must list two rates or more, or be a number")
    if (ensemble.size > 1) + (ensemble.folds > 0) + is_sweep > 1:
        problems.append(
            "ensemble.size, ensemble.folds and a list of optim.learning_rate exclude each other"
        )
    if is_sweep and len(set(rate)) < len(rate):
        problems.append(f"optim.learning_rate {rate!r} must not list a rate twice")
    if ensemble.folds and config.split.fold:
        problems.append("ensemble.folds trains every fold: set split.fold to 0")
    if ensemble.folds == 1:
        problems.append("ensemble.folds must be at least 2, or 0")
    if ensemble.folds and config.split.num_folds not in (0, ensemble.folds):
        wrong = f"split.num_folds {config.split.num_folds} must be"
        problems.append(f"{wrong} ensemble.folds {ensemble.folds}, or 0")
    if ensemble.size > 1 and config.seed + ensemble.size > 2**31:
        problems.append(f"seed {config.seed} + ensemble.size {ensemble.size} must not pass 2^31")
    return problems
