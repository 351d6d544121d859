"""Bytes of files flipped, cut and zeroed at random: what is read is right, or refused by name."""

import dataclasses
import functools
import itertools
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg.data import images, labels, prepared, surveyed
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.layouts import find
from jaxseg.data.layouts.wanted import Wanted
from jaxseg.experiment import gather, portable, replay, train
from jaxseg.experiment.predictor import load_predictor
from jaxseg.experiment.saved import saved_config
from jaxseg.problem import Problem
from jaxseg.run import checkpoint, identity, log

NUM_TRIES = 500


def damaged(content, rng):
    """The content with some bytes flipped, cut off or zeroed."""
    kind, content = rng.integers(3), bytearray(content)
    place = int(rng.integers(len(content)))
    if kind == 0:
        for index in rng.integers(len(content), size=rng.integers(1, 4)):
            content[index] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[place:]
    else:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    return bytes(content)


@pytest.fixture
def files(tmp_path, finished_run, monkeypatch):
    """By path a function that reads the file, or what it belongs to."""
    run, data = finished_run
    values = np.random.default_rng(0).integers(0, 3, (7, 6, 5)).astype(np.uint8)

    def read_both(path):
        images.read_image(path)
        labels.read_label(path, LabelCoding((0, 1, 2)))

    # What takes long, and is damaged apart.
    load_variables = checkpoint.load_variables
    monkeypatch.setattr(checkpoint, "load_variables", functools.cache(load_variables))
    found = {}
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / name)
        found[tmp_path / name] = read_both
    nibabel.save(nibabel.MGHImage(values, np.eye(4)), tmp_path / "a.mgz")
    found[tmp_path / "a.mgz"] = read_both
    for name in ("b.png", "b.jpg", "b.bmp", "b.tif"):
        Image.fromarray(values[..., 0] * 100).save(tmp_path / name)
        found[tmp_path / name] = lambda path: images.read_image(path)
    if sitk := pytest.importorskip("SimpleITK"):
        for name in ("c.nrrd", "c.mha"):
            sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name))
            found[tmp_path / name] = read_both
    description = data / "dataset.json"
    (tmp_path / "data").mkdir()
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / folder).symlink_to(data / folder)
    (tmp_path / "data" / "dataset.json").write_bytes(description.read_bytes())
    found[tmp_path / "data" / "dataset.json"] = lambda path: find.find_dataset(
        path.parent, Wanted()
    )
    (tmp_path / "run").mkdir()
    for path in run.iterdir():
        if path.suffix != ".json" and path.is_dir():
            (tmp_path / "run" / path.name).symlink_to(path)
        elif path.suffix == ".json":
            (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "plan.json", "data.json", "predictor.json"):
        found[tmp_path / "run" / name] = lambda path: load_predictor([str(path.parent)])
    for name, read in (
        ("identity.json", identity.read_sessions),
        ("metrics.jsonl", log.read_metrics),
        ("trace.jsonl", log.read_trace),
    ):
        shutil.copy(run / name, tmp_path / "run")
        found[tmp_path / "run" / name] = lambda path, read=read: read(path.parent)
    (step,) = (run / "checkpoints").glob("[0-9]*")
    checkpoints = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    saved = checkpoints / step.name
    arrays = max((saved / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    for path in (arrays, saved / "state" / "_METADATA", saved / "metrics" / "metrics"):
        found[path] = lambda path: load_variables(str(checkpoints), int(step.name))
    portable.export([str(run)], str(data / "imagesTr" / "case_00.nii.gz"), str(tmp_path / "served"))
    found[tmp_path / "served" / "predictor.jaxseg"] = portable.load_exported
    found |= cached(data, tmp_path / "cache")
    return found


def cached(data, folder):
    """Files of prepared cases, with a function that finds whether what is read of them is right."""
    everyone = find.find_dataset(data, Wanted())
    dataset = dataclasses.replace(everyone, cases=everyone.cases[:1])

    def read():
        survey, sha256, _ = surveyed.survey_once(dataset, cache_dir=str(folder))
        store, plan = prepared.prepare(
            dataset,
            ["case_00"],
            survey=survey,
            sha256=sha256,
            cache_dir=str(folder),
            spacing_mm=(),
            normalisation="auto",
            crop=False,
            image_order=1,
            label_order=1,
        )
        return store["case_00"].image[:, :, :], plan

    image, plan = read()

    def check(path):
        again, plan_again = read()
        np.testing.assert_array_equal(again, image)
        assert plan_again == plan

    return {path: check for path in folder.rglob("*") if path.is_file() and path.stat().st_size}


@pytest.mark.filterwarnings("ignore")
def test_every_outcome_is_right_or_a_named_refusal(files, tmp_path):
    rng = np.random.default_rng(0)
    for _, (path, read) in zip(range(NUM_TRIES), itertools.cycle(files.items()), strict=False):
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        try:
            read(path)
        except Problem as problem:
            places = [path, *itertools.takewhile(lambda place: place != tmp_path, path.parents)]
            assert any(place.name in str(problem) for place in places), problem
        except OSError as error:
            assert error.filename or str(path.name) in str(error), error
        finally:
            path.write_bytes(content)


# What a file of text can have become as a whole.
BECOME = {
    "nothing": lambda content: b"",
    "half": lambda content: content[: len(content) // 2] + b"\n",
    "a list": lambda content: b"[]\n",
    "an object": lambda content: b"{}\n",
    "null": lambda content: b"null\n",
    "a number": lambda content: b"1" * 5000 + b"\n",
    "noise": lambda content: bytes(range(256)),
    "nested": lambda content: b'{"a":' * 100_000 + b"\n",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", BECOME)
def test_what_is_kept_of_data_and_is_no_more_is_made_again(finished_run, tmp_path, damage):
    for path, check in cached(finished_run[1], tmp_path).items():
        path.write_bytes(BECOME[damage](path.read_bytes()))
        check(path)


# By command what it reads of a run.
READ = {
    "predict": {"config.json", "plan.json", "data.json", "predictor.json"},
    "reproduce": {"config.json", "plan.json", "data.json", "identity.json", "trace.jsonl"},
    "train": {"config.json", "plan.json", "data.json", "identity.json", "metrics.jsonl"}
    | {"trace.jsonl", "split.json"},
}


class GoesOn(Exception):
    """The files of the run were taken as they are."""


@pytest.fixture
def commands(finished_run, tmp_path, monkeypatch):
    """(folder of a copy of the run, by name functions that end where long work would begin)."""
    run, folder = finished_run[0], tmp_path / "copy"
    shutil.copytree(run, folder)
    config = saved_config(run)
    config.workdir = str(folder)
    load_variables = checkpoint.load_variables
    monkeypatch.setattr(checkpoint, "load_variables", functools.cache(load_variables))
    found = gather.find_data(config, log.SilentLog())
    data = gather.prepare_data(config, found, log.SilentLog())
    monkeypatch.setattr(gather, "find_data", lambda *args: found)
    monkeypatch.setattr(gather, "prepare_data", lambda *args: data)

    def go_on(*args, **options):
        raise GoesOn

    monkeypatch.setattr(train, "create_run", go_on)
    monkeypatch.setattr(replay, "replay", go_on)
    return folder, {
        "predict": lambda: go_on(load_predictor([str(folder)])),
        "reproduce": lambda: replay.reproduce(str(folder), say=lambda line: None),
        "train": lambda: train.train(config),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", BECOME)
def test_a_file_of_a_run_that_is_no_more_is_named_by_whoever_reads_it(commands, damage):
    folder, functions = commands
    refused = {name: set() for name in functions}
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl")):
        content = path.read_bytes()
        path.write_bytes(BECOME[damage](content))
        for name, function in functions.items():
            with pytest.raises((GoesOn, Problem)) as caught:
                function()
            if caught.type is not GoesOn:
                assert str(path) in str(caught.value)
                refused[name].add(path.name)
        path.write_bytes(content)
    no_rows = {"metrics.jsonl", "trace.jsonl"} if damage == "nothing" else set()
    expected = READ | {"train": READ["train"] - no_rows}  # which a run may go on without
    assert refused == expected
