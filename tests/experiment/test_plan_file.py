import json

import pytest

from jaxseg import config_planned
from jaxseg.config import ConfigProblems
from jaxseg.config_planned import PLANNED, undecided
from jaxseg.experiment import train
from jaxseg.experiment.plan_file import completed_by_file

DECISIONS = {
    "data.patch_size": [20, 20, 8],
    "data.foreground_by_place": True,
    "data.foreground_fraction": 0.33,
    "preprocess.spacing_mm": [1.0, 1.0, 2.0],
    "preprocess.axes": [0, 1, 2],
    "preprocess.crop": True,
    "preprocess.normalisation": "ct",
    "preprocess.image_order": 3,
    "augment.rotation.range_deg": [-30.0, 30.0],
    "augment.rotation.in_plane": False,
    "augment.scaling.in_plane": False,
    "augment.flip.axes": [0, 1, 2],
    "augment.blur.channel_prob": 0.5,
    "augment.low_resolution.channel_prob": 0.5,
    "model.encoder": "plain",
    "model.features": [4, 8, 16],
    "model.num_convs": [2, 2, 2],
    "model.decoder_convs": 2,
    "model.kernel_sizes": [[3, 3, 1], [3, 3, 3], [3, 3, 3]],
    "model.strides": [[2, 2, 1], [2, 2, 2]],
    "model.deep_supervision": False,
    "loss.over_batch": False,
    "optim.name": "adamw",
    "optim.learning_rate": 2e-3,
    "optim.weight_decay": 1e-2,
    "train.batch_size": 2,
}


@pytest.fixture
def config_with(tmp_path):
    """Function that writes a plan's file and returns a config that names it."""

    def config_with(content, **changes):
        path = tmp_path / "plan.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        config = config_planned.open_config()
        config.data.dir, config.workdir = str(tmp_path / "none"), str(tmp_path / "run")
        config.plan.file = str(path)
        config.update_from_flattened_dict(changes)
        return config

    return config_with


def plan_of(**changes):
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    decisions = DECISIONS | changed
    return {"preset": "compact", "configuration": "3d_fullres", "decisions": decisions}


def refusal(config):
    """What training says, before it looks for the data."""
    with pytest.raises(ConfigProblems) as caught:
        train.train(config)
    assert all(line.startswith(f"plan.file '{config.plan.file}'") for line in caught.value.problems)
    return str(caught.value)


def test_what_the_file_decides_and_what_is_set(config_with):
    assert set(DECISIONS) == set(PLANNED)
    for content in (plan_of(), b"\xef\xbb\xbf" + json.dumps(plan_of()).encode()):
        complete = completed_by_file(config_with(content, **{"train.batch_size": 3}))
        assert undecided(complete) == []
        assert complete.data.patch_size == (20, 20, 8) and complete.train.batch_size == 3
        assert complete.model.strides == ((2, 2, 1), (2, 2, 2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON"),
        (json.dumps(plan_of()).encode()[:200], "no JSON ("),
        (bytes(range(128, 256)), "no JSON ('utf-8' codec can't decode"),
        (b"[" * 100_000, "no JSON (maximum recursion"),
        ([], "holds no object of decisions; write one with jaxseg.plan"),
        (None, "holds no object of decisions"),
        ({"decisions": [1]}, "holds no object of decisions"),
        ({"decisions": {"train.batch_size": 2}}, "data.patch_size is decided neither by it nor"),
        (plan_of(model__strides=None), "model.strides is decided neither by it nor by you"),
        (plan_of(model__depth=3), "model.depth is nothing that a plan decides"),
        (plan_of(optim__momentum=1), "set it with --config.optim.momentum"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(config_with, content, words):
    assert words in refusal(config_with(content))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__patch_size": 20}, "data.patch_size must be a list, not 20"),
        ({"data__patch_size": [20.5, 20, 8]}, "must hold whole numbers"),
        ({"data__patch_size": [-20, 20, 8]}, "must be positive"),
        ({"data__patch_size": [20]}, "needs 2 (slices) or 3 (volumes) entries, not 1"),
        ({"data__patch_size": [4, 2, 2]}, "model.strides leave one voxel of it"),
        ({"data__patch_size": [10**5] * 3}, "GiB of memory, of which"),
        ({"preprocess__spacing_mm": [1, 1, -1]}, "must not be negative"),
        ({"preprocess__spacing_mm": [1, 1, float("nan")]}, "must not be negative"),
        ({"preprocess__spacing_mm": [1, 1, float("inf")]}, "must not be negative"),
        ({"preprocess__spacing_mm": ["1", 1, 1]}, "must not be negative"),
        ({"preprocess__spacing_mm": [1, 1]}, "needs 3 entries"),
        ({"preprocess__axes": ["x", 1, 2]}, "must hold 0, 1 and 2"),
        ({"preprocess__axes": [0, True, 2]}, "must hold 0, 1 and 2"),
        ({"preprocess__normalisation": "ct,zscor"}, "did you mean 'zscore'?"),
        ({"preprocess__normalisation": 1}, "must be text, not 1"),
        ({"preprocess__crop": 1}, "must be true or false, not 1"),
        ({"preprocess__image_order": 2}, "must be one of 1, 3"),
        ({"augment__blur__channel_prob": 1.5}, "must lie in [0, 1]"),
        ({"optim__learning_rate": "fast"}, "must be a number, not 'fast'"),
        ({"optim__weight_decay": -1}, "must not be negative"),
        ({"model__features": [4, 8]}, "model.num_convs needs 2 entries for 2 resolutions"),
        ({"model__features": [4, 8, 16, 32]}, "model.kernel_sizes needs 4 entries"),
        ({"model__features": [4, 8, "16"]}, "model.features must be positive"),
        ({"model__features": []}, "give one number per resolution"),
        ({"model__num_convs": [2.5]}, "model.num_convs must hold whole numbers"),
        ({"model__num_convs": 2}, "model.num_convs must be a list, not 2"),
        ({"model__decoder_convs": 1.5}, "must be a whole number, not 1.5"),
        ({"model__strides": [[2, 2], [2, 2]]}, "or 3 of them for the axes"),
        ({"model__strides": [[2, 2, 1], [True, 2, 2]]}, "or 3 of them for the axes"),
        ({"model__strides": [[2, 2, 0], [2, 2, 2]]}, "or 3 of them for the axes"),
        ({"model__kernel_sizes": [[3, 3, 3]]}, "model.kernel_sizes needs 3 entries"),
        ({"model__encoder": "residue"}, "did you mean 'residual'?"),
        ({"model__deep_supervision": "no"}, "must be true or false, not 'no'"),
        ({"model__deep_supervision": True}, "needs at least 4 resolutions"),
        ({"train__batch_size": "two"}, "must be a whole number, not 'two'"),
        ({"train__batch_size": 0}, "must be positive"),
        ({"train__batch_size": 10**9}, "GiB of memory, of which"),
        ({"augment__flip__axes": [3]}, "lie outside a 3D patch"),
        ({"augment__rotation__range_deg": [30.0, -30.0]}, "must be (lowest, highest)"),
    ],
)
def test_decisions_that_none_can_be_are_refused_by_name(config_with, changes, words):
    text = refusal(config_with(plan_of(**changes)))
    (name,) = changes
    assert words in text and (name.replace("__", ".") in text or name == "model__features")


def test_all_that_is_wrong_is_told_at_once(config_with):
    changes = {"train__batch_size": "two", "model__encoder": 5, "loss__over_batch": 1}
    assert refusal(config_with(plan_of(**changes))).startswith("the config has 3 problem(s)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan.preset": "nnunet"}, "is of preset 'compact', but plan.preset is 'nnunet'"),
        ({"plan.configuration": "2d"}, "is of configuration '3d_fullres', but plan.config"),
        ({"data.patch_size": (16, 16)}, "beside what you set (data.patch_size): model.strides"),
        ({"plan.file": "/none.json"}, "can not be read (No such file or directory)"),
    ],
)
def test_what_stands_against_what_is_set_is_told(config_with, changes, words):
    assert words in refusal(config_with(plan_of(), **changes))
    allowed = {"plan.preset": "compact", "plan.configuration": "3d_fullres"}
    completed_by_file(config_with(plan_of(), **allowed))


def test_a_config_that_leaves_nothing_open_has_no_use_for_a_file(config_with):
    complete = completed_by_file(config_with(plan_of()))
    assert "here nothing: take auto.py" in refusal(complete)
