"""The vocabulary of an experiment: every field with its default, and what makes a config valid.

A file in `configs/` starts from `base_config` and states only what differs. Augmentation defaults
are those of nnU-Net v2 (Isensee et al. 2021) except translation, which nnU-Net gets from its random
crop.
"""

import difflib
import json
import math
import re

from ml_collections import ConfigDict, FieldReference

MODEL_DEFAULTS = {
    "unet": {
        "name": "unet",
        "features": (32, 64, 128, 256),  # one entry per resolution, finest first
        "encoder": "plain",  # residual; or vgg16, resnet18 ... for published weights
        "num_convs": (2,),  # per resolution, or one for all; blocks of a residual encoder
        "decoder_convs": 2,
        "kernel_sizes": (),  # per resolution a number or one per axis; () means 3
        "strides": (),  # per step down a number or one per axis; () means 2
        "norm": "instance",
        "activation": "leaky_relu",
        "down": "conv",  # strided convolution or max_pool
        "up": "conv",  # transposed convolution or (linear) resize
        "padding": "same",  # valid: as published, logits cover the centre of the patch
        "attention": False,
        "deep_supervision": False,
        "dropout": 0.0,
        "freeze_batch_stats": False,
        "remat": False,  # less memory, more time
        "dtype": "float32",  # of the computation; parameters and loss stay float32
    },
    "fcn": {
        "name": "fcn",
        "encoder": "plain",  # or vgg16, as published; then features is ()
        "features": (16, 32, 64, 128, 256),  # after pool1 ... pool5 (strides 2 ... 32)
        "num_convs": 2,
        "norm": "instance",
        "activation": "relu",
        "head": "8s",
        "upsample": "learned",  # transposed convolution from bilinear weights, or fixed bilinear
        "padding": "same",  # paper: 100 zeros around the image and crops, for vgg16
        "dropout": 0.0,
        "freeze_batch_stats": False,
        "remat": False,
        "dtype": "float32",
    },
}

CHOICES = {
    "data.kind": ("msd", "images"),
    "preprocess.normalisation": ("auto", "ct", "zscore"),
    "preprocess.image_order": (1, 3),
    "preprocess.label_order": (0, 1),
    "model.norm": ("instance", "batch", "group", "none"),
    "model.activation": ("relu", "leaky_relu"),
    "model.dtype": ("float32", "bfloat16"),
    "model.down": ("conv", "max_pool"),
    "model.up": ("conv", "resize"),
    "model.head": ("32s", "16s", "8s"),
    "model.upsample": ("learned", "fixed"),
    "loss.name": ("cross_entropy", "soft_dice", "dice_cross_entropy", "focal", "tversky"),
    "optim.name": ("sgd", "adamw"),
    "optim.schedule": ("constant", "polynomial", "cosine"),
    "parallel.mode": ("pmap", "shard_map"),
    "ensemble.by": ("map", "vmap"),
}

MODEL_CHOICES = {
    "unet": {
        "model.encoder": ("plain", "residual", "vgg16", "resnet18", "resnet34", "resnet50"),
        "model.padding": ("same", "valid"),
    },
    "fcn": {
        "model.encoder": ("plain", "vgg16"),
        "model.padding": ("same", "paper"),
    },
}

POSITIVE = (
    "data.patch_size",
    "preprocess.spacing_mm",
    "augment.scaling.range",
    "augment.elastic.spacing_voxels",
    "augment.blur.range_sigma_voxels",
    "augment.low_resolution.range_zoom",
    "augment.gamma.range",
    "augment.inverted_gamma.range",
    "model.features",
    "model.num_convs",
    "loss.border_weight.sigma_voxels",
    "optim.learning_rate",
    "optim.accumulate_steps",
    "train.num_steps",
    "train.batch_size",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "parallel.space",
    "ensemble.size",
    "predict.buffer_mib",
)

NOT_NEGATIVE = (
    "augment.elastic.range_magnitude_voxels",
    "augment.noise.range_variance",
    "optim.weight_decay",
    "optim.clip_norm",
    "loss.border_weight.w0",
    "parallel.virtual_shards",
    "ensemble.folds",
)

# Resolutions of the encoders whose channels are published.
PUBLISHED_DEPTHS = {"vgg16": 5, "resnet18": 6, "resnet34": 6, "resnet50": 6}

# A resumed run may change these without becoming another experiment.
FREE_WHEN_RESUMING = (
    "workdir",
    "data.cache_dir",
    "train.log_every",
    "train.keep_checkpoints",
    "parallel.mode",
    "parallel.space",
    "predict.buffer_mib",
)


class ConfigProblems(ValueError):
    """Everything that is wrong with a config, one line each, in `problems`."""

    def __init__(self, problems):
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"the config has {len(self.problems)} problem(s):\n{lines}")


def base_config(model="unet", rank=2):
    """Every field of an experiment with its default.

    Args:
      model: "unet" or "fcn"; picks the fields of `config.model`.
      rank: 2 trains on slices, 3 on volumes; sets patch size, rotation range and flip axes.
    Returns:
      A locked ConfigDict; existing fields can be changed, new ones can not be added.
    """
    config = ConfigDict(
        {
            "name": model,
            "workdir": "",  # "" means runs/<name>
            "seed": 0,
            "data": {
                "dir": "",  # "" means the embedded demonstration cohort
                "cache_dir": "~/.cache/jaxseg",
                "kind": "msd",
                "image_glob": "images/*",  # kind "images": where the images are ...
                "label_pattern": "masks/{case}.png",  # ... and the mask of each
                "class_names": ("background", "foreground"),  # kind "images" only
                "label_values": (),  # kind "images": file value of each class; () means >0 is 1
                "patch_size": (128, 128) if rank == 2 else (64, 64, 64),
                "foreground_fraction": 0.33,
            },
            "split": {
                "seed": 0,  # of who is in which set, so that `seed` repeats a run on the same
                "file": "",  # JSON with lists of case ids, relative to data.dir
                "subject_regex": "",  # its first group is the subject; "" means a case is one
                "test_regex": "",  # cases that match are the test set
                "val_fraction": 0.15,
                "test_fraction": 0.15,
                "num_folds": 0,  # k > 1: val is fold `fold` of k
                "fold": 0,  # also which entry of a `file` that lists folds
            },
            "preprocess": {
                "spacing_mm": (),  # () means the median spacing of the training cases
                "image_order": 1,
                "label_order": 1,  # 1: linear resampling of one-hot labels, 0: nearest
                "normalisation": "auto",  # ct where dataset.json says CT, else zscore
            },
            "augment": {
                "rotation": {
                    "prob": 0.2,
                    "range_deg": (-180.0, 180.0) if rank == 2 else (-30.0, 30.0),
                },
                "translation": {"prob": 0.2, "range_fraction": (-0.1, 0.1)},
                "scaling": {"prob": 0.2, "range": (0.7, 1.4)},
                "elastic": {
                    "prob": 0.0,
                    "spacing_voxels": 16,
                    "range_magnitude_voxels": (0.0, 4.0),
                },
                "flip": {"prob": 0.5, "axes": tuple(range(rank))},
                "noise": {"prob": 0.1, "range_variance": (0.0, 0.1)},
                "blur": {"prob": 0.2, "range_sigma_voxels": (0.5, 1.0)},
                "brightness": {"prob": 0.15, "range": (0.75, 1.25)},
                "contrast": {"prob": 0.15, "range": (0.75, 1.25)},
                "low_resolution": {"prob": 0.25, "range_zoom": (0.5, 1.0)},
                "gamma": {"prob": 0.3, "range": (0.7, 1.5)},
                "inverted_gamma": {"prob": 0.1, "range": (0.7, 1.5)},
            },
            "model": MODEL_DEFAULTS[model],
            "init": {
                "checkpoint": "",  # a run's folder, or a .safetensors, .npz or .pth file
                "strict": False,  # refuse weights of which anything does not fit
            },
            "loss": {
                "name": "dice_cross_entropy",
                # Weigh gaps between touching cells (Ronneberger et al. 2015 take w0 = 10).
                "border_weight": {"w0": 0.0, "sigma_voxels": 5.0},
            },
            "optim": {
                "name": "adamw",
                # A list, [1e-3, 3e-3], trains one member for each.
                "learning_rate": FieldReference(2e-3, field_type=object),
                "schedule": "polynomial",
                "warmup_steps": 50,
                "weight_decay": 1e-2,
                "momentum": 0.99,  # sgd only, Nesterov
                "clip_norm": 12.0,  # global gradient norm; 0 means no clipping
                "accumulate_steps": 1,
                # (pattern, factor, first step): the first pattern that matches a parameter's path
                # scales its learning rate (0 freezes it) and says when it starts to move.
                "groups": (),
            },
            "train": {
                "num_steps": 1000,
                "batch_size": 16,  # global, whatever the number of devices
                "log_every": 25,
                "eval_every": 250,
                "checkpoint_every": 250,
                "keep_checkpoints": 2,
            },
            "parallel": {
                "mode": "pmap",  # or shard_map: the same step, over a mesh with more axes
                "space": 1,  # devices that share a volume, along its first axis; shard_map only
                # Sum gradients of this many parts of the batch in one order, whatever the number of
                # devices, so that it changes no bit; 0 leaves the order to the devices.
                "virtual_shards": 0,
            },
            "ensemble": {
                "size": 1,  # members that differ in their seed: seed, seed + 1 ...
                "folds": 0,  # k: one member for each fold of a cross-validation
                "by": "map",  # members one after the other, to the bit as alone; or vmap
            },
            "predict": {
                "buffer_mib": 1024,  # most memory for overlapping tiles, whatever the volume
            },
        }
    )
    return config.lock()


def model_options(config):
    """Returns `config.model` as a plain dict without its name: the model's keyword arguments."""
    return {name: value for name, value in config.model.items() if name != "name"}


def validate(config):
    """Checks a whole config before data or devices are touched.

    Raises:
      ConfigProblems: lists every problem found, not just the first.
    """
    problems = []
    fields = _flatten(config)

    for name, choices in (CHOICES | MODEL_CHOICES.get(config.model.name, {})).items():
        if name in fields and fields[name] not in choices:
            problems.append(_not_a_choice(name, fields[name], choices))
    if config.model.name not in MODEL_DEFAULTS:
        problems.append(_not_a_choice("model.name", config.model.name, tuple(MODEL_DEFAULTS)))
    elif set(config.model) != set(MODEL_DEFAULTS[config.model.name]):
        problems.append(
            f"model.name is {config.model.name!r} but the other model fields belong to another "
            f"model: start the config from base_config({config.model.name!r})"
        )
    else:
        problems += _model_problems(config.model, len(config.data.patch_size))

    for name in POSITIVE:
        if not all(_is_number(v) and v > 0 for v in _entries(fields[name])):
            problems.append(f"{name} must be positive, not {fields[name]!r}")
    for name in NOT_NEGATIVE:
        if not all(_is_number(v) and v >= 0 for v in _entries(fields[name])):
            problems.append(f"{name} must not be negative, not {fields[name]!r}")
    for name in ("data.patch_size", "model.features"):
        if any(isinstance(v, float) for v in fields[name]):
            problems.append(f"{name} must hold whole numbers, not {fields[name]!r}")
    for name, value in fields.items():
        is_probability = name.endswith((".prob", "_fraction", ".dropout", ".momentum")) and (
            "range" not in name
        )
        if is_probability and not (_is_number(value) and 0 <= value <= 1):
            problems.append(f"{name} must lie in [0, 1], not {value!r}")
        is_range = name.rpartition(".")[2].startswith("range")
        if is_range and not (
            len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]
        ):
            problems.append(f"{name} must be (lowest, highest), not {value!r}")
        if name.endswith("_regex"):
            problems += _regex_problems(name, value)
    for name in ("model.dropout", "optim.momentum"):
        if fields[name] == 1:
            problems.append(f"{name} must be below 1")

    problems += _data_problems(config)
    problems += _training_problems(config)
    problems += _parallel_problems(config)
    problems += _ensemble_problems(config)
    if problems:
        raise ConfigProblems(problems)


def to_json(config):
    """Returns the config as JSON text, keys sorted: what is saved with a run and compared."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text):
    """The locked ConfigDict that `to_json` wrote.

    Raises:
      ConfigProblems: its fields are not those of this version.
    """
    saved = _with_tuples(json.loads(text))
    try:
        config = base_config(saved["model"]["name"], rank=len(saved["data"]["patch_size"]))
        config.update(saved)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigProblems([f"it was not written by this version of jaxseg: {error}"]) from None
    return config


def _with_tuples(value):
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def differences(saved_json, new_json):
    """What changes in a saved run that would make it another experiment.

    Args:
      saved_json, new_json: texts that `to_json` wrote.
    Returns:
      List of lines "field: saved -> new"; empty when the run may be resumed.
    """
    saved, new = _flatten(json.loads(saved_json)), _flatten(json.loads(new_json))
    return [
        f"{name}: {saved.get(name, '(absent)')!r} -> {new.get(name, '(absent)')!r}"
        for name in sorted(saved.keys() | new.keys())
        if saved.get(name) != new.get(name) and name not in FREE_WHEN_RESUMING
    ]


def _flatten(config, prefix=""):
    fields = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            fields |= _flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def _entries(value):
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _not_a_choice(name, value, choices):
    nearest = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name} is {value!r}, must be one of {', '.join(map(repr, choices))}{hint}"


def _regex_problems(name, value):
    try:
        groups = re.compile(value).groups
    except re.error as error:
        return [f"{name} {value!r} is not a regular expression: {error}"]
    if name == "split.subject_regex" and value and groups < 1:
        return [f"{name} {value!r} needs a group (...) that holds the subject"]
    return []


def _data_problems(config):
    problems = [
        f"{name} {path!r} is the address of an object store: mount it, and give that folder"
        for name, path in (("workdir", config.workdir), ("data.dir", config.data.dir))
        if "://" in path
    ]
    data, split = config.data, config.split
    rank = len(data.patch_size)
    if rank not in (2, 3):
        problems.append(f"data.patch_size needs 2 (slices) or 3 (volumes) entries, not {rank}")
    if any(axis not in range(rank) for axis in config.augment.flip.axes):
        problems.append(f"augment.flip.axes {config.augment.flip.axes} lie outside a {rank}D patch")
    if len(config.preprocess.spacing_mm) not in (0, 3):
        problems.append("preprocess.spacing_mm needs 3 entries, or () for the training median")
    if data.kind == "images" and not data.dir:
        problems.append("data.kind is 'images': say where they are with --config.data.dir=DIR")
    if data.kind == "images" and rank == 3:
        problems.append("data.kind is 'images': data.patch_size must have 2 entries")
    if data.kind == "images" and "{case}" not in data.label_pattern:
        problems.append(f"data.label_pattern {data.label_pattern!r} must contain {{case}}")
    if not all(isinstance(name, str) for name in data.class_names):
        problems.append(f"data.class_names must be text, not {data.class_names!r}")
    if not all(isinstance(v, int) and v >= 0 for v in data.label_values):
        problems.append(f"data.label_values must be whole and not negative: {data.label_values!r}")
    if not data.image_glob or data.image_glob.startswith("/"):
        problems.append(f"data.image_glob {data.image_glob!r} must be relative to data.dir")
    if len(data.class_names) < 2:
        problems.append("data.class_names needs the background and at least one class")
    if data.label_values and len(data.label_values) != len(data.class_names):
        problems.append(
            f"data.label_values has {len(data.label_values)} entries, "
            f"data.class_names {len(data.class_names)}: they must agree"
        )
    if split.file and (split.num_folds or split.test_regex):
        problems.append("split.file already says who is where: unset num_folds and test_regex")
    if split.num_folds == 1 or split.num_folds < 0:
        problems.append("split.num_folds must be 0 (no cross-validation) or at least 2")
    elif not split.file and split.fold not in range(max(split.num_folds, 1)):
        problems.append(
            f"split.fold {split.fold} is missing: there are {split.num_folds} folds, from 0"
        )
    if split.val_fraction + split.test_fraction >= 1:
        problems.append("split.val_fraction + split.test_fraction leave no training cases")
    return problems


def _model_problems(model, rank):
    problems = []
    published = model.encoder in PUBLISHED_DEPTHS
    depth = PUBLISHED_DEPTHS[model.encoder] if published else len(model.features)
    if published and model.features:
        problems.append(
            f"model.encoder {model.encoder!r} has published channels: set model.features to ()"
        )
    if not published and not model.features:
        problems.append("model.features is (): give one number per resolution, finest first")
    if model.freeze_batch_stats and model.norm != "batch" and "resnet" not in model.encoder:
        problems.append("model.freeze_batch_stats needs batch normalisation in the network")
    if model.norm == "group" and any(_is_number(f) and f % 8 for f in model.features):
        problems.append(f"model.norm 'group' needs features divisible by 8, not {model.features}")
    if model.name == "fcn":
        if depth != 5:
            problems.append(
                f"model.features of an FCN needs 5 entries (pool1 ... pool5), not {depth}"
            )
        if model.padding == "paper" and model.encoder != "vgg16":
            problems.append("model.padding 'paper' belongs to model.encoder 'vgg16'")
        return problems
    if not model.num_convs:
        problems.append("model.num_convs is (): give one number for all resolutions, or one each")
    if model.decoder_convs < 1:
        problems.append(f"model.decoder_convs must be at least 1, not {model.decoder_convs}")
    if model.deep_supervision and depth < 4:
        problems.append(f"model.deep_supervision needs at least 4 resolutions, not {depth}")
    if model.down != "conv" and model.encoder != "plain":
        problems.append(f"model.down {model.down!r} belongs to model.encoder 'plain'")
    if model.dropout and published:
        problems.append(
            f"model.dropout does not reach model.encoder {model.encoder!r}: set it to 0"
        )
    lengths = {"kernel_sizes": depth, "strides": depth - 1}
    if len(model.num_convs) > 1:
        lengths["num_convs"] = depth
    for name, length in lengths.items():
        entries = model[name]
        if entries and len(entries) != length:
            problems.append(
                f"model.{name} needs {length} entries for {depth} resolutions, not {len(entries)}"
            )
        for entry in entries:
            numbers = _entries(entry)
            fits = isinstance(entry, int) or (len(numbers) == rank and name != "num_convs")
            if not fits or not all(isinstance(n, int) and n > 0 for n in numbers):
                problems.append(
                    f"model.{name} must hold whole numbers, or {rank} of them for the axes of the "
                    f"patch, not {entry!r}"
                )
    if published and (model.kernel_sizes or model.strides):
        problems.append(
            f"model.encoder {model.encoder!r} has published kernels and strides: set "
            "model.kernel_sizes and model.strides to ()"
        )
    if model.padding == "valid":
        if model.encoder != "plain":
            problems.append("model.padding 'valid' needs model.encoder 'plain'")
        if model.deep_supervision:
            problems.append("model.deep_supervision needs model.padding 'same'")
    return problems


def _group_problems(entry):
    if not (
        isinstance(entry, tuple)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and _is_number(entry[1])
        and entry[1] >= 0
        and isinstance(entry[2], int)
        and entry[2] >= 0
    ):
        return [
            "optim.groups must hold (pattern, learning-rate factor, first step), for example "
            f"('encoder/.*', 0.1, 0), not {entry!r}"
        ]
    return _regex_problems("optim.groups", entry[0])


def _training_problems(config):
    problems = []
    optim, train = config.optim, config.train
    if config.init.strict and not config.init.checkpoint:
        problems.append("init.strict needs an init.checkpoint")
    for entry in optim.groups:
        problems += _group_problems(entry)
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
    if space == 1:
        return problems
    if parallel.mode != "shard_map":
        problems.append("parallel.space needs parallel.mode 'shard_map'")
    if shards:
        problems.append("parallel.space can not be had together with parallel.virtual_shards")
    whole = {"padding": "same", "up": "conv", "attention": False}
    if (
        model.name != "unet"
        or model.encoder in PUBLISHED_DEPTHS
        or any(model[name] != value for name, value in whole.items())
    ):
        problems.append(
            "parallel.space needs a U-Net with model.encoder 'plain' or 'residual', model.padding "
            "'same', model.up 'conv', and no model.attention"
        )
    else:
        steps = model.strides or (2,) * (len(model.features) - 1)
        parts = space * math.prod(_entries(step)[0] for step in steps)
        if config.data.patch_size[0] % parts:
            problems.append(
                f"data.patch_size {tuple(config.data.patch_size)} must begin with a multiple of "
                f"{parts}, so that parallel.space {space} parts stay aligned at all resolutions"
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
        problems.append(
            f"split.num_folds {config.split.num_folds} must be ensemble.folds {ensemble.folds}, "
            "or 0"
        )
    if ensemble.size > 1 and config.seed + ensemble.size > 2**31:
        problems.append(f"seed {config.seed} + ensemble.size {ensemble.size} must not pass 2^31")
    return problems
