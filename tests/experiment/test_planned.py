"""What a config leaves open, decided for the data: obeyed, explained, kept when a run goes on."""

import csv
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg import config_fields, config_planned, plan
from jaxseg.config import ConfigProblems, base_config, flatten, from_json, to_json
from jaxseg.config_checks import validate
from jaxseg.config_planned import PLANNED, decided, undecided
from jaxseg.data import pipeline
from jaxseg.experiment import fitting, plan_folder, planned, train
from jaxseg.experiment.gather import find_data
from jaxseg.experiment.plan_file import completed_by_file
from jaxseg.experiment.predict_folder import predict
from jaxseg.experiment.setup import RunProblem
from jaxseg.planning.budget import PRESETS
from jaxseg.run import log as run_log


def open_config(data, tmp_path, **changes):
    config = config_planned.open_config()
    config.plan.preset = "compact"
    config.data.dir, config.data.cache_dir = str(data), str(tmp_path / "cache")
    config.workdir = str(tmp_path / "run")
    config.update_from_flattened_dict(
        {
            "train.num_steps": 6,
            "train.eval_every": 6,
            "train.checkpoint_every": 2,
            "optim.warmup_steps": 2,
        }
        | changes
    )
    return config


def resolve(config):
    found = find_data(config, run_log.SilentLog())
    return fitting.resolved(config, found)


def test_every_field_that_is_open_is_decided_and_explained(boxes, tmp_path):
    config = open_config(boxes, tmp_path)
    assert undecided(config) == sorted(PLANNED)
    validate(config)
    complete, lines = resolve(config)
    assert undecided(complete) == [] and undecided(config) == sorted(PLANNED)
    validate(complete)
    # Boxes are 20 x 18 x 8 voxels of 1 x 1 x 2 mm: two halvings across leave z one.
    assert complete.data.patch_size == (20, 20, 8)
    assert complete.preprocess.spacing_mm == (1.0, 1.0, 2.0)
    assert complete.model.strides == ((2, 2, 1), (2, 2, 2))
    assert complete.model.features == (16, 32)  # the first is as coarse as the first stride
    assert complete.augment.flip.axes == ()  # the network is trained for minutes
    assert complete.augment.rotation.range_deg == (-30.0, 30.0)
    assert (complete.preprocess.crop, complete.preprocess.image_order) == (True, 3)
    assert complete.preprocess.normalisation == "zscore"
    assert (complete.optim.name, complete.optim.learning_rate) == ("muon", 3e-2)
    assert complete.data.foreground_by_place and complete.augment.blur.channel_prob == 0.5
    assert to_json(from_json(to_json(complete)))
    text = "\n".join(lines)
    assert "compact 3d_fullres" in text and "20 x 20 x 8 voxels" in text
    assert "set by you" not in text


def test_what_is_set_is_obeyed_and_the_rest_follows_it(boxes, tmp_path):
    changes = {"data.patch_size": (16, 16), "train.batch_size": 3}
    complete, lines = resolve(open_config(boxes, tmp_path, **changes))
    assert complete.data.patch_size == (16, 16) and complete.train.batch_size == 3
    assert complete.model.strides == ((2, 2), (2, 2))
    assert complete.preprocess.axes == (0, 1, 2)
    assert "set by you: data.patch_size (16, 16), train.batch_size 3" in lines[-1]
    assert "  patch: (16, 16) (set by you)" in lines and "  batch: 3 (set by you)" in lines
    assert sum("(set by you)" in line for line in lines) == 2


def test_axes_that_are_set_are_planned_for(boxes, tmp_path):
    changes = {"preprocess.axes": (2, 0, 1), "preprocess.normalisation": "ct"}
    complete, lines = resolve(open_config(boxes, tmp_path, **changes))
    # 8 voxels of 2 mm come first now, and are halved last.
    assert complete.data.patch_size == (8, 20, 20)
    assert complete.model.strides == ((1, 2, 2), (2, 2, 2))
    assert complete.preprocess.spacing_mm == (1.0, 1.0, 2.0)  # of x, y, z as ever
    assert "  channel MRI: ct (set by you)" in lines


def test_a_patch_that_the_configuration_can_not_have_is_refused(boxes, tmp_path):
    changes = {"plan.configuration": "2d", "data.patch_size": (16, 16, 8)}
    with pytest.raises(ConfigProblems, match=r"'2d' takes no data\.patch_size \(16, 16, 8\)"):
        validate(open_config(boxes, tmp_path, **changes))
    validate(open_config(boxes, tmp_path, **changes | {"data.patch_size": (16, 16)}))


def test_a_preset_that_would_decide_nothing_is_refused(boxes, tmp_path):
    config = base_config("unet")
    config.data.dir, config.workdir = str(boxes), str(tmp_path / "run")
    config.plan.preset = "nnunet"
    with pytest.raises(ConfigProblems, match="'nnunet' decides what a config leaves open, here"):
        train.train(config)
    assert not (tmp_path / "run").exists()


def test_what_is_decided_of_turns_and_sides_has_a_reason(make_msd_folder, tmp_path):
    data = make_msd_folder()
    description = json.loads((data / "dataset.json").read_text())
    description["labels"] = {"0": "background", "1": "left kidney", "2": "right kidney"}
    (data / "dataset.json").write_text(json.dumps(description))
    lines = resolve(open_config(data, tmp_path, **{"plan.preset": "nnunet"}))[1]
    assert "  mirrored: yz (not along x, where left and right are classes)" in lines
    assert "  turns: up to 30 degrees (about every axis, as in nnU-Net)" in lines
    assert "  optimiser: sgd, 0.01 (for many steps, as in nnU-Net)" in lines
    lines = resolve(open_config(data, tmp_path))[1]
    assert "  mirrored: never (scans lie as patients do)" in lines
    assert "  crop: to what is not 0 (which is 100 % of a scan)" in lines
    own = {"augment.flip.axes": (1,), "optim.name": "sgd"}
    lines = resolve(open_config(data, tmp_path, **own))[1]
    assert "  mirrored: (1,) (set by you)" in lines and "  optimiser: sgd (set by you)" in lines


def test_sides_that_are_classes_are_not_exchanged(make_msd_folder, tmp_path):
    data = make_msd_folder()
    description = json.loads((data / "dataset.json").read_text())
    description["labels"] = {"0": "background", "1": "left kidney", "2": "right kidney"}
    (data / "dataset.json").write_text(json.dumps(description))
    complete, _ = resolve(open_config(data, tmp_path, **{"plan.preset": "nnunet"}))
    assert complete.augment.flip.axes == (1, 2)


def test_without_a_plan_an_open_field_is_a_problem(boxes, tmp_path):
    config = open_config(boxes, tmp_path, **{"plan.preset": ""})
    with pytest.raises(ConfigProblems, match=r"data\.patch_size is not set: give it a value"):
        validate(config)


def test_what_is_wrong_is_said_before_the_data_are_read(boxes, tmp_path):
    config = open_config(boxes, tmp_path, **{"augment.flip.axes": (0, 1, 2)})
    validate(config)  # of volumes
    with pytest.raises(ConfigProblems, match=r"1 problem.*\n.*optim\.weight_decay must not be"):
        validate(open_config(boxes, tmp_path, **{"optim.weight_decay": -1.0}))


def test_killed_and_resumed_it_gives_the_same_bits_and_plans_once(boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "assess", lambda run, state: None)
    small = {"model.features": (4, 4), "model.num_convs": (1,), "data.patch_size": (16, 16)}
    whole = open_config(boxes, tmp_path, **small)
    assert train.train(whole) is None
    run = pathlib.Path(whole.workdir)
    saved = from_json((run / "config.json").read_text())
    assert undecided(saved) == [] and saved.model.strides == ((2, 2),)
    fingerprint = json.loads((run / "fingerprint.json").read_text())
    assert len(fingerprint["cases"]) == fingerprint["num_cases"] == 6

    def never(*args):
        raise AssertionError("the plan is made again")

    monkeypatch.setattr(fitting, "plan_for", never)
    assert train.train(whole) is None

    file = tmp_path / "plan.json"
    decisions = {name: flatten(saved)[name] for name in PLANNED}
    file.write_text(json.dumps({"decisions": decisions}))
    again = open_config(boxes, tmp_path, workdir=str(tmp_path / "again"), **small)
    again.plan.file = str(file)
    batches = pipeline.train_batches

    def interrupted(*args, **kwargs):
        for count, batch in enumerate(batches(*args, **kwargs)):
            if count == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", interrupted)
        assert train.train(again) == signal.SIGTERM

    file.write_text(json.dumps({"decisions": decisions | {"train.batch_size": 5}}))
    with pytest.raises(RunProblem, match=r"train\.batch_size: \d -> 5"):
        train.train(again)
    file.unlink()  # which the run needs no more
    assert train.train(again) is None
    assert run_log.read_trace(again.workdir) == run_log.read_trace(whole.workdir)


def test_the_text_and_the_file_of_a_plan(boxes, tmp_path):
    output = tmp_path / "plan.json"
    text = plan_folder.plan_folder(
        str(boxes),
        preset="nnunet",
        settings=(f"data.cache_dir={tmp_path}/cache", "train.batch_size=5"),
        output=str(output),
        log=run_log.SilentLog(),
    )
    for words in (
        "20 x 18 x 8",
        "outer",
        "nnunet 3d_fullres, which is trained",
        "nnunet 2d",
        "parameters",
        "5 patches of 20 x 20 x 8 take ",
    ):
        assert words in text
    content = json.loads(output.read_text())
    assert content["preset"] == "nnunet" and content["decisions"]["train.batch_size"] == 5
    assert set(content["decisions"]) == set(PLANNED)

    content["decisions"]["model.features"] = [4, 8, 16]
    output.write_text(json.dumps(content))
    changes = {"plan.preset": "auto", "plan.file": str(output)}
    complete = completed_by_file(open_config(boxes, tmp_path, **changes))
    assert complete.model.features == (4, 8, 16) and complete.train.batch_size == 5
    with pytest.raises(ConfigProblems, match=r"plan\.file holds a plan already"):
        plan_folder.plan_folder(
            str(boxes), settings=(f"plan.file={output}",), log=run_log.SilentLog()
        )


def test_settings_that_can_not_be_used_are_all_told(boxes):
    with pytest.raises(ConfigProblems, match="2 problem") as caught:
        plan_folder.plan_folder(
            str(boxes), settings=("data.knd=images", "seed"), log=run_log.SilentLog()
        )
    assert "--set=data.knd=images" in str(caught.value) and "--set=seed" in str(caught.value)


def test_channels_without_a_name_have_their_number_everywhere(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(8):
        colours = rng.integers(0, 9, (24, 20, 3)) + 9 * np.arange(3)
        for folder, values in (("images", colours), ("masks", 255 * np.eye(24, 20))):
            path = tmp_path / "data" / folder / f"p{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
    config = open_config(tmp_path / "data", tmp_path)
    found = find_data(config, run_log.SilentLog())
    _, lines = fitting.resolved(config, found)
    names = [line.split(":")[0].strip() for line in lines if line.startswith("  channel")]
    assert names == ["channel 0", "channel 1", "channel 2"]
    fingerprint = json.loads(planned.fingerprint_json(found))
    assert [of["channel"] for of in fingerprint["intensities"]] == ["0", "1", "2"]
    assert len({of["mean"] for of in fingerprint["intensities"]}) == 3
    text = plan_folder.plan_folder(
        str(tmp_path / "data"),
        settings=(f"data.cache_dir={tmp_path}/cache",),
        log=run_log.SilentLog(),
    )
    for number in range(3):
        assert re.search(rf"^  {number} +\d", text, re.M)  # of the table of intensities
        assert re.search(rf"^  channel {number} +zscore", text, re.M)
    assert " mm" not in text and "(mm)" not in text and "spacing (pixels)" in text
    assert re.search(r"^  spacing +1 x 1 pixels", text, re.M)


def test_the_command_says_what_training_says_of_the_data(
    make_msd_folder, tmp_path, monkeypatch, capsys
):
    data = make_msd_folder(num_cases=6)
    shutil.copy(data / "imagesTr/case_00.nii.gz", data / "imagesTr/case_01.nii.gz")
    shutil.copy(data / "imagesTr/case_00.nii.gz", data / "imagesTr/unlisted.nii.gz")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    said = []
    for _ in range(2):
        plan.main(["plan", f"--dir={data}", f"--set=data.cache_dir={tmp_path}/cache"])
        said.append(capsys.readouterr().out)
    for text in said:
        assert re.search(r"^note: .*unlisted\.nii\.gz", text, re.M)
        assert "are there more than once, those cases count as one subject: case_00" in text
        assert text.count("6 labelled cases") == 1
    assert re.search(r"^verifying: 6 cases in .* s$", said[0], re.M) and "verifying" not in said[1]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "cache"}  # and no log of a run


def test_a_configuration_that_the_data_do_not_have_is_refused(boxes, tmp_path):
    config = open_config(boxes, tmp_path, **{"plan.configuration": "3d_lowres"})
    with pytest.raises(ConfigProblems, match=r"'3d_lowres', but compact has .* 3d_fullres, 2d"):
        resolve(config)
    config.preprocess.spacing_mm = (1.0, 1.0, 2.0)
    with pytest.raises(ConfigProblems, match=r"its? has a spacing of its own"):
        resolve(config)
    complete, _ = resolve(open_config(boxes, tmp_path, **{"plan.configuration": "2d"}))
    assert len(complete.data.patch_size) == 2


def test_volumes_at_low_resolution_are_trained_and_predicted(boxes, tmp_path, monkeypatch):
    """A patch that shows little calls for a coarser grid; what is predicted is on the case's."""
    style = dataclasses.replace(PRESETS["nnunet"].style, first_features=4)
    tiny = dataclasses.replace(PRESETS["nnunet"], style=style, reference={2: 1e4, 3: 6e3})
    monkeypatch.setitem(PRESETS, "nnunet", tiny)
    changes = {"plan.preset": "nnunet", "plan.configuration": "3d_lowres"}
    config = open_config(boxes, tmp_path, **changes)
    assert train.train(config) is None
    saved = from_json((tmp_path / "run" / "config.json").read_text())
    assert saved.preprocess.spacing_mm[0] > 1.3 and len(saved.data.patch_size) == 3
    predict([config.workdir], str(boxes / "imagesTr"), str(tmp_path / "out"))
    with open(tmp_path / "run" / "test.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] == "outer"]
    assert rows
    for row in rows:
        name = f"{row['case']}.nii.gz"
        predicted, reference = (
            np.asarray(nibabel.load(folder / name).dataobj) == 1
            for folder in (tmp_path / "out", boxes / "labelsTr")
        )
        assert predicted.shape == (20, 18, 8)
        dice = 2 * (predicted & reference).sum() / (predicted.sum() + reference.sum())
        assert dice == pytest.approx(float(row["dice"]), abs=1e-6)


def test_a_config_knows_the_presets_that_there_are():
    assert set(config_fields.CHOICES["plan.preset"]) == {"", "auto", *PRESETS}


def test_deciding_keeps_what_is_there():
    config = base_config("unet")
    values = {"data.patch_size": (8, 8, 8), "train.batch_size": 1}
    assert flatten(decided(config, values)) == flatten(config)
    config = config_planned.open_config()
    config.data.patch_size = (16, 16)
    made = decided(config, values)
    assert made.data.patch_size == (16, 16) and made.train.batch_size == 1
    made.optim.learning_rate = [1e-3, 1e-2]
