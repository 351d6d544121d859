"""Which files of a folder are a dataset; no image is opened here."""

import json
import os
import shutil

import pytest

from jaxseg.data.cases import Case, DatasetProblems
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.layouts import decathlon, find, nnunet, patterns, table
from jaxseg.data.layouts.wanted import Wanted


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def describe(root, **content):
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))


def problems_of(function, *args):
    with pytest.raises(DatasetProblems) as caught:
        function(*args)
    return caught.value.problems


NNUNET = {
    "channel_names": {"0": "T1", "1": "CT"},
    "labels": {"tumour": 2, "background": 0, "organ": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def nnunet_root(tmp_path):
    for case in ("b", "a"):
        channels = (f"imagesTr/{case}_{number:04d}.nii.gz" for number in range(2))
        touch(tmp_path, *channels, f"labelsTr/{case}.nii.gz")
    describe(tmp_path, **NNUNET)
    return tmp_path


def test_an_nnunet_folder(nnunet_root):
    touch(nnunet_root, "splits_final.json", "imagesTr/._a_0000.nii.gz")
    dataset = find.find_dataset(nnunet_root, Wanted())
    assert dataset.layout == nnunet.LAYOUT
    files = [str(nnunet_root / f"imagesTr/a_000{channel}.nii.gz") for channel in range(2)]
    assert dataset.cases[0] == Case("a", tuple(files), str(nnunet_root / "labelsTr/a.nii.gz"))
    assert [case.case_id for case in dataset.cases] == ["a", "b"]
    assert dataset.class_names == ("background", "organ", "tumour")
    assert dataset.coding == LabelCoding((0, 1, 2))
    assert dataset.modalities == ("T1", "CT")
    assert dataset.split_file == "splits_final.json" and not dataset.notes


def test_classes_by_name_in_a_list_of_the_decathlon(tmp_path):
    labels = {"background": 0, "b": 2, "a": "1"}
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    msd(tmp_path, labels=labels)
    dataset = decathlon.find(tmp_path)
    assert dataset.class_names == ("background", "a", "b") and dataset.coding.values == (0, 1, 2)


def test_colours_of_nnunet_are_one_picture(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.png", "labelsTr/a.png")
    content = NNUNET | {"channel_names": {"0": "R", "1": "G", "2": "B"}, "numTraining": 1}
    describe(tmp_path, **(content | {"file_ending": ".png"}))
    (case,) = find.find_dataset(tmp_path, Wanted()).cases
    assert case.image_paths == (str(tmp_path / "imagesTr/a_0000.png"),)
    touch(tmp_path, "imagesTr/b_0000.png", "imagesTr/b_0001.png", "labelsTr/b.png")
    (problem,) = problems_of(find.find_dataset, tmp_path, Wanted())
    assert "case b has channels [0, 1], where dataset.json names 3" in problem


def test_a_table_as_a_spreadsheet_writes_it(tmp_path):
    touch(tmp_path, "i/a.nii", "l/a.nii")
    rows = b"\xef\xbb\xbfCase;Image_T1;Label;Subject\r\na;i\\a.nii;l\\a.nii;x\r\n;;;\r\n"
    (tmp_path / "cases.csv").write_bytes(rows)
    wanted = Wanted(class_names=("background", "a"), coding=LabelCoding((0, 1)))
    dataset = table.find(tmp_path, wanted)
    label = str(tmp_path / "l/a.nii")
    assert dataset.cases == (Case("a", (str(tmp_path / "i/a.nii"),), label, subject="x"),)
    assert dataset.modalities == ("T1",)


def test_the_ignore_label_of_nnunet_counts_for_nothing(nnunet_root):
    describe(nnunet_root, **NNUNET | {"labels": {"background": 0, "organ": 1, "ignore": 2}})
    dataset = nnunet.find(nnunet_root)
    assert dataset.coding == LabelCoding((0, 1), ignore=(2,))
    assert dataset.class_names == ("background", "organ")


def test_the_test_folder_of_nnunet_if_asked(nnunet_root):
    touch(nnunet_root, "labelsTs/c.nii.gz")
    for case in "cd":
        touch(nnunet_root, *(f"imagesTs/{case}_{number:04d}.nii.gz" for number in range(2)))
    assert len(nnunet.find(nnunet_root).cases) == 2
    dataset = nnunet.find(nnunet_root, Wanted(test_folder=True))
    assert [(case.case_id, case.set_name) for case in dataset.cases] == [
        ("a", ""),
        ("b", ""),
        ("c", "test"),
    ]
    assert [case.case_id for case in dataset.unlabelled] == ["d"]


def test_a_table_of_paths_in_the_description_of_nnunet(tmp_path):
    touch(tmp_path / "elsewhere", "x.mha", "x_seg.mha")
    table_of = {"x": {"images": ["../elsewhere/x.mha"], "label": "../elsewhere/x_seg.mha"}}
    one = {"channel_names": {"0": "CT"}, "numTraining": 1, "file_ending": ".mha"}
    describe(tmp_path / "root", **NNUNET | one, dataset=table_of)
    [case] = find.find_dataset(tmp_path / "root", Wanted()).cases
    assert case.image_path == str(tmp_path / "elsewhere" / "x.mha")
    assert case.label_path == str(tmp_path / "elsewhere" / "x_seg.mha")
    table_of["x"]["images"].append("gone.mha")
    describe(tmp_path / "root", **NNUNET | one, dataset=table_of)
    problems = problems_of(nnunet.find, tmp_path / "root")
    assert len(problems) == 2
    assert "2 images for 1 channels" in problems[0] and "gone.mha" in problems[1]


def test_all_problems_of_an_nnunet_folder(nnunet_root):
    (nnunet_root / "imagesTr/a_0001.nii.gz").unlink()
    (nnunet_root / "labelsTr/b.nii.gz").unlink()
    problems = problems_of(nnunet.find, nnunet_root)
    assert len(problems) == 2
    assert "case a has channels [0], where dataset.json names 2" in problems[0]
    assert "labelsTr/b.nii.gz: the label of case b is missing" in problems[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "has regions (whole), which"),
        ({"labels": {"organ": 1, "rim": 2}}, 'has no "background": 0'),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "one value to several names"),
        ({"labels": {}}, '"labels" is missing'),
        ({"file_ending": "nii"}, '"file_ending" is missing'),
        ({"channel_names": {"1": "T1", "2": "CT"}}, "numbers its channels [1, 2]"),
    ],
)
def test_a_description_of_nnunet_that_says_nonsense(nnunet_root, changes, message):
    describe(nnunet_root, **NNUNET | changes)
    assert any(message in problem for problem in problems_of(nnunet.find, nnunet_root))


@pytest.mark.parametrize("values", [(1, 2), (1,), (0,)])
def test_where_classes_are_wrong_labels_are_not_called_wrong_for_it(nnunet_root, values):
    names = {"abc"[value]: value for value in values}
    touch(nnunet_root, "images/a.png", "masks/a.png")
    for find_in, content, wanted in (
        (nnunet.find, NNUNET | {"labels": names}, Wanted()),
        (decathlon.find, {"labels": names}, Wanted()),
        (patterns.find, {}, Wanted(class_names=tuple(names), coding=LabelCoding((0, 1, 2)))),
    ):
        describe(nnunet_root, **content)
        with pytest.raises(DatasetProblems) as caught:
            find_in(nnunet_root, wanted)
        assert caught.value.found is None


def test_what_nothing_lists_is_a_note_or_if_strict_a_problem(nnunet_root):
    touch(nnunet_root, "imagesTr/other.nii.gz", "labelsTr/c.nii.gz", "imagesTr/readme.txt")
    describe(nnunet_root, **NNUNET | {"numTraining": 5})
    notes = nnunet.find(nnunet_root).notes
    assert len(notes) == 3
    assert "other.nii.gz" in notes[0] and "readme.txt" in notes[0] and "left out" in notes[0]
    assert "labelsTr/c.nii.gz: a label without" in notes[1] and "numTraining" in notes[2]
    assert problems_of(nnunet.find, nnunet_root, Wanted(strict=True)) == list(notes)


def msd(root, **changes):
    training = [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]
    content = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background", "1": "organ"},
        "training": training,
    }
    describe(root, **content | changes)


def test_channels_that_are_files_in_a_folder_of_nnunet_v1(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    msd(tmp_path)
    [case] = find.find_dataset(tmp_path, Wanted()).cases
    files = tuple(str(tmp_path / f"imagesTr/a_000{channel}.nii.gz") for channel in range(2))
    assert case == Case("a", files, str(tmp_path / "labelsTr/a.nii.gz"))
    (tmp_path / "imagesTr/a_0001.nii.gz").unlink()
    [problem] = problems_of(decathlon.find, tmp_path)
    assert "has no channel a_0001.nii.gz" in problem


def test_names_as_other_systems_write_them(tmp_path):
    decomposed, composed = "u\u0308.nii.gz", "\u00fc.nii.gz"
    touch(tmp_path, f"imagesTr/{decomposed}", "labelsTr/a.nii.gz", "imagesTr/b.nii.gz")
    training = [
        {"image": f"imagesTr/{composed}", "label": "labelsTr\\a.nii.gz"},
        {"image": str(tmp_path / "imagesTr/b.nii.gz"), "label": ".\\labelsTr\\a.nii.gz"},
    ]
    msd(tmp_path, training=training, numTraining="2", modality={"0": "T1"})
    path = tmp_path / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    dataset = decathlon.find(tmp_path)
    assert {case.image_path for case in dataset.cases} == {
        str(tmp_path / "imagesTr" / decomposed),
        str(tmp_path / "imagesTr/b.nii.gz"),
    }
    assert not dataset.notes


def test_an_image_that_no_list_names_is_a_note(tmp_path):
    touch(tmp_path, *(f"imagesTr/{name}.nii.gz" for name in "abcdefgh"), "labelsTr/a.nii.gz")
    msd(tmp_path, modality={"0": "T1"})
    [note] = decathlon.find(tmp_path).notes
    assert "imagesTr/b.nii.gz" in note and "and 2 more: not listed in dataset.json" in note
    assert problems_of(decathlon.find, tmp_path, Wanted(strict=True)) == [note]


def test_several_channels_by_several_patterns(tmp_path):
    touch(tmp_path, *(f"s{n}/s{n}_{k}.nii.gz" for n in (1, 2) for k in ("t1", "t2", "seg")))
    wanted = Wanted(
        image_glob="*/{case}_t1.nii.gz",
        other_channels=("{dir}/{case}_t2.nii.gz",),
        label_pattern="{dir}/{case}_seg.nii.gz",
    )
    dataset = find.find_dataset(tmp_path, wanted)
    assert dataset.layout == patterns.LAYOUT
    files = tuple(str(tmp_path / f"s1/s1_{kind}.nii.gz") for kind in ("t1", "t2"))
    assert dataset.cases[0] == Case("s1", files, str(tmp_path / "s1/s1_seg.nii.gz"))
    (tmp_path / "s2/s2_t2.nii.gz").unlink()
    [problem] = problems_of(patterns.find, tmp_path, wanted)
    assert "s2_t1.nii.gz: its channel" in problem and "s2_t2.nii.gz is missing" in problem


@pytest.mark.parametrize(
    ("image_glob", "label_pattern", "expected"),
    [
        ("{case}/image.nii.gz", "{case}/label.nii.gz", ["p1", "p2"]),
        ("{case}/{case}_*.mha", "{case}/label.nii.gz", ["p1", "p2"]),
        ("**/{case}_t1.mha", "{case}/label.nii.gz", ["p1", "p2"]),
        ("p[1]/{case}_t1.mha", "{case}/label.nii.gz", ["p1"]),
        ("p[!1]/{case}_t?.mha", "{case}/label.nii.gz", ["p2"]),
        ("[]^p][!]2]/{case}_t1.mha", "{case}/label.nii.gz", ["p1"]),
        ("./p[1-2]/{case}_t1.mha", "{dir}/../{case}/label.nii.gz", ["p1", "p2"]),
        ("./{case}//image.nii.gz", "{case}/label.nii.gz", ["p1", "p2"]),
    ],
)
def test_a_case_has_its_name_anywhere_in_a_path(tmp_path, image_glob, label_pattern, expected):
    touch(tmp_path, *(f"p{n}/{name}.nii.gz" for n in (1, 2) for name in ("image", "label")))
    touch(tmp_path, "p1/p1_t1.mha", "p2/p2_t1.mha", "p2/p1.mha")
    wanted = Wanted(image_glob=image_glob, label_pattern=label_pattern)
    dataset = find.find_dataset(tmp_path, wanted)
    assert dataset.layout == patterns.LAYOUT
    assert [case.case_id for case in dataset.cases] == expected
    label = os.path.normpath(dataset.cases[0].label_path)
    assert label == str(tmp_path / expected[0] / "label.nii.gz")


@pytest.mark.parametrize("image_glob", ["**.nii.gz", "", ".", "/", "/data/*", "**", "a/[z-b]*"])
def test_a_glob_that_is_none_is_one_clear_problem(tmp_path, image_glob):
    [problem] = problems_of(find.find_dataset, tmp_path, Wanted(image_glob=image_glob))
    assert f"data.image_glob is {image_glob!r}; " in problem and "**/*.nii.gz" in problem


@pytest.mark.parametrize("image_glob", ["*/{case}/image.nii", "**/{case}/image.nii"])
def test_links_to_folders_are_folders(tmp_path, image_glob):
    touch(tmp_path, "data/x/p1/image.nii", "data/x/p1/label.nii", "p2/image.nii", "p2/label.nii")
    root = tmp_path / "data"
    (root / "x" / "p2").symlink_to(tmp_path / "p2")
    (root / "x" / "up").symlink_to(root)
    (root / "x" / ".p3").symlink_to(tmp_path / "nowhere")
    wanted = Wanted(image_glob=image_glob, label_pattern="x/{case}/label.nii")
    dataset = find.find_dataset(root, wanted)
    assert [case.case_id for case in dataset.cases] == ["p1", "p2"] and not dataset.notes
    (root / "x" / "p3").symlink_to("/nowhere")
    [note] = find.find_dataset(root, wanted).notes
    assert "x/p3: is a link to /nowhere, where nothing is; mend or remove it" in note


def test_links_to_nothing_are_problems(tmp_path, nnunet_root):
    touch(tmp_path / "pairs", "masks/a.png", "masks/b.png", "images/a.png")
    (tmp_path / "pairs/images/b.png").symlink_to("/nowhere/x")
    [problem] = problems_of(patterns.find, tmp_path / "pairs", Wanted())
    assert "images/b.png: is a link to /nowhere/x, where nothing is" in problem
    image = nnunet_root / "imagesTr" / "b_0001.nii.gz"
    image.unlink()
    image.symlink_to("/nowhere/y")
    [problem] = problems_of(nnunet.find, nnunet_root)
    assert "b_0001.nii.gz: is a link to /nowhere/y" in problem


@pytest.mark.parametrize("image_glob", ["{case}/image.nii", "{case}/*.nii", "**/{case}/i*.nii"])
@pytest.mark.parametrize("name", ["{case}/image.nii", "{case}/label.nii"])
def test_a_link_to_nothing_is_one_problem(tmp_path, name, image_glob):
    touch(tmp_path, *(f"{case}/{of}.nii" for case in "ab" for of in ("image", "label")))
    path = tmp_path / name.format(case="b")
    path.unlink()
    path.symlink_to("/nowhere")
    wanted = Wanted(image_glob=image_glob, label_pattern="{case}/label.nii")
    [problem] = problems_of(find.find_dataset, tmp_path, wanted)
    assert "is a link to /nowhere, where nothing is" in problem and str(path) in problem


@pytest.mark.parametrize("name", ["dataset.json", "cases.csv"])
def test_a_description_that_is_a_link_to_nothing_is_not_passed_over(tmp_path, name):
    touch(tmp_path, "images/a.png", "masks/a.png")
    (tmp_path / name).symlink_to("/nowhere")
    [problem] = problems_of(find.find_dataset, tmp_path, Wanted())
    assert f"{name}: cannot be read (No such file or directory)" in problem


def test_links_to_nothing_of_nnunet_are_not_passed_over(nnunet_root):
    touch(nnunet_root, "imagesTs/c_0000.nii.gz", "imagesTs/c_0001.nii.gz", "labelsTs/d.nii.gz")
    (nnunet_root / "splits_final.json").symlink_to("/nowhere")
    assert nnunet.find(nnunet_root).split_file == "splits_final.json"  # which reading will tell
    (nnunet_root / "labelsTs" / "c.nii.gz").symlink_to("/nowhere")
    [problem] = problems_of(nnunet.find, nnunet_root, Wanted(test_folder=True))
    assert "the label of case c is a link to /nowhere" in problem


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_folder_that_is_a_link_to_nothing_is_named(tmp_path, folder):
    image, label = "imagesTr/a_0000.nii", "labelsTr/a.nii"
    touch(tmp_path, image, label)
    shutil.rmtree(tmp_path / folder)
    (tmp_path / folder).symlink_to("/nowhere")
    one = {"channel_names": {"0": "T1"}, "numTraining": 1, "file_ending": ".nii"}
    in_list = {
        "modality": {"0": "T1"},
        "labels": {"0": "background", "1": "organ"},
        "training": [{"image": image, "label": label}],
    }
    table_of = NNUNET | one | {"dataset": {"a": {"images": [image], "label": label}}}
    for content in (NNUNET | one, table_of, in_list):
        describe(tmp_path, **content)
        [problem] = problems_of(find.find_dataset, tmp_path, Wanted())
        assert f"{folder} is a link to /nowhere, where nothing is" in problem.replace(": is", " is")


def test_an_unlisted_link_to_nothing_is_told(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    (tmp_path / "imagesTr" / "b.nii.gz").symlink_to("/nowhere")
    msd(tmp_path)
    [note] = decathlon.find(tmp_path).notes
    assert "imagesTr/b.nii.gz: not listed" in note


def test_a_name_that_is_not_utf_8_is_a_problem(tmp_path):
    name = os.fsdecode(b"M\xfcller")
    touch(tmp_path, f"images/{name}.png", f"masks/{name}.png")
    first, *_ = problems_of(patterns.find, tmp_path, Wanted())
    assert first == f"{tmp_path}/images/M\ufffdller.png: its name is not UTF-8; rename it"
    (tmp_path / "masks" / f"{name}.png").unlink()  # what is said of the rest can be written too
    problems = problems_of(patterns.find, tmp_path, Wanted())
    assert len(problems) == 2 and "masks/M\ufffdller.png is missing" in "".join(problems)
    "".join(problems).encode()


def test_a_listed_name_that_no_file_can_have_is_missing(tmp_path):
    touch(tmp_path, "l.nii")
    msd(tmp_path, numTraining=1, training=[{"image": "\ud800.nii", "label": "l.nii"}])
    [problem] = problems_of(decathlon.find, tmp_path)
    assert "\ufffd.nii is listed but missing" in problem


@pytest.mark.parametrize("value", [1.7, "1.7", float("nan"), 1e999, [1], True])
def test_a_label_of_nnunet_is_a_whole_number(nnunet_root, value):
    describe(nnunet_root, **NNUNET | {"labels": {"background": 0, "organ": value}})
    if value is True:  # which is 1
        assert nnunet.find(nnunet_root).coding.values == (0, 1)
        return
    assert any('"labels" has' in problem for problem in problems_of(nnunet.find, nnunet_root))


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ({"background": 0, "a": 1, "b": 1}, "gives one number to several names"),
        ({"0": "background", "1": "a", "01": "b"}, "gives one number to several names"),
        ({"0": "background", "1.7": "a"}, "has keys ['0', '1.7'], not numbers"),
        ({"background": 0, "a": "\u00b2"}, "has keys ['background', 'a'], not numbers"),
    ],
)
def test_each_class_of_the_decathlon_has_a_number_of_its_own(tmp_path, labels, wrong):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    msd(tmp_path, labels=labels)
    [problem] = problems_of(decathlon.find, tmp_path)
    assert f'"labels" {wrong}' in problem


def test_a_key_that_comes_twice_is_not_passed_over(tmp_path):
    (tmp_path / "dataset.json").write_text('{"file_ending": ".nii", "labels": {"a": 1, "a": 2}}')
    [problem] = problems_of(find.find_dataset, tmp_path, Wanted())
    assert "not valid JSON ('a' comes twice)" in problem


def test_what_is_no_entry_is_shown_in_short(tmp_path):
    deep = json.loads("[" * 900 + "]" * 900)
    msd(tmp_path, training=[deep])
    assert 'entry 0 of "training" is [[[' in (problem := problems_of(decathlon.find, tmp_path)[0])
    assert len(problem) < len(str(tmp_path)) + 200


def test_a_table(tmp_path):
    touch(tmp_path / "data", "1_t1.nii.gz", "1_t2.nii.gz", "1.nii.gz", "2_t1.mha", "2_t2.mha")
    whole = tmp_path / "data" / "2_t2.mha"
    (tmp_path / "cases.csv").write_text(
        "\ufeffcase,image_t1,image_t2,label,subject,set,fold\n"
        "one,data/1_t1.nii.gz,data/1_t2.nii.gz,data/1.nii.gz,anna,train,1\n"
        f"two,data\\2_t1.mha,{whole},,,,\n",
        encoding="utf-8",
    )
    for root in (tmp_path, tmp_path / "cases.csv"):
        dataset = find.find_dataset(root, Wanted(class_names=("b", "c")))
        assert dataset.layout == table.LAYOUT and dataset.modalities == ("t1", "t2")
        [one], [two] = dataset.cases, dataset.unlabelled
        files = tuple(str(tmp_path / f"data/1_{kind}.nii.gz") for kind in ("t1", "t2"))
        assert one == Case("one", files, str(tmp_path / "data/1.nii.gz"), "anna", "train", 1)
        assert two == Case("two", (str(tmp_path / "data/2_t1.mha"), str(whole)))


def test_all_problems_of_a_table(tmp_path):
    touch(tmp_path, "a.png", "m.png")
    path = tmp_path / "cases.csv"
    path.write_text(
        "case;image;label;set;fold\n"
        "a;a.png;m.png;training;x\n"
        ";b.png;m.png;;\n"
        "a;a.png;m.png\n"
        "../c;a.png;m.png;;\n"
    )
    problems = problems_of(table.find, path, Wanted())
    for fragment in (
        "line 2: its set is 'training'",
        "line 2: its fold is 'x'",
        "line 3: the case '' is no name",
        "line 3: " + str(tmp_path / "b.png") + " is missing",
        "line 4 has another number of cells",
        "line 5: the case '../c' is no name",
        "case a is there 2 times",
    ):
        assert sum(fragment in problem for problem in problems) == 1, (fragment, problems)
    path.write_text("case,picture\n")
    assert len(problems_of(table.find, path, Wanted())) == 3  # no image, no label, an odd column
    path.write_text("case,image_T1,Image_T1,label\na,a.png,m.png,m.png\n")
    [problem] = problems_of(table.find, path, Wanted())
    assert "several columns are named image_T1" in problem and "name each once" in problem
    path.write_text(" case,Image,IMAGE,label,,,\na,a.png,m.png,m.png,,,\n")
    [problem] = problems_of(table.find, path, Wanted())
    assert "several columns are named image;" in problem
    path.write_text("case,image,label,,\na,a.png,m.png,,seen\n")
    [problem] = problems_of(table.find, path, Wanted())
    assert "column 'number 5' is unknown" in problem
    path.write_text("case,image,label,,\na,a.png,m.png,,\n")  # as spreadsheets leave it
    assert len(table.find(path, Wanted()).cases) == 1
    path.write_text("")
    assert "is empty" in problems_of(table.find, path, Wanted())[0]


@pytest.mark.parametrize(("cell", "fold"), [("3", 3), ("0.0", 0), ("2.", 2), ("\u00b2", None)])
def test_a_fold_is_a_whole_number(tmp_path, cell, fold):
    touch(tmp_path, "a.png", "m.png")
    (tmp_path / "cases.csv").write_text(f"case,image,label,fold\na,a.png,m.png,{cell}\n")
    if fold is None:
        [problem] = problems_of(table.find, tmp_path, Wanted())
        assert f"line 2: its fold is {cell!r}" in problem
    else:
        assert table.find(tmp_path, Wanted()).cases[0].fold == fold


def test_a_name_with_brackets_is_a_name(tmp_path):
    touch(tmp_path, "images/a[1].png", "masks/a[1].png", "images/a1.png", "masks/a1.png")
    dataset = find.find_dataset(tmp_path, Wanted(exclude=("a[1]",)))
    assert [case.case_id for case in dataset.cases] == ["a1"] and dataset.excluded == ("a[1]",)
    dataset = find.find_dataset(tmp_path, Wanted(exclude=("a[12]",)))
    assert [case.case_id for case in dataset.cases] == ["a[1]"]


def test_cases_are_left_out_by_name_or_pattern(nnunet_root):
    dataset = find.find_dataset(nnunet_root, Wanted(exclude=("b*",)))
    assert [case.case_id for case in dataset.cases] == ["a"]
    [problem] = problems_of(find.find_dataset, nnunet_root, Wanted(exclude=("c", "a")))
    assert "'c' is no case of" in problem


def test_a_folder_of_no_known_layout_says_what_was_looked_for(tmp_path):
    [problem] = problems_of(find.find_dataset, tmp_path, Wanted())
    for word in ("dataset.json", "cases.csv", "images/*", "--config.data.image_glob"):
        assert word in problem
    [problem] = problems_of(find.find_dataset, tmp_path / "gone", Wanted())
    assert "no such folder" in problem


def test_many_alike_problems_are_shown_as_a_few_and_a_number():
    problems = [f"{n}.nii: cut; copy it again" for n in range(40)] + ["a: b; mend it"]
    error = DatasetProblems(problems, all_in="run/problems.txt")
    lines = str(error).splitlines()
    assert lines[0] == "41 problems in the dataset:"
    assert lines[1:6] == [f"- {line}" for line in problems[:5]]
    assert lines[6:] == [
        "- ... and 35 more like the last",
        "- a: b; mend it",
        "all of them are in run/problems.txt",
    ]


@pytest.mark.parametrize(
    ("folder", "num_cases", "num_classes"),
    [("Dataset027_ACDC", 100, 4), ("Dataset501_HeadNeckCT", 50, 6)],
)
def test_real_nnunet_folders(shared_data, folder, num_cases, num_classes):
    dataset = find.find_dataset(shared_data(folder), Wanted())
    assert dataset.layout == nnunet.LAYOUT and dataset.split_file == "splits_final.json"
    assert len(dataset.cases) == num_cases and len(dataset.class_names) == num_classes
