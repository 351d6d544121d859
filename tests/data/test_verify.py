import gzip

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg.data import cases
from jaxseg.data.verify import verify

SHAPE = (4, 5, 6)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def make_image(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_label():
    label = np.zeros(SHAPE, np.uint8)
    label[1:3, 1:3, 1:3] = 1
    return label


def set_affine_row(path, row):
    """Writes `row` over the first row of the affine, which nibabel would refuse to save."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[280:296] = np.array(row, "<f4").tobytes()
    path.write_bytes(gzip.compress(content))


class Builder:
    """A folder of NIfTI cases that are right except for what a test asks for."""

    def __init__(self, root):
        self.root = root
        self.cases = []

    def add(self, name, image=None, label=None, image_affine=AFFINE, label_affine=AFFINE):
        image = make_image(len(self.cases)) if image is None else image
        label = make_label() if label is None else label
        paths = []
        for folder, values, affine in (
            ("imagesTr", image, image_affine),
            ("labelsTr", label, label_affine),
        ):
            path = self.root / folder / f"{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, affine), path)
            paths.append(path)
        self.cases.append(cases.Case(name, *map(str, paths)))
        return paths

    def dataset(self, modalities=("MRI",)):
        return cases.Dataset(
            str(self.root), tuple(self.cases), ("background", "organ"), (0, 1), modalities
        )


def picture_dataset(root, *pictures):
    found = []
    for number, pixels in enumerate(pictures):
        image, label = root / f"{number}.png", root / f"{number}_mask.png"
        Image.fromarray(pixels).save(image)
        Image.fromarray(np.eye(*pixels.shape[:2], dtype=np.uint8)).save(label)
        found.append(cases.Case(str(number), str(image), str(label)))
    return cases.Dataset(str(root), tuple(found), ("background", "cell"), (0, 1), ())


def problems_of(dataset):
    with pytest.raises(cases.DatasetProblems) as caught:
        verify(dataset)
    return caught.value.problems


def assert_each_once(problems, expected):
    """Each (path, fragment) is in one problem that starts with the path; there are no others."""
    for path, fragment in expected:
        hits = [p for p in problems if p.startswith(f"{path}: ") and fragment in p]
        assert len(hits) == 1, (str(path), fragment, problems)
    assert len(problems) == len(expected), problems


def test_a_dataset_without_fault_passes(tmp_path):
    builder = Builder(tmp_path)
    builder.add("a")
    builder.add("b", label=np.zeros(SHAPE, np.float32))
    builder.add("c", image=make_image(9, (*SHAPE, 1)), label=make_label()[..., None])
    near = AFFINE.copy()
    near[0, 3] += 9e-4
    builder.add("d", label_affine=near)
    assert verify(builder.dataset()) is None


def test_every_problem_of_every_case_is_reported_at_once(tmp_path):
    builder = Builder(tmp_path)
    builder.add("good")
    expected = []

    image, label = builder.add("text", label=make_label() * 4)
    image.write_bytes(gzip.compress(b"this is not an image"))
    expected += [(image, "not a NIfTI file"), (label, "unknown label values 4 (8 voxels)")]

    image, label = builder.add("cut")
    image.write_bytes(image.read_bytes()[:-200])
    label.write_bytes(b"")
    expected += [(image, "damaged gzip file"), (label, "the file is empty")]

    image, label = builder.add("gone")
    image.unlink()
    label.unlink()
    expected += [(image, "no such file"), (label, "no such file")]

    values = make_image(3)
    values[0, 0, :2] = np.nan
    values[0, 1, :3] = -np.inf
    image, label = builder.add("nan", image=values)
    expected += [(image, "2 NaN and 3 infinite values among 120")]

    moved = AFFINE.copy()
    moved[2, 3] = 1.5
    image, label = builder.add(
        "grid", label=np.full((4, 5, 7), 9, np.uint8), image_affine=AFFINE, label_affine=moved
    )
    expected += [
        (label, "unknown label values 9 (140 voxels), where the classes have only [0, 1]"),
        (label, f"shape [4, 5, 7], but the image {image} has [4, 5, 6]"),
        (label, f"affine differs from that of {image} by up to 1.5"),
    ]

    image, label = builder.add("slip")
    set_affine_row(label, [1, 0, 0, 0.002])
    expected += [(label, "by up to 0.002 ")]

    image, label = builder.add("channels", image=make_image(6, (*SHAPE, 2)))
    expected += [(image, "2 channels, but the dataset declares 1 (MRI)")]

    image, label = builder.add("constant", image=np.full(SHAPE, -1024, np.int16))
    expected += [(image, "every value is -1024")]

    image, label = builder.add("nothing", image=np.zeros((4, 0, 6), np.uint8))
    expected += [
        (image, "no voxels, its shape is [4, 0, 6, 1]"),
        (label, f"shape [4, 5, 6], but the image {image} has [4, 0, 6]"),
    ]

    image, label = builder.add("singular")
    set_affine_row(image, [0, 0, 0, 0])
    set_affine_row(label, [np.nan, 0, 0, 0])
    expected += [(image, "the affine is singular"), (label, "the affine is not finite")]

    image, label = builder.add("copy", image=make_image(0))
    expected += [(image, "same image as case good")]

    image, label = builder.add("five", label=make_label()[..., None, None])
    expected += [(label, "5 axes, shape [4, 5, 6, 1, 1]")]

    problems = problems_of(builder.dataset())
    assert_each_once(problems, expected)
    assert all("; " in problem for problem in problems)


def test_three_axes_where_channels_are_declared(tmp_path):
    builder = Builder(tmp_path)
    flat, _ = builder.add("flat")
    builder.add("deep", image=make_image(5, (*SHAPE, 2)))
    problems = problems_of(builder.dataset(modalities=("T2", "ADC")))
    assert_each_once(problems, [(flat, "1 channels, but the dataset declares 2 (T2, ADC)")])


def test_pictures_differ_in_channels_from_most_others(tmp_path):
    rng = np.random.default_rng(0)
    colours = [rng.integers(0, 255, (5, 6, 3), dtype=np.uint8) for _ in range(3)]
    grey = rng.integers(0, 255, (5, 6), dtype=np.uint8)
    dataset = picture_dataset(tmp_path, grey, *colours)
    expected = [(tmp_path / "0.png", "1 channels, but 3 of 4 images have 3")]
    assert_each_once(problems_of(dataset), expected)
    verify(picture_dataset(tmp_path, *colours))


def test_equal_values_in_another_shape_are_another_image(tmp_path):
    pixels = np.arange(30, dtype=np.uint8)
    verify(picture_dataset(tmp_path, pixels.reshape(5, 6), pixels.reshape(6, 5)))


def test_progress_wraps_the_cases(tmp_path):
    builder = Builder(tmp_path)
    builder.add("a")
    builder.add("b")
    seen = []

    def progress(iterable):
        for case in iterable:
            seen.append(case.case_id)
            yield case

    verify(builder.dataset(), progress)
    assert seen == ["a", "b"]


def test_real_volumes_pass(shared_data):
    verify(cases.find_msd_cases(shared_data("Task04_Hippocampus")))


def test_real_pictures_pass(shared_data):
    background_and = ("background", "object")
    verify(
        cases.find_image_cases(
            shared_data("DSB2018"), "images/*.png", "masks/{case}.png", background_and, None
        )
    )
    verify(
        cases.find_image_cases(
            shared_data("CHASE_DB1"), "*.jpg", "{case}_1stHO.png", background_and, (0, 1)
        )
    )


def test_real_faulty_label_is_reported(shared_data):
    dataset = cases.find_image_cases(
        shared_data("axondeepseg_sem"),
        "**/*_SEM.png",
        "derivatives/labels/{dir}/{case}_seg-axonmyelin-manual.png",
        ("background", "myelin", "axon"),
        (0, 127, 255),
    )
    [problem] = problems_of(dataset)
    assert "sub-rat2_sample-data5_SEM_seg-axonmyelin-manual.png" in problem
    assert "128 (488611 voxels), 130 (5 voxels), 233 (4 voxels)" in problem
