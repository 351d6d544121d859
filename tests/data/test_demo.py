import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jaxseg.data import demo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None,
    reason="nilearn, which ships the MNI152 template, is not installed",
)

SHAPE = (99, 117, 95)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return demo.create_demo_cohort(tmp_path_factory.mktemp("demo") / "cohort", num_cases=2)


@pytest.fixture(scope="module")
def template():
    return demo.load_template()[0]


@pytest.fixture
def plain(monkeypatch):
    """No deformation, bias field or noise."""
    monkeypatch.setattr(demo, "MAX_CONTROL_SHIFT", 0)
    monkeypatch.setattr(demo, "MAX_ROTATION_DEG", 0)
    monkeypatch.setattr(demo, "SCALE_RANGE", (1, 1))
    monkeypatch.setattr(demo, "MAX_LOG_BIAS", 0)
    monkeypatch.setattr(demo, "NOISE_RANGE", (0, 0))
    monkeypatch.setattr(demo, "WHITE_RANGE", (1000, 1000))
    return monkeypatch


def file_digests(folder):
    """{path relative to folder: sha256} of every file below it."""
    paths = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    return {
        os.path.relpath(path, folder): hashlib.sha256(open_bytes(path)).hexdigest()
        for path in paths
    }


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def tiny_case(template, seed, k):
    return np.ones((2, 2, 2), np.int16), np.ones((2, 2, 2), np.uint8)


def load_cases(folder):
    with open(os.path.join(folder, "dataset.json"), encoding="utf-8") as file:
        entries = json.load(file)["training"]
    return [
        tuple(nib.load(os.path.join(folder, entry[key])) for key in ("image", "label"))
        for entry in entries
    ]


def jacobian_determinant(points):
    """Of a map sampled every 2 mm, [3, X, Y, Z] -> [X, Y, Z]."""
    jacobian = np.stack(np.gradient(points, 2, axis=(1, 2, 3)), axis=1)
    return np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))


def test_folder_is_a_decathlon_dataset(cohort):
    with open(os.path.join(cohort, "dataset.json"), encoding="utf-8") as file:
        metadata = json.load(file)
    assert metadata["labels"] == {
        "0": "background",
        "1": "CSF",
        "2": "grey matter",
        "3": "white matter",
    }
    assert metadata["modality"] == {"0": "MRI"}
    assert (metadata["numTraining"], metadata["numTest"]) == (2, 0)
    assert metadata["tensorImageSize"] == "3D"
    for key in ("name", "description", "reference", "licence", "release"):
        assert metadata[key]
    listed = {os.path.normpath(path) for entry in metadata["training"] for path in entry.values()}
    assert set(file_digests(cohort)) == listed | {"dataset.json", "NOTICE"}
    assert os.path.normpath("imagesTr/brain_001.nii.gz") in listed
    assert b"Louis Collins, McConnell Brain Imaging Centre" in open_bytes(
        os.path.join(cohort, "NOTICE")
    )


def test_image_and_label_share_the_2_mm_grid(cohort):
    expected = np.array([[2, 0, 0, -98], [0, 2, 0, -134], [0, 0, 2, -72], [0, 0, 0, 1]])
    for image, label in load_cases(cohort):
        assert image.shape == label.shape == SHAPE
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
        for nifti in (image, label):
            np.testing.assert_array_equal(nifti.get_sform(), expected)
            np.testing.assert_array_equal(nifti.get_qform(), expected)
            assert nifti.header.get_xyzt_units()[0] == "mm"


def test_tissues_have_plausible_volumes_and_t1_order(cohort):
    for image, label in load_cases(cohort):
        image, label = np.asarray(image.dataobj), np.asarray(label.dataobj)
        np.testing.assert_array_equal(np.unique(label), [0, 1, 2, 3])
        np.testing.assert_array_equal(label == 0, image == 0)
        brain_litres = (label > 0).sum() * 8 / 1e6
        assert 1.3 < brain_litres < 2.6  # 1.89 in the template, scales between 0.9 and 1.1 an axis
        csf, grey, white = np.bincount(label.ravel())[1:] / (label > 0).sum()
        assert 0.05 < csf < 0.13
        assert 0.5 < grey < 0.65
        assert 0.27 < white < 0.42
        means = ndimage.mean(image, label, index=[1, 2, 3])
        assert means[0] * 1.2 < means[1] and means[1] * 1.05 < means[2]


def test_cases_differ(cohort):
    (image_a, label_a), (image_b, label_b) = (
        tuple(np.asarray(nifti.dataobj) for nifti in case) for case in load_cases(cohort)
    )
    white_a, white_b = label_a == 3, label_b == 3
    assert 2 * (white_a & white_b).sum() / (white_a.sum() + white_b.sum()) < 0.8
    ratio_a, ratio_b = image_a[label_a == 2].mean(), image_b[label_b == 2].mean()
    assert abs(ratio_a / image_a[white_a].mean() - ratio_b / image_b[white_b].mean()) > 0.01


def test_same_seed_gives_the_same_bytes(cohort, tmp_path):
    again = demo.create_demo_cohort(tmp_path / "again", num_cases=2, seed=0)
    assert file_digests(again) == file_digests(cohort)


def test_a_case_depends_on_seed_and_index_alone(cohort, tmp_path):
    shorter = file_digests(demo.create_demo_cohort(tmp_path / "shorter", num_cases=1, seed=0))
    other = file_digests(demo.create_demo_cohort(tmp_path / "other", num_cases=1, seed=1))
    whole = file_digests(cohort)
    for folder in ("imagesTr", "labelsTr"):
        path = os.path.join(folder, "brain_001.nii.gz")
        assert shorter[path] == whole[path] != other[path]


@pytest.mark.parametrize("seed", range(4))
def test_deformation_is_strong_smooth_and_does_not_fold(seed):
    moved = demo.displacement_mm(np.random.default_rng(seed), SHAPE)
    length_mm = np.linalg.norm(moved, axis=0)
    assert 3 < length_mm.mean() < 5
    assert 7 < length_mm.max() < 13
    points = demo.sampling_points(np.random.default_rng(seed), SHAPE)
    assert jacobian_determinant(points).min() > 0.2


def test_deformation_cannot_fold_at_its_bound():
    # Control points two by two pushed towards each other along each axis, as far as allowed.
    axes = iter(range(3))

    def converging(low, high, size):
        axis = next(axes)
        steps = np.where(np.arange(size[axis]) < size[axis] // 2, high, low)
        return np.broadcast_to(np.expand_dims(steps, [a for a in range(3) if a != axis]), size)

    moved = demo.displacement_mm(SimpleNamespace(uniform=converging), SHAPE)
    smallest = jacobian_determinant(2.0 * np.indices(SHAPE) + moved).min()
    # A cubic B-spline's slope is a quadratic one's value, at most 3 / 4 of the coefficients' step.
    assert smallest == pytest.approx((1 - 2 * 0.4 * 3 / 4) ** 3, rel=0.05)


def test_smooth_field_is_the_cubic_b_spline_of_its_coefficients():
    field = demo.smooth_field(np.random.default_rng(3), SHAPE, 30)
    intervals = np.rint((np.array(SHAPE) - 1) * 2 / 30).astype(int)
    coefficients = np.random.default_rng(3).uniform(-1, 1, intervals + 3)
    axes = [1 + np.linspace(0, n, size) for n, size in zip(intervals, SHAPE, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    expected = ndimage.map_coordinates(coefficients, points, order=3, prefilter=False)
    np.testing.assert_allclose(field, expected, atol=1e-12)


def test_affine_part_stays_in_its_ranges(monkeypatch):
    monkeypatch.setattr(demo, "MAX_CONTROL_SHIFT", 0)
    centre = np.array([20, 30, 40.0])
    for seed in range(20):
        points = demo.sampling_points(np.random.default_rng(seed), (21, 31, 41))
        np.testing.assert_allclose(points[:, 10, 15, 20], centre)
        columns = [points[:, 11, 15, 20], points[:, 10, 16, 20], points[:, 10, 15, 21]]
        matrix = np.stack([column - centre for column in columns], axis=1) / 2
        left, scales, right = np.linalg.svd(np.linalg.inv(matrix))
        assert scales.min() >= 0.9 and scales.max() <= 1.1
        angle_deg = np.degrees(np.arccos((np.trace(left @ right) - 1) / 2))
        assert 0.1 < angle_deg < 18  # three turns of at most 10 degrees


def test_undeformed_label_is_the_most_probable_template_tissue(plain, template):
    brain, _, grey, white = template[:, ::2, ::2, ::2]
    _, label = demo.create_case(template, 0, 0)
    expected = np.where(brain > 0, 1 + np.argmax([1 - grey - white, grey, white], axis=0), 0)
    np.testing.assert_array_equal(label, expected)
    plain.setattr(demo, "SCALE_RANGE", (1.1, 1.1))
    _, larger = demo.create_case(template, 0, 0)
    # The template is cut through the brain stem, hence less than 1.1 ** 3.
    assert (larger > 0).sum() / (label > 0).sum() == pytest.approx(1.331, rel=0.02)


def test_contrast_shifts_each_tissue_as_a_whole(plain, template):
    plain.setattr(demo, "GREY_RANGE", (0.65, 0.65))
    _, t1, grey, white = template[:, ::2, ::2, ::2]
    image, _ = demo.create_case(template, 0, 0)
    for tissue, wanted in ((grey, 0.65), (white, 1)):
        pure = tissue > 0.99
        shift = wanted - np.average(t1, weights=tissue)
        # Up to 1 % of other tissues, whose shifts differ by less than 0.3, and rounding.
        np.testing.assert_allclose(image[pure], 1000 * (t1[pure] + shift), atol=3.5)


def test_noise_is_rician(plain, template):
    clean, label = demo.create_case(template, 0, 0)
    plain.setattr(demo, "NOISE_RANGE", (0.04, 0.04))
    noisy, _ = demo.create_case(template, 0, 0)
    clean, noisy = (image[label > 0].astype(float) for image in (clean, noisy))
    bright = clean > 700
    assert np.std((noisy - clean)[bright]) == pytest.approx(40, rel=0.02)
    # E[M^2] = S^2 + 2 sigma^2, against S^2 + sigma^2 for Gaussian noise.
    assert np.mean(noisy**2 - clean**2) == pytest.approx(2 * 40**2, abs=600)


def test_finished_cohort_is_returned_untouched(cohort):
    before = {path: os.stat(os.path.join(cohort, path)).st_mtime_ns for path in os.listdir(cohort)}

    def refuse(cases):
        raise AssertionError("made again")

    assert demo.create_demo_cohort(cohort, num_cases=2, progress=refuse) == cohort
    for path, mtime in before.items():
        assert os.stat(os.path.join(cohort, path)).st_mtime_ns == mtime


@pytest.mark.parametrize("other", [{"num_cases": 3}, {"num_cases": 2, "seed": 1}])
def test_another_cohort_in_the_folder_is_refused(cohort, other):
    with pytest.raises(FileExistsError, match="name another folder"):
        demo.create_demo_cohort(cohort, **other)


def test_damaged_or_foreign_folder_is_refused_and_kept(cohort, tmp_path):
    damaged = shutil.copytree(cohort, tmp_path / "damaged")
    os.remove(damaged / "labelsTr" / "brain_002.nii.gz")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for folder in (damaged, foreign):
        before = file_digests(folder)
        with pytest.raises(FileExistsError, match=str(folder)):
            demo.create_demo_cohort(folder, num_cases=2)
        assert file_digests(folder) == before


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "create_case", tiny_case)

    def stop_after_one_case(cases):
        yield cases[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.create_demo_cohort(tmp_path / "cohort", num_cases=2, progress=stop_after_one_case)
    assert os.listdir(tmp_path) == []


def test_another_process_finishing_first_wins(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "create_case", tiny_case)

    def overtake(cases):
        yield from cases
        shutil.copytree(cohort, tmp_path / "cohort")

    made = demo.create_demo_cohort(tmp_path / "cohort", num_cases=2, progress=overtake)
    assert file_digests(made) == file_digests(cohort)
    assert os.listdir(tmp_path) == ["cohort"]


def test_folder_is_as_open_as_any_other(cohort, tmp_path):
    (tmp_path / "plain").mkdir()
    assert os.stat(cohort).st_mode == os.stat(tmp_path / "plain").st_mode


def test_missing_nilearn_or_template_says_what_to_install(tmp_path, monkeypatch):
    empty_package = SimpleNamespace(origin=str(tmp_path / "nilearn" / "__init__.py"))
    for spec in (None, empty_package):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(FileNotFoundError, match=r"pip install 'jaxseg\[demo\]'.*config.data.d"):
            demo.create_demo_cohort(tmp_path / "cohort")
    assert os.listdir(tmp_path) == []


def test_no_cases_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_cases is 0"):
        demo.create_demo_cohort(tmp_path / "cohort", num_cases=0)


def test_nilearn_is_not_imported():
    code = (
        "import sys; from jaxseg.data import demo; demo.load_template(); "
        "sys.exit('nilearn' in sys.modules)"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(demo.__file__)))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
