import csv
import dataclasses
import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg import evaluate, metrics
from jaxseg.data import builder, cases

NAN = float("nan")
OPTIONS = {"spacing_mm": (), "normalisation": "auto", "image_order": 1, "label_order": 1}
# Second axis to the left, third to the front, first downwards, and shifted.
TURNED = np.array([[0, -1.1, 0, 9], [0, 0, 2.3, -7], [-0.9, 0, 0, 0.1], [0, 0, 0, 1]])
TILING = {"patch_size": (16, 16), "batch_size": 3}


def predict_reference(batch):
    """Probabilities 0 and 1, as the label has it."""
    return np.eye(3, dtype=np.float32)[batch["label"]]


def predict_nothing(batch):
    return np.eye(3, dtype=np.float32)[0 * batch["label"]]


@pytest.fixture
def dataset(make_msd_folder):
    """Three cases: one on a turned grid, one without class 2."""
    root = make_msd_folder(num_cases=3)
    for name in ("imagesTr", "labelsTr"):
        path = root / name / "case_01.nii.gz"
        volume = nibabel.load(path)
        turned = nibabel.Nifti1Image(np.asarray(volume.dataobj), TURNED)
        turned.set_qform(TURNED, code=1)
        turned.set_sform(TURNED, code=2)
        nibabel.save(turned, path)
    path = root / "labelsTr" / "case_02.nii.gz"
    volume = nibabel.load(path)
    values = np.minimum(np.asarray(volume.dataobj), 1)
    nibabel.save(nibabel.Nifti1Image(values, volume.affine), path)
    return cases.find_msd_cases(root)


def evaluated(dataset, cache, predict_fn, **options):
    store, _, _ = builder.prepare(dataset, ["case_00"], cache_dir=str(cache), **(OPTIONS | options))
    return list(
        evaluate.evaluate_cases(
            predict_fn,
            store,
            dataset.cases,
            label_values=dataset.label_values,
            num_classes=3,
            **TILING,
        )
    )


def save(folder, results, dataset):
    return evaluate.save_evaluation(
        str(folder),
        "test",
        results,
        class_names=dataset.class_names,
        label_values=dataset.label_values,
        about={"set": "test", "step": 7},
    )


def load_json(path):
    """Strict JSON, which has no NaN."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))


def voxels(path):
    return np.asarray(nibabel.load(path).dataobj)


def result_with(dice):
    dice = np.array(dice)
    return evaluate.CaseResult(None, None, None, None, {"dice": dice})


def test_a_perfect_network_scores_one_on_the_grid_of_the_files(tmp_path, dataset):
    turned = dataclasses.replace(dataset, cases=dataset.cases[1:2])
    store, _, _ = builder.prepare(turned, ["case_01"], cache_dir=str(tmp_path), **OPTIONS)
    (result,) = evaluate.evaluate_cases(
        predict_reference, store, turned.cases, label_values=(0, 1, 2), num_classes=3, **TILING
    )
    label = voxels(turned.cases[0].label_path)
    assert store["case_01"].label.shape != label.shape
    np.testing.assert_array_equal(result.label, label)
    np.testing.assert_array_equal(result.prediction, label)
    np.testing.assert_array_equal(result.affine, TURNED.astype(np.float32))
    for score in evaluate.SCORES:
        assert result.scores[score].tolist() == [1.0, 1.0, 1.0]


def test_every_case_is_scored_once_in_order_on_its_own_grid(tmp_path, dataset):
    results = evaluated(dataset, tmp_path, predict_reference, spacing_mm=(0.9, 0.8, 1.5))
    assert [result.case for result in results] == list(dataset.cases)
    for result in results:
        label = voxels(result.case.label_path)
        np.testing.assert_array_equal(result.label, label)
        assert result.prediction.shape == label.shape and result.prediction.dtype == np.uint8
        assert 0.9 < result.scores["dice"][1] < 1
        counts = metrics.confusion_counts(result.prediction, label, 3)
        expected = metrics.scores_from_counts(counts)
        np.testing.assert_array_equal(result.scores["dice"], expected["dice"])
    assert np.isnan(results[2].scores["dice"][2])


def test_the_reference_is_the_file_not_the_prepared_label(tmp_path, dataset):
    results = evaluated(dataset, tmp_path, predict_nothing)
    for result in results:
        assert not result.prediction.any()
        np.testing.assert_array_equal(result.label, voxels(result.case.label_path))
        assert result.scores["dice"][1] == 0
        assert np.isnan(result.scores["precision"][1])


def test_saved_files_say_what_was_found(tmp_path, dataset):
    results = evaluated(dataset, tmp_path / "cache", predict_reference, spacing_mm=(1.3, 1.2, 2.0))
    table, _ = save(tmp_path, results, dataset)

    content = load_json(tmp_path / "test.json")
    assert content["about"] == {"set": "test", "step": 7}
    assert content["class_names"] == ["background", "outer", "inner"]
    assert list(content["cases"]) == ["case_00", "case_01", "case_02"]
    for result in results:
        for score in evaluate.SCORES:
            saved = content["cases"][result.case.case_id][score]
            saved = [NAN if value is None else value for value in saved]
            np.testing.assert_array_equal(saved, result.scores[score])
    assert content["cases"]["case_02"]["dice"][2] is None
    dice = [result.scores["dice"][1:] for result in results]
    by_case = [np.mean(dice[0]), np.mean(dice[1]), dice[2][0]]
    assert content["mean_dice"] == pytest.approx(np.mean(by_case))
    summary = content["summary"]["dice"]
    assert summary["mean"][2] == pytest.approx((dice[0][1] + dice[1][1]) / 2)
    assert summary["num"] == [3, 3, 2]

    with open(tmp_path / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [
        (f"case_0{index}", name) for index in range(3) for name in ("outer", "inner")
    ]
    assert list(rows[0]) == ["case", "class", *evaluate.SCORES]
    assert float(rows[2]["iou"]) == results[1].scores["iou"][1]
    assert np.isnan(float(rows[5]["dice"]))

    lines = table.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["class", *evaluate.SCORES, "cases"]
    assert lines[1].startswith("outer") and lines[1].endswith(" 3")
    assert lines[2].startswith("inner") and lines[2].endswith(" 2")
    assert f"{summary['mean'][2]:.4f} ± {summary['sd'][2]:.4f}" in lines[2]


def test_predictions_are_written_on_the_grid_of_the_image_bit_for_bit(tmp_path, dataset):
    results = evaluated(dataset, tmp_path / "cache", predict_reference)
    recoded = dataclasses.replace(dataset, label_values=(0, 4, 300))
    save(tmp_path, results, recoded)
    assert len(list((tmp_path / "test").iterdir())) == 3
    for result in results:
        written = nibabel.load(tmp_path / "test" / f"{result.case.case_id}.nii.gz")
        image = nibabel.load(result.case.image_path)
        assert written.affine.tobytes() == image.affine.tobytes()
        for field in ("pixdim", "qform_code", "sform_code", "srow_x", "quatern_b", "xyzt_units"):
            np.testing.assert_array_equal(written.header[field], image.header[field])
        values = np.array([0, 4, 300])[result.prediction]
        np.testing.assert_array_equal(np.asarray(written.dataobj), values)


def coloured(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=-1) > 40).sum())


def test_the_contact_sheet_shows_reference_and_prediction(tmp_path, dataset):
    counts = {}
    for predict_fn in (predict_nothing, predict_reference):
        folder = tmp_path / predict_fn.__name__
        folder.mkdir()
        save(folder, evaluated(dataset, tmp_path / "cache", predict_fn), dataset)
        counts[predict_fn] = coloured(folder / "test.png")
    # Without a prediction there are half the overlays, and the legend.
    assert counts[predict_nothing] > 5000
    assert counts[predict_reference] > 1.8 * counts[predict_nothing]


def panels_of(monkeypatch, tmp_path, results, dataset):
    captured = []
    monkeypatch.setattr(
        evaluate.plots, "save_contact_sheet", lambda path, panels, names: captured.extend(panels)
    )
    save(tmp_path, results, dataset)
    return captured


def test_a_panel_shows_the_slice_with_most_foreground_upright(monkeypatch, tmp_path, dataset):
    results = evaluated(dataset, tmp_path / "cache", predict_reference)
    label = results[0].label.copy()
    label[:, :, 5] = 0
    label[3, 2, 5] = 2
    label[:, :, 3] = 1
    results = [dataclasses.replace(results[0], label=label)]
    ((title, image, reference, prediction, aspect),) = panels_of(
        monkeypatch, tmp_path, results, dataset
    )
    assert title == "case_00: Dice 1.000"
    assert image.shape == reference.shape == prediction.shape == (18, 20)  # y downwards, x right
    assert aspect == 1.0
    assert (reference == 1).all()  # z = 3
    source = voxels(dataset.cases[0].image_path)
    for x, y in [(0, 0), (4, 11), (19, 17)]:
        assert image[17 - y, x] == source[x, y, 3]


def test_pixels_of_a_panel_keep_their_shape(monkeypatch, tmp_path, dataset):
    results = evaluated(dataset, tmp_path / "cache", predict_reference)
    panels = panels_of(monkeypatch, tmp_path, results, dataset)
    # Spacing 0.9 along x of the file and 1.1 along y: a pixel is 1.1 high and 0.9 wide.
    assert panels[1][-1] == pytest.approx(1.1 / 0.9)


def test_a_sheet_has_six_cases_at_most(monkeypatch, tmp_path, dataset):
    results = evaluated(dataset, tmp_path / "cache", predict_reference) * 3
    assert len(panels_of(monkeypatch, tmp_path, results, dataset)) == 6


@pytest.mark.parametrize("size", [(20, 30), (1, 16)])
def test_pictures_are_evaluated_as_they_are(monkeypatch, tmp_path, size):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    rng = np.random.default_rng(0)
    shapes = [(*size, 3), size]  # colour and grey
    masks = rng.integers(0, 2, (2, *size)).astype(np.uint8) * 255
    for index, shape in enumerate(shapes):
        pixels = rng.integers(0, 255, shape).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"p{index}.png")
        Image.fromarray(masks[index]).save(tmp_path / "masks" / f"p{index}.png")
    dataset = cases.find_image_cases(
        tmp_path, "images/*.png", "masks/{case}.png", ("background", "cell"), None
    )
    for index, case in enumerate(dataset.cases):
        alone = dataclasses.replace(dataset, cases=(case,))
        store, _, _ = builder.prepare(
            alone, [case.case_id], cache_dir=str(tmp_path / "cache"), **OPTIONS
        )
        (result,) = evaluate.evaluate_cases(
            lambda batch: np.eye(2, dtype=np.float32)[batch["label"]],
            store,
            alone.cases,
            label_values=None,
            num_classes=2,
            **TILING,
        )
        assert result.scores["dice"].tolist() == [1.0, 1.0]
        with monkeypatch.context() as patch:
            ((_, image, reference, _, aspect),) = panels_of(patch, tmp_path, [result], alone)
        assert image.shape == shapes[index] and aspect == 1.0
        np.testing.assert_array_equal(reference, masks[index] > 0)
        written = np.asarray(Image.open(tmp_path / "test" / f"p{index}.png"))
        np.testing.assert_array_equal(written, masks[index] > 0)
        save(tmp_path, [result], alone)
        assert coloured(tmp_path / "test.png") > 100


def test_mean_dice_leaves_out_what_is_undefined():
    results = [result_with([1, 0.5, 1.0]), result_with([1, NAN, 0.25]), result_with([1, NAN, NAN])]
    scores = [result.scores for result in results]
    assert evaluate.mean_dice(scores) == pytest.approx((0.75 + 0.25) / 2)
    assert np.isnan(evaluate.mean_dice(scores[2:]))


def test_an_evaluation_without_any_defined_score_is_saved(tmp_path, dataset):
    label = np.zeros((20, 18, 8), np.uint8)
    counts = metrics.confusion_counts(label, label, 3)
    scores = metrics.scores_from_counts(counts)
    result = evaluate.CaseResult(dataset.cases[0], label, label, np.diag([1, 1, 2.0, 1]), scores)
    table, mean = save(tmp_path, [result], dataset)
    assert np.isnan(mean)
    content = load_json(tmp_path / "test.json")
    assert content["mean_dice"] is None
    assert content["cases"]["case_00"]["dice"] == [1.0, None, None]
    assert "nan" in table


def test_table_by_hand():
    scores = [
        {score: np.array([1.0, value, NAN]) for score in evaluate.SCORES} for value in (0.5, 0.75)
    ]
    scores[1]["recall"] = np.array([1.0, 1.0, NAN])
    table = evaluate.format_table(metrics.summarise(scores), ("background", "a", "longest"))
    head, first, second = table.splitlines()
    assert first == "a         " + "  0.6250 ± 0.1768" * 3 + "  0.7500 ± 0.3536" + "      2"
    assert second == "longest   " + "     nan ±    nan" * 4 + "      0"
    assert len(head) == len(first)
