import ast
import importlib.util
import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from jaxseg import config_fields
from jaxseg.config import (
    ConfigProblems,
    base_config,
    differences,
    from_json,
    model_options,
    to_json,
)
from jaxseg.config_checks import validate

CONFIG_FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def problems_of(config):
    with pytest.raises(ConfigProblems) as caught:
        validate(config)
    return caught.value.problems


def problem_after(**fields):
    """The one problem of a default config with some fields changed ("__" stands for ".")."""
    config = base_config()
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        setattr(config[section.replace("__", ".")] if section else config, field, value)
    (problem,) = problems_of(config)
    return problem


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("model", config_fields.MODEL_DEFAULTS)
@pytest.mark.parametrize("rank", [2, 3])
def test_every_default_is_valid(model, rank):
    config = base_config(model, rank)
    validate(config)
    assert len(config.data.patch_size) == rank
    assert config.augment.flip.axes == tuple(range(rank))
    assert config.model.name == model


def test_every_choice_of_every_field_is_valid():
    for model in config_fields.MODEL_DEFAULTS:
        for name, choices in (config_fields.CHOICES | config_fields.MODEL_CHOICES[model]).items():
            section, field = name.split(".")
            for choice in choices:
                config = base_config(model)
                config.data.dir = "somewhere"
                if choice == "paper":
                    config.model.encoder = "vgg16"
                if field in config[section]:
                    config[section][field] = choice
                    if config.model.encoder in config_fields.PUBLISHED_DEPTHS:
                        config.model.features = ()
                    validate(config)


def test_two_configs_share_nothing():
    changed = base_config()
    changed.model.dropout = 0.5
    changed.augment.flip.prob = 0.25
    assert base_config().model.dropout == 0.0
    assert base_config().augment.flip.prob == 0.5


def test_all_problems_are_reported_at_once():
    config = base_config()
    wrong = {
        "data.kind": "msdd",
        "data.patch_size": (0, 64),
        "data.foreground_fraction": 1.5,
        "data.class_names": ("background",),
        "split.subject_regex": "subject",
        "split.test_regex": "(",
        "split.val_fraction": 0.6,
        "split.test_fraction": 0.4,
        "split.num_folds": 1,
        "preprocess.spacing_mm": (1.0, -1.0),
        "preprocess.normalisation": "ct, z-score",
        "augment.rotation.range_deg": (30.0, -30.0),
        "augment.blur.prob": -0.1,
        "augment.flip.axes": (0, 2),
        "augment.noise.range_variance": (-0.1, 0.1),
        "model.norm": "group",
        "model.features": (12, 24),
        "model.dropout": 1.0,
        "loss.name": "dice",
        "optim.learning_rate": 0.0,
        "optim.warmup_steps": 1000,
        "optim.clip_norm": -1.0,
        "optim.accumulate_steps": 3,
        "train.eval_every": 0,
    }
    for name, value in wrong.items():
        section, _, field = name.rpartition(".")
        config[section][field] = value
    with pytest.raises(ConfigProblems) as caught:
        validate(config)
    message = str(caught.value)
    # val_fraction and test_fraction, norm and features share a problem; spacing_mm has two.
    assert len(caught.value.problems) == len(wrong) - 1
    assert message.startswith(f"the config has {len(wrong) - 1} problem(s):\n  - ")
    assert "features divisible by 8, not (12, 24)" in message
    for name in wrong.keys() - {"model.features"}:
        assert name in message, name
    assert message.count("\n") == len(wrong) - 1


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("loss__name", "soft_dise", "soft_dice"),
        ("optim__name", "adam", "adamw"),
        ("model__norm", "instnce", "instance"),
        ("optim__schedule", "cosin", "cosine"),
        ("model__name", "u-net", "unet"),
    ],
)
def test_a_wrong_value_names_the_nearest_valid_one(name, value, nearest):
    problem = problem_after(**{name: value})
    assert repr(value) in problem
    assert problem.endswith(f"did you mean {nearest!r}?")


def test_a_value_near_nothing_lists_the_choices():
    problem = problem_after(loss__name="xyz")
    assert "did you mean" not in problem
    for choice in config_fields.CHOICES["loss.name"]:
        assert repr(choice) in problem


@pytest.mark.parametrize("num_folds, fold", [(0, 1), (5, 5), (5, -1)])
def test_a_missing_fold_is_a_problem(num_folds, fold):
    problem = problem_after(split__num_folds=num_folds, split__fold=fold)
    assert f"split.fold {fold} is missing" in problem
    assert f"{num_folds} folds" in problem


def test_the_fold_of_a_split_file_is_left_to_the_file():
    config = base_config()
    config.split.file = "splits_final.json"
    config.split.fold = 4
    validate(config)


def test_fields_of_another_model_are_a_problem():
    config = base_config("unet")
    config.model.name = "fcn"
    assert any("base_config('fcn')" in problem for problem in problems_of(config))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**31}, "seed 2147483648"),
        ({"model__features": ()}, "model.features"),
        ({"model__features": (8, 16.5)}, "model.features must hold whole numbers"),
        ({"model__features": (8, "16")}, "model.features must be positive"),
        ({"data__patch_size": (64.0, 64)}, "data.patch_size must hold whole numbers"),
        ({"data__patch_size": (64,) * 4}, "2 (slices) or 3 (volumes) entries, not 4"),
        ({"augment__scaling__range": (0.0, 1.0)}, "augment.scaling.range must be positive"),
        ({"augment__scaling__range": ()}, "augment.scaling.range must be (lowest, highest)"),
        ({"augment__gamma__range": (0.0, 1.0)}, "augment.gamma.range must be positive"),
        ({"augment__blur__range_sigma_voxels": (0.0, 1.0)}, "range_sigma_voxels must be positive"),
        ({"augment__low_resolution__range_zoom": (0.0, 1.0)}, "range_zoom must be positive"),
        ({"augment__elastic__spacing_voxels": 0}, "spacing_voxels must be positive"),
        ({"optim__momentum": 1.0}, "optim.momentum must be below 1"),
        ({"optim__momentum": -0.1}, "optim.momentum must lie in [0, 1]"),
        ({"split__subject_regex": "[0-9]+"}, "needs a group"),
        ({"data__label_values": (0, 1, 2)}, "data.label_values has 3 entries"),
        ({"data__kind": "images"}, "--config.data.dir=DIR"),
        ({"data__kind": "images", "data__dir": "d", "data__label_pattern": "m.png"}, "{case}"),
        ({"workdir": "gs://bucket/run"}, "workdir 'gs://bucket/run' is the address of an object"),
        ({"data__dir": "s3://bucket"}, "data.dir 's3://bucket' is the address of an object"),
        ({"parallel__virtual_shards": 3}, "virtual_shards 3 must be a power of two"),
        ({"parallel__virtual_shards": 32}, "divisible by parallel.virtual_shards 32"),
        ({"parallel__virtual_shards": 4, "optim__accumulate_steps": 2}, "accumulate_steps to 1"),
        ({"parallel__virtual_shards": 4, "model__norm": "batch"}, "statistics of batch norm"),
        ({"parallel__space": 2}, "parallel.space needs parallel.mode 'shard_map'"),
        (
            {"parallel__space": 2, "parallel__mode": "shard_map", "model__attention": True},
            "parallel.space needs a U-Net",
        ),
        (
            {"parallel__space": 3, "parallel__mode": "shard_map"},
            "data.patch_size (128, 128) must begin with a multiple of 24",
        ),
        (
            {"parallel__space": 2, "parallel__mode": "shard_map", "parallel__virtual_shards": 4},
            "parallel.space can not be had together",
        ),
        (
            {"parallel__space": 2, "parallel__mode": "shard_map", "augment__on": "device"},
            "images that are augmented: set augment.on to 'host'",
        ),
        ({"augment__on": "devise"}, "must be one of 'host', 'device'; did you mean 'device'?"),
        ({"optim__learning_rate": [1e-3]}, "two rates or more"),
        ({"optim__learning_rate": [1e-3, -1.0]}, "optim.learning_rate must be positive"),
        ({"optim__learning_rate": "fast"}, "optim.learning_rate must be positive"),
        ({"optim__learning_rate": [1e-3, 2e-3], "ensemble__size": 2}, "exclude each other"),
        ({"ensemble__size": 2, "ensemble__folds": 5}, "exclude each other"),
        ({"optim__learning_rate": [1e-3, 1e-3]}, "must not list a rate twice"),
        (
            {"ensemble__folds": 5, "split__num_folds": 5, "split__fold": 2},
            "ensemble.folds trains every fold",
        ),
        ({"ensemble__folds": 1}, "ensemble.folds must be at least 2"),
        ({"ensemble__folds": 5, "split__num_folds": 4}, "must be ensemble.folds 5"),
        ({"ensemble__size": 3, "seed": 2**31 - 2}, "must not pass 2^31"),
    ],
)
def test_each_problem_is_named(fields, words):
    assert words in problem_after(**fields)


@pytest.mark.parametrize("kind", ["images", "nnunet", "table"])
def test_a_layout_needs_a_folder(kind):
    config = base_config()
    config.data.kind = kind
    (problem,) = problems_of(config)
    assert problem == f"data.kind is {kind!r}: say where it is with --config.data.dir=DIR"


def test_a_run_of_version_0_1_goes_on_whether_masks_hold_objects_or_not():
    saved = json.loads(to_json(base_config()))
    del saved["data"]["objects"]
    for objects in (False, True):
        config = base_config()
        config.data.objects = objects
        assert differences(json.dumps(saved), to_json(config)) == []
    assert from_json(json.dumps(saved)).data.objects
    config.data.objects = False
    known = to_json(base_config()).replace('"objects": false', '"objects": true')
    assert differences(known, to_json(config)) == ["data.objects: True -> False"]


def test_objects_are_of_masks():
    config = base_config()
    config.data.objects, config.data.label_values = True, (0, 1)
    (problem,) = problems_of(config)
    assert "data.objects" in problem and "data.label_values" in problem


def test_an_fcn_has_five_stages():
    config = base_config("fcn")
    config.model.features = (8, 16)
    (problem,) = problems_of(config)
    assert "5 entries" in problem and "not 2" in problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": ()}, ["model.features is ()"]),
        ({"encoder": "resnet18"}, ["set model.features to ()"]),
        ({"encoder": "vgg16", "features": (), "strides": (2, 2, 2, 2)}, ["published kernels"]),
        ({"strides": (2, 2)}, ["model.strides needs 3 entries for 4 resolutions, not 2"]),
        ({"kernel_sizes": (3, 3, 3, (3, 3, 3))}, ["or 2 of them for the axes", "(3, 3, 3)"]),
        ({"kernel_sizes": (3, 3, 0, 3)}, ["model.kernel_sizes must hold whole numbers"]),
        ({"num_convs": (2, 2, 2)}, ["model.num_convs needs 4 entries"]),
        ({"kernel_sizes": ((3,), 3, 3, 3)}, ["model.kernel_sizes must hold whole numbers"]),
        ({"num_convs": ()}, ["model.num_convs is ()"]),
        ({"decoder_convs": 0}, ["model.decoder_convs must be at least 1, not 0"]),
        ({"features": (8, 8, 8), "deep_supervision": True}, ["at least 4 resolutions, not 3"]),
        ({"down": "max_pool", "encoder": "residual"}, ["'max_pool' belongs to"]),
        ({"dropout": 0.5, "encoder": "vgg16", "features": ()}, ["does not reach"]),
        ({"freeze_batch_stats": True}, ["needs batch normalisation"]),
        ({"padding": "valid", "encoder": "residual"}, ["'valid' needs model.encoder 'plain'"]),
        ({"padding": "valid", "deep_supervision": True}, ["needs model.padding 'same'"]),
        ({"padding": "paper"}, ["model.padding is 'paper', must be one of 'same', 'valid'"]),
    ],
)
def test_a_unet_that_can_not_be_built_is_refused(changes, words):
    config = base_config("unet")
    config.model.update(changes)
    (problem,) = problems_of(config)
    assert all(word in problem for word in words)


def test_the_padding_of_the_paper_is_that_of_its_encoder():
    config = base_config("fcn")
    config.model.padding = "paper"
    (problem,) = problems_of(config)
    assert "belongs to model.encoder 'vgg16'" in problem


@pytest.mark.parametrize(
    "entry", [("encoder", 0.1), ("encoder", -0.1, 0), ("encoder", 0.1, 0.5), (1, 0.1, 0), "encoder"]
)
def test_a_malformed_parameter_group_is_shown_a_well_formed_one(entry):
    config = base_config()
    config.optim.groups = (entry,)
    (problem,) = problems_of(config)
    assert "('encoder/.*', 0.1, 0)" in problem and repr(entry) in problem


def test_a_parameter_group_needs_a_regular_expression():
    config = base_config()
    config.optim.groups = (("encoder/(", 0.1, 0),)
    (problem,) = problems_of(config)
    assert "is not a regular expression" in problem


def test_base_config_is_locked():
    config = base_config()
    with pytest.raises(AttributeError, match='Did you mean "learning_rate"'):
        config.optim.learning_rat = 1.0
    with pytest.raises(AttributeError):
        config.augment.mirror = {}
    with pytest.raises(TypeError):
        config.train.num_steps = "many"


def test_model_options_are_the_model_without_its_name():
    options = model_options(base_config("unet"))
    assert options.pop("features") == (32, 64, 128, 256)
    assert set(options) == set(config_fields.MODEL_DEFAULTS["unet"]) - {"name", "features"}


def other_value(name, value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return (*value, 7)


def test_differences_lists_exactly_the_changed_fields_that_are_not_free():
    saved = to_json(base_config())
    assert differences(saved, to_json(base_config())) == []
    for name, value in leaves(base_config()):
        config = base_config()
        section, _, field = name.rpartition(".")
        setattr(config[section] if section else config, field, other_value(name, value))
        lines = differences(saved, to_json(config))
        if name in config_fields.FREE_WHEN_RESUMING:
            assert lines == []
        else:
            (line,) = lines
            assert line.startswith(f"{name}: ") and " -> " in line


def test_differences_gives_both_values_and_names_absent_fields():
    config = base_config("unet")
    config.optim.learning_rate = 0.5
    config.data.patch_size = (64, 96)
    config.workdir = "elsewhere"
    assert differences(to_json(base_config()), to_json(config)) == [
        "data.patch_size: [128, 128] -> [64, 96]",
        "optim.learning_rate: 0.002 -> 0.5",
    ]
    lines = differences(to_json(base_config("unet")), to_json(base_config("fcn")))
    assert "model.up: 'conv' -> '(absent)'" in lines
    assert "model.head: '(absent)' -> '8s'" in lines


def test_free_fields_exist():
    assert set(config_fields.FREE_WHEN_RESUMING) <= dict(leaves(base_config())).keys()


def test_there_are_config_files():
    names = {path.stem for path in CONFIG_FILES}
    assert names >= {"unet", "fcn", "hippocampus", "vessels", "nuclei"}


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_carries_its_command(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commands = re.findall(r"^python -m jaxseg\.main (.*)$", module.__doc__, re.MULTILINE)
    assert commands
    assert not path.read_text().splitlines()[0].rstrip().endswith('"""'), "docstring has no command"
    for command in commands:
        config = module.get_config()
        first, *overrides = command.split()
        assert first == f"--config=configs/{path.name}"
        for override in overrides:
            name, value = re.fullmatch(r"--config\.([\w.]+)=(.*)", override).groups()
            fields = dict(leaves(config))
            value = value if isinstance(fields[name], str) else ast.literal_eval(value)
            section, _, field = name.rpartition(".")
            setattr(config[section] if section else config, field, value)
        validate(config)
        assert config.is_locked


def test_a_split_file_excludes_other_ways_to_split():
    config = base_config()
    config.split.file = "split.json"
    config.split.num_folds = 5
    with pytest.raises(ConfigProblems, match=r"split\.file already says who is where"):
        validate(config)


def test_a_field_that_an_older_version_did_not_have_gets_its_default():
    config = base_config()
    config.seed = 5
    saved = json.loads(to_json(config))
    del saved["compile"], saved["split"]["seed"]
    assert from_json(json.dumps(saved)).to_dict() == config.to_dict()
    saved["split"]["tomorrow"] = 1
    with pytest.raises(ConfigProblems, match=r"not written by this version of jaxseg.*tomorrow"):
        from_json(json.dumps(saved))
