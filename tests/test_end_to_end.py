"""The main job as a user runs it, on tiny data."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from jaxseg.run import checkpoint
from jaxseg.run import log as run_log

pytestmark = pytest.mark.multiprocess

TINY = (
    "--config.data.patch_size=(16,16)",
    "--config.model.features=(8,16)",
    "--config.model.num_convs=(1,)",
    "--config.model.decoder_convs=1",
    "--config.train.num_steps=80",
    "--config.train.batch_size=4",
    "--config.train.log_every=20",
    "--config.train.eval_every=40",
    "--config.optim.warmup_steps=0",
    "--config.optim.learning_rate=0.02",
)


@pytest.fixture
def run_main(run_command, tmp_path):
    """Function that runs the main command in folders of its own."""

    def run(*arguments, config="configs/unet.py", first=""):
        own = (f"--config.workdir={tmp_path}/run", f"--config.data.cache_dir={tmp_path}/cache")
        return run_command("jaxseg.main", f"--config={config}", *own, *arguments, first=first)

    return run


def test_volumes_in_trained_network_and_scores_out(run_main, tmp_path, make_msd_folder):
    data = make_msd_folder(num_cases=8)
    done = run_main(f"--config.data.dir={data}", *TINY)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"

    evaluation = json.loads((run / "test.json").read_text())
    split = json.loads((run / "split.json").read_text())
    assert sorted(evaluation["cases"]) == split["test"]
    assert evaluation["mean_dice"] > 0.5  # boxes brighter than noise; an untrained net is near 0.1
    assert f"mean test Dice {evaluation['mean_dice']:.4f}" in done.stdout
    assert "parameters" in done.stdout
    assert "images/s  ETA" in (run / "train.log").read_text()

    for case in split["test"]:
        image = nib.load(data / "imagesTr" / f"{case}.nii.gz")
        label = np.asarray(nib.load(data / "labelsTr" / f"{case}.nii.gz").dataobj)
        written = nib.load(run / "test" / f"{case}.nii.gz")
        np.testing.assert_array_equal(written.affine, image.affine)
        prediction = np.asarray(written.dataobj)
        overlap = 2 * np.sum((prediction == 1) & (label == 1))
        dice = overlap / (np.sum(prediction == 1) + np.sum(label == 1))
        assert evaluation["cases"][case]["dice"][1] == pytest.approx(dice)

    with open(run / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(split["test"])
    losses = [row["loss"] for row in run_log.read_metrics(run) if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]  # at steps 20, 40, 60, 80
    for picture in ("curves.png", "test.png"):
        with Image.open(run / picture) as image:
            assert np.asarray(image).std() > 0


# They take longest, and are made by the tests of volumes and of an FCN.
NO_PICTURES = (
    "from jaxseg.experiment import assess; assess._draw = assess._report = lambda *args: None"
)
SHORT = (
    "--config.train.num_steps=40",
    "--config.train.eval_every=40",
    "--config.train.log_every=40",
)


def mark_as_unfinished(label_path, value):
    """Overwrites a fifth of a label with a value that stands for "nobody looked here"."""
    image = nib.load(label_path)
    label = np.asarray(image.dataobj).copy()
    label[:4] = value
    nib.save(nib.Nifti1Image(label, image.affine), label_path)


def dice_where_it_counts(prediction_path, label_path, value):
    prediction, label = (np.asarray(nib.load(p).dataobj) for p in (prediction_path, label_path))
    counts = label != value
    found, true = (prediction == 1) & counts, (label == 1) & counts
    return 2 * np.sum(found & true) / (np.sum(found) + np.sum(true))


def test_a_table_with_subjects_sets_unlabelled_cases_and_ignored_voxels(
    run_main, tmp_path, make_msd_folder
):
    data = make_msd_folder(num_cases=7)
    lines = ["case,image_t1,label,subject,set"]
    for index, set_name in enumerate(("train", "train", "train", "val", "test", "test", "")):
        label = f"labelsTr/case_{index:02d}.nii.gz" if set_name else ""
        subject = "last" if set_name == "test" else f"s{index}"
        lines.append(f"scan{index},imagesTr/case_{index:02d}.nii.gz,{label},{subject},{set_name}")
        if label:
            mark_as_unfinished(data / label, 9)
    (data / "cases.csv").write_text("\n".join(lines) + "\n")
    (data / "dataset.json").unlink()
    done = run_main(
        f"--config.data.dir={data}",
        '--config.data.class_names=("background", "outer", "inner")',
        "--config.data.label_values=(0, 1, 2)",
        "--config.data.ignore_values=(9,)",
        *TINY,
        *SHORT,
        first=NO_PICTURES,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    split = json.loads((run / "split.json").read_text())
    assert split["val"] == ["scan3"] and split["test"] == ["scan4", "scan5"]
    assert "a table of cases" in (run / "train.log").read_text()
    assert [path.name for path in (run / "predicted").iterdir()] == ["scan6.nii.gz"]
    evaluation = json.loads((run / "test.json").read_text())
    for index in (4, 5):
        written = run / "test" / f"scan{index}.nii.gz"
        expected = dice_where_it_counts(written, data / f"labelsTr/case_{index:02d}.nii.gz", 9)
        assert evaluation["cases"][f"scan{index}"]["dice"][1] == pytest.approx(expected)


def test_a_folder_of_nnunet_with_its_splits_its_ignore_label_and_its_test_set(
    run_main, tmp_path, make_msd_folder
):
    source, data = make_msd_folder(num_cases=8), tmp_path / "Dataset001_boxes"
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (data / folder).mkdir(parents=True)
    for index in range(8):
        name, end = f"case_{index:02d}", "Tr" if index < 5 else "Ts"
        image = source / "imagesTr" / f"{name}.nii.gz"
        image.rename(data / f"images{end}" / f"{name}_0000.nii.gz")
        if index < 7:
            label = data / f"labels{end}" / f"{name}.nii.gz"
            (source / "labelsTr" / f"{name}.nii.gz").rename(label)
            mark_as_unfinished(label, 3)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "outer": 1, "inner": 2, "ignore": 3},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (data / "dataset.json").write_text(json.dumps(description))
    ids = [f"case_{index:02d}" for index in range(5)]
    folds = [{"train": ids[1:], "val": ids[:1]}, {"train": ids[:3], "val": ids[3:]}]
    (data / "splits_final.json").write_text(json.dumps(folds))
    done = run_main(
        f"--config.data.dir={data}",
        "--config.data.test_folder=True",
        "--config.split.fold=1",
        *TINY,
        *SHORT,
        first=NO_PICTURES,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    split = json.loads((run / "split.json").read_text())
    assert split == {"train": ids[:3], "val": ids[3:], "test": ["case_05", "case_06"]}
    assert [path.name for path in (run / "predicted").iterdir()] == ["case_07.nii.gz"]
    evaluation = json.loads((run / "test.json").read_text())
    assert [name for name in evaluation["cases"]] == split["test"]
    for name in split["test"]:
        written = run / "test" / f"{name}.nii.gz"
        expected = dice_where_it_counts(written, data / "labelsTs" / f"{name}.nii.gz", 3)
        assert evaluation["cases"][name]["dice"][1] == pytest.approx(expected)


def make_pictures(tmp_path):
    """Six RGB pictures of a bright box in noise, and their masks."""
    data = tmp_path / "pictures"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    for index in range(6):
        rng = np.random.default_rng(index)
        mask = np.zeros((40, 52), np.uint8)
        y, x = rng.integers(4, 20, 2)
        mask[y : y + 16, x : x + 18] = 255
        image = rng.integers(0, 60, (40, 52, 3)).astype(np.uint8) + (mask[..., None] // 2)
        Image.fromarray(image).save(data / "images" / f"p{index}.png")
        Image.fromarray(mask).save(data / "masks" / f"p{index}.png")
    return data


def test_pictures_in_trained_fcn_and_masks_out(run_main, tmp_path):
    data = make_pictures(tmp_path)
    done = run_main(
        f"--config.data.dir={data}",
        "--config.data.kind=images",
        "--config.data.image_glob=images/*.png",
        "--config.data.patch_size=(32,32)",
        "--config.model.features=(4,8,8,8,8)",
        "--config.model.num_convs=1",
        "--config.train.num_steps=40",
        "--config.train.batch_size=4",
        "--config.train.eval_every=80",
        "--config.optim.warmup_steps=0",
        "--config.optim.learning_rate=0.02",
        config="configs/fcn.py",
    )
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "run" / "test.json").read_text())
    assert evaluation["mean_dice"] > 0.5
    for case in evaluation["cases"]:
        with Image.open(tmp_path / "run" / "test" / f"{case}.png") as image:
            assert image.size == (52, 40)


def test_published_unet_on_pictures_then_its_frozen_encoder_on_volumes(
    run_main, tmp_path, make_msd_folder
):
    network = ("--config.model.features=(4,8)", "--config.model.dropout=0.0")
    network += ("--config.model.num_convs=(1,)", "--config.model.decoder_convs=1")
    steps = ("--config.train.num_steps=4", "--config.train.eval_every=4")
    steps += ("--config.optim.warmup_steps=0", "--config.train.batch_size=2")
    done = run_main(
        f"--config.data.dir={make_pictures(tmp_path)}",
        f"--config.workdir={tmp_path}/pretrained",
        "--config.data.patch_size=(44,44)",
        *network,
        *steps,
        config="configs/unet2015.py",
        first=NO_PICTURES,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(next((tmp_path / "pretrained" / "test").glob("*.png"))) as image:
        assert image.size == (52, 40)

    done = run_main(
        f"--config.data.dir={make_msd_folder()}",
        f"--config.init.checkpoint={tmp_path}/pretrained",
        '--config.optim.groups=(("encoder", 0.0, 0),)',
        "--config.data.patch_size=(16,16,8)",
        "--config.augment.flip.axes=(0,)",
        "--config.model.norm=none",
        "--config.model.activation=relu",
        "--config.model.down=max_pool",
        *network,
        *steps,
        first=NO_PICTURES,
    )
    assert done.returncode == 0, done.stderr
    assert "from 3 to 1 input channels" in done.stdout
    assert "skipped head/kernel: " in done.stdout
    before, after = (
        checkpoint.load_variables(str(tmp_path / run / "checkpoints"))["params"]
        for run in ("pretrained", "run")
    )
    kernel = before["encoder"]["stage1"]["conv0"]["kernel"]
    inflated = np.repeat(kernel[:, :, None], 3, axis=2) * np.float32(1 / 3)
    np.testing.assert_array_equal(after["encoder"]["stage1"]["conv0"]["kernel"], inflated)
    moved = after["up0"]["conv0"]["bias"] != before["up0"]["conv0"]["bias"]
    assert moved.any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config.init.checkpoint=resnet18.pth"],
            ["resnet18-f37072fd.pth", "https://download.pytorch.org/models/"],
        ),
        (
            ['--config.optim.groups=(("encodr", 0.0, 0),)'],
            ["'encodr' decides about no parameter", "encoder/stage0/conv0/kernel"],
        ),
    ],
)
def test_weights_and_groups_that_do_not_fit_are_one_message(
    run_main, make_msd_folder, arguments, words
):
    done = run_main(f"--config.data.dir={make_msd_folder()}", *TINY, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words)


def test_a_patch_that_an_unpadded_network_can_not_take_is_refused_at_once(run_main, tmp_path):
    done = run_main("--config.model.padding=valid", "--config.model.down=max_pool")
    assert done.returncode == 2
    assert "must halve its maps exactly" in done.stderr and "(104, 120)" in done.stderr
    assert not (tmp_path / "run").exists()


def test_every_misspelt_field_and_value_is_listed_with_the_nearest(run_main):
    done = run_main("--config.optim.learning_rat=1", "--config.trian.x=3", "--config.seed=x")
    assert done.returncode == 2
    assert (
        '--config.optim.learning_rat=1: no such field; did you mean "learning_rate"?' in done.stderr
    )
    assert '--config.trian.x=3: no such field; did you mean "train"?' in done.stderr
    assert "--config.seed=x" in done.stderr and "invalid literal" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_config_problem_is_reported_before_any_work(run_main, tmp_path):
    done = run_main(
        "--config.loss.name=soft_dise",
        "--config.model.norm=instnce",
        "--config.train.batch_size=0",
        "--config.split.fold=3",
    )
    assert done.returncode == 2
    for words in ("'soft_dice'", "'instance'", "train.batch_size", "split.fold 3 is missing"):
        assert words in done.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_every_data_problem_is_reported_and_nothing_is_prepared(
    run_main, tmp_path, make_msd_folder
):
    data = make_msd_folder()
    (data / "labelsTr" / "case_05.nii.gz").unlink()
    (data / "imagesTr" / "case_01.nii.gz").write_bytes(b"")
    label = nib.load(data / "labelsTr" / "case_03.nii.gz")
    moved = nib.Nifti1Image(np.asarray(label.dataobj) + 7, label.affine + np.eye(4))
    nib.save(moved, data / "labelsTr" / "case_03.nii.gz")
    done = run_main(f"--config.data.dir={data}", *TINY)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "affine" in done.stderr
    for case in ("case_01", "case_03", "case_05"):
        assert case in done.stderr
    assert not list((tmp_path / "cache").rglob("plan.json"))
    assert not (tmp_path / "run" / "config.json").exists()
