"""Scores of cases against other libraries, and the command from files to files."""

import csv
import json
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxseg import evaluate
from jaxseg.data import pairs
from jaxseg.evaluation import metrics, scoring, statistics, tables
from jaxseg.experiment import evaluate_folder

NAN, INF = float("nan"), float("inf")
NUM_SHAPES = 200
CLASSES = ("background", "outer", "inner")
AFFINE = np.array([[0, -1.5, 0, 9], [0, 0, 2, -7], [-0.5, 0, 0, 1], [0, 0, 0, 1.0]])


def random_shape(seed):
    """A pair of masks of one kind of trouble, on an oblique anisotropic grid or in a picture."""
    rng = np.random.default_rng(seed)
    size = (*rng.integers(4, 17, 2), 1 if seed % 5 == 4 else rng.integers(4, 17))
    smooth = ndimage.gaussian_filter(rng.normal(size=(3, *size)), (0, 1.5, 1.5, 1.5))
    shared = smooth[0] / smooth[0].std()
    label, prediction = (shared + 0.5 * s / s.std() > 0.4 for s in smooth[1:])
    kind = seed // 5 % 8
    if kind == 1:
        label, prediction = rng.random((2, *size)) < rng.uniform(0.02, 0.2)
    elif kind == 2:
        prediction = np.zeros_like(prediction)
    elif kind == 3:
        label = np.zeros_like(label)
    elif kind == 4:
        label, prediction = np.zeros((2, *size), bool)
    elif kind == 5:
        label, prediction = np.zeros((2, *size), bool)
        for mask in (label, prediction):
            mask[tuple(rng.integers(0, size))] = True
    elif kind == 6:
        label[: size[0] // 2], prediction[: size[0] // 2 + 1] = True, True
    elif kind == 7:
        label, prediction = np.ones_like(label), rng.random(size) < 0.9
    spacing_mm = rng.uniform(0.4, 4, 3)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * spacing_mm
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return prediction, label, affine, spacing_mm


def scored(seed, tolerance_mm):
    """Masks and spacing without the axis that a picture lacks, and our scores of class 1."""
    prediction, label, affine, spacing_mm = random_shape(seed)
    scores = scoring.score_case(
        prediction.astype(np.uint8),
        label.astype(np.uint8),
        affine,
        2,
        tolerance_mm=tolerance_mm,
        lesions=True,
    )
    scores = {name: values[1] for name, values in scores.items()}
    kept = [axis for axis, size in enumerate(label.shape) if size > 1]
    masks = (mask.reshape([mask.shape[axis] for axis in kept]) for mask in (prediction, label))
    return (*masks, spacing_mm[kept], scores)


def test_the_random_shapes_hold_every_kind_of_trouble():
    shapes = [random_shape(seed)[:2] for seed in range(NUM_SHAPES)]
    sizes = [(p.sum(), g.sum()) for p, g in shapes]
    assert sum(p == 0 < g for p, g in sizes) >= 20 and sum(g == 0 < p for p, g in sizes) >= 20
    assert sum(p == g == 0 for p, g in sizes) >= 20 and sum(p == g == 1 for p, g in sizes) >= 20
    assert sum(g.shape[2] == 1 for _, g in shapes) == NUM_SHAPES // 5
    assert sum(p[0].any() and g[0].any() for p, g in shapes) >= 80


@pytest.mark.parametrize("start", range(0, NUM_SHAPES, 50))
def test_scores_equal_those_of_medpy(start):
    medpy = pytest.importorskip("medpy.metric.binary", exc_type=ImportError)
    for seed in range(start, start + 50):
        prediction, label, spacing_mm, scores = scored(seed, 1.5)
        expected = {}
        if prediction.any() or label.any():
            expected |= {"dice": medpy.dc(prediction, label), "iou": medpy.jc(prediction, label)}
        if prediction.any():
            expected["precision"] = medpy.precision(prediction, label)
        if label.any():
            expected["recall"] = medpy.recall(prediction, label)
        if prediction.any() and label.any():
            there, back = (
                getattr(medpy, "__surface_distances")(*pair, spacing_mm)
                for pair in ((prediction, label), (label, prediction))
            )
            both = np.concatenate([there, back])
            expected |= {
                "hd": medpy.hd(prediction, label, spacing_mm),
                "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
                "assd": both.mean(),
                "nsd": np.mean(both <= 1.5),
            }
            error = scores["volume_error_ml"] / scores["reference_volume_ml"]
            assert error == pytest.approx(medpy.ravd(prediction, label))
            if lesions_are_paired(prediction, label):
                # Of medpy, the "true positive rate" is of the objects of the result, and the "false
                # positive rate" of those of the reference, as its documentation says.
                every = {"connectivity": label.ndim}
                expected["lesion_precision"] = medpy.obj_tpr(prediction, label, **every)
                expected["lesion_recall"] = 1 - medpy.obj_fpr(prediction, label, **every)
        for name, score in expected.items():
            assert scores[name] == pytest.approx(score, rel=1e-9, abs=1e-12), (seed, name)


def lesions_are_paired(prediction, label):
    """Whether no lesion meets two, since medpy lets each meet but one."""
    structure = np.ones((3,) * label.ndim)
    (a, _), (b, _) = (ndimage.label(mask, structure) for mask in (prediction, label))
    met = np.unique(np.stack([a, b])[:, prediction & label], axis=1)
    return all(np.unique(row).size == row.size for row in met)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("start", range(0, NUM_SHAPES, 50))
def test_scores_equal_those_of_monai(start):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics", exc_type=ImportError)
    for seed in range(start, start + 50):
        prediction, label, spacing_mm, scores = scored(seed, 1.5)
        if not (prediction.any() or label.any()):
            continue
        masks = [torch.tensor(m, dtype=torch.float32)[None, None] for m in (prediction, label)]
        spacing = {"spacing": spacing_mm.tolist(), "include_background": True}
        expected = {
            "dice": monai.compute_dice(*masks, include_background=True, ignore_empty=False),
            "iou": monai.compute_iou(*masks, include_background=True, ignore_empty=False),
        }
        confusion = monai.get_confusion_matrix(*masks, include_background=True)
        if prediction.any():
            expected["precision"] = monai.compute_confusion_matrix_metric("precision", confusion)
        if label.any():
            expected["recall"] = monai.compute_confusion_matrix_metric("recall", confusion)
            expected["nsd"] = monai.compute_surface_dice(*masks, [1.5], **spacing)
        if prediction.any() and label.any():
            expected |= {
                "hd": monai.compute_hausdorff_distance(*masks, **spacing),
                "hd95": monai.compute_hausdorff_distance(*masks, percentile=95, **spacing),
                "assd": monai.compute_average_surface_distance(*masks, symmetric=True, **spacing),
            }
        for name, score in expected.items():
            assert scores[name] == pytest.approx(float(score), rel=1e-5), (seed, name)


def test_volumes_equal_those_of_simpleitk():
    sitk = pytest.importorskip("SimpleITK", exc_type=ImportError)
    for seed in range(0, NUM_SHAPES, 3):
        prediction, label, affine, spacing_mm = random_shape(seed)
        scores = scoring.score_case(prediction.astype(np.uint8), label.astype(np.uint8), affine, 2)
        for mask, name in ((prediction, "volume_ml"), (label, "reference_volume_ml")):
            image = sitk.GetImageFromArray(mask.astype(np.uint8).T)
            image.SetSpacing(spacing_mm.tolist())
            statistics = sitk.LabelShapeStatisticsImageFilter()
            statistics.Execute(image)
            expected = statistics.GetPhysicalSize(1) / 1000 if mask.any() else 0
            assert scores[name][1] == pytest.approx(expected)


def test_the_scores_of_a_case_without_a_class_by_hand():
    label = np.zeros((6, 6, 6), np.uint8)
    label[1:3, 1:3, 1:3] = 1
    prediction = np.where(label == 1, 2, label)
    scores = scoring.score_case(prediction, label, np.diag([1, 1, 2.5, 1]), 4, lesions=True)
    expected = {
        "dice": [0, 0, NAN],
        "iou": [0, 0, NAN],
        "precision": [NAN, 0, NAN],
        "recall": [0, NAN, NAN],
        "hd": [INF, INF, NAN],
        "hd95": [INF, INF, NAN],
        "assd": [INF, INF, NAN],
        "nsd": [0, 0, NAN],
        "volume_ml": [0, 0.02, 0],
        "reference_volume_ml": [0.02, 0, 0],
        "volume_error_ml": [-0.02, 0.02, 0],
        "lesion_precision": [NAN, 0, NAN],
        "lesion_recall": [0, NAN, NAN],
        "lesion_f1": [0, 0, NAN],
    }
    assert scores.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(scores[name][1:], expected[name], err_msg=name)
    assert set(scoring.score_case(prediction, label, np.eye(4), 4)) == {
        name for name in scores if not name.startswith("lesion")
    }


def test_scores_do_not_depend_on_the_order_of_the_memory():
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 3, (2, 7, 6, 5), dtype=np.uint8)
    affine = AFFINE.copy()
    affine[0, 0] = 0.3  # sheared, so that exchanged axes would show
    expected = scoring.score_case(prediction, label, affine, 3, lesions=True)
    orders = [(np.asfortranarray, np.asfortranarray), (np.asfortranarray, np.ascontiguousarray)]
    for of_prediction, of_label in orders:
        arrays = of_prediction(prediction), of_label(label)
        scores = scoring.score_case(*arrays, affine, 3, lesions=True)
        for name in expected:
            np.testing.assert_allclose(scores[name], expected[name], rtol=1e-12, err_msg=name)


def with_dice(*dice, **others):
    return {"dice": np.array([1.0, *dice])} | {k: np.array([1.0, *v]) for k, v in others.items()}


def test_mean_dice_leaves_out_what_is_undefined():
    scores = [with_dice(0.5, 1.0), with_dice(NAN, 0.25), with_dice(NAN, NAN)]
    assert metrics.mean_dice(scores) == pytest.approx((0.75 + 0.25) / 2)
    assert np.isnan(metrics.mean_dice(scores[2:]))


def test_the_worst_case_comes_first_and_undefined_ones_last():
    scores_of = {
        "empty": with_dice(NAN, NAN),
        "good": with_dice(0.9, 0.8),
        "b": with_dice(0.2, NAN),
        "a": with_dice(0.1, 0.3),
        "bad": with_dice(0.0, 0.1),
    }
    assert list(metrics.worst_first(scores_of)) == ["bad", "a", "b", "good", "empty"]


def load_json(path):
    """Strict JSON, which has no NaN."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))


def test_saved_scores_say_what_was_found(tmp_path):
    scores_of = {
        "good": with_dice(0.9, 0.8, hd=[2.0, 5.0]),
        "bad": with_dice(0.5, NAN, hd=[INF, NAN]),
        "middling": with_dice(0.6, 0.7, hd=[3.0, 4.0]),
    }
    table, mean = scoring.save_scores(
        str(tmp_path), "test", scores_of, class_names=CLASSES, about={"step": 7}
    )
    assert mean == pytest.approx((0.85 + 0.5 + 0.65) / 3)

    content = load_json(tmp_path / "test.json")
    assert content["about"] == {"step": 7} and content["class_names"] == list(CLASSES)
    assert content["mean_dice"] == mean
    assert list(content["cases"]) == ["bad", "middling", "good"]
    assert content["cases"]["bad"] == {"dice": [1.0, 0.5, None], "hd": [1.0, None, None]}
    dice, hd = content["summary"]["dice"], content["summary"]["hd"]
    assert dice["mean"] == pytest.approx([1, 2 / 3, 0.75])
    assert dice["sd"] == pytest.approx([0, np.std([0.9, 0.5, 0.6], ddof=1), np.sqrt(0.005)])
    assert dice["num"] == [3, 3, 2] and dice["num_infinite"] == [0, 0, 0]
    expected = statistics.bootstrap_interval([0.5, 0.6, 0.9])
    assert dice["interval"][1] == pytest.approx(expected, abs=1e-12)
    assert hd["mean"] == [1, 2.5, 4.5] and hd["num"] == [3, 2, 2]
    assert hd["num_infinite"] == [0, 1, 0]

    with open(tmp_path / "test.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["case", "class", "dice", "hd"],
        ["bad", "outer", "0.5", "inf"],
        ["bad", "inner", "nan", "nan"],
        ["middling", "outer", "0.6", "3.0"],
        ["middling", "inner", "0.7", "4.0"],
        ["good", "outer", "0.9", "2.0"],
        ["good", "inner", "0.8", "5.0"],
    ]
    assert table == tables.format_table(scoring.summarise(scores_of), CLASSES)


def test_scores_that_no_case_has_are_saved(tmp_path):
    label = np.zeros((4, 4, 4), np.uint8)
    scores_of = {"empty": scoring.score_case(label, label, np.eye(4), 3)}
    table, mean = scoring.save_scores(
        str(tmp_path), "val", scores_of, class_names=CLASSES, about={}
    )
    assert np.isnan(mean) and "nan" in table
    content = load_json(tmp_path / "val.json")
    assert content["mean_dice"] is None
    assert content["summary"]["dice"]["interval"] == [[None, None]] * 3


def test_table_by_hand():
    scores_of = {
        "a": with_dice(0.5, NAN, nsd=[0.5, NAN], hd=[2.0, NAN]),
        "b": with_dice(0.75, NAN, nsd=[0.0, NAN], hd=[INF, NAN]),
    }
    for scores in scores_of.values():
        scores |= {"iou": scores["dice"], "precision": scores["dice"], "recall": scores["dice"]}
        scores |= {"hd95": scores["hd"], "assd": scores["hd"]}
    table = tables.format_table(scoring.summarise(scores_of), ("background", "a", "longest"))
    overlap, surface = (part.splitlines() for part in table.split("\n\n"))
    assert overlap[0].split() == [
        "class",
        "dice",
        *["95", "%", "interval", "iou", "precision", "recall", "cases"],
    ]
    assert overlap[1].startswith("a        0.6250 ± 0.1768  0.5000 … 0.7500  0.6250 ± 0.1768")
    assert overlap[1].split()[-1] == "2"
    assert overlap[2].split()[:7] == ["longest", "nan", "±", "nan", "nan", "…", "nan"]
    assert surface[0].endswith("hd        hd95        assd  cases  no distance")
    # Of two cases, one has no distance; it is not in the mean of the distances, but in that of nsd.
    assert surface[1].split("  ")[-1].strip() == "1"
    assert "0.2500 ± 0.3536" in surface[1] and "2.00 ± nan" in surface[1]
    assert len({len(line) for line in overlap}) == len({len(line) for line in surface}) == 1


def write_nifti(path, values, affine, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(dtype), affine), path)


@pytest.fixture
def folders(tmp_path):
    """References of three cases, and predictions that miss ever more of them."""
    rng = np.random.default_rng(0)
    for index, case in enumerate(("c", "a", "b")):
        label = np.zeros((12, 10, 8), np.uint8)
        label[2:9, 2:8, 1:7], label[4:6, 4:6, 3:5] = 1, 2
        write_nifti(tmp_path / "references" / f"{case}.nii.gz", label, AFFINE)
        for name, shift in (("predictions", index), ("others", 5)):
            moved = np.roll(label, shift, axis=0)
            moved[rng.random(label.shape) < 0.02] = 1
            write_nifti(tmp_path / name / f"{case}.nii", moved, AFFINE)
    return tmp_path


def evaluated(root, **options):
    return evaluate_folder.evaluate_folders(
        str(root / "predictions"), str(root / "references"), **options
    )


def voxels(path):
    return np.asarray(nibabel.load(path).dataobj)


def test_folders_are_scored_case_by_case(folders, tmp_path):
    text = evaluated(folders, output=str(tmp_path / "out"), tolerance_mm=1.7, lesions=True)
    content = load_json(tmp_path / "out" / "evaluation.json")
    assert list(content["cases"]) == ["b", "a", "c"]
    assert content["class_names"] == ["background", "1", "2"]
    about = content["about"]
    assert about["label_values"] == [0, 1, 2] and about["tolerance_mm"] == 1.7
    assert about["unit"] == "mm" and about["references"] == str(folders / "references")
    for case, saved in content["cases"].items():
        expected = scoring.score_case(
            voxels(folders / "predictions" / f"{case}.nii"),
            voxels(folders / "references" / f"{case}.nii.gz"),
            AFFINE,
            3,
            tolerance_mm=1.7,
            lesions=True,
        )
        assert saved.keys() == expected.keys()
        for name in saved:
            values = [NAN if value is None else value for value in saved[name]]
            np.testing.assert_allclose(values, expected[name], err_msg=name)
    assert text.startswith(f"{folders / 'predictions'}: 3 cases, surface Dice (nsd) at 1.7 mm\n")
    dice = [metrics.mean_foreground(content["cases"][case]["dice"]) for case in "bac"]
    worst = "\n".join(f"  {case}  {value:.4f}" for case, value in zip("bac", dice, strict=True))
    assert f"mean Dice {np.mean(dice):.4f}; the worst cases:\n{worst}" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json",
        "evaluation.csv",
    }


def test_two_models_are_compared_on_the_same_cases(folders, tmp_path):
    text = evaluated(
        folders, others=str(folders / "others"), output=str(tmp_path / "out"), class_names=CLASSES
    )
    ours, theirs = (load_json(tmp_path / "out" / f"{n}.json") for n in ("evaluation", "compared"))
    rows = load_json(tmp_path / "out" / "comparison.json")
    assert [(row["score"], row["class"]) for row in rows] == [
        (score, name) for score in ("dice", "nsd") for name in ("outer", "inner")
    ]
    for row in rows:
        index = CLASSES.index(row["class"])
        a, b = ([of["cases"][c][row["score"]][index] for c in "abc"] for of in (ours, theirs))
        assert row["difference"] == pytest.approx(np.mean(np.subtract(a, b)))
        assert row["difference"] > 0 and row["num"] == 3
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert row["p_wilcoxon"] == pytest.approx(statistics.wilcoxon(a, b))
    assert f"{folders / 'predictions'} minus {folders / 'others'}" in text
    assert f"{rows[0]['difference']:+.4f}" in text


def problems_of(root, **options):
    with pytest.raises(pairs.EvaluationProblems) as caught:
        evaluated(root, **options)
    return caught.value.problems


def test_every_problem_is_named_before_anything_is_computed(folders, monkeypatch):
    monkeypatch.setattr(scoring, "score_case", lambda *_, **__: pytest.fail("computed"))
    predictions, references = folders / "predictions", folders / "references"
    label = voxels(references / "a.nii.gz")
    write_nifti(predictions / "a.nii", label[:-1], AFFINE)
    shifted = AFFINE.copy()
    shifted[0, 3] += 2.5
    write_nifti(predictions / "b.nii", label, shifted)
    write_nifti(predictions / "c.nii", label + 3 * (label == 2), AFFINE)
    write_nifti(predictions / "d.nii", label, AFFINE)
    write_nifti(references / "e.nii", label, AFFINE)
    (references / "f.nii.gz").write_bytes((references / "a.nii.gz").read_bytes()[:99])
    write_nifti(predictions / "f.nii", label, AFFINE)
    write_nifti(
        references / "g.nii",
        label + np.linspace(0, 0.5, label.size).reshape(label.shape),
        AFFINE,
        float,
    )
    write_nifti(predictions / "g.nii", label, AFFINE)
    problems = problems_of(folders, label_values=(0, 1, 2))
    found = {fragment: [p for p in problems if fragment in p] for fragment in (
        "no prediction of e;",
        f"{references}: no reference of d;",
        f"a.nii: shape [11, 10, 8], but {references / 'a.nii.gz'} has [12, 10, 8]",
        "b.nii: its affine differs",
        "voxels (",
        "c.nii: label values [5] are not among [0, 1, 2]",
        "f.nii.gz: damaged gzip file",
        "g.nii: holds",
    )}  # fmt: skip
    assert {fragment: len(lines) for fragment, lines in found.items()} == dict.fromkeys(found, 1)
    assert len(problems) == 7


def test_a_name_that_is_not_utf_8_is_named_before_anything_is_computed(folders):
    for folder in ("predictions", "references"):
        [path, *_] = sorted((folders / folder).iterdir())
        path.rename(path.with_name(os.fsdecode(b"M\xfcller") + "".join(path.suffixes)))
    named = [problem for problem in problems_of(folders) if "its name is not UTF-8" in problem]
    assert len(named) == 2 and all("/M\ufffdller.nii" in problem for problem in named)


def test_references_without_a_prediction_are_left_out_where_that_is_asked_for(folders):
    predictions, references = folders / "predictions", folders / "references"
    label = voxels(references / "a.nii.gz")
    write_nifti(references / "e.nii", label, AFFINE)
    assert "no prediction of e;" in problems_of(folders)[0]
    pairs_of, *_ = pairs.check_folders([predictions], references, subset=True)
    assert [pair.case_id for pair in pairs_of[0]] == ["a", "b", "c"]

    fewer = folders / "fewer"
    fewer.mkdir()
    write_nifti(fewer / "a.nii", label, AFFINE)
    with pytest.raises(pairs.EvaluationProblems, match="fewer: no prediction of b, c, to"):
        pairs.check_folders([predictions, fewer], references, subset=True)


def test_values_are_not_judged_by_some_of_the_references(folders):
    for case in "ab":
        path = folders / "references" / f"{case}.nii.gz"
        write_nifti(path, np.minimum(voxels(path), 1), AFFINE)
    (folders / "references" / "c.nii.gz").write_bytes(b"")
    (problem,) = problems_of(folders)  # not that no reference has the predictions' value 2
    assert "c.nii.gz: the file is empty" in problem


@pytest.mark.parametrize("value", [2.5, -1, np.inf, np.nan])
def test_what_is_no_label_is_named(folders, value):
    path = folders / "references" / "a.nii.gz"
    values = voxels(path).astype(np.float32)
    values[0, 0, 0] = value
    write_nifti(path, values, AFFINE, np.float32)
    (problem,) = problems_of(folders)
    assert f"{path}: holds 4 values from" in problem and f"{value:g}" in problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ("background", "a")}, "2 class names for 3 classes"),
        ({"label_values": (0, 1, 1)}, r"label values \[0, 1, 1\] are no classes"),
        ({"label_values": (0,)}, r"label values \[0\] are no classes"),
        ({"label_values": (-1, 1)}, r"label values \[-1, 1\] are no classes"),
        ({"label_values": (0, 2)}, r"a.nii: label values \[1\] are not among \[0, 2\]"),
        ({"others": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_a_wrong_request_is_named(folders, options, message):
    with pytest.raises(pairs.EvaluationProblems, match=message):
        evaluated(folders, **options)


def test_a_folder_without_labels_is_named(folders):
    for path in (folders / "references").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert problems_of(folders)[0].startswith(f"{folders / 'references'}: holds no label file")


def test_label_values_are_those_of_the_references(folders):
    for path in (folders / "references").iterdir():
        write_nifti(path, np.array([0, 7, 300])[voxels(path)], AFFINE, np.int16)
    assert len(problems_of(folders)) == 3  # the predictions have 1 and 2
    for path in (folders / "predictions").iterdir():
        write_nifti(path, np.array([0, 7, 300])[voxels(path)], AFFINE, np.float32)
    text = evaluated(folders)
    assert "\n7 " in text and "\n300 " in text


def test_maps_beside_a_prediction_are_no_predictions(folders):
    rng = np.random.default_rng(0)
    for name in ("a_probs", "a_entropy", "b_grad_cam_outer", "c_mutual_information"):
        write_nifti(
            folders / "predictions" / f"{name}.nii", rng.random((4, 4, 4, 3)), AFFINE, float
        )
    assert "3 cases" in evaluated(folders)
    write_nifti(folders / "predictions" / "d_probs.nii", np.zeros((4, 4, 4)), AFFINE)
    assert "no reference of d_probs;" in problems_of(folders)[0]


@pytest.mark.parametrize("mask_value", [1, 255])
def test_pictures_are_scored_in_pixels(tmp_path, mask_value):
    mask = np.zeros((9, 12), np.uint8)
    mask[2:6, 3:8] = 1
    for folder, values in (("references", mask_value * mask), ("predictions", np.roll(mask, 1, 1))):
        (tmp_path / folder).mkdir()
        Image.fromarray(values).save(tmp_path / folder / "p.png")
    text = evaluated(tmp_path, output=str(tmp_path / "out"))
    assert "at 1 pixel" in text
    content = load_json(tmp_path / "out" / "evaluation.json")
    assert content["cases"]["p"]["dice"][1] == pytest.approx(16 / 20)
    assert content["cases"]["p"]["hd"][1] == 1 and content["cases"]["p"]["nsd"][1] == 1
    assert content["about"]["unit"] == "pixel"


def run(*arguments):
    command = [sys.executable, "-m", "jaxseg.evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_the_scores(folders):
    done = run(
        f"--predictions={folders / 'predictions'}",
        f"--references={folders / 'references'}",
        "--class_names=background,outer,inner",
        "--label_values=0,1,2",
        "--tolerance_mm=2",
        "--lesions",
    )
    expected = evaluated(folders, class_names=CLASSES, tolerance_mm=2.0, lesions=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--references=x"], "--predictions must be given"),
        (["--predictions=x", "--references=y"], "y: no such folder"),
        (
            ["--predictions=x", "--references=y", "--tolerance_mm=nan"],
            "--tolerance_mm is nan; give a distance in mm",
        ),
        (["--predictions=x", "--references=y", "--label_values=0,one"], "'one'"),
        (["--prediction=x"], "Unknown command line flag 'prediction'. Did you mean: predictions"),
        (["x"], "unexpected argument 'x'"),
    ],
)
def test_the_command_says_what_is_wrong_without_a_traceback(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["jaxseg-evaluate", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxseg-evaluate: ") and message in error


def test_the_command_starts_without_what_it_does_not_need():
    code = (
        "import sys, jaxseg.evaluate; print(*({'tensorflow', 'jax', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_masks_of_any_depth_are_scored(tmp_path):
    mask = np.zeros((8, 9), np.uint8)
    mask[2:6, 3:7] = 1
    for name, values in (("p", mask), ("r", mask.astype(np.uint16) * 65535)):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "a.png")
    text = evaluate_folder.evaluate_folders(str(tmp_path / "p"), str(tmp_path / "r"))
    assert "mean Dice 1.0000" in text


def test_what_does_not_count_is_not_scored_and_contradictions_are_told_of(
    tmp_path,
):
    label = np.zeros((8, 9, 5), np.uint8)
    label[2:6, 3:7, 1:4] = 1
    reference = label.copy()
    reference[4:] = 9
    for name, values in (("p", label), ("r", reference)):
        (tmp_path / name).mkdir()
        image = nibabel.Nifti1Image(values, None)
        image.header.set_zooms((1.5, 1.5, 10.0))
        image.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]), 2, update_affine=False)
        nibabel.save(image, tmp_path / name / "a.nii.gz")
    options = {"label_values": (0, 1), "ignore_values": (9,), "output": str(tmp_path / "o")}
    text = evaluate_folder.evaluate_folders(str(tmp_path / "p"), str(tmp_path / "r"), **options)
    assert text.startswith("note: 2 files, for example the first: sform and pixdim contradict")
    scores = json.loads((tmp_path / "o" / "evaluation.json").read_text())["cases"]["a"]
    assert scores["dice"][1] == 1
    assert scores["reference_volume_ml"][1] == pytest.approx(2 * 4 * 3 * 22.5 / 1000)
