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
from jaxseg.experiment import portable
from jaxseg.experiment.predictor import load_predictor
from jaxseg.problem import Problem
from jaxseg.run import checkpoint

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
