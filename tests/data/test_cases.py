import json

import pytest

from jaxseg.data import cases
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.layouts import decathlon, patterns
from jaxseg.data.layouts.wanted import Wanted

LABELS = {"0": "background", "1": "liver", "2": "tumour"}


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_description(root, **changes):
    """dataset.json of the cases a and b, with `changes`; None removes a key."""
    content = {
        "modality": {"0": "CT"},
        "labels": LABELS,
        "numTraining": 2,
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in ("b", "a")
        ],
    }
    content = {key: value for key, value in (content | changes).items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def msd_root(tmp_path):
    touch(tmp_path, *(f"{folder}/{n}.nii.gz" for folder in ("imagesTr", "labelsTr") for n in "ab"))
    write_description(tmp_path)
    return tmp_path


def find_image_cases(root, image_glob, label_pattern, class_names, label_values, **others):
    coding = LabelCoding(label_values and tuple(label_values))
    wanted = Wanted(
        image_glob=image_glob,
        label_pattern=label_pattern,
        class_names=tuple(class_names),
        coding=coding,
        **others,
    )
    return patterns.find(root, wanted)


def problems_of(find, *args):
    with pytest.raises(cases.DatasetProblems) as caught:
        find(*args)
    return caught.value.problems


def assert_each_once(problems, fragments):
    """Each fragment is in one problem, and there are no other problems."""
    for fragment in fragments:
        assert sum(fragment in problem for problem in problems) == 1, (fragment, problems)
    assert len(problems) == len(fragments), problems


def test_problems_are_counted_and_listed():
    error = cases.DatasetProblems(["first", "second"])
    assert error.problems == ["first", "second"]
    assert str(error).splitlines() == ["2 problems in the dataset:", "- first", "- second"]
    assert str(cases.DatasetProblems(["only"])).startswith("1 problem in")


def test_find_msd_cases(msd_root):
    touch(msd_root, "imagesTr/._a.nii.gz", "imagesTr/.DS_Store", "imagesTr/notes.txt")
    dataset = decathlon.find(str(msd_root))
    assert dataset == cases.Dataset(
        root=str(msd_root),
        cases=tuple(
            cases.Case(
                name,
                (str(msd_root / "imagesTr" / f"{name}.nii.gz"),),
                str(msd_root / "labelsTr" / f"{name}.nii.gz"),
            )
            for name in ("a", "b")
        ),
        class_names=("background", "liver", "tumour"),
        coding=LabelCoding((0, 1, 2)),
        modalities=("CT",),
        layout=decathlon.LAYOUT,
    )


def test_numbers_in_the_description_are_sorted_as_numbers(msd_root):
    labels = {"10": "ten", "0": "background", "2": "two"}
    modalities = {str(number): f"m{number}" for number in reversed(range(11))}
    write_description(msd_root, labels=labels, modality=modalities)
    dataset = decathlon.find(msd_root)
    assert dataset.coding.values == (0, 2, 10)
    assert dataset.class_names == ("background", "two", "ten")
    assert dataset.modalities == tuple(f"m{number}" for number in range(11))


def test_no_description(tmp_path):
    assert_each_once(
        problems_of(decathlon.find, tmp_path),
        [f"{tmp_path / 'dataset.json'}: cannot be read (No such file"],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"labels": }', "not valid JSON (Expecting value: line 1 column 12"),
        (b'{"a": "\xff"}', "not valid JSON ('utf-8' codec"),
        (b"[]", "holds a list, not an object"),
    ],
)
def test_malformed_description(tmp_path, content, message):
    (tmp_path / "dataset.json").write_bytes(content)
    assert_each_once(problems_of(decathlon.find, tmp_path), [message])


def test_missing_keys_are_all_named(msd_root):
    write_description(msd_root, training=None, labels=None, modality=None)
    fragments = ['"training" is missing', '"labels" is missing', '"modality" is missing']
    assert_each_once(problems_of(decathlon.find, msd_root), fragments)


def test_all_structural_problems_appear_together(msd_root):
    touch(msd_root, "imagesTr/extra.nii.gz", "imagesTr/c.nii", "imagesTr/d.txt", "imagesTr/e.nii")
    touch(msd_root, "labelsTr/d.nii", "other/a.nii.gz", "labelsTr/a2.nii.gz")
    training = [
        {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"},
        {"image": "other/a.nii.gz", "label": "labelsTr/a2.nii.gz"},
        {"image": "./imagesTr/b.nii.gz", "label": "labelsTr/gone.nii.gz"},
        {"image": "imagesTr/lost.nii.gz", "label": "labelsTr/b.nii.gz"},
        {"image": "imagesTr/c.nii"},
        {"image": "imagesTr/d.txt", "label": "labelsTr/d.nii"},
        {"image": "imagesTr/e.nii", "label": "../secret.nii"},
        {"image": "/abs.nii", "label": "imagesTr/../../up.nii"},
        "imagesTr/f.nii",
        {"label": "labelsTr/a.nii.gz"},
        {"image": "imagesTr/a.nii.gz", "label": 3},
    ]
    write_description(
        msd_root, training=training, numTraining=12, labels={"1": "liver"}, modality={"1": "CT"}
    )
    problems = problems_of(decathlon.find, msd_root)
    assert_each_once(
        problems,
        [
            '"numTraining" is 12, but "training" lists 11',
            "1 classes; name 2 to 256",
            '"labels" has no "0"',
            '"modality" numbers its channels [1]',
            "labelsTr/gone.nii.gz is listed but missing",
            "imagesTr/lost.nii.gz is listed but missing",
            'image imagesTr/c.nii has no "label"',
            "imagesTr/d.txt is not named as a volume",
            "../secret.nii leads out of the dataset's folder",
            "/abs.nii leads out of the dataset's folder",
            "imagesTr/../../up.nii leads out of the dataset's folder",
            "entry 8 of \"training\" is 'imagesTr/f.nii'",
            'entry 9 of "training"',
            'entry 10 of "training"',
            "case a is there 2 times (",
        ],
    )
    path = msd_root / "dataset.json"
    assert all(str(path) in problem or problem.startswith("case a") for problem in problems)


def test_labels_that_are_neither_way_round_are_explained(msd_root):
    write_description(msd_root, labels={"background": 0, "liver": "one"})
    assert_each_once(
        problems_of(decathlon.find, msd_root),
        ["\"labels\" has keys ['background', 'liver'], not numbers"],
    )


def test_find_image_cases_in_two_folders(tmp_path):
    touch(tmp_path, "images/y.png", "images/x.png", "images/.x.png", "masks/x.png", "masks/y.png")
    dataset = find_image_cases(
        tmp_path, "images/*.png", "masks/{case}.png", ["background", "cell"], None
    )
    assert dataset == cases.Dataset(
        root=str(tmp_path),
        cases=tuple(
            cases.Case(
                name, (str(tmp_path / f"images/{name}.png"),), str(tmp_path / f"masks/{name}.png")
            )
            for name in ("x", "y")
        ),
        class_names=("background", "cell"),
        coding=LabelCoding(),
        layout=patterns.LAYOUT,
    )


def test_labels_beside_the_images_are_not_images(tmp_path):
    touch(tmp_path, "x.png", "y.png", "x_mask.png", "y_mask.png")
    dataset = find_image_cases(tmp_path, "*", "{case}_mask.png", ("b", "c"), [0, 255])
    assert [case.case_id for case in dataset.cases] == ["x", "y"]
    assert dataset.cases[0].label_path == str(tmp_path / "x_mask.png")
    assert dataset.coding.values == (0, 255)


def test_the_pattern_follows_the_folder_of_the_image(tmp_path):
    touch(tmp_path, "s1/m/x.png", "s2/y.png", "z.png")
    touch(tmp_path, "labels/s1/m/x_seg.png", "labels/s2/y_seg.png", "labels/z_seg.png")
    dataset = find_image_cases(
        tmp_path, "**/*.png", "labels/{dir}/{case}_seg.png", ("b", "c"), (0, 1)
    )
    found = {case.case_id: case.label_path for case in dataset.cases}
    assert found == {
        "x": str(tmp_path / "labels/s1/m/x_seg.png"),
        "y": str(tmp_path / "labels/s2/y_seg.png"),
        "z": str(tmp_path / "labels/z_seg.png"),
    }


def test_image_pairs_can_be_nifti(tmp_path):
    touch(tmp_path, "images/x.nii.gz", "labels/x.nii.gz")
    dataset = find_image_cases(tmp_path, "images/*", "labels/{case}.nii.gz", ("b", "c"), (0, 1))
    assert [case.case_id for case in dataset.cases] == ["x"]


def test_all_problems_of_image_pairs_appear_together(tmp_path):
    touch(tmp_path, "s1/x.png", "s2/x.png", "s1/y.png", "s1/x_m.png")
    problems = problems_of(
        find_image_cases, tmp_path, "*/*.png", "{dir}/{case}_m.png", ("b",), (0, 1)
    )
    assert_each_once(
        problems,
        [
            f"{tmp_path / 's2/x.png'}: its label {tmp_path / 's2/x_m.png'} is missing",
            f"{tmp_path / 's1/y.png'}: its label {tmp_path / 's1/y_m.png'} is missing",
            "case x is there 2 times",
            "1 classes",
            "label values [0, 1] for 1 class names",
        ],
    )


def test_no_image_matched_names_the_glob(tmp_path):
    problems = problems_of(find_image_cases, tmp_path, "imgs/*.png", "{case}.png", ("b", "c"), None)
    assert_each_once(problems, ["no image matches 'imgs/*.png'"])


def test_a_pattern_that_gives_the_image_itself(tmp_path):
    touch(tmp_path, "x.png")
    find = (find_image_cases, tmp_path, "*.png")
    problems = problems_of(*find, "{dir}/{case}.png", ("b", "c"), None)
    assert_each_once(problems, ["x.png: is its own label"])
    touch(tmp_path, "mask.tif")
    assert_each_once(problems_of(*find, "mask.tif", ("b", "c"), None), ["has no {case}"])


@pytest.mark.parametrize(
    ("class_names", "label_values", "message"),
    [
        (("a", "b", "c"), None, "3 class names, but without label values"),
        (("a", "b"), (0, 0), "label values [0, 0] for 2 class names"),
        (("a", "b"), (0, -1), "negative label values in [0, -1]"),
        (tuple(map(str, range(257))), tuple(range(257)), "257 classes"),
    ],
)
def test_classes_and_label_values_must_fit(tmp_path, class_names, label_values, message):
    touch(tmp_path, "x.png", "x_m.png")
    problems = problems_of(
        find_image_cases, tmp_path, "*.png", "{case}_m.png", class_names, label_values
    )
    assert_each_once(problems, [message])


def test_real_msd_folder(shared_data):
    dataset = decathlon.find(shared_data("Task04_Hippocampus"))
    assert len(dataset.cases) == 199
    assert dataset.class_names == ("background", "Anterior", "Posterior")
    assert dataset.modalities == ("MRI",)


@pytest.mark.parametrize(
    ("folder", "image_glob", "label_pattern", "num_cases"),
    [
        ("DSB2018", "images/*.png", "masks/{case}.png", 92),
        ("CHASE_DB1", "*.jpg", "{case}_1stHO.png", 28),
        (
            "axondeepseg_sem",
            "**/*_SEM.png",
            "derivatives/labels/{dir}/{case}_seg-axonmyelin-manual.png",
            10,
        ),
    ],
)
def test_real_image_folders(shared_data, folder, image_glob, label_pattern, num_cases):
    dataset = find_image_cases(
        shared_data(folder), image_glob, label_pattern, ("background", "object"), (0, 255)
    )
    assert len(dataset.cases) == num_cases
