"""What a config says about the members of a run, and about its splits."""

import dataclasses
import json
import shutil

import jax
import nibabel
import numpy as np
import pytest

from jaxseg.config import base_config, from_json, to_json
from jaxseg.config_checks import validate
from jaxseg.data import cases
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.preprocess import Plan
from jaxseg.data.verify import CaseFacts
from jaxseg.experiment import advice, build, gather
from jaxseg.experiment.members import Member, kind_of_members, members_of
from jaxseg.planning.measures import CaseMeasures
from jaxseg.run.log import SilentLog


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("single", {}, (Member(4, 0, 1e-3),)),
        (
            "seeds",
            {"ensemble.size": 3},
            (Member(4, 0, 1e-3), Member(5, 0, 1e-3), Member(6, 0, 1e-3)),
        ),
        ("folds", {"ensemble.folds": 2}, (Member(4, 0, 1e-3), Member(4, 1, 1e-3))),
        (
            "rates",
            {"optim.learning_rate": [1e-2, 1e-4]},
            (Member(4, 0, 1e-2), Member(4, 0, 1e-4)),
        ),
    ],
)
def test_members_are_what_single_runs_would_train(kind, fields, expected):
    config = base_config()
    config.seed, config.optim.learning_rate = 4, 1e-3
    config.update_from_flattened_dict(fields)
    validate(config)
    for same in (config, from_json(to_json(config))):
        assert kind_of_members(same) == kind
        assert members_of(same) == expected


def test_members_begin_as_runs_with_their_seeds():
    config = base_config()
    config.model.features = (4, 8)
    config.ensemble.size = 2
    model, tx = build.create_model_for(config, 2), build.create_tx(config)
    state, keys, rates = build.create_members(config, model, tx, (8, 8, 1))
    for seed in range(2):
        alone = base_config()
        alone.model.features = (4, 8)
        alone.seed = seed
        one, key, rate = build.create_members(alone, model, tx, (8, 8, 1))
        jax.tree.map(lambda x, y, i=seed: np.testing.assert_array_equal(x[i], y), state, one)
        assert keys[seed] == key and rates[seed] == rate
    kernels = state.params["head"]["kernel"]
    assert (kernels[0] != kernels[1]).any()


def some_cases(num_cases):
    found = tuple(cases.Case(f"case_{i}", (f"{i}.nii",), f"{i}_seg.nii") for i in range(num_cases))
    return cases.Dataset("", found, ("b", "c"), LabelCoding((0, 1)))


def test_the_seed_of_a_run_does_not_decide_who_is_tested():
    config = base_config()
    splits = []
    for seed, split_seed in ((0, 0), (1, 0), (0, 1)):
        config.seed, config.split.seed = seed, split_seed
        splits.append(gather.make_split(config, some_cases(20), 0))
    assert splits[0] == splits[1] != splits[2]


def test_folds_of_an_ensemble_are_those_of_single_runs():
    config, alone = base_config(), base_config()
    config.ensemble.folds = 4
    alone.split.num_folds = 4
    validated = []
    for fold in range(4):
        split = gather.make_split(config, some_cases(20), fold)
        alone.split.fold = fold
        assert split == gather.make_split(alone, some_cases(20), fold)
        validated += split["val"]
    assert len(validated) == len(set(validated)) == 20 - len(split["test"])


def test_a_split_that_the_dataset_brings_is_honoured(tmp_path):
    (tmp_path / "splits_final.json").write_text(
        json.dumps(
            [
                {"train": ["case_0", "case_2"], "val": ["case_1"]},
                {"train": ["case_1", "case_2"], "val": ["case_0"]},
            ]
        )
    )
    dataset = dataclasses.replace(some_cases(3), root=str(tmp_path), split_file="splits_final.json")
    config = base_config()
    for fold, validated in ((0, "case_1"), (1, "case_0")):
        split = gather.make_split(config, dataset, fold)
        assert split["val"] == [validated] and split["test"] == []
    tested = dataclasses.replace(
        dataset,
        cases=(*dataset.cases, cases.Case("case_9", ("9.nii",), "9_seg.nii", set_name="test")),
    )
    assert gather.make_split(config, tested, 0)["test"] == ["case_9"]
    config.split.num_folds = 3  # asks for another
    assert len(gather.make_split(config, dataset, 2)["val"]) == 1


def test_subjects_and_sets_of_a_table_are_honoured():
    found = tuple(
        cases.Case(f"c{n}", (f"{n}.nii",), f"{n}_seg.nii", subject="ab"[n % 2], set_name=s)
        for n, s in enumerate(("train", "val", "train", "val"))
    )
    dataset = dataclasses.replace(some_cases(1), cases=found)
    split = gather.make_split(base_config(), dataset, 0)
    assert split == {"train": ["c0", "c2"], "val": ["c1", "c3"], "test": []}


@pytest.mark.parametrize("patch_size", [(16, 16), (8, 8, 8)])
def test_without_a_labelled_case_nothing_is_trained(make_msd_folder, tmp_path, patch_size):
    config = base_config(rank=len(patch_size))
    config.data.dir, config.data.cache_dir = str(make_msd_folder(num_cases=2)), str(tmp_path)
    config.data.exclude = ("*",)
    with pytest.raises(
        cases.DatasetProblems, match=r"no case has a label, there are 0 .* and 2 excluded"
    ):
        gather.load_data(config, SilentLog())


def test_that_nothing_is_labelled_is_not_said_of_a_part_of_the_data(make_msd_folder, tmp_path):
    root = make_msd_folder(num_cases=3)
    config = base_config()
    config.data.dir, config.data.cache_dir = str(root), str(tmp_path)
    blank, damaged, missing = (root / "labelsTr" / f"case_0{n}.nii.gz" for n in range(3))
    label = nibabel.load(blank)
    nibabel.save(nibabel.Nifti1Image(0 * np.asarray(label.dataobj), label.affine), blank)
    shutil.copy(blank, damaged)
    missing.unlink()
    with pytest.raises(cases.DatasetProblems) as caught:
        gather.find_data(config, SilentLog())
    [problem] = caught.value.problems
    assert "case_02.nii.gz is listed but missing" in problem
    damaged.write_bytes(b"")
    with pytest.raises(cases.DatasetProblems) as caught:
        gather.find_data(config, SilentLog())
    [_, problem] = caught.value.problems
    assert problem.startswith(f"{damaged}: ")


def test_what_a_split_leaves_out_is_told(make_msd_folder, tmp_path):
    root = make_msd_folder(num_cases=4)
    folds = [{"train": ["case_00", "case_03"], "val": ["case_01"]}]
    (root / "folds.json").write_text(json.dumps(folds))
    config = base_config()
    config.data.dir, config.data.cache_dir = str(root), str(tmp_path)
    config.split.file, config.data.exclude = "folds.json", ("case_03",)
    log = SilentLog()
    log.text = (lines := []).append
    found = gather.find_data(config, log)
    assert found.splits[0] == {"train": ["case_00"], "val": ["case_01"], "test": []}
    assert lines[0].endswith("3 labelled cases, 1 excluded")
    assert "1 labelled case(s) are in no set of the split: case_02" in lines


def facts(spacing_mm):
    measures = CaseMeasures((20, 20, 20), spacing_mm, (20, 20, 20))
    return CaseFacts(measures, (10, 5), "x")


def test_how_slices_are_cut_and_sides_are_mistaken_is_said():
    config, dataset = base_config(), some_cases(2)
    plan = Plan((4.0, 1.0, 1.0), ("zscore",), ((),), 1, 1, axes=(1, 2, 0))
    of_cases = [facts((4.0, 1.0, 1.0)), facts((1.0, 1.0, 9.0))]
    lines = list(advice.about_axes(config, dataset, of_cases, plan))
    assert len(lines) == 2
    assert lines[0].startswith("slices are sagittal: of voxels of 2.5 x 1 x 5 mm in the median")
    assert lines[1].startswith("slices of 1 training case(s), which lie another way")
    sided = dataclasses.replace(dataset, class_names=("background", "left_parotid"))
    axial = dataclasses.replace(plan, axes=(0, 1, 2), spacing_mm=(1.0, 1.0, 4.0))
    lines = list(advice.about_axes(config, sided, of_cases, axial))
    assert "mirrors left and right: --config.augment.flip.axes=(1,) ends that" in lines[-1]
    assert (
        len(list(advice.about_axes(config, sided, of_cases, plan))) == 2
    )  # no axis in plane is it
    config.augment.flip.axes = (1,)
    assert len(list(advice.about_axes(config, sided, of_cases, axial))) == 2


@pytest.mark.parametrize(
    ("name", "says_so"),
    [
        ("left_parotid", True),
        ("Kidney L", True),
        ("kidneyRight", True),
        ("LH-cortex", True),
        ("liver", False),
        ("bright lesion", False),
        ("cleft", False),
    ],
)
def test_names_of_sides(name, says_so):
    assert advice.names_a_side(name) == says_so


def test_a_split_that_was_drawn_stays_drawn():
    config = base_config()
    config.split.num_folds = 4
    dataset = some_cases(20)
    drawn = gather.make_split(config, dataset, 0)
    drawn["train"].append(drawn["val"].pop())
    assert gather.make_split(config, dataset, 0, drawn=drawn) is drawn
    assert gather.make_split(config, some_cases(21), 0, drawn=drawn) != drawn
