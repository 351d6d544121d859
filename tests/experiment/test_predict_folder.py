import json
import os
import subprocess
import sys
import threading
import types

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg import predict
from jaxseg.data.images import read_image
from jaxseg.data.predictions import FolderProblem
from jaxseg.experiment import predict_folder as predict_lib
from jaxseg.experiment.predictor import PredictorProblem

NAMES = ("background", "liver", "lesion")
VALUES = (0, 7, 300)


@pytest.fixture
def fake(monkeypatch):
    """A predictor that takes voxels of 100 to 200 for liver and brighter ones for lesion.

    It calls `fake.act` with each image first, and keeps the shapes of those it has segmented.
    """
    fake = types.SimpleNamespace(
        class_names=NAMES,
        label_values=VALUES,
        num_channels=1,
        identity="one",
        notes=("run has not finished",),
        config=None,
        steps=[],
        plan=types.SimpleNamespace(spacing_from="pixdim"),
        recipe=types.SimpleNamespace(spacing_mm=(1.0, 1.0, 1.0)),
    )
    fake.seen, fake.loaded, fake.act = [], [], lambda image: None

    def load(workdirs, *, mirror=False, outputs=("label",), unfinished=False):
        assert unfinished  # whoever predicts may do so before training is over
        fake.loaded.append((workdirs, mirror, outputs))
        fake.outputs = outputs
        return fake

    def check(predictor, image, affine):
        if image.shape[-1] != fake.num_channels:
            raise PredictorProblem(f"the image has {image.shape[-1]} channels")
        return ["it is very bright"] if image.max() > 1000 else []

    def segment(predictor, image, affine):
        fake.act(image)
        fake.seen.append(image.shape)
        label = np.digitize(image[..., 0], [100, 200]).astype(np.uint8)
        probs = np.eye(3, dtype=np.float32)[label] * 0.7 + 0.1
        maps = {"label": label, "probs": probs, "confidence": image[..., 0] / 1000}
        return {name: maps.get(name, image[..., 0] / 3) for name in predictor.outputs}

    for name, function in (("load_predictor", load), ("check_image", check), ("segment", segment)):
        monkeypatch.setattr(predict_lib, name, function)
    return fake


def make_image(seed=0, shape=(6, 5, 4)):
    return np.random.default_rng(seed).integers(0, 300, shape).astype(np.int16)


def save_volume(path, values, affine=None, sform_code=1, qform_code=1):
    image = nibabel.Nifti1Image(values, None)
    affine = np.diag([1.0, 2.0, 2.5, 1.0]) if affine is None else affine
    image.set_sform(affine, sform_code)
    image.set_qform(affine, qform_code, strip_shears=True)
    path.parent.mkdir(exist_ok=True)
    nibabel.save(image, path)


def make_folder(tmp_path, num_cases=3):
    for index in range(num_cases):
        save_volume(tmp_path / "in" / f"case{index}.nii.gz", make_image(index))
    return str(tmp_path / "in"), str(tmp_path / "out")


def load_records(folder):
    with open(os.path.join(folder, "predictions.json"), encoding="utf-8") as file:
        return json.load(file)


def expected_values(image):
    return np.asarray(VALUES)[np.digitize(image, [100, 200])]


def run_command(*arguments):
    """Exit status of the command in this process; 0 where it just returns."""
    try:
        predict.main(["predict", *arguments])
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


def test_writes_label_values_and_records_what_it_did(fake, tmp_path):
    source, folder = make_folder(tmp_path, 2)
    assert predict_lib.predict(["run"], source, folder) == (2, 0, {})
    assert fake.loaded == [(["run"], False, ("label",))]
    for index in range(2):
        written = nibabel.load(os.path.join(folder, f"case{index}.nii.gz"))
        assert written.get_data_dtype() == np.uint16
        np.testing.assert_array_equal(
            np.asarray(written.dataobj), expected_values(make_image(index))
        )
    records = load_records(folder)
    assert records["identity"] == "one"
    assert records["class_names"] == list(NAMES)
    record = records["cases"]["case1"]
    assert record["file"] == os.path.join(source, "case1.nii.gz")
    assert record["file_bytes"] == os.path.getsize(record["file"])
    assert list(record["seconds"]) == ["read", "compute", "write"]
    assert record["warnings"] == []
    image = make_image(1)
    num_liver = np.count_nonzero((image >= 100) & (image < 200))
    assert record["volume_ml"] == pytest.approx(
        {"liver": num_liver * 5 / 1000, "lesion": np.count_nonzero(image >= 200) * 5 / 1000}
    )
    log = (tmp_path / "out" / "predict.log").read_text()
    assert "case0: read " in log and "case1: read " in log


def rotation_about(axis, angle):
    x, y = np.roll(np.eye(3), -axis, axis=0)[1:]
    skew = np.outer(y, x) - np.outer(x, y)
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew


@pytest.mark.parametrize(
    ("order", "flips", "codes"),
    [
        ((0, 1, 2), (1, 1, 1), (1, 1)),
        ((0, 2, 1), (-1, 1, 1), (2, 0)),
        ((1, 0, 2), (1, -1, 1), (0, 1)),
        ((1, 2, 0), (1, 1, -1), (0, 0)),
        ((2, 0, 1), (-1, -1, 1), (4, 2)),
        ((2, 1, 0), (-1, -1, -1), (0, 3)),
    ],
)
@pytest.mark.parametrize("shear", [0.0, 0.2])
def test_outputs_lie_where_the_image_lies_bit_for_bit(fake, tmp_path, order, flips, codes, shear):
    axes = np.eye(3)[:, order] * flips * [0.7, 0.9, 3.1]
    axes = rotation_about(0, 0.3) @ rotation_about(2, -0.5) @ axes
    axes[0, 1] += shear
    affine = np.eye(4)
    affine[:3] = np.column_stack([axes, [-31.3, 12.7, 5.1]])
    image = make_image()
    save_volume(tmp_path / "in" / "a.nii.gz", image, affine, *codes)
    source = nibabel.load(tmp_path / "in" / "a.nii.gz")
    folder = str(tmp_path / "out")
    predict_lib.predict(["run"], str(tmp_path / "in"), folder, outputs=("label", "probs"))
    for name, shape in (("a", (6, 5, 4)), ("a_probs", (6, 5, 4, 3))):
        written = nibabel.load(os.path.join(folder, f"{name}.nii.gz"))
        assert written.shape == shape
        assert written.affine.tobytes() == source.affine.tobytes()
        assert written.get_sform(coded=True)[1] == codes[0]
        assert written.get_qform(coded=True)[1] == codes[1]
        for field in ("xyzt_units", "quatern_b", "quatern_c", "quatern_d", "pixdim", "srow_y"):
            assert written.header[field].tobytes() == source.header[field].tobytes(), field
    label = np.asarray(nibabel.load(os.path.join(folder, "a.nii.gz")).dataobj)
    np.testing.assert_array_equal(label, expected_values(image))


def test_real_volumes_get_labels_of_their_place_and_shape(fake, tmp_path, shared_data):
    root = shared_data("Task04_Hippocampus") / "imagesTr"
    for name in sorted(os.listdir(root))[:3]:
        predict_lib.predict(["run"], str(root / name), str(tmp_path / "out"))
        source, written = nibabel.load(root / name), nibabel.load(tmp_path / "out" / name)
        assert written.shape == source.shape
        assert written.affine.tobytes() == source.affine.tobytes()
        for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "quatern_b"):
            assert written.header[field].tobytes() == source.header[field].tobytes(), field


def test_pictures_become_png_labels_and_tiff_maps(fake, tmp_path):
    pixels = make_image(shape=(8, 9)).astype(np.uint16)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    folder = tmp_path / "out"
    outputs = ("label", "probs", "confidence")
    predict_lib.predict(["run"], str(tmp_path / "in"), str(folder), outputs=outputs)
    np.testing.assert_array_equal(Image.open(folder / "a.png"), expected_values(pixels))
    with Image.open(folder / "a_probs.tif") as probs:
        assert probs.n_frames == 3
        probs.seek(1)
        is_liver = (pixels >= 100) & (pixels < 200)
        np.testing.assert_allclose(probs, np.where(is_liver, 0.8, 0.1), atol=1e-6)
    confidence, _ = read_image(folder / "a_confidence.tif")
    np.testing.assert_array_equal(confidence[:, :, 0, 0], pixels.astype(np.float32) / 1000)
    record = load_records(folder)["cases"]["a"]
    assert record["num_pixels"]["lesion"] == np.count_nonzero(pixels >= 200)
    assert "volume_ml" not in record
    assert record["confidence"]["liver"] == pytest.approx(pixels[is_liver].mean() / 1000)


def test_confidence_of_a_structure_that_is_not_there_is_null(fake, tmp_path):
    save_volume(tmp_path / "in" / "a.nii", np.full((3, 4, 5), 150, np.int16))
    folder = str(tmp_path / "out")
    predict_lib.predict(["run"], str(tmp_path / "in"), folder, outputs=("label", "confidence"))
    record = load_records(folder)["cases"]["a"]
    assert record["confidence"] == {"liver": pytest.approx(0.15), "lesion": None}


def test_an_image_without_all_of_its_channels_fails_alone(fake, tmp_path, capsys):
    names = ("a_0000", "a_0001", "a_0002", "b_0000", "b_0002", "mask", "all_0001")
    for number, name in enumerate(names):
        save_volume(tmp_path / "in" / f"{name}.nii.gz", make_image(number))
    save_volume(tmp_path / "in" / "all_0001.nii.gz", make_image(shape=(3, 4, 5, 3)))
    fake.num_channels = 3
    done, _, failed = predict_lib.predict(["run"], str(tmp_path / "in"), str(tmp_path / "out"))
    assert done == 2 and sorted(failed) == ["b_0000", "b_0002", "mask"]
    for case_id in ("b_0000", "b_0002"):
        assert f"{case_id}.nii.gz: is a channel of an image without b_0001" in failed[case_id]


def test_goes_on_after_bad_files_and_names_them(fake, tmp_path, capsys):
    source, folder = make_folder(tmp_path, 3)
    (tmp_path / "in" / "case1.nii.gz").write_bytes(b"no gzip")
    save_volume(tmp_path / "in" / "channels.nii", make_image(shape=(3, 4, 5, 2)))
    save_volume(tmp_path / "in" / "bright.nii", np.full((3, 4, 5), 2000, np.int16))

    def act(image):
        if (image[..., 0] == make_image(2)).all():
            raise ZeroDivisionError("oops")

    fake.act = lambda image: act(image) if image.shape == (6, 5, 4, 1) else None
    status = run_command("--workdir=run", f"--input={source}", f"--output={folder}")
    assert status == 1
    shown = capsys.readouterr()
    assert shown.out == f"2 predicted, 3 failed: see {folder}\n"
    assert "case1: failed: " in shown.err and "not a NIfTI file" in shown.err
    assert "channels: failed: the image has 2 channels" in shown.err
    assert "case2: failed: ZeroDivisionError: oops" in shown.err
    assert "bright: unlike the training set: it is very bright" in shown.err
    assert "Traceback" not in shown.err and "run has not finished\n" in shown.err
    assert shown.err.endswith("these failed:\n- case1\n- case2\n- channels\n")
    assert "Traceback" in (tmp_path / "out" / "predict.log").read_text()
    written = sorted(name for name in os.listdir(folder) if name.endswith(".nii.gz"))
    assert written == ["bright.nii.gz", "case0.nii.gz"]
    records = load_records(folder)["cases"]
    assert records["bright"]["warnings"] == ["it is very bright"]
    assert records["case2"]["error"] == "ZeroDivisionError: oops"
    assert "not a NIfTI file" in records["case1"]["error"]


def test_the_same_command_again_does_what_is_missing(fake, tmp_path):
    source, folder = make_folder(tmp_path, 4)
    bad = tmp_path / "in" / "case1.nii.gz"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    num_done, num_before, failed = predict_lib.predict(["run"], source, folder)
    assert (num_done, num_before, list(failed)) == (3, 0, ["case1"])
    bad.write_bytes(good)
    (tmp_path / "out" / "case2.nii.gz").unlink()
    save_volume(tmp_path / "in" / "case3.nii.gz", make_image(3, (7, 7, 7)))
    fake.seen.clear()
    assert predict_lib.predict(["run"], source, folder) == (3, 1, {})
    assert sorted(fake.seen) == [(6, 5, 4, 1), (6, 5, 4, 1), (7, 7, 7, 1)]
    assert predict_lib.predict(["run"], source, folder) == (0, 4, {})
    assert len(fake.seen) == 3
    outputs = ("label", "probs")
    assert predict_lib.predict(["run"], source, folder, outputs=outputs) == (4, 0, {})
    assert "error" not in load_records(folder)["cases"]["case1"]


def test_another_predictor_does_not_mix_with_what_is_there(fake, tmp_path):
    source, folder = make_folder(tmp_path, 1)
    predict_lib.predict(["run"], source, folder)
    fake.identity = "two"
    with pytest.raises(FolderProblem, match="other weights or options; give another --output"):
        predict_lib.predict(["run"], source, folder)
    assert load_records(folder)["identity"] == "one"


def test_an_interrupt_leaves_whole_files_alone_and_is_gone_on_from(fake, tmp_path, capsys):
    source, folder = make_folder(tmp_path, 4)

    def act(image):
        if len(fake.seen) == 2:
            raise KeyboardInterrupt

    fake.act = act
    arguments = ("--workdir=run", f"--input={source}", f"--output={folder}")
    assert run_command(*arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    made = ["case0.nii.gz", "case1.nii.gz", "predict.log", "predictions.json"]
    assert sorted(os.listdir(folder)) == made
    assert list(load_records(folder)["cases"]) == ["case0", "case1"]
    fake.act = lambda image: None
    assert run_command(*arguments) == 0
    assert capsys.readouterr().out == f"2 predicted, 2 done before, 0 failed: see {folder}\n"


def test_a_label_that_can_not_be_written_is_a_failure_of_that_case(fake, tmp_path, monkeypatch):
    source, folder = make_folder(tmp_path, 2)
    write_label = predict_lib.write_label

    def fail(path, *arguments, **options):
        if "case0" in path:
            raise OSError("disk full")
        write_label(path, *arguments, **options)

    monkeypatch.setattr(predict_lib, "write_label", fail)
    assert predict_lib.predict(["run"], source, folder) == (1, 0, {"case0": "disk full"})
    assert not os.path.exists(os.path.join(folder, "case0.nii.gz"))


def test_reading_computing_and_writing_overlap_by_one_case():
    num_cases = 5
    read_done = [threading.Event() for _ in range(num_cases)]
    finish_begun = [threading.Event() for _ in range(num_cases)]
    finish_allowed = [threading.Event() for _ in range(num_cases)]
    reads_begun, finished = [], []

    def read(index):
        reads_begun.append(index)
        read_done[index].set()
        return index

    def compute(index):
        if index + 1 < num_cases:  # while this case is computed, the next one is read
            assert read_done[index + 1].wait(10)
        assert len(reads_begun) <= index + 2
        if index > 0:  # and the last one is being written, and those before it are
            assert finish_begun[index - 1].wait(10)
            assert finished == list(range(index - 1))
            finish_allowed[index - 1].set()

    def finish(index):
        finish_begun[index].set()
        assert finish_allowed[index].wait(10)
        finished.append(index)

    finish_allowed[-1].set()
    predict_lib._overlap(range(num_cases), read, compute, finish)
    assert finished == list(range(num_cases))


def test_a_slow_disk_holds_the_network_up_with_one_case_waiting():
    third_begun = threading.Event()
    too_early = []

    def compute(index):
        if index == 2:
            third_begun.set()

    def finish(index):
        if index == 0:
            too_early.append(third_begun.wait(0.3))

    predict_lib._overlap(range(4), lambda index: index, compute, finish)
    assert too_early == [False]
    assert third_begun.is_set()


def test_no_array_outlives_its_stage(fake, tmp_path, monkeypatch):
    source, folder = make_folder(tmp_path, 3)
    jobs = []
    monkeypatch.setattr(predict_lib, "_tell", lambda job, log: jobs.append(job))
    predict_lib.predict(["run"], source, folder)
    assert [(job.image, job.results) for job in jobs] == [(None, None)] * 3


@pytest.mark.parametrize(
    ("arguments", "mirror", "outputs"),
    [
        ((), False, ("label",)),
        (("--mirror", "--probs"), True, ("label", "probs")),
        (("--uncertainty",), False, ("label", "confidence", "entropy")),
        (
            ("--uncertainty", "--mirror"),
            True,
            ("label", "confidence", "entropy", "mutual_information"),
        ),
        (
            ("--explain=liver,lesion,liver",),
            False,
            (
                *("label", "grad_cam:liver", "integrated_gradients:liver"),
                *("grad_cam:lesion", "integrated_gradients:lesion"),
            ),
        ),
    ],
)
def test_flags_choose_the_outputs(fake, tmp_path, arguments, mirror, outputs):
    source, folder = make_folder(tmp_path, 1)
    required = ("--workdir=run", f"--input={source}", f"--output={folder}")
    assert run_command(*required, *arguments) == 0
    assert fake.loaded == [(["run"], mirror, outputs)]
    files = {
        "case0.nii.gz" if name == "label" else f"case0_{name.replace(':', '_')}.nii.gz"
        for name in outputs
    }
    assert set(os.listdir(folder)) == files | {"predict.log", "predictions.json"}


def test_several_runs_have_mutual_information(fake, tmp_path):
    source, folder = make_folder(tmp_path, 1)
    required = ("--workdir=run,other", f"--input={source}", f"--output={folder}")
    assert run_command(*required, "--uncertainty") == 0
    workdirs, _, outputs = fake.loaded[0]
    assert workdirs == ["run", "other"]
    assert outputs[-1] == "mutual_information"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workdir, --input, --output must be given"),
        (("--workdir=run", "--input=a"), "--output must be given"),
        (("--wrokdir=run",), "Did you mean: workdir"),
        (("run",), "unexpected argument 'run'"),
        (("--workdir=run", "--input=gone", "--output=out"), "gone: is missing; correct --input"),
    ],
)
def test_arguments_that_can_not_be_used_are_one_message(fake, capsys, arguments, message):
    assert run_command(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("jaxseg-predict: ") and message in shown
    assert fake.loaded == []


def test_images_in_subfolders_are_segmented_into_subfolders(fake, tmp_path):
    for name in ("patient1", "patient2"):
        (tmp_path / "in" / name).mkdir(parents=True)
        save_volume(tmp_path / "in" / name / "ct.nii", make_image())
    folder = str(tmp_path / "in" / "out")
    required = ("--workdir=run", f"--input={tmp_path / 'in'}", f"--output={folder}")
    assert run_command(*required, "--recursive") == 0
    assert list(load_records(folder)["cases"]) == ["patient1/ct", "patient2/ct"]
    written = nibabel.load(os.path.join(folder, "patient2", "ct.nii.gz"))
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected_values(make_image()))
    assert run_command(*required, "--recursive") == 0
    assert len(fake.seen) == 2


def test_what_the_predictor_refuses_is_one_message(fake, tmp_path, capsys, monkeypatch):
    source, folder = make_folder(tmp_path, 1)

    def refuse(*arguments, **options):
        raise PredictorProblem("run holds no finished run; train it")

    monkeypatch.setattr(predict_lib, "load_predictor", refuse)
    assert run_command("--workdir=run", f"--input={source}", f"--output={folder}") == 2
    expected = "jaxseg-predict: run holds no finished run; train it\n"
    assert capsys.readouterr().err == expected
    assert not os.path.exists(folder)


def test_help_names_every_flag(capsys):
    assert run_command("--help") == 0
    shown = capsys.readouterr().out
    for name in ("workdir", "input", "output", "recursive", "mirror", "probs", "explain"):
        assert name in shown


def test_the_command_does_not_load_tensorflow():
    code = "import sys, jaxseg.predict; print('tensorflow' in sys.modules)"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown == "False\n"
