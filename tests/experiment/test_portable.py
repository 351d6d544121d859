import dataclasses
import hashlib
import json
import pathlib
import re
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from safetensors import safe_open

from jaxseg import geometry
from jaxseg.data.images import read_image
from jaxseg.experiment import portable, predictor
from jaxseg.experiment.portable import ExportProblem
from jaxseg.inference import resampling, whole_volume
from jaxseg.problem import FileProblem
from jaxseg.run import checkpoint, weights

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    run, data = finished_run
    folder = tmp_path_factory.mktemp("exported")
    like = data / "imagesTr" / "case_00.nii.gz"
    command = [sys.executable, "-m", "jaxseg.export", f"--workdir={run}", f"--like={like}"]
    done = subprocess.run(
        [*command, f"--output={folder}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "volumes of up to 64 x 64 x 64 voxels, for cpu, cuda, tpu" in done.stdout
    return folder


def unmended(run, image, affine):
    """Class indices before post-processing, in RAS+ axes."""
    restored = predictor.load_predictor([str(run)])
    label = restored.segment_fn(restored.variables, image, affine)["label"]
    return geometry.to_canonical(label, affine)[0]


def test_readmes_loader_needs_jax_and_numpy_alone_and_gives_the_same_bits(
    exported, finished_run, tmp_path
):
    run, data = finished_run
    path = data / "imagesTr" / "case_04.nii.gz"
    turned = nibabel.load(path).slicer[::-1]
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    image, affine = read_image(tmp_path / "turned.nii.gz")
    volume, canonical_affine = geometry.to_canonical(image, affine)
    np.save(tmp_path / "volume.npy", volume)
    spacing_mm = geometry.spacing_mm_from_affine(canonical_affine).tolist()

    (loader,) = re.findall(r"<!-- ci: loader -->\n```python\n(.*?)```", README.read_text(), re.S)
    assert len([line for line in loader.splitlines() if line]) <= 20
    script = (
        "import sys\n"
        "for name in ('jaxseg', 'flax', 'tensorflow', 'nibabel', 'scipy.ndimage'):\n"
        "    sys.modules[name] = None\n"
        f"{loader}\n"
        f"label = segment(np.load('volume.npy'), np.array({spacing_mm}))\n"
        "np.save('label.npy', label)\n"
    )
    (tmp_path / "predictor.jaxseg").write_bytes((exported / "predictor.jaxseg").read_bytes())
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    label = np.load(tmp_path / "label.npy")
    expected = unmended(run, image, affine)
    assert label.dtype == np.uint8 and len(np.unique(label)) == 3
    np.testing.assert_array_equal(label, expected)

    script = script.replace("np.load('volume.npy')", "np.zeros((60, 18, 8, 1))")
    script = script.replace(str(spacing_mm), "[3.0, 1.0, 2.0]")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "AssertionError: larger than it was exported for" in done.stderr


@pytest.mark.parametrize(
    ("spacing_mm", "target_mm"),
    [((1.0, 1.25, 5.0), (1.5, 1.25, 2.0)), ((2.0, 1.5, 1.0), (2.5, 0.0, 1.5))],
)
def test_readmes_loader_crops_and_keeps_coarse_axes_apart(
    finished_run, tmp_path, monkeypatch, spacing_mm, target_mm
):
    run, data = finished_run
    restored = predictor.load_predictor([str(run)])
    recipe = dataclasses.replace(
        restored.recipe,
        spacing_mm=target_mm,
        image_order=3,
        statistics=(("zscore_inside",),),
        crop=True,
        normalise_first=True,
        coarse_apart=True,
    )
    restored = dataclasses.replace(
        restored, recipe=recipe, segment_fn=whole_volume.create_segment_fn(recipe)
    )
    image, _ = read_image(data / "imagesTr" / "case_04.nii.gz")
    image = np.pad(image[:12, :13], [(3, 1), (0, 4), (2, 0), (0, 0)])
    expected = restored.segment_fn(restored.variables, image, np.diag([*spacing_mm, 1.0]))
    content = portable.export_predictor(restored, (64, 64, 64), (64, 64, 64))
    (tmp_path / "predictor.jaxseg").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    (loader,) = re.findall(r"<!-- ci: loader -->\n```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(loader, names)
    label = names["segment"](image, np.array(spacing_mm))
    np.testing.assert_array_equal(label, expected["label"])
    assert label[3:15, :13].any() and not label[:3].any() and not label[..., :2].any()
    assert not names["segment"](image * 0, np.array(spacing_mm)).all()


def test_an_image_whose_spacing_makes_an_absurd_grid_is_refused(finished_run, tmp_path):
    run, _ = finished_run
    volume = nibabel.Nifti1Image(np.ones((20, 18, 8), np.float32), np.diag([9e4, 9e4, 9e4, 1]))
    nibabel.save(volume, tmp_path / "like.nii.gz")
    with pytest.raises(FileProblem, match=r"like\.nii\.gz: .* become .*; correct its spacing"):
        portable.export([str(run)], str(tmp_path / "like.nii.gz"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_any_number_of_volumes_of_different_sizes(exported, finished_run):
    run, data = finished_run
    about, call = portable.load_exported(exported / "predictor.jaxseg")
    assert about["class_names"] == ["background", "outer", "inner"]
    assert about["label_values"] == [0, 1, 2]
    images, sizes, grids, spacings_mm = [], [], [], []
    for index, stop in enumerate((20, 13, 7)):
        image, affine = read_image(data / "imagesTr" / f"case_{index:02d}.nii.gz")
        images.append(image[:stop])
        sizes.append(images[-1].shape[:3])
        spacing_mm = geometry.spacing_mm_from_affine(affine)
        spacings_mm.append(spacing_mm)
        grids.append(geometry.resampled_shape(sizes[-1], spacing_mm, about["spacing_mm"]))
    volumes = np.zeros((3, *resampling.box_of(sizes[0]), 1), np.float32)
    for volume, image in zip(volumes, images, strict=True):
        volume[tuple(map(slice, image.shape[:3]))] = image
    labels = np.asarray(call(volumes, np.int32(sizes), np.int32(grids), np.float32(spacings_mm)))
    for label, image in zip(labels, images, strict=True):
        found = label[tuple(map(slice, image.shape[:3]))]
        np.testing.assert_array_equal(found, unmended(run, image, affine))


def test_weights_can_be_read_by_name_and_bring_their_description(exported, finished_run):
    run, _ = finished_run
    path = exported / "weights.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    for name in ("config", "plan", "data", "predictor"):
        assert json.loads(metadata[name]) == json.loads((run / f"{name}.json").read_text())
    step = json.loads(metadata["predictor"])["step"]
    saved = checkpoint.load_variables(str(run / "checkpoints"), step)["params"]
    read = weights.read_weights(str(path))["params"]
    np.testing.assert_array_equal(read["params/head/kernel"], saved["head"]["kernel"])
    assert len(read) > 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-1], "cut short or altered"),
        (lambda content: content[:90], "cut short or altered"),
        (lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:], "altered"),
        (lambda content: b"", "not a file that jaxseg.export wrote"),
        (lambda content: b"\x80\x04" + content, "not a file that jaxseg.export wrote"),
        (lambda content: resigned(b"{}\n" + bytes(1000)), "can not read it"),
        (lambda content: resigned(b"no json"), "can not read it"),
        (lambda content: resigned(content.split(b"\n", 2)[2][:5000]), "can not read it"),
    ],
)
def test_a_hostile_or_damaged_file_is_one_clear_error(exported, tmp_path, change, words):
    path = tmp_path / "damaged.jaxseg"
    path.write_bytes(change((exported / "predictor.jaxseg").read_bytes()))
    with pytest.raises(ExportProblem, match=words) as caught:
        portable.load_exported(path)
    assert str(path) in str(caught.value)


def resigned(rest):
    """What an attacker would write: any content under a digest that fits."""
    return b"\n".join((portable.MAGIC, hashlib.sha256(rest).hexdigest().encode(), rest))


def test_a_missing_file_or_flag_is_one_clear_error(tmp_path):
    with pytest.raises(ExportProblem, match=r"nothing\.jaxseg: cannot be read"):
        portable.load_exported(tmp_path / "nothing.jaxseg")
    command = [sys.executable, "-m", "jaxseg.export", f"--workdir={tmp_path}", "--output=out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "jaxseg-export: --like must be given: see --help\n"
