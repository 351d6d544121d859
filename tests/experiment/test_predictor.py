import functools
import json
import re
import shutil

import jax
import nibabel
import numpy as np
import pytest

from jaxseg import geometry
from jaxseg.data.images import read_image
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.labels import read_label
from jaxseg.experiment import predictor
from jaxseg.experiment.predictor import PredictorProblem, load_predictor
from jaxseg.problem import FileProblem, Problem
from jaxseg.run import checkpoint


def test_predicts_what_training_evaluated(finished_run):
    run, data = finished_run
    restored = load_predictor([str(run)])
    assert restored.class_names == ("background", "outer", "inner")
    test_ids = json.loads((run / "split.json").read_text())["test"]
    for case_id in test_ids:
        image, affine = read_image(data / "imagesTr" / f"{case_id}.nii.gz")
        assert predictor.check_image(restored, image, affine) == []
        label = predictor.segment(restored, image, affine)["label"]
        written, _ = read_label(
            run / "test" / f"{case_id}.nii.gz", LabelCoding(restored.label_values)
        )
        np.testing.assert_array_equal(label, written)
        assert len(np.unique(label)) == 3


def test_probabilities_are_at_the_temperature_that_validation_chose(finished_run):
    run, data = finished_run
    restored = load_predictor([str(run)], outputs=("label", "probs"))
    chosen = json.loads((run / "predictor.json").read_text())
    assert restored.recipe.temperature == pytest.approx(chosen["temperature"])
    image, affine = read_image(data / "imagesTr" / "case_00.nii.gz")
    probs = predictor.segment(restored, image, affine)["probs"]
    assert probs.shape == (*image.shape[:3], 3)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)


def copy_with(run, folder, name, **changes):
    """A copy of a run with fields of one of its JSON files changed."""
    shutil.copytree(run, folder)
    change_in(folder / name, **changes)
    return str(folder)


def change_in(path, *sections, **changes):
    content = json.loads(path.read_text())
    functools.reduce(dict.get, sections, content).update(changes)
    path.write_text(json.dumps(content))


def test_a_run_and_its_copy_agree_as_an_ensemble(finished_run, tmp_path):
    run, data = finished_run
    other = copy_with(run, tmp_path / "other", "predictor.json", temperature=4.0)
    outputs = ("label", "mutual_information", "entropy")
    both = load_predictor([str(run), other], outputs=outputs)
    own = json.loads((run / "predictor.json").read_text())["temperature"]
    assert both.recipe.temperature == pytest.approx(np.sqrt(own * 4.0))
    image, affine = read_image(data / "imagesTr" / "case_01.nii.gz")
    found = predictor.segment(both, image, affine)
    alone = predictor.segment(load_predictor([str(run)]), image, affine)
    np.testing.assert_array_equal(found["label"], alone["label"])
    np.testing.assert_allclose(found["mutual_information"], 0, atol=1e-5)
    assert found["entropy"].max() > 0.1


def test_identity_is_of_what_decides_the_label(finished_run, tmp_path):
    run, _ = finished_run
    identity = load_predictor([str(run)]).identity
    assert load_predictor([str(run)], outputs=("label", "entropy")).identity == identity
    assert load_predictor([str(run)], mirror=True).identity != identity
    assert load_predictor([str(run), str(run)]).identity != identity
    steps = [{"name": "fill_holes", "classes": [1]}, {"name": "fill_holes", "classes": [2]}]
    changed = {"postprocess": {"steps": steps, "decisions": []}}
    other = copy_with(run, tmp_path / "other", "predictor.json", **changed)
    assert load_predictor([other]).identity != identity


def test_label_is_post_processed(finished_run, tmp_path):
    run, data = finished_run
    step = {"name": "remove_small", "classes": [1, 2], "min_volume_mm3": 1e6}
    changed = {"postprocess": {"steps": [step], "decisions": []}}
    other = copy_with(run, tmp_path / "other", "predictor.json", **changed)
    image, affine = read_image(data / "imagesTr" / "case_02.nii.gz")
    assert predictor.segment(load_predictor([str(run)]), image, affine)["label"].any()
    assert not predictor.segment(load_predictor([other]), image, affine)["label"].any()


def test_an_image_unlike_the_training_set_is_flagged_with_the_reason(finished_run):
    run, data = finished_run
    restored = load_predictor([str(run)])
    image, affine = read_image(data / "imagesTr" / "case_00.nii.gz")
    (*reasons,) = predictor.check_image(restored, image, affine @ np.diag([10, 10, 10, 1]))
    assert any("spacing" in reason and "10" in reason for reason in reasons)
    with pytest.raises(PredictorProblem, match=r"2 channel\(s\), the network was trained on 1"):
        predictor.check_image(restored, np.concatenate([image, image], -1), affine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: (run / "predictor.json").unlink(), "holds no finished run"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "80"), "no checkpoint of step 80"),
        (
            lambda run: (run / "plan.json").write_text("{"),
            r"plan\.json: can not be read .*checkpoints/80/plan/metadata is a copy",
        ),
        (lambda run: (run / "data.json").unlink(), r"data\.json: can not be read \(No such file"),
        (lambda run: (run / "config.json").write_text("[]"), r"config\.json: can not be read"),
        (
            lambda run: (run / "predictor.json").write_text(""),
            r"predictor\.json: can not be read .*run the command of its training again",
        ),
        (
            lambda run: (run / "predictor.json").write_text(
                '{"step": 80, "temperature": 1, "postprocess": {"steps": [{"name": "exec"}]}}'
            ),
            "exec",
        ),
        (
            lambda run: change_in(run / "config.json", "model", features=[8, 24]),
            r"another network than that whose .*\(3, 3, 8, 24\), not \(3, 3, 8, 16\).*copies",
        ),
        (lambda run: change_in(run / "data.json", num_channels=2), "plan.json is of images with 1"),
    ],
)
def test_an_unusable_run_is_named(finished_run, tmp_path, change, words):
    shutil.copytree(finished_run[0], tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(Problem, match=words) as caught:
        load_predictor([str(tmp_path / "run")])
    assert str(tmp_path / "run") in str(caught.value)


def test_a_run_that_still_trains_predicts_with_its_best_network_so_far(
    finished_run, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(finished_run[0], run)
    (run / "predictor.json").unlink()
    checkpoints = str(run / "checkpoints")
    best = checkpoint.step_to_use(checkpoints)
    restored = load_predictor([str(run)], unfinished=True)
    assert restored.steps == [] and restored.recipe.temperature == 1.0
    (note,) = restored.notes
    assert note.startswith(f"{run} has not finished") and f"of step {best}," in note
    weights = checkpoint.load_variables(checkpoints, best)
    jax.tree.map(
        lambda ours, saved: np.testing.assert_array_equal(ours[0], saved),
        jax.device_get(restored.variables),
        weights,
    )
    assert load_predictor([str(finished_run[0])], unfinished=True).notes == ()

    def replaced(directory, step):  # while it was read
        monkeypatch.undo()
        assert step == 7
        raise FileNotFoundError("no checkpoint of step 7")

    monkeypatch.setattr(checkpoint, "step_to_use", lambda directory: 7)
    monkeypatch.setattr(checkpoint, "load_variables", replaced)
    again = load_predictor([str(run)], unfinished=True)
    assert again.identity == restored.identity
    shutil.rmtree(checkpoints)
    with pytest.raises(PredictorProblem, match="holds no finished run"):
        load_predictor([str(run)], unfinished=True)


def test_a_file_is_brought_back_from_where_the_message_says(finished_run, tmp_path):
    for name in ("config", "plan", "data"):
        run = shutil.copytree(finished_run[0], tmp_path / name)
        (run / f"{name}.json").write_text("")
        with pytest.raises(FileProblem) as caught:
            load_predictor([str(run)])
        (copy,) = re.findall(r"; (\S+) is a copy, put it there", str(caught.value))
        shutil.copy(copy, run / f"{name}.json")
        assert (
            load_predictor([str(run)]).identity == load_predictor([str(finished_run[0])]).identity
        )


def test_what_can_not_be_had_is_refused_before_any_work(finished_run, tmp_path):
    run = str(finished_run[0])
    with pytest.raises(PredictorProblem, match="mutual_information says how far members"):
        load_predictor([run], outputs=("label", "mutual_information"))
    with pytest.raises(PredictorProblem, match=r"no class 'liver' to explain.*'outer', 'inner'"):
        load_predictor([run], outputs=("label", "grad_cam:liver"))
    other = copy_with(run, tmp_path / "other", "data.json", class_names=["background", "a", "b"])
    with pytest.raises(PredictorProblem, match=r"differs from .* in classes"):
        load_predictor([run, other])


def test_output_lies_where_the_input_lies_whatever_its_axes(finished_run, tmp_path):
    run, data = finished_run
    restored = load_predictor([str(run)])
    source = nibabel.load(data / "imagesTr" / "case_03.nii.gz")
    image, affine = read_image(data / "imagesTr" / "case_03.nii.gz")
    upright = predictor.segment(restored, image, affine)["label"]
    for axes in ("PIR", "LAS", "SRA"):
        codes = nibabel.orientations.axcodes2ornt(axes)
        turned = source.as_reoriented(
            nibabel.orientations.ornt_transform(nibabel.io_orientation(source.affine), codes)
        )
        nibabel.save(turned, tmp_path / "turned.nii.gz")
        image, affine = read_image(tmp_path / "turned.nii.gz")
        label = predictor.segment(restored, image, affine)["label"]
        back, _ = geometry.to_canonical(label, affine)
        np.testing.assert_array_equal(back, geometry.to_canonical(upright, source.affine)[0])
