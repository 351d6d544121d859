import json

import numpy as np
import pytest

from jaxseg.data import splits
from jaxseg.data.layouts import decathlon
from jaxseg.data.splits import (
    SplitProblem,
    lists_folds,
    split_by_subject,
    split_from_file,
    subject_from_regex,
)

# Twelve subjects, the left and right side of each.
IDS = [f"s{number:02d}_{side}" for number in range(12) for side in "LR"]
subject_of = subject_from_regex(r"(s\d+)_[LR]")


def subjects(case_ids):
    return set(map(subject_of, case_ids))


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def message_of(function, *args, **kwargs):
    with pytest.raises(SplitProblem) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def assert_partition(split, case_ids):
    assert sorted(case for name in splits.SETS for case in split[name]) == sorted(case_ids)


@pytest.mark.parametrize("seed", range(5))
def test_no_subject_is_in_two_sets(seed):
    split = split_by_subject(IDS, seed=seed, subject_of=subject_of)
    assert_partition(split, IDS)
    groups = [subjects(split[name]) for name in splits.SETS]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 12
    assert [len(group) for group in groups] == [8, 2, 2]  # 15 % of 12 is 1.8
    assert all(split[name] == sorted(split[name]) for name in splits.SETS)


def test_without_a_regex_every_case_is_its_own_subject():
    split = split_by_subject(IDS, seed=0)
    assert [len(split[name]) for name in splits.SETS] == [16, 4, 4]
    assert subject_from_regex("")("a_b") == "a_b"


def test_the_same_subjects_in_another_order_split_alike():
    expected = split_by_subject(IDS, seed=3, subject_of=subject_of)
    shuffled = list(np.random.default_rng(0).permutation(IDS))
    for order in (IDS[::-1], shuffled):
        assert split_by_subject(order, seed=3, subject_of=subject_of) == expected


def test_the_seed_decides():
    drawn = {json.dumps(split_by_subject(IDS, seed=seed)) for seed in range(5)}
    again = {json.dumps(split_by_subject(IDS, seed=seed)) for seed in range(5)}
    assert len(drawn) == 5
    assert drawn == again


def test_folds_partition_the_subjects_outside_the_test_set():
    folds = [
        split_by_subject(IDS, seed=1, subject_of=subject_of, num_folds=4, fold=fold)
        for fold in range(4)
    ]
    tests = {tuple(split["test"]) for split in folds}
    assert len(tests) == 1
    validated = [case for split in folds for case in split["val"]]
    assert len(validated) == len(set(validated))
    assert sorted(validated) == sorted(set(IDS) - set(folds[0]["test"]))
    for split in folds:
        assert_partition(split, IDS)
        assert not subjects(split["train"]) & subjects(split["val"])
    sizes = [len(subjects(split["val"])) for split in folds]
    assert sorted(sizes) == [2, 2, 3, 3]  # 10 subjects, as even as can be


def test_cases_that_match_are_the_test_set_with_all_of_their_subject():
    split = split_by_subject(IDS, seed=0, subject_of=subject_of, test_regex="s0[34]_L")
    assert split["test"] == ["s03_L", "s03_R", "s04_L", "s04_R"]
    assert len(subjects(split["val"])) == 2


def test_validation_gets_one_subject_however_small_its_fraction():
    split = split_by_subject(["a", "b", "c"], seed=0, val_fraction=0.0, test_fraction=0.0)
    assert [len(split[name]) for name in splits.SETS] == [2, 1, 0]


@pytest.mark.parametrize("num_folds, fold", [(4, 4), (4, -1)])
def test_a_missing_fold_is_an_error(num_folds, fold):
    message = message_of(split_by_subject, IDS, seed=0, num_folds=num_folds, fold=fold)
    assert f"split.fold {fold} is missing" in message and str(num_folds) in message


def test_more_folds_than_subjects_is_an_error():
    options = {"subject_of": subject_of, "test_fraction": 0.5}
    message = message_of(split_by_subject, IDS, seed=0, num_folds=7, **options)
    assert "num_folds is 7" in message and "6 subjects" in message


def test_a_test_regex_that_matches_nothing_is_an_error():
    message = message_of(split_by_subject, IDS, seed=0, test_regex="patient")
    assert "'patient' matches none" in message


def test_a_subject_regex_that_misses_a_case_is_an_error():
    message = message_of(split_by_subject, [*IDS, "other"], seed=0, subject_of=subject_of)
    assert "split.subject_regex" in message and "'other'" in message


def test_one_subject_can_not_be_split():
    message = message_of(split_by_subject, ["s00_L", "s00_R"], seed=0, subject_of=subject_of)
    assert 'has no case in "train"' in message


def test_all_cases_in_the_test_set_is_an_error():
    message = message_of(split_by_subject, ["a", "b"], seed=0, test_regex=".")
    assert 'no case in "train"' in message and 'no case in "val"' in message


def test_saved_split_is_read_back(tmp_path):
    split = split_by_subject(IDS, seed=0, subject_of=subject_of)
    path = tmp_path / "split.json"
    splits.save_split(path, split)
    assert split_from_file(path, IDS, subject_of=subject_of) == split
    assert [file.name for file in tmp_path.iterdir()] == ["split.json"]


def test_the_list_of_nnunet_gives_each_fold(tmp_path):
    folds = [
        {"train": ["c", "b"], "val": ["a"]},
        {"train": ["a", "c"], "val": ["b"]},
    ]
    path = write(tmp_path / "splits_final.json", folds)
    case_ids = ["a", "b", "c"]
    assert split_from_file(path, case_ids) == {"train": ["b", "c"], "val": ["a"], "test": []}
    assert split_from_file(path, case_ids, fold=1)["val"] == ["b"]
    for fold in (2, -1):
        message = message_of(split_from_file, path, case_ids, fold=fold)
        assert path in message and f"fold {fold} is missing" in message and "2 folds" in message


def test_all_faults_of_a_file_are_named(tmp_path):
    content = {"train": ["s00_L", "s01_L", "gone_7"], "val": ["s00_R"], "test": ["s01_R", "gone_8"]}
    path = write(tmp_path / "split.json", content)
    case_ids = ["s00_L", "s00_R", "s01_L", "s01_R", "s02_L", "s02_R"]
    by_prefix = subject_from_regex("([a-z0-9]+)_")
    message = message_of(split_from_file, path, case_ids, subject_of=by_prefix)
    assert message.startswith(path)
    assert (
        "names cases that the dataset lacks or the split leaves unused: gone_7, gone_8" in message
    )
    assert "leaves cases out: s02_L, s02_R" in message
    assert "s00 (s00_L in train, s00_R in val)" in message
    assert "s01 (s01_L in train, s01_R in test); give its cases one set" in message


def test_nnunets_list_leaves_out_what_it_does_not_list(tmp_path):
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    path = tmp_path / "splits_final.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(folds).encode())  # with a byte-order mark
    split = split_from_file(path, ["a", "b", "c", "d"], fold=1)
    assert split == {"train": ["b", "c"], "val": ["a"], "test": []}
    assert lists_folds(path)
    # A case that the user leaves out leaves the split; one that is unknown does not.
    split = split_from_file(path, ["a", "c", "d"], excluded=["b"])
    assert split == {"train": ["a"], "val": ["c"], "test": []}
    assert "lacks or the split leaves unused: b" in message_of(split_from_file, path, ["a", "c"])
    single = write(tmp_path / "split.json", folds[0])
    assert "leaves cases out: d" in message_of(split_from_file, single, ["a", "b", "c", "d"])


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"train": ["a"', "", "\udcff"])
def test_a_damaged_file_is_one_clear_problem(tmp_path, text):
    path = tmp_path / "split.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for function in (lambda: split_from_file(path, ["a"]), lambda: lists_folds(path)):
        assert f"{path}: not a readable JSON split" in message_of(function)


def test_one_case_in_two_sets_is_an_error(tmp_path):
    path = write(tmp_path / "split.json", {"train": ["a", "b"], "val": ["b"]})
    assert "b (b in train, b in val)" in message_of(split_from_file, path, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a readable JSON split"),
        ("3", 'has no list "train"'),
        ('{"training": ["a"]}', 'has no list "train"'),
        ('{"train": ["a", "b"]}', 'has no case in "val"'),
        ('{"train": "ab", "val": ["b"]}', '"train" is not a list of case ids'),
        ('{"train": ["a"], "val": null}', '"val" is not a list of case ids'),
        ('{"train": ["a", 3], "val": ["b"]}', '"train" is not a list of case ids'),
    ],
)
def test_a_malformed_file_is_an_error(tmp_path, text, words):
    path = tmp_path / "split.json"
    path.write_text(text)
    message = message_of(split_from_file, path, ["a", "b"])
    assert message.startswith(str(path)) and words in message


def test_an_absent_file_is_an_error(tmp_path):
    message = message_of(split_from_file, tmp_path / "absent.json", ["a", "b"])
    assert "absent.json" in message and "--config.split.file" in message


def test_real_split_keeps_persons_together(shared_data):
    folder = shared_data("Task04_Hippocampus")
    case_ids = [case.case_id for case in decathlon.find(folder).cases]

    def person(case_id):
        return (int(case_id.removeprefix("hippocampus_")) + 1) // 2

    split = split_from_file(folder / "subject_split.json", case_ids, subject_of=person)
    assert_partition(split, case_ids)
    assert len(split["train"]) > len(split["val"]) > 0


def test_a_fold_of_a_file_with_one_split_is_missing(tmp_path):
    path = tmp_path / "split.json"
    path.write_text('{"train": ["a"], "val": ["b"]}')
    with pytest.raises(SplitProblem, match="fold 1 is missing, the file holds a single split"):
        splits.split_from_file(path, ["a", "b"], fold=1)


def test_unused_cases_are_in_no_set_and_may_share_a_subject_with_one(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["a1"], "val": ["b1"], "unused": ["a2", "b2"]}))
    split = split_from_file(path, ["a1", "a2", "b1", "b2"], subject_of=lambda case: case[0])
    assert split == {"train": ["a1"], "val": ["b1"], "test": []}
    path.write_text(json.dumps({"train": ["a1"], "val": ["b1"], "unused": ["b1"]}))
    with pytest.raises(SplitProblem, match="leaves unused: b1"):
        split_from_file(path, ["a1", "b1"])


def test_folds_with_other_test_sets_are_not_averaged():
    folds = [
        {"train": ["a", "b"], "val": ["c"], "test": ["d"]},
        {"train": ["c", "d"], "val": ["a"], "test": ["b"]},
    ]
    with pytest.raises(SplitProblem, match="different test sets"):
        splits.check_folds(folds)


def test_folds_that_validate_a_case_twice_are_not_averaged():
    folds = [
        {"train": ["a"], "val": ["b", "c"], "test": []},
        {"train": ["b"], "val": ["a", "c"], "test": []},
    ]
    with pytest.raises(SplitProblem, match="several folds validate c:"):
        splits.check_folds(folds)
    folds[1]["val"] = ["a"]
    splits.check_folds(folds)


def test_the_split_of_a_table():
    told = {
        "a": ("train", None),
        "b": ("val", None),
        "c": ("test", None),
        "d": ("unused", None),
        "e": ("", None),
    }
    assert splits.split_as_told(told) == {"train": ["a", "e"], "val": ["b"], "test": ["c"]}


def test_the_folds_of_a_table():
    told = {"a": ("", 0), "b": ("train", 1), "c": ("test", None), "d": ("", 2)}
    assert splits.split_as_told(told, fold=1) == {"train": ["a", "d"], "val": ["b"], "test": ["c"]}
    with pytest.raises(SplitProblem, match=r"split\.fold 3 is missing: .* \[0, 1, 2\]"):
        splits.split_as_told(told, fold=3)
    with pytest.raises(SplitProblem, match="puts a subject into two sets: anna"):
        splits.split_as_told(told, subject_of=lambda case: "anna" if case in "ab" else case)


def test_cases_with_one_image_are_not_divided(tmp_path):
    sets = ("train", "val", "test", "unused")
    told = {case: (name, None) for case, name in zip("abcd", sets, strict=True)}
    words = "divides cases that are one image: a (train) and c (test); give them one set, or"
    assert "the table " + words in message_of(splits.split_as_told, told, twins=[["c", "a"]])
    path = write(tmp_path / "split.json", {"train": ["a"], "val": ["b"], "test": ["c"]})
    message = message_of(split_from_file, path, "abc", twins=[["a", "c"], ["b", "gone"]])
    assert words in message and "subject" not in message
    assert splits.split_as_told(told, twins=[["a", "d"]])["train"] == ["a"]
    # One subject by an image that is in no set.
    of_one = {"a": "anna", "d": "anna"}.get
    message = message_of(
        splits.split_as_told, told, subject_of=lambda case: of_one(case, case), twins=[["d", "b"]]
    )
    assert "puts a subject into two sets: anna (a in train, b in val); give its" in message


def test_cases_with_one_image_are_of_one_subject():
    subject_of = splits.with_twins(
        lambda case: case[0],
        [["a1", "b1"], ["c1", "b2"], ["d1", "d2"], ["e1", "gone"]],
        ["a1", "b1", "b2", "c1", "d1", "d2", "e1", "f1"],
    )
    assert len({subject_of(case) for case in ("a1", "b1", "b2", "c1", "a2")}) == 1
    assert [subject_of(case) for case in ("d1", "e1", "f1")] == ["d", "e", "f"]
    ids = [f"{subject}{number}" for subject in "abcdefgh" for number in (1, 2)]
    for seed in range(5):
        split = split_by_subject(ids, seed=seed, subject_of=subject_of)
        [together] = [names for names in split.values() if "a1" in names]
        assert {"b1", "b2", "c1"} <= set(together)


def test_a_given_test_set_is_kept():
    split = split_by_subject(list("abcdefgh"), seed=0, test=["c"])
    assert split["test"] == ["c"] and len(split["val"]) == 1


@pytest.mark.parametrize(
    ("number", "validated"),
    [
        (13, [[0, 7, 9], [3, 6, 10], [8, 11, 12], [1, 4], [2, 5]]),
        (20, [[3, 8, 13, 16], [0, 10, 12, 15], [6, 7, 11, 17], [9, 14, 18, 19], [1, 2, 4, 5]]),
    ],
)
def test_folds_without_a_test_set_are_those_of_nnunet(number, validated):
    """As scikit-learn 1.9.1's KFold(5, shuffle=True, random_state=12345) has them."""
    ids = [f"case_{index:02}" for index in range(number)]
    folds = [
        split_by_subject(ids[::-1], seed=0, test_fraction=0, num_folds=5, fold=fold)["val"]
        for fold in range(5)
    ]
    assert folds == [[ids[index] for index in of] for of in validated]
    other = split_by_subject(ids, seed=1, test_fraction=0, num_folds=5, fold=0)["val"]
    assert other != folds[0]
