"""What makes the description of a network valid."""

from ml_collections import ConfigDict

from jaxseg.config_checks_fields import entries, is_number, not_a_choice
from jaxseg.config_fields import MODEL_DEFAULTS, PUBLISHED_DEPTHS


def model_problems(config: ConfigDict) -> list[str]:
    """Everything that is wrong with `config.model`."""
    model, rank = config.model, len(config.data.patch_size)
    if model.name not in MODEL_DEFAULTS:
        return [not_a_choice("model.name", model.name, tuple(MODEL_DEFAULTS))]
    if set(model) != set(MODEL_DEFAULTS[model.name]):
        return [
            f"model.name is {model.name!r} but the other model fields belong to another "
            f"model: start the config from base_config({model.name!r})"
        ]
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
    if model.norm == "group" and any(is_number(f) and f % 8 for f in model.features):
        problems.append(f"model.norm 'group' needs features divisible by 8, not {model.features}")
    if model.name == "fcn":
        return problems + _fcn_problems(model, depth)
    return problems + _unet_problems(model, depth, rank)


def _fcn_problems(model, depth):
    problems = []
    if depth != 5:
        problems.append(f"model.features of an FCN needs 5 entries (pool1 ... pool5), not {depth}")
    if model.padding == "paper" and model.encoder != "vgg16":
        problems.append("model.padding 'paper' belongs to model.encoder 'vgg16'")
    return problems


def _unet_problems(model, depth, rank):
    problems = []
    published = model.encoder in PUBLISHED_DEPTHS
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
    problems += _per_resolution_problems(model, depth, rank)
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


def _per_resolution_problems(model, depth, rank):
    problems = []
    lengths = {"kernel_sizes": (depth,), "strides": (depth - 1, depth)}
    if len(model.num_convs) > 1:
        lengths["num_convs"] = (depth,)
    for name, right in lengths.items():
        given = model[name]
        if given and len(given) not in right:
            problems.append(
                f"model.{name} needs {right[0]} entries for {depth} resolutions, not {len(given)}"
            )
        for entry in given:
            numbers = entries(entry)
            fits = isinstance(entry, int) or (len(numbers) == rank and name != "num_convs")
            if not fits or not all(type(n) is int and n > 0 for n in numbers):
                problems.append(
                    f"model.{name} must hold whole numbers, or {rank} of them for the axes of the "
                    f"patch, not {entry!r}"
                )
    return problems
