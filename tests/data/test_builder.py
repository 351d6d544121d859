import dataclasses
import hashlib
import itertools
import os
import pathlib
import shutil
import threading
import time
import types

import nibabel
import numpy as np
import pytest

from jaxseg.data import (
    blocked_arrays,
    builder,
    cases,
    digests,
    images,
    labels,
    prepared,
    preprocess,
    reading,
    verify,
)
from jaxseg.data import parts as parts_lib
from jaxseg.data.border_weights import border_weights
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.layouts import decathlon
from jaxseg.data.surveyed import survey_once

OPTIONS = {"spacing_mm": (), "normalisation": "auto", "crop": False}
OPTIONS |= {"image_order": 1, "label_order": 1}


def prepare(dataset, cache_dir, plan_ids=("case_00", "case_01"), **options):
    cache_dir = prepared.local_folder(str(cache_dir))
    shared = {
        name: options[name] for name in ("progress", "process_index", "barrier") if name in options
    }
    survey, sha256, _ = survey_once(dataset, cache_dir=cache_dir, **shared)
    known = {"survey": survey, "sha256": sha256, "cache_dir": cache_dir}
    made = prepared.prepare(dataset, plan_ids, **known, **(OPTIONS | options))
    return *made, sha256


def whole(case):
    """The case with its arrays read whole."""
    arrays = {name: getattr(case, name) for name in ("image", "label", "weight")}
    read = {name: a[:, :, :] for name, a in arrays.items() if a is not None}
    return dataclasses.replace(case, **read)


@pytest.fixture
def dataset(make_msd_folder):
    return decathlon.find(make_msd_folder(num_cases=3))


@pytest.fixture
def count_reads(monkeypatch):
    """Case images read by the builder, in order."""
    reads = []

    def counted(dataset, case):
        reads.append(pathlib.Path(case.image_path).name)
        return reading.read_case_image(dataset, case)

    monkeypatch.setattr(builder, "read_case_image", counted)
    return reads


def assert_same_case(actual, expected):
    actual, expected = whole(actual), whole(expected)
    for field in dataclasses.fields(expected):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        if field.name == "locations":
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_array_equal(a, b)


def assert_same_store(actual, expected, dataset):
    for case in dataset.cases:
        assert_same_case(actual[case.case_id], expected[case.case_id])


def rewrite_image(dataset, index, change):
    path = dataset.cases[index].image_path
    image = nibabel.load(path)
    values = change(np.asarray(image.dataobj)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)


def test_records_are_what_preprocessing_gives(tmp_path, make_msd_folder):
    root = make_msd_folder(num_cases=2, spacing_mm=(1.3, 0.9, 2.0))
    affine = np.array([[0, 0, -2.0, 3], [-1.3, 0, 0, 4], [0, 0.9, 0, 5], [0, 0, 0, 1]])
    for folder in ("imagesTr", "labelsTr"):
        path = root / folder / "case_01.nii.gz"
        volume = nibabel.load(path)
        turned = nibabel.Nifti1Image(np.asarray(volume.dataobj), affine)
        nibabel.save(turned, path)
    dataset = decathlon.find(root)
    store, plan, _ = prepare(dataset, tmp_path / "cache", ["case_00"], spacing_mm=(1.0, 1.2, 1.5))
    assert plan.spacing_mm == (1.0, 1.2, 1.5)
    for case in dataset.cases:
        image, file_affine = images.read_image(case.image_path)
        label, _ = labels.read_label(case.label_path, dataset.coding)
        expected, _ = preprocess.preprocess_image(image, file_affine, plan)
        prepared = whole(store[case.case_id])
        np.testing.assert_array_equal(prepared.image, expected)
        np.testing.assert_array_equal(
            prepared.label, preprocess.preprocess_label(label, file_affine, plan, 3)
        )
        assert prepared.image.dtype == np.float32 and prepared.label.dtype == np.uint8
        assert prepared.image.shape[:3] == prepared.label.shape


def test_cases_are_cropped_to_what_is_not_zero(tmp_path, dataset):
    rewrite_image(dataset, 1, lambda image: np.pad(image[2:-3, 1:], ((2, 3), (1, 0), (0, 0))))
    whole_store, whole_plan, _ = prepare(dataset, tmp_path / "cache")
    store, plan, _ = prepare(dataset, tmp_path / "cache", crop=True)
    assert plan == dataclasses.replace(whole_plan, crop=True, intensity=plan.intensity)
    x, y, z = whole(whole_store["case_01"]).label.shape
    cropped = whole(store["case_01"])
    assert cropped.image.shape == (x - 5, y - 1, z, 1)
    np.testing.assert_array_equal(cropped.label, whole(whole_store["case_01"]).label[2:-3, 1:])
    for index, voxels in enumerate(cropped.locations, start=1):
        np.testing.assert_array_equal(voxels, np.argwhere(cropped.label == index))


def test_a_plan_of_slices_is_prepared_apart(tmp_path, dataset, count_reads):
    volumes = prepare(dataset, tmp_path / "cache")[1]
    slices = prepare(dataset, tmp_path / "cache", slices=True)[1]
    assert slices.spacing_mm == (*volumes.spacing_mm[:2], 0.0)
    assert len(count_reads) == 6
    again = prepare(dataset, tmp_path / "cache", slices=True, saved_plan=slices)[1]
    assert again == slices and len(count_reads) == 6


def test_locations_are_the_voxels_of_each_class_present(tmp_path, dataset):
    store, _, _ = prepare(dataset, tmp_path / "cache")
    for case in dataset.cases:
        prepared = whole(store[case.case_id])
        assert len(prepared.locations) == 2
        for index, voxels in enumerate(prepared.locations, start=1):
            np.testing.assert_array_equal(voxels, np.argwhere(prepared.label == index))


def test_locations_of_a_large_or_absent_class():
    mask = np.zeros((60, 50, 40), bool)
    mask[10:50, 5:45, 3:33] = True
    voxels = builder._locations(mask)
    assert len(voxels) == builder.LOCATIONS_PER_CLASS
    assert mask[tuple(voxels.T)].all()
    assert len(np.unique(voxels, axis=0)) == len(voxels)
    for axis, (start, stop) in enumerate([(10, 50), (5, 45), (3, 33)]):  # no slice is left out
        places, counts = np.unique(voxels[:, axis], return_counts=True)
        np.testing.assert_array_equal(places, np.arange(start, stop))
        assert counts.min() > 0.5 * counts.mean()
    assert builder._locations(np.zeros((2, 2, 2), bool)).shape == (0, 3)


def test_a_case_without_foreground_has_no_locations(tmp_path, dataset):
    path = dataset.cases[2].label_path
    label = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), path)
    store, _, _ = prepare(dataset, tmp_path / "cache")
    assert store["case_02"].locations == ()
    assert len(store["case_01"].locations) == 2


def test_more_than_ten_cases_keep_their_names(tmp_path, make_msd_folder):
    root = make_msd_folder(num_cases=12, shape=(16, 15, 5))
    dataset = decathlon.find(root)
    for index, case in enumerate(dataset.cases):
        volume = nibabel.load(case.label_path)
        label = np.asarray(volume.dataobj).copy()
        label.flat[: index + 1] = 2
        label.flat[index + 1 : 14] = 0
        nibabel.save(nibabel.Nifti1Image(label, volume.affine), case.label_path)
    store, _, _ = prepare(dataset, tmp_path / "cache")
    for index, case in enumerate(dataset.cases):
        prepared = whole(store[case.case_id])
        assert (prepared.label.flat[:14] == 2).sum() == index + 1


def test_prepared_once_reused_after(tmp_path, dataset, count_reads, monkeypatch):
    first, plan, sha256 = prepare(dataset, tmp_path / "cache")
    assert count_reads == ["case_00.nii.gz", "case_01.nii.gz", "case_02.nii.gz"]

    def forbidden(*args, **kwargs):
        raise AssertionError("done before")

    monkeypatch.setattr(verify, "verify", forbidden)
    monkeypatch.setattr(preprocess, "make_plan", forbidden)
    second, same_plan, same_sha256 = prepare(dataset, tmp_path / "cache")
    assert len(count_reads) == 3
    assert (same_plan, same_sha256) == (plan, sha256)
    assert_same_store(second, first, dataset)


def test_a_copy_of_the_data_elsewhere_is_the_same_data(tmp_path, dataset, count_reads):
    _, _, sha256 = prepare(dataset, tmp_path / "cache")
    shutil.copytree(dataset.root, tmp_path / "copy")
    copy = decathlon.find(tmp_path / "copy")
    assert prepare(copy, tmp_path / "cache")[2] == sha256
    assert len(count_reads) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"spacing_mm": (1.0, 1.0, 1.0)},
        {"normalisation": "ct"},
        {"image_order": 3},
        {"label_order": 0},
        {"plan_ids": ("case_00", "case_02")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_preprocessing_is_prepared_apart(tmp_path, dataset, count_reads, options):
    before, _, sha256 = prepare(dataset, tmp_path / "cache")
    expected = {case.case_id: whole(before[case.case_id]) for case in dataset.cases}
    assert prepare(dataset, tmp_path / "cache", **options)[2] == sha256  # of the same data
    assert len(count_reads) == 6
    again, _, _ = prepare(dataset, tmp_path / "cache")
    assert len(count_reads) == 6
    for case_id, case in expected.items():
        assert_same_case(again[case_id], case)


def test_changed_data_is_another_digest(tmp_path, dataset):
    def of(dataset):
        return digests.digest_of_data(dataset, str(tmp_path / "cache"))[0]

    seen = [of(dataset)]
    rewrite_image(dataset, 1, lambda image: image + (image == image.max()))
    seen.append(of(dataset))
    for changes in (
        {"class_names": ("background", "outer", "core")},
        {"coding": LabelCoding((0, 2, 1))},
        {"coding": LabelCoding((0, 1, 2), ignore=(3,))},
        {"modalities": ("CT",)},
        {"cases": dataset.cases[:2]},
        {"cases": (dataclasses.replace(dataset.cases[0], case_id="x"), *dataset.cases[1:])},
    ):
        seen.append(of(dataclasses.replace(dataset, **changes)))
    assert len(set(seen)) == 8


def test_voxels_beside_a_header_and_a_spacing_beside_a_stack_are_in_the_digest(tmp_path, dataset):
    def of(path):
        case = dataclasses.replace(dataset.cases[0], image_paths=(str(path),), label_path=None)
        found, by_case = digests.digest_of_data(
            dataclasses.replace(dataset, cases=(case,)), str(tmp_path / "cache")
        )
        assert digests.files_of(case) == [str(path), str(beside)]
        assert by_case == {
            case.case_id: [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, beside)]
        }
        return found

    header, beside = tmp_path / "a.mhd", tmp_path / "a.raw"
    header.write_text("NDims = 3\nElementDataFile = a.raw\n")
    beside.write_bytes(b"voxels")
    first = of(header)
    beside.write_bytes(b"vowels")
    assert of(header) != first
    stack, beside = tmp_path / "b.tif", tmp_path / "b.json"
    stack.write_bytes(b"pages")
    beside.write_text('{"spacing": [1, 1, 1]}')
    first = of(stack)
    beside.write_text('{"spacing": [2, 1, 1]}')
    assert of(stack) != first


def test_changed_bytes_of_a_file_are_prepared_again(tmp_path, dataset, count_reads):
    before, _, sha256 = prepare(dataset, tmp_path / "cache")
    flipped = whole(before["case_02"]).image[::-1]
    rewrite_image(dataset, 2, lambda image: image[::-1])
    after, _, new_sha256 = prepare(dataset, tmp_path / "cache")
    assert new_sha256 != sha256
    assert len(count_reads) == 6
    np.testing.assert_allclose(whole(after["case_02"]).image, flipped, atol=1e-5)


def test_statistics_come_from_training_cases_only(tmp_path, dataset):
    for index, value in enumerate((10, 30, 500)):
        label = np.asarray(nibabel.load(dataset.cases[index].label_path).dataobj)
        rewrite_image(dataset, index, lambda image, on=label > 0, v=value: np.where(on, v, image))
    ct = dataclasses.replace(dataset, modalities=("CT",))
    _, plan, _ = prepare(ct, tmp_path / "cache", ("case_00", "case_01"))
    assert plan.intensity == ((10.0, 30.0, 20.0, 10.0),)  # the boxes are of one size


def test_bad_cases_are_all_listed_and_nothing_is_stored(tmp_path, dataset, count_reads):
    pathlib.Path(dataset.cases[0].image_path).write_bytes(b"")
    rewrite_image(dataset, 2, lambda image: np.where(image == image.max(), np.nan, image))
    with pytest.raises(cases.DatasetProblems) as caught:
        prepare(dataset, tmp_path / "cache")
    assert len(caught.value.problems) == 2
    assert "case_00" in caught.value.problems[0] and "empty" in caught.value.problems[0]
    assert "case_02" in caught.value.problems[1] and "1 NaN" in caught.value.problems[1]
    assert not list((tmp_path / "cache").glob("*/*"))
    assert count_reads == []


def test_files_that_vanished_are_all_listed(tmp_path, dataset):
    pathlib.Path(dataset.cases[0].image_path).unlink()
    pathlib.Path(dataset.cases[1].label_path).unlink()
    with pytest.raises(cases.DatasetProblems) as caught:
        prepare(dataset, tmp_path / "cache")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        dataset.cases[0].image_path,
        dataset.cases[1].label_path,
    ]
    assert not list((tmp_path / "cache").glob("*/*"))


class Interrupted(BaseException):
    """As Ctrl-C is: not an Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("phase", ["verifying", "planning", "preprocessing"])
def test_an_interrupted_preparation_goes_on(
    tmp_path, dataset, count_reads, monkeypatch, phase, error
):
    monkeypatch.setattr(parts_lib, "CASES_PER_PART", 1)
    cache, killed = tmp_path / "cache", tmp_path / "killed"
    cache.mkdir()

    def interrupting(items, title):
        for index, item in enumerate(items):
            if title == phase and index == 1:
                shutil.copytree(cache, killed)  # what is left if nobody can tidy up
                raise error("in the middle")
            yield item

    with pytest.raises(error, match="in the middle"):
        prepare(dataset, cache, progress=interrupting)
    expected, plan, _ = prepare(dataset, tmp_path / "other")
    for folder in (cache, killed):
        assert len(list(folder.rglob("plan.json"))) == (phase == "preprocessing")
        count_reads.clear()
        store, same_plan, _ = prepare(dataset, folder)
        # The first case is a part, which was finished.
        assert len(count_reads) == (2 if phase == "preprocessing" else 3)
        assert same_plan == plan
        assert_same_store(store, expected, dataset)


@pytest.mark.parametrize("place", ["plan", "part"])
def test_what_is_not_whole_is_not_seen(tmp_path, dataset, monkeypatch, place):
    def full(*paths):
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(builder.os, {"plan": "replace", "part": "rename"}[place], full)
        with pytest.raises(OSError, match="full"):
            prepare(dataset, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("plan.json"))) == (place == "part")
    [*unfinished] = (tmp_path / "cache").glob("*/part-*.unfinished")
    assert len(unfinished) == (place == "part")
    store, plan, _ = prepare(dataset, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/part-*.unfinished"))
    expected, same_plan, _ = prepare(dataset, tmp_path / "other")
    assert plan == same_plan
    assert_same_store(store, expected, dataset)


def test_a_part_that_another_run_is_making_is_waited_for(tmp_path, dataset, count_reads):
    """Two runs that start together: the second finds what the first has made meanwhile."""
    progress = []

    def slow(items, title):
        for item in items:
            if title == "preprocessing" and not progress:
                progress.append(threading.Thread(target=lambda: stores.append(second())))
                progress[0].start()
                progress[0].join(0.5)
                assert progress[0].is_alive()  # waits
            yield item

    def second():
        return prepare(dataset, tmp_path / "cache")[0]

    stores = []
    stores.append(prepare(dataset, tmp_path / "cache", progress=slow)[0])
    progress[0].join()
    assert len(count_reads) == 3
    assert_same_store(*stores, dataset)


def test_progress_sees_every_phase_and_case(tmp_path, dataset):
    seen = []

    def recording(items, title):
        for item in items:
            seen.append((title, item.case_id))
            yield item

    prepare(dataset, tmp_path / "cache", ("case_01",), progress=recording)
    every = ["case_00", "case_01", "case_02"]
    assert seen == [
        *(("verifying", case_id) for case_id in every),
        ("planning", "case_01"),
        *(("preprocessing", case_id) for case_id in every),
    ]


def test_an_unknown_case_is_an_error(tmp_path, dataset):
    store, _, _ = prepare(dataset, tmp_path / "cache")
    with pytest.raises(KeyError):
        store["case_99"]


def test_store_reads_again_when_memory_is_short(tmp_path, dataset, monkeypatch):
    roomy, _, _ = prepare(dataset, tmp_path / "cache")
    monkeypatch.setattr(builder, "CACHE_BYTES", 1)
    store, _, _ = prepare(dataset, tmp_path / "cache")
    for case_id in ("case_00", "case_01", "case_00", "case_02"):
        assert_same_case(store[case_id], roomy[case_id])


def test_a_slice_reads_only_the_blocks_it_touches(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(blocked_arrays, "BLOCK_VOXELS", 4 * 4 * 2)
    monkeypatch.setattr(blocked_arrays, "BLOCK_DEPTH", 2)
    store, _, _ = prepare(dataset, tmp_path / "cache")  # of [20, 18, 8]: 5 x 5 x 4 blocks
    expected = whole(prepare(dataset, tmp_path / "cache")[0]["case_01"])
    read = []
    monkeypatch.setattr(store, "_records", RecordingDict(read, store._read))
    case = store["case_01"]
    assert [key[1] for key in read] == ["cases"]  # nothing of its arrays
    read.clear()
    np.testing.assert_array_equal(case.image[4:9, 3:4, 6:8], expected.image[4:9, 3:4, 6:8])
    first = 100 + 3  # of the second case, in the last layer
    assert [key[1:] for key in read] == [("blocks", first + 20 * i) for i in (1, 2)]


class RecordingDict(dict):
    def __init__(self, read, load):
        self._read, self._load = read, load

    def __missing__(self, key):
        self._read.append(key)
        return self._load(key)


@pytest.mark.parametrize("lost", ["part-000-of-001", "plan.json"])
def test_a_cache_that_lost_something_is_prepared_again(tmp_path, dataset, lost):
    expected, plan, _ = prepare(dataset, tmp_path / "other")
    prepare(dataset, tmp_path / "cache")
    [path] = (tmp_path / "cache").rglob(lost)
    path.unlink() if path.is_file() else shutil.rmtree(path)
    store, same_plan, _ = prepare(dataset, tmp_path / "cache")
    assert same_plan == plan
    assert_same_store(store, expected, dataset)


def test_border_weights_are_stored_apart_and_read_back(tmp_path, dataset, count_reads):
    plain, _, _ = prepare(dataset, tmp_path / "cache")
    options = {"w0": 10.0, "sigma": 5.0}
    stores = [prepare(dataset, tmp_path / "cache", border_weight=options)[0] for _ in range(2)]
    assert len(count_reads) == 2 * len(dataset.cases)  # the third finds the second's
    for case in dataset.cases:
        assert plain[case.case_id].weight is None
        instances, affine = labels.read_instances(case.label_path, dataset.coding)
        plan = preprocess.Plan((1.0, 1.0, 2.0), ("zscore",), ((),), 1, 1)
        instances = preprocess.preprocess_instances(instances, affine, plan)
        expected = border_weights(instances, **options)
        assert expected.max() > expected.min()
        for store in stores:
            np.testing.assert_array_equal(whole(store[case.case_id]).weight, expected)


@pytest.fixture
def count_digests(monkeypatch):
    """Files whose bytes were read for their digests."""
    names = []

    def counted(file, name):
        names.append(pathlib.Path(file.name).name)
        return hashlib.file_digest(file, name)

    fake = types.SimpleNamespace(sha256=hashlib.sha256, file_digest=counted)
    monkeypatch.setattr(digests, "hashlib", fake)
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)  # tests do not wait
    return names


def test_files_that_are_as_they_were_are_not_read_again(tmp_path, dataset, count_digests):
    first = digests.digest_of_data(dataset, str(tmp_path / "cache"))
    assert len(count_digests) == 6
    assert digests.digest_of_data(dataset, str(tmp_path / "cache")) == first
    assert len(count_digests) == 6
    assert digests.digest_of_data(dataset, str(tmp_path / "elsewhere")) == first
    assert len(count_digests) == 12


@pytest.mark.parametrize("kept_time", [False, True])
def test_a_changed_file_of_the_same_size_is_noticed(tmp_path, dataset, count_digests, kept_time):
    first = digests.digest_of_data(dataset, str(tmp_path / "cache"))
    path = pathlib.Path(dataset.cases[1].label_path)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-9] ^= 1
    time.sleep(0.02)  # more than a tick of the file system's clock
    path.write_bytes(content)
    if kept_time:  # as copying with "cp -p" does
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    count_digests.clear()
    assert digests.digest_of_data(dataset, str(tmp_path / "cache")) != first
    assert count_digests == ["case_01.nii.gz"]


def test_a_file_that_was_just_written_is_read_again(tmp_path, dataset, count_digests, monkeypatch):
    """It could be written once more without a new time of change."""
    monkeypatch.setattr(digests, "SETTLED_S", 1e4)
    for _ in range(2):
        digests.digest_of_data(dataset, str(tmp_path / "cache"))
    assert len(count_digests) == 12


def test_processes_that_share_the_work_make_what_one_makes(
    tmp_path, dataset, count_reads, monkeypatch
):
    monkeypatch.setattr(parts_lib, "CASES_PER_PART", 1)
    expected, plan, sha256 = prepare(dataset, tmp_path / "one")
    count_reads.clear()
    meeting = threading.Barrier(2, timeout=60)
    names, made = [[], []], {}

    def run(index):
        def barrier(name):
            names[index].append(name)
            meeting.wait()

        made[index] = prepare(
            dataset,
            tmp_path / "two",
            process_index=index,
            process_count=2,
            barrier=barrier,
        )

    for _ in range(2):  # and when all is there
        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for store, same_plan, same_sha256 in made.values():
            assert (same_plan, same_sha256) == (plan, sha256)
            assert_same_store(store, expected, dataset)
    assert names == [["survey", "plan", "parts"] * 2] * 2
    assert sorted(count_reads) == ["case_00.nii.gz", "case_01.nii.gz", "case_02.nii.gz"]


def test_processes_that_do_not_share_a_file_system_are_told(tmp_path, dataset, monkeypatch):
    with pytest.raises(OSError, match=r"plan.json: not there \(1 of 1 missing\).*all hosts share"):
        prepare(dataset, tmp_path / "a", process_index=1, process_count=2)
    monkeypatch.setattr(parts_lib, "CASES_PER_PART", 1)
    with pytest.raises(OSError, match=r"part-001-of-003: not there \(1 of 3 missing\)"):
        prepare(dataset, tmp_path / "b", process_index=0, process_count=2)


def test_large_data_has_a_bounded_number_of_parts(dataset):
    cases_of = {3: 1, 4: 1, 5: 2, 256: 64, 257: 52, 10_000: 64}
    for num_cases, num_parts in cases_of.items():
        many = dataclasses.replace(dataset, cases=tuple(range(num_cases)))
        parts = parts_lib.cut(many, "folder")
        assert len(parts) == num_parts
        assert sum((part.cases for part in parts.values()), ()) == many.cases


def test_an_object_store_is_refused(dataset):
    with pytest.raises(OSError, match=r"gs://bucket/cache: .* local folder"):
        prepare(dataset, "gs://bucket/cache")


@pytest.mark.parametrize("path", ["~/cache", "cache", "./x/../cache"])
def test_home_and_relative_paths_work(tmp_path, dataset, monkeypatch, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store, _, _ = prepare(dataset, path)
    assert len(list((tmp_path / "cache").rglob("plan.json"))) == 1
    monkeypatch.chdir("/")
    assert store["case_00"].image[:1, :1, :1].shape == (1, 1, 1, 1)


def test_a_case_that_memory_does_not_hold_is_named_before_any_is_prepared(tmp_path, dataset):
    for path in dataset.cases[2].paths:
        values = np.asarray(nibabel.load(path).dataobj)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1000.0, 1000, 2000, 1])), path)
    with pytest.raises(cases.DatasetProblems) as caught:
        prepare(dataset, tmp_path / "cache")
    [problem] = caught.value.problems
    assert problem.startswith(f"{dataset.cases[2].image_path}: [20, 18, 8] voxels of 1000 x 1000")
    assert "x 2000 mm become [20000, 18000, 8000], which takes some" in problem
    assert not list((tmp_path / "cache").glob("*/part-*"))


DAMAGES = (
    lambda content: content[: len(content) // 2],
    lambda content: bytes(len(content)),
    lambda content: content[:10] + bytes([content[10] ^ 1]) + content[11:],
    lambda content: b"",
)


def test_a_part_that_is_damaged_is_made_again(tmp_path, dataset, count_reads):
    store, _, _ = prepare(dataset, tmp_path / "cache")
    expected = [whole(store[case.case_id]) for case in dataset.cases]
    files = [path for path in (tmp_path / "cache").rglob("part-*/**/*") if path.is_file()]
    assert len(files) > 4
    for path, damage in zip(files, itertools.cycle(DAMAGES), strict=False):
        path.write_bytes(damage(path.read_bytes()))
        count_reads.clear()
        store, _, _ = prepare(dataset, tmp_path / "cache")
        assert len(count_reads) == 3, path
        for case, original in zip(dataset.cases, expected, strict=True):
            assert_same_case(store[case.case_id], original)


def test_a_full_disk_is_named_with_the_setting_that_mends_it(tmp_path, dataset, monkeypatch):
    def full(self, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder.CaseBuilder, "download_and_prepare", full)
    with pytest.raises(OSError, match=r"No space left .*--config\.data\.cache_dir"):
        prepare(dataset, tmp_path / "cache")


def test_voxels_that_do_not_count_weigh_nothing(tmp_path, dataset):
    for case in dataset.cases:
        image = nibabel.load(case.label_path)
        values = np.asarray(image.dataobj).copy()
        values[:6] = 9
        nibabel.save(nibabel.Nifti1Image(values, image.affine), case.label_path)
    ignoring = dataclasses.replace(dataset, coding=LabelCoding((0, 1, 2), ignore=(9,)))
    store, _, _ = prepare(ignoring, tmp_path / "cache")
    for border_weight in (None, {"w0": 10.0, "sigma": 5.0}):
        store, _, _ = prepare(ignoring, tmp_path / "cache", border_weight=border_weight)
        case = whole(store["case_00"])
        assert not case.weight[:6].any() and (case.weight[6:] > 0).all()
        assert not case.label[:6].any() and case.label.any()
        assert min(voxels[:, 0].min() for voxels in case.locations) >= 6
