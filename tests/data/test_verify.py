import dataclasses
import gzip
import json
import multiprocessing
import os

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg.data import cases, images, memory, workers
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.layouts import decathlon, patterns
from jaxseg.data.layouts.wanted import Wanted
from jaxseg.data.verify import describe, examine, from_json, to_json, twins_of, verify

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
        image_path, label_path = map(str, paths)
        self.cases.append(cases.Case(name, (image_path,), label_path))
        return paths

    def dataset(self, modalities=("MRI",)):
        return cases.Dataset(
            str(self.root),
            tuple(self.cases),
            ("background", "organ"),
            LabelCoding((0, 1)),
            modalities,
        )


def picture_dataset(root, *pictures):
    found = []
    for number, pixels in enumerate(pictures):
        image, label = root / f"{number}.png", root / f"{number}_mask.png"
        Image.fromarray(pixels).save(image)
        Image.fromarray(np.eye(*pixels.shape[:2], dtype=np.uint8)).save(label)
        found.append(cases.Case(str(number), (str(image),), str(label)))
    return cases.Dataset(str(root), tuple(found), ("background", "cell"), LabelCoding((0, 1)))


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
    builder.add("e", image=np.full(SHAPE, -1024, np.int16), label=np.zeros(SHAPE, np.uint8))
    builder.add("f", label=make_label()[..., None, None])
    survey = verify(builder.dataset())
    assert list(survey) == list("abcdef")
    assert survey["a"].shape == SHAPE and survey["a"].spacing_mm == (1.0, 2.0, 3.0)
    assert survey["a"].voxels == (112, 8) and survey["b"].voxels == (120, 0)
    assert survey["e"].content == "" and not any(facts.remarks for facts in survey.values())
    assert from_json(to_json(survey)) == survey
    earlier = json.loads(to_json(survey))  # before this was counted; such a survey is made again
    del earlier["a"]["measures"]["background"]
    with pytest.raises(KeyError):
        from_json(json.dumps(earlier))
    [line] = describe(survey, ("background", "organ"))
    assert line.startswith("1 image(s) have one value everywhere and nothing labelled: e")


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
    expected += [(image, "is missing"), (label, "is missing")]

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
        (label, f"shape [4, 5, 7], but {image} has [4, 5, 6]"),
    ]

    image, label = builder.add("slip")
    set_affine_row(label, [1, 0, 0, 0.6])
    expected += [(label, f"affine differs from that of {image} by up to 0.6 voxels")]

    image, label = builder.add("channels", image=make_image(6, (*SHAPE, 2)))
    expected += [(image, "2 channels, but the dataset declares 1 (MRI)")]

    image, label = builder.add("constant", image=np.full(SHAPE, -1024, np.int16))
    expected += [(image, "every value is -1024, though something is labelled")]

    image, label = builder.add("nothing", image=np.zeros((4, 0, 6), np.uint8))
    expected += [
        (image, "no voxels, its shape is [4, 0, 6, 1]"),
        (label, f"shape [4, 5, 6], but {image} has [4, 0, 6]"),
    ]

    image, label = builder.add("singular")
    set_affine_row(image, [0, 0, 0, 0])
    set_affine_row(label, [np.nan, 0, 0, 0])
    expected += [(image, "the affine is singular"), (label, "the affine is not finite")]

    image, label = builder.add("five", label=np.stack([make_label()] * 2, -1)[..., None])
    expected += [(label, "a label has one value per voxel, this one has 2")]

    problems = problems_of(builder.dataset())
    assert_each_once(problems, expected)
    assert all("; " in problem for problem in problems)


def test_what_is_only_nearly_on_the_grid_of_its_image_is_told_of(tmp_path):
    builder = Builder(tmp_path)
    near = AFFINE.copy()
    near[0, 3] += 0.1
    builder.add("near", label_affine=near)
    survey = verify(builder.dataset())
    [line] = describe(survey, ("background", "organ"))
    assert line.startswith("1 file: the affine differs from that of its image by less than half")
    assert "labelsTr/near.nii.gz" in line and "by up to 0.1 voxels" in line


def test_an_image_that_is_there_twice_is_told_of_or_refused(tmp_path):
    builder = Builder(tmp_path)
    builder.add("a", image=make_image(0))
    builder.add("b", image=make_image(1))
    builder.add("c", image=make_image(0))
    survey = verify(builder.dataset())
    assert twins_of(survey) == [["a", "c"]]
    [line] = describe(survey, ("background", "organ"))
    assert "1 image(s) are there more than once" in line and "a and c" in line
    with pytest.raises(cases.DatasetProblems, match="a and c have the same image; remove one"):
        verify(builder.dataset(), strict=True)


def test_a_dataset_where_nothing_is_labelled_is_refused(tmp_path):
    builder = Builder(tmp_path)
    builder.add("a", label=np.zeros(SHAPE, np.uint8))
    builder.add("b", label=np.zeros(SHAPE, np.uint8))
    assert_each_once(
        problems_of(builder.dataset()), [(tmp_path, "no labelled foreground voxel in any case")]
    )


def test_a_scan_larger_than_memory_is_named_before_it_is_read(tmp_path, monkeypatch):
    builder = Builder(tmp_path)
    builder.add("small")
    large, _ = builder.add("large", image=make_image(3, (40, 50, 60)), label=make_label())
    monkeypatch.setattr(memory, "available_bytes", lambda: 100_000.0)
    problems = problems_of(builder.dataset())
    assert_each_once(problems, [(large, "takes some 0.00134 GiB of memory, of which 9.31e-05")])


def test_a_scan_that_memory_is_too_small_for_after_all_is_named(tmp_path, monkeypatch):
    builder = Builder(tmp_path)
    image, _ = builder.add("a")

    def failing(paths, spacing_from):
        raise MemoryError("no 5 GiB")

    monkeypatch.setattr(images, "decode_image", failing)
    problems = problems_of(builder.dataset())
    assert [p for p in problems if str(image) in p and "more memory than there is (no 5" in p]


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


def test_pictures_and_volumes_are_not_of_one_dataset(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 6), dtype=np.uint8)
    pictures = picture_dataset(tmp_path, pixels)
    builder = Builder(tmp_path)
    volume, _ = builder.add("a")
    flat = builder.dataset()
    mixed = cases.Dataset(
        str(tmp_path), (*pictures.cases, *flat.cases), pictures.class_names, pictures.coding
    )
    [problem] = problems_of(mixed)
    assert problem.startswith(f"{tmp_path / '0.png'}: is a picture") and str(volume) in problem


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
    verify(decathlon.find(shared_data("Task04_Hippocampus")))


def test_real_pictures_pass(shared_data):
    background_and = ("background", "object")
    wanted = Wanted(class_names=background_and, coding=LabelCoding(objects=True))
    verify(patterns.find(shared_data("DSB2018"), wanted))
    wanted = Wanted(
        image_glob="*.jpg",
        label_pattern="{case}_1stHO.png",
        class_names=background_and,
        coding=LabelCoding((0, 1)),
    )
    verify(patterns.find(shared_data("CHASE_DB1"), wanted))


def test_real_faulty_label_is_reported(shared_data):
    wanted = Wanted(
        image_glob="**/*_SEM.png",
        label_pattern="derivatives/labels/{dir}/{case}_seg-axonmyelin-manual.png",
        class_names=("background", "myelin", "axon"),
        coding=LabelCoding((0, 127, 255)),
    )
    dataset = patterns.find(shared_data("axondeepseg_sem"), wanted)
    [problem] = problems_of(dataset)
    assert "sub-rat2_sample-data5_SEM_seg-axonmyelin-manual.png" in problem
    assert "128 (488611 voxels), 130 (5 voxels), 233 (4 voxels)" in problem


@pytest.mark.multiprocess
def test_processes_find_what_one_does(make_msd_folder, monkeypatch):
    """The same survey, the same problems in the same order, and progress over all cases."""
    folder = make_msd_folder(num_cases=5)
    dataset = decathlon.find(folder)
    alone = examine(dataset)
    nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 4), np.nan), np.eye(4)), folder / "broken.nii")
    broken = dataclasses.replace(dataset.cases[1], image_paths=(str(folder / "broken.nii"),))
    damaged = dataclasses.replace(dataset, cases=(dataset.cases[0], broken, *dataset.cases[2:]))
    alone_damaged = examine(damaged)
    assert alone_damaged[1] and not alone[1]
    monkeypatch.setattr(workers, "POOL_BYTES", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    shown = []

    def progress(cases):
        for case in cases:
            shown.append(case.case_id)
            yield case

    assert examine(dataset, progress) == alone
    assert shown == [case.case_id for case in dataset.cases]
    assert examine(damaged) == alone_damaged
    assert not multiprocessing.active_children()
