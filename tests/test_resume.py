"""Stopping, going on and refusing: a run is the same however often it was interrupted."""

import json
import os
import pathlib
import shutil
import signal
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxseg.config import base_config
from jaxseg.data import cases, pipeline
from jaxseg.experiment import resume, setup, train
from jaxseg.problem import FileProblem
from jaxseg.run import checkpoint
from jaxseg.run import log as run_log

pytestmark = pytest.mark.multiprocess

NUM_STEPS = 8


@pytest.fixture
def config(tmp_path, make_msd_folder):
    return tiny_config(tmp_path, make_msd_folder())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, boxes):
    """Config of a run that is complete; tests leave it so."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, shutil.copytree(boxes, folder / "data"))
    assert train.train(config) is None
    return config


def tiny_config(folder, data):
    config = base_config("unet")
    config.workdir = str(folder / "run")
    config.data.dir = str(data)
    config.data.cache_dir = str(folder / "cache")
    config.data.patch_size = (16, 16)
    config.model.features = (4, 8)
    config.model.num_convs, config.model.decoder_convs = (1,), 1
    config.model.norm = "batch"
    config.model.dropout = 0.2
    config.optim.warmup_steps = 2
    config.train.num_steps = NUM_STEPS
    config.train.batch_size = 4
    config.train.log_every = 3
    config.train.eval_every = NUM_STEPS
    config.train.checkpoint_every = 2
    return config


@pytest.fixture
def not_assessed(monkeypatch):
    """What follows the last step takes time, and no part in these tests."""
    monkeypatch.setattr(train, "assess", lambda run, state: None)


def copy_of(config):
    return config.copy_and_resolve_references()


def saved_state(config, step=NUM_STEPS):
    manager = checkpoint.open_checkpoints(f"{config.workdir}/checkpoints", keep=2)
    items = ocp.args.Composite(state=ocp.args.StandardRestore())
    state = jax.tree.leaves(manager.restore(step, args=items).state)
    manager.close()
    return state


def stop_after(monkeypatch, number, batches):
    """Sends this process a signal when the pipeline is asked for the batch after that many."""
    original = pipeline.train_batches

    def interrupted(*args, **kwargs):
        for count, batch in enumerate(original(*args, **kwargs)):
            if count == batches:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", interrupted)


@pytest.mark.usefixtures("not_assessed")
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(trained, tmp_path, monkeypatch):
    config = copy_of(trained)
    config.workdir = str(tmp_path / "interrupted")
    handler = signal.getsignal(signal.SIGINT)
    stopped_at = [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patch:
            stop_after(patch, number, batches=3)
            assert train.train(config) == number
        stopped_at.append(checkpoint.last_step(f"{config.workdir}/checkpoints"))
        with open(f"{config.workdir}/metrics.jsonl", "a") as file:
            file.write('{"step": 9, "lo')  # which a crash would have cut
    assert stopped_at == sorted({*stopped_at}) and stopped_at[-1] < NUM_STEPS
    assert "run the same command" in pathlib.Path(config.workdir, "train.log").read_text()

    assert train.train(config) is None
    for expected, actual in zip(saved_state(trained), saved_state(config), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert run_log.read_trace(config.workdir) == run_log.read_trace(trained.workdir)
    assert signal.getsignal(signal.SIGINT) is handler
    steps = [row["step"] for row in run_log.read_metrics(config.workdir) if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == NUM_STEPS


@pytest.mark.usefixtures("not_assessed")
def test_augmented_on_the_device_it_is_so_too(config, tmp_path, monkeypatch):
    config.augment.on = "device"
    assert train.train(config) is None
    whole, config.workdir = config.workdir, str(tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        stop_after(patch, signal.SIGTERM, batches=3)
        assert train.train(config) == signal.SIGTERM
    assert 0 < checkpoint.last_step(f"{config.workdir}/checkpoints") < NUM_STEPS
    assert train.train(config) is None
    assert run_log.read_trace(config.workdir) == run_log.read_trace(whole)


@pytest.mark.usefixtures("not_assessed")
def test_another_seed_gives_other_parameters(trained, tmp_path):
    config = copy_of(trained)  # of the same seed: above, and in another process in test_kills
    config.workdir, config.seed = str(tmp_path / "run"), 1
    train.train(config)
    states = zip(saved_state(trained), saved_state(config), strict=True)
    assert not all(np.array_equal(a, b) for a, b in states)


def test_another_config_is_refused_with_the_difference(trained):
    config = copy_of(trained)
    config.model.features = (4, 16)
    config.train.log_every = 1  # free to change
    with pytest.raises(setup.RunProblem) as caught:
        train.train(config)
    assert "model.features: [4, 8] -> [4, 16]" in str(caught.value)
    assert "log_every" not in str(caught.value)


def test_other_data_is_refused(trained):
    path = pathlib.Path(trained.data.dir, "dataset.json")
    original = path.read_text()
    metadata = json.loads(original)
    metadata["labels"]["2"] = "renamed"
    path.write_text(json.dumps(metadata))
    try:
        with pytest.raises(setup.RunProblem, match="fingerprint"):
            train.train(trained)
    finally:
        path.write_text(original)


@pytest.mark.parametrize("text", ["{", '{"train": ["case_00"], "val": ["case_01"], "test": []}'])
def test_a_split_beside_a_run_that_is_not_its_own_is_refused(trained, text):
    path = pathlib.Path(trained.workdir, "split.json")
    original = path.read_text()
    path.write_text(text)
    try:
        with pytest.raises(FileProblem, match=r"split\.json: can not be read .* delete it, data\."):
            train.train(trained)
    finally:
        path.write_text(original)


def test_nothing_is_refused_before_the_first_checkpoint(config, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *args: (_ for _ in ()).throw(OSError("disk")))
    for rate in (2e-3, 1e-3):
        config.optim.learning_rate = rate
        with pytest.raises(OSError, match="disk"):
            train.train(config)
        saved = json.loads(pathlib.Path(config.workdir, "config.json").read_text())
        assert saved["optim"]["learning_rate"] == rate


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(config, monkeypatch):
    original = pipeline.train_batches

    def poisoned(*args, **kwargs):
        for step, batch in enumerate(original(*args, **kwargs), start=1):
            if step == 5:
                batch["image"] = np.full_like(batch["image"], np.nan)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", poisoned)
    with pytest.raises(setup.RunProblem, match="loss of step 5 is nan"):
        train.train(config)
    assert all(np.isfinite(leaf).all() for leaf in saved_state(config, step=4))
    manager = checkpoint.open_checkpoints(f"{config.workdir}/checkpoints", keep=2)
    assert manager.latest_step() == 4
    manager.close()


def test_a_signal_while_waiting_for_the_device_is_not_taken_for_saved(config, monkeypatch):
    original = train.mean_metrics

    def interrupted(values, last_step, **options):
        if last_step == 3:  # a step that reports but does not save
            os.kill(os.getpid(), signal.SIGTERM)
        return original(values, last_step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "mean_metrics", interrupted)
        assert train.train(config) == signal.SIGTERM
    manager = checkpoint.open_checkpoints(f"{config.workdir}/checkpoints", keep=2)
    assert manager.latest_step() == 4
    manager.close()
    log = pathlib.Path(config.workdir, "train.log").read_text()
    assert "saved at step 4" in log and "saved at step 3" not in log


def test_non_finite_gradient_of_a_finite_loss_stops_too():
    rows = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": float("nan")}]
    with pytest.raises(setup.RunProblem, match=r"of step 7 is .* norm nan"):
        train.mean_metrics(rows, 7)


def test_a_batch_that_devices_can_not_share_is_refused(config):
    config.optim.accumulate_steps = 3
    with pytest.raises(setup.RunProblem, match="multiple of 3"):
        train.train(config)


def test_a_learning_rate_that_diverges_does_not_end_the_others():
    rows = [
        {"loss": np.float32([1.0, np.nan]), "grad_norm": np.float32([2.0, 3.0])},
        {"loss": np.float32([3.0, np.inf]), "grad_norm": np.float32([4.0, np.nan])},
    ]
    with pytest.raises(setup.RunProblem, match="loss of step 6"):
        train.mean_metrics(rows, 7)
    means = train.mean_metrics(rows, 7, enough=np.any)
    assert (means["loss"], means["grad_norm"]) == (2.0, 3.0)
    rows[1]["loss"][0] = np.nan
    with pytest.raises(setup.RunProblem, match="loss of step 7"):
        train.mean_metrics(rows, 7, enough=np.any)


def test_a_finished_run_whose_data_have_moved_is_evaluated_again_but_not_trained(
    trained, tmp_path, monkeypatch
):
    config = copy_of(trained)
    config.data.dir = str(tmp_path / "elsewhere")
    shutil.copytree(trained.data.dir, config.data.dir)
    before = saved_state(trained)
    os.remove(f"{trained.workdir}/test.json")
    monkeypatch.setattr(train.parallel, "map_train_step", lambda step, layout: None)
    train.train(config)
    assert os.path.exists(f"{trained.workdir}/test.json")
    for expected, actual in zip(before, saved_state(trained), strict=True):
        np.testing.assert_array_equal(actual, expected)

    image = pathlib.Path(config.data.dir, "imagesTr", "case_01.nii.gz")
    other = pathlib.Path(config.data.dir, "imagesTr", "case_02.nii.gz")
    image.write_bytes(other.read_bytes())
    with pytest.raises(setup.RunProblem) as caught:
        train.train(config)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [f"  - case case_01: {image} has changed"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (["i"], ["i", "l"], "case a has a label, l.nii, the run began without one"),
        (["i", "l"], ["i"], "case a has no label, the run began with one"),
        (["i"], ["j", "l"], "case a has 2 files, the run began with 1"),
        (["i", "l"], ["i", "m"], "case a: l.nii has changed"),
    ],
)
def test_a_label_that_came_or_went_is_named(before, after, said):
    case = cases.Case("a", ("i.nii",), "l.nii" if len(after) == 2 else None)
    labelled = ("cases", "unlabelled")[case.label_path is None]
    dataset = types.SimpleNamespace(**{"cases": (), "unlabelled": ()} | {labelled: (case,)})
    data = types.SimpleNamespace(dataset=dataset)
    assert resume._changed_files({"a": before}, {"a": after}, data) == [said]
