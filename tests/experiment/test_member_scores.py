"""What becomes of the members of one run: averaged, chosen, scored, reported, restored."""

import contextlib
import json
import os
import shutil
import types

import jax
import numpy as np
import pytest
from scipy import stats

from jaxseg.config import base_config, from_json, to_json
from jaxseg.data.images import read_image
from jaxseg.data.label_values import LabelCoding
from jaxseg.data.labels import read_label
from jaxseg.data.layouts import decathlon
from jaxseg.data.preprocess import Plan
from jaxseg.experiment import assess, member_scores, members, portable, predictor, train
from jaxseg.experiment.predictor import PredictorProblem, load_predictor
from jaxseg.inference import whole_volume
from jaxseg.run import checkpoint
from jaxseg.run import log as run_log
from jaxseg.run.weights import WeightsProblem, read_weights
from jaxseg.training.state import TrainState

NUM_CLASSES, VALUES = 3, (0, 1, 2)
RECIPE = types.SimpleNamespace(axis_order=(2, 0, 1), crop=False)


def member(seed=0, fold=0, learning_rate=0.01):
    return members.Member(seed, fold, learning_rate)


def logits_of(image, shift):
    """Class k is where an image of make_msd_folder is nearest to 100 (k + shift)."""
    return np.stack([-((image[..., 0] / 100 - k - shift) ** 2) for k in range(NUM_CLASSES)], -1)


def label_of(case, shift):
    return logits_of(read_image(case.image_path)[0], shift).argmax(-1)


def segment_fn(variables, image, affine):
    """As `whole_volume.create_segment_fn` makes them, of networks whose only weight is a shift."""
    logits = np.mean([logits_of(image, shift) for shift in variables["params"]["shift"]], axis=0)
    sample = whole_volume.sampled(logits, image, affine, RECIPE)
    return {"label": logits.argmax(-1).astype(np.uint8), "sample": sample}


class FakeData:
    """Eight cases of which the last two are for the test; folds validate every second case."""

    def __init__(self, root, num_folds, has_test):
        self.dataset = decathlon.find(root)
        ids = [case.case_id for case in self.dataset.cases]
        test = ids[6:] if has_test else []
        rest = [case_id for case_id in ids if case_id not in test]
        step = num_folds or 3
        self.splits = [
            {
                "train": [i for i in rest if i not in rest[k::step]],
                "val": rest[k::step],
                "test": test,
            }
            for k in range(num_folds or 1)
        ]
        self.split = self.splits[0]
        self.plan = Plan((1.0, 1.0, 2.0), ("zscore",), ((),), 1, 1)
        self.sha256, self.num_classes = "abc", NUM_CLASSES

    def cases_of(self, set_name, member=0):
        split = self.splits[member if len(self.splits) > 1 else 0]
        return [case for case in self.dataset.cases if case.case_id in split[set_name]]


def run_of(folder, root, shifts, members, has_test=True, **changes):
    """(run, state) of members that are shifts."""
    config = base_config("unet")
    config.update_from_flattened_dict(changes)
    folder.mkdir()
    log = run_log.RunLog(str(folder))
    log.start_at(0)
    run = types.SimpleNamespace(
        config=config,
        workdir=str(folder),
        data=FakeData(root, config.ensemble.folds, has_test),
        log=log,
        segment_fn=segment_fn,
        recipe=RECIPE,
        members=members,
    )
    many = len(shifts) > 1
    shift = np.float32(shifts) if many else np.float32(shifts[0])
    step = np.full(len(shifts), 7) if many else np.int32(7)
    return run, TrainState(step, {"shift": shift}, {}, ())


def finish_run(run, state):
    with contextlib.closing(run.log):
        assess.assess(run, state)


def read(folder, name):
    return json.loads((folder / name).read_text())


def dice(case, label):
    """[outer, inner] of a prediction."""
    reference, _ = read_label(case.label_path, LabelCoding(VALUES))
    return [
        2 * np.sum((label == c) & (reference == c)) / (np.sum(label == c) + np.sum(reference == c))
        for c in (1, 2)
    ]


def assert_scores(folder, set_name, label_by_case):
    """The masks on disk and the scores are those of these labels."""
    scores = read(folder, f"{set_name}.json")["cases"]
    assert sorted(scores) == sorted(case.case_id for case in label_by_case)
    for case, label in label_by_case.items():
        written, _ = read_label(folder / set_name / f"{case.case_id}.nii.gz", LabelCoding(VALUES))
        np.testing.assert_array_equal(written, label)
        np.testing.assert_allclose(scores[case.case_id]["dice"][1:], dice(case, label))


@pytest.fixture
def no_post_processing(monkeypatch):
    """So that a test can say which voxel has which class."""
    monkeypatch.setattr(assess.postprocess, "choose_steps", lambda cases, num: ([], []))


@pytest.mark.parametrize("set_name", ["test", "val"])
def test_seeds_are_averaged_and_each_is_scored_alone(
    tmp_path, make_msd_folder, no_post_processing, set_name
):
    shifts = (0.5, 0.2, 0.35)
    root, folder = make_msd_folder(num_cases=8), tmp_path / "run"
    members = tuple(member(seed=seed) for seed in (4, 5, 6))
    options = {"has_test": set_name == "test", "ensemble.size": 3}
    run, state = run_of(folder, root, shifts, members, **options)
    finish_run(run, state)

    cases = run.data.cases_of(set_name)
    assert_scores(folder, set_name, {c: label_of(c, np.mean(shifts)) for c in cases})
    found = read(folder, "members.json")
    assert (found["kind"], found["set"], found["chosen"]) == ("seeds", set_name, None)
    assert [row["seed"] for row in found["members"]] == [4, 5, 6]
    by_class = np.array([np.mean([dice(c, label_of(c, s)) for c in cases], 0) for s in shifts])
    np.testing.assert_allclose([row["dice_by_class"] for row in found["members"]], by_class)
    means = by_class.mean(1)
    np.testing.assert_allclose([row["dice"] for row in found["members"]], means)
    summary = found["summary"]
    for values, of_score in zip(
        (means, *by_class.T), (summary["dice"], *summary["dice_by_class"]), strict=True
    ):
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose(of_score["interval"], interval)
        assert of_score["sd"] == pytest.approx(np.std(values, ddof=1))
        assert of_score["num"] == 3
    chosen = read(folder, "predictor.json")
    assert (chosen["kind"], chosen["member"], chosen["step"]) == ("seeds", None, 7)
    expected = f"{means.mean():.4f} ± {means.std(ddof=1):.4f} (95 % interval"
    assert (
        f"mean {set_name} Dice of a member alone {expected}" in (folder / "train.log").read_text()
    )


def test_seeds_are_scored_with_the_post_processing_of_their_average(tmp_path, make_msd_folder):
    run, state = run_of(
        tmp_path / "run",
        make_msd_folder(8),
        (0.3, -0.1),
        (member(0), member(1)),
        **{"ensemble.size": 2},
    )
    everything = [{"name": "remove_small", "classes": [1, 2], "min_volume_mm3": 1e6}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assess.postprocess, "choose_steps", lambda cases, num: (everything, []))
        finish_run(run, state)
    assert [row["dice"] for row in read(tmp_path / "run", "members.json")["members"]] == [0, 0]


@pytest.mark.parametrize("has_test", [True, False])
def test_each_fold_is_predicted_by_the_member_that_was_not_trained_on_it(
    tmp_path, make_msd_folder, no_post_processing, has_test
):
    shifts, folder = (0.45, 0.3), tmp_path / "run"
    members = (member(fold=0), member(fold=1))
    run, state = run_of(
        folder, make_msd_folder(8), shifts, members, has_test=has_test, **{"ensemble.folds": 2}
    )
    finish_run(run, state)

    fold_of = {c: k for k in (0, 1) for c in run.data.cases_of("val", member=k)}
    assert len(fold_of) == (6 if has_test else 8)
    out_of_fold = {c: label_of(c, shifts[k]) for c, k in fold_of.items()}
    for case, label in out_of_fold.items():
        np.testing.assert_array_equal(
            read_label(folder / "val" / f"{case.case_id}.nii.gz", LabelCoding(VALUES))[0], label
        )
    if has_test:
        assert_scores(folder, "test", {c: label_of(c, 0.375) for c in run.data.cases_of("test")})
        assert "average of 2 networks, one of each fold" in (folder / "report.md").read_text()
    else:
        assert_scores(folder, "val", out_of_fold)
        assert "Cross-validated: each case was predicted" in (folder / "report.md").read_text()
    found = read(folder, "members.json")
    assert (found["kind"], found["set"]) == ("folds", "val")
    for k, row in enumerate(found["members"]):
        expected = [dice(c, out_of_fold[c]) for c in run.data.cases_of("val", member=k)]
        assert (row["fold"], row["num_cases"]) == (k, len(expected))
        np.testing.assert_allclose(row["dice"], np.mean(expected))
    assert read(folder, "predictor.json")["kind"] == "folds"


def test_the_learning_rate_with_the_best_validation_dice_is_the_network(
    tmp_path, make_msd_folder, no_post_processing
):
    shifts, rates, folder = (0.4, 0.3, np.nan), (0.1, 0.01, 0.001), tmp_path / "run"
    members = tuple(member(learning_rate=rate) for rate in rates)
    changes = {"optim.learning_rate": rates}
    run, state = run_of(folder, make_msd_folder(8), shifts, members, **changes)
    finish_run(run, state)

    assert_scores(folder, "test", {c: label_of(c, 0.3) for c in run.data.cases_of("test")})
    found = read(folder, "members.json")
    assert (found["kind"], found["set"], found["chosen"]) == ("rates", "val", 1)
    assert "summary" not in found
    cases = run.data.cases_of("val")
    expected = [np.mean([dice(c, label_of(c, s)) for c in cases]) for s in (0.4, 0.3)]
    np.testing.assert_allclose([row["dice"] for row in found["members"][:2]], expected)
    assert read(folder, "predictor.json")["member"] == 1
    assert "; 0.01 is used" in (folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("dice", "best"), [([np.nan, 0.2, 0.3], 2), ([0.0, np.nan], 0), ([np.nan, np.nan], 0)]
)
def test_a_member_without_a_score_is_not_the_best(dice, best):
    scores = [{"a": {"dice": np.array([1.0, value])}} for value in dice]
    assert member_scores.best_member(scores) == best


def test_a_single_network_has_no_members(tmp_path, make_msd_folder, no_post_processing):
    run, state = run_of(tmp_path / "run", make_msd_folder(8), (0.35,), (member(),))
    finish_run(run, state)
    assert_scores(
        tmp_path / "run", "test", {c: label_of(c, 0.35) for c in run.data.cases_of("test")}
    )
    assert not (tmp_path / "run" / "members.json").exists()
    assert "Members" not in (tmp_path / "run" / "report.md").read_text()
    chosen = read(tmp_path / "run", "predictor.json")
    assert (chosen["kind"], chosen["member"]) == ("single", None)


def test_the_report_says_which_source_computed_it(tmp_path, make_msd_folder, no_post_processing):
    run, state = run_of(tmp_path / "run", make_msd_folder(8), (0.35,), (member(),))
    sessions = [{"first_step": 0, "source": "abc"}, {"first_step": 5, "source": "def+changes"}]
    (tmp_path / "run" / "identity.json").write_text(json.dumps({"sessions": sessions}))
    finish_run(run, state)
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert "- git revision: def+changes\n" in markdown
    assert f"- device: {jax.device_count()} x" in markdown


def test_a_class_that_no_case_of_a_fold_has_does_not_count():
    scores = [
        {"a": {"dice": np.array([1, 0.5, np.nan])}, "b": {"dice": np.array([1, 0.7, np.nan])}},
        {"c": {"dice": np.array([1, 0.8, 0.4])}},
    ]
    found = member_scores.summarise_members("folds", "val", (member(), member(fold=1)), scores)
    assert found["members"][0]["dice_by_class"] == [pytest.approx(0.6), None]
    assert [row["dice"] for row in found["members"]] == [pytest.approx(0.6), pytest.approx(0.6)]
    first, second = found["summary"]["dice_by_class"]
    assert (first["num"], second["num"], second["mean"]) == (2, 1, 0.4)
    assert second["interval"] == [None, None]


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def save_run(source, folder, step, variables, **changes):
    """A copy of a run with other weights, and fields of its config and predictor.json changed."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints"))
    chosen = json.loads((folder / "predictor.json").read_text())
    config = from_json((folder / "config.json").read_text())
    config.update_from_flattened_dict(
        {name: value for name, value in changes.items() if "." in name}
    )
    chosen |= {name: value for name, value in changes.items() if "." not in name}
    (folder / "config.json").write_text(to_json(config))
    (folder / "predictor.json").write_text(json.dumps(chosen))
    manager = checkpoint.open_checkpoints(str(folder / "checkpoints"), keep=1)
    state = TrainState(np.int32(step), variables["params"], variables["batch_stats"], ())
    texts = {"config_json": to_json(config), "plan_json": "{}", "data": {}, "metrics": None}
    checkpoint.save(manager, step, state, **texts)
    checkpoint.close_checkpoints(manager)
    return str(folder)


@pytest.fixture(scope="module")
def runs(finished_run, tmp_path_factory):
    """Folders: two single networks "a", "b" and runs of "seeds", "folds" and "rates" of both."""
    source, _ = finished_run
    folder = tmp_path_factory.mktemp("members")
    step = json.loads((source / "predictor.json").read_text())["step"]
    a = checkpoint.load_variables(str(source / "checkpoints"), step)
    rng = np.random.default_rng(0)
    b = jax.tree.map(lambda x: x + np.float32(0.05) * rng.normal(size=x.shape).astype(x.dtype), a)
    both = stacked([a, b])
    return {
        "a": save_run(source, folder / "a", step, a),
        "b": save_run(source, folder / "b", step, b),
        "seeds": save_run(source, folder / "seeds", step, both, **{"ensemble.size": 2}),
        "folds": save_run(source, folder / "folds", step, both, **{"ensemble.folds": 2}),
        "rates": save_run(
            source, folder / "rates", step, both, **{"optim.learning_rate": (0.1, 0.01)}, member=1
        ),
    }


@pytest.mark.parametrize("kind", ["seeds", "folds"])
def test_members_of_one_run_are_averaged_as_runs_are(runs, finished_run, kind):
    image, affine = read_image(finished_run[1] / "imagesTr" / "case_00.nii.gz")
    outputs = ("label", "sample", "mutual_information")
    together = load_predictor([runs[kind]], outputs=outputs)
    found = together.segment_fn(together.variables, image, affine)
    alone = [load_predictor([runs[name]], outputs=outputs[:2]) for name in "ab"]
    logits = [p.segment_fn(p.variables, image, affine)["sample"] for p in alone]
    np.testing.assert_allclose(found["sample"], np.mean(logits, axis=0), atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    assert found["mutual_information"].max() > 1e-4
    assert together.identity == load_predictor([runs["a"], runs["b"]]).identity


def test_the_chosen_learning_rate_alone_predicts(runs):
    assert load_predictor([runs["rates"]]).identity == load_predictor([runs["b"]]).identity
    with pytest.raises(PredictorProblem, match="there is one"):
        load_predictor([runs["rates"]], outputs=("label", "mutual_information"))


def test_runs_of_any_kind_predict_together(runs):
    found = load_predictor([runs["rates"], runs["seeds"], runs["a"]])
    same = load_predictor([runs[name] for name in "baba"])
    assert found.identity == same.identity


def test_exported_weights_have_the_member_before_their_name(runs, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = str(tmp_path / "weights.safetensors")
    portable.save_weights(path, load_predictor([runs["folds"]]), runs["folds"])
    arrays = safetensors.load_file(path)
    for index, name in enumerate("ab"):
        kernel = read_weights(runs[name])["params"]["head/kernel"]
        np.testing.assert_array_equal(arrays[f"member{index}/params/head/kernel"], kernel)


def test_a_network_starts_from_one_member(runs):
    for index, name in enumerate("ab"):
        for kind in ("seeds", "folds", "rates"):
            found = read_weights(f"{runs[kind]}/member{index}")
            jax.tree.map(np.testing.assert_array_equal, found, read_weights(runs[name]))
    path = os.path.join(runs["seeds"], "checkpoints", "member1")
    assert read_weights(path).keys() == {"params", "batch_stats"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("seeds", r"seeds holds 2 members, .* give \S*seeds/member0 to \S*seeds/member1"),
        ("folds/member2", r"folds holds 2 members, .* give \S*folds/member0"),
        ("rates/checkpoints", "holds 2 members"),
        ("a/member0", r"holds a single network, no member0: give \S*/a$"),
    ],
)
def test_which_member_is_asked(runs, path, words):
    name, _, rest = path.partition("/")
    with pytest.raises(WeightsProblem, match=words):
        read_weights(os.path.join(runs[name], rest) if rest else runs[name])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("seeds", {"ensemble.size": 2}),
        pytest.param("folds", {"ensemble.folds": 2}, marks=pytest.mark.slow),
        pytest.param("rates", {"optim.learning_rate": (1e-4, 0.02)}, marks=pytest.mark.slow),
    ],
)
def test_from_training_to_prediction(tmp_path, make_msd_folder, kind, changes):
    folder, root = tmp_path / "run", make_msd_folder(num_cases=8)
    config = base_config("unet")
    config.update_from_flattened_dict(
        {
            "workdir": str(folder),
            "data.dir": str(root),
            "data.cache_dir": str(tmp_path / "cache"),
            "data.patch_size": (16, 16),
            "model.features": (4, 8),
            "model.num_convs": (1,),
            "model.decoder_convs": 1,
            "optim.warmup_steps": 0,
            "optim.learning_rate": 0.02,
            "train.num_steps": 40,
            "train.batch_size": 4,
            "train.log_every": 20,
            "train.eval_every": 20,
            **changes,
        }
    )
    train.train(config)

    chosen = read(folder, "predictor.json")
    assert chosen["kind"] == read(folder, "members.json")["kind"] == kind
    rows = [row for row in run_log.read_metrics(folder) if "val_dice" in row]
    of_step = {row["step"]: row["member_val_dice"] for row in rows}[chosen["step"]]
    assert len(of_step) == 2
    if kind == "rates":
        assert chosen["member"] == np.argmax(of_step) == 1
    if kind != "seeds":  # which are scored on the test cases
        scored = [row["dice"] for row in read(folder, "members.json")["members"]]
        np.testing.assert_allclose(scored, of_step, rtol=1e-6)
    assert "## Members" in (folder / "report.md").read_text()
    curve = {"seeds": "seed 1", "folds": "fold 1", "rates": "learning rate 0.02"}[kind]
    assert (folder / "report.html").read_text().count(curve) >= 2  # of loss and validation Dice

    restored = load_predictor([str(folder)], outputs=("label", "sample"))
    weights_of = [members.member_alone(restored.variables, k) for k in range(2)]
    for case_id in read(folder, "test.json")["cases"]:
        image, affine = read_image(root / "imagesTr" / f"{case_id}.nii.gz")
        label = predictor.segment(restored, image, affine)["label"]
        written, _ = read_label(folder / "test" / f"{case_id}.nii.gz", LabelCoding(VALUES))
        np.testing.assert_array_equal(label, written)
        if kind == "rates":
            continue
        alone = [restored.segment_fn(weights, image, affine)["sample"] for weights in weights_of]
        together = restored.segment_fn(restored.variables, image, affine)["sample"]
        np.testing.assert_allclose(together, np.mean(alone, axis=0), atol=1e-4)
        assert np.abs(alone[0] - alone[1]).max() > 0.1
