"""Replays are stood in for here; real ones are in test_resume."""

import contextlib
import json
import shutil
import types

import numpy as np
import pytest

from jaxseg import reproduce
from jaxseg.config import base_config, to_json
from jaxseg.data.preprocess import Plan
from jaxseg.experiment import gather, replay
from jaxseg.run import identity
from jaxseg.run import log as run_log

PLAN = Plan(
    spacing_mm=(1.0, 1.0, 1.0),
    normalisation=("zscore",),
    intensity=((),),
    image_order=1,
    label_order=1,
)


def metrics_of(step, num_members=None):
    rng = np.random.default_rng(step)
    shape = () if num_members is None else (num_members,)
    return {
        "batch_checksum": rng.integers(2**32, size=shape, dtype=np.uint32),
        "params_checksum": rng.integers(2**32, size=shape, dtype=np.uint32),
        "loss": np.asarray(rng.normal(size=shape), np.float32),
        "grad_norm": np.asarray(rng.normal(size=shape), np.float32),
    }


@pytest.fixture
def make_run(tmp_path):
    """Function that writes what a run of some steps leaves; returns its folder."""

    def make_run(num_steps=6, num_members=None):
        config_json = to_json(base_config())
        (tmp_path / "config.json").write_text(config_json)
        (tmp_path / "plan.json").write_text(PLAN.to_json())
        data = {"class_names": ["0", "1"], "label_values": None, "num_channels": 1}
        (tmp_path / "data.json").write_text(json.dumps(data | {"split": {"train": ["a"]}}))
        identity.record(tmp_path, 0, identity.describe(config_json, "f" * 64))
        with contextlib.closing(run_log.RunLog(str(tmp_path))) as log:
            log.start_at(0)
            steps = range(1, num_steps + 1)
            log.trace(run_log.trace_row(step, metrics_of(step, num_members)) for step in steps)
        return str(tmp_path)

    return make_run


@pytest.fixture
def replay_as(monkeypatch):
    """Function that sets what a replay gives: changes of the metrics of steps."""
    calls = []

    def replay_as(changes=None, num_members=None, sha256="f" * 64):
        def stand_in(config, data, log, num_steps, stretches):
            calls.append((to_json(config), type(log), num_steps))
            for step in range(1, num_steps + 1):
                metrics = metrics_of(step, num_members) | (changes or {}).get(step, {})
                calls.append(step)
                yield run_log.trace_row(step, metrics)

        data = types.SimpleNamespace(sha256=sha256)
        monkeypatch.setattr(gather, "load_data", lambda config, log, plan: data)
        monkeypatch.setattr(replay, "replay", stand_in)
        return calls

    return replay_as


def run(*arguments, capsys):
    """(exit status, output, errors) of the command."""
    with pytest.raises(SystemExit) as caught:
        reproduce.main(["reproduce", *arguments])
    return (caught.value.code, *capsys.readouterr())


def test_a_run_that_agrees(make_run, replay_as, capsys, tmp_path):
    workdir, calls = make_run(), replay_as()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    status, output, _ = run(f"--workdir={workdir}", capsys=capsys)
    assert (status, output) == (0, "all 6 steps agree to the bit\n")
    assert calls == [(to_json(base_config()), run_log.SilentLog, 6), 1, 2, 3, 4, 5, 6]
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_other_data_are_named(make_run, replay_as, capsys):
    workdir = make_run()
    replay_as(sha256="0" * 64)
    _, output, _ = run(f"--workdir={workdir}", capsys=capsys)
    assert f"data: '{'f' * 64}' -> '{'0' * 64}'" in output


def test_fewer_steps(make_run, replay_as, capsys):
    workdir, calls = make_run(), replay_as({4: {"loss": np.float32(0)}})
    status, output, _ = run(f"--workdir={workdir}", "--num_steps=3", capsys=capsys)
    assert (status, output) == (0, "all 3 steps agree to the bit\n")
    assert calls[1:] == [1, 2, 3]


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("batch_checksum", "batch"),
        ("loss", "loss"),
        ("grad_norm", "grad_norm"),
        ("params_checksum", "params"),
    ],
)
def test_the_first_step_that_differs_is_named_and_what_differs(
    make_run, replay_as, capsys, metric, name
):
    right = metrics_of(4)[metric]
    if right.dtype == np.uint32:
        wrong = right ^ np.uint32(1)
        shown = f"{right:08x} -> {wrong:08x}"
    else:
        wrong = np.nextafter(right, np.float32(9))  # the least that can differ
        shown = f"{float(right)!r} -> {float(wrong)!r}"
    calls = replay_as({4: {metric: wrong}, 5: {"loss": np.float32(0)}})
    status, output, _ = run(f"--workdir={make_run()}", capsys=capsys)
    assert status == 1 and calls[-1] == 4  # nothing after it is done
    assert output == f"step 4 is the first that differs:\n  {name}: {shown}\n"


def test_of_several_members_those_that_differ_are_named(make_run, replay_as, capsys):
    loss = metrics_of(2, 3)["loss"].copy()
    loss[1] = 0.25
    params = metrics_of(2, 3)["params_checksum"] + np.array([0, 1, 1], np.uint32)
    replay_as({2: {"loss": loss, "params_checksum": params}}, num_members=3)
    status, output, _ = run(f"--workdir={make_run(num_members=3)}", capsys=capsys)
    assert status == 1
    lines = output.splitlines()
    assert [line.partition(": ")[0].strip() for line in lines] == [
        "step 2 is the first that differs:",
        "loss of member 1",
        "params of member 1",
        "params of member 2",
    ]
    assert lines[1].endswith(" -> 0.25")


def test_another_number_of_members(make_run, replay_as, capsys):
    replay_as(num_members=2)
    status, output, _ = run(f"--workdir={make_run(num_members=3)}", capsys=capsys)
    assert status == 1
    assert "  loss: of 3 members -> of 2\n" in output


def test_what_has_changed_since_is_shown_first(make_run, replay_as, capsys):
    workdir = make_run()
    replay_as()
    (recorded,) = identity.read_sessions(workdir)
    recorded.pop("first_step")
    recorded["versions"]["jax"] = "0.0.1"
    identity.record(workdir, 4, recorded | {"num_devices": 512})
    status, output, _ = run(f"--workdir={workdir}", capsys=capsys)
    lines = output.splitlines()
    assert status == 0 and lines[-1] == "all 6 steps agree to the bit"
    assert [line.partition(" -> now: ")[0] for line in lines[:-1]] == ["the run from step 5 on"] * 2
    assert "num_devices: 512 -> " in lines[0] and "versions.jax: '0.0.1' -> " in lines[1]


def test_a_trace_that_ends_before_the_run_is_refused_unless_its_length_is_asked_for(
    make_run, replay_as, capsys, tmp_path
):
    workdir, calls = make_run(num_steps=12), replay_as()
    trace = tmp_path / "trace.jsonl"
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    (tmp_path / "checkpoints" / "12").mkdir()
    whole = trace.read_bytes()
    assert run(f"--workdir={workdir}", capsys=capsys)[0] == 0
    calls.clear()
    trace.write_bytes(whole[: len(whole) // 2])  # in the middle of the 7th
    words = f"{trace}: ends at step 6, but the run has come to step 12; bring back a copy, or "
    status, output, errors = run(f"--workdir={workdir}", capsys=capsys)
    assert status == 2 and output == "" and words in errors and calls == []
    status, output, _ = run(f"--workdir={workdir}", "--num_steps=6", capsys=capsys)
    assert (status, output) == (0, "all 6 steps agree to the bit\n")

    # Of a run without its checkpoints it is known how far it came once it is finished.
    shutil.rmtree(tmp_path / "checkpoints")
    assert run(f"--workdir={workdir}", capsys=capsys)[0] == 0
    (tmp_path / "predictor.json").write_text("{}")
    num_steps = base_config().train.num_steps
    status, _, errors = run(f"--workdir={workdir}", capsys=capsys)
    assert status == 2 and f"the run has come to step {num_steps}" in errors


def test_what_can_not_be_replayed_is_one_message(make_run, replay_as, capsys, tmp_path):
    calls = replay_as()
    status, output, errors = run(f"--workdir={tmp_path / 'none'}", capsys=capsys)
    assert status == 2 and output == "" and f"{tmp_path / 'none'}/config.json" in errors
    workdir = make_run(num_steps=6)
    status, output, errors = run(f"--workdir={workdir}", "--num_steps=7", capsys=capsys)
    assert status == 2 and output == "" and errors.count("\n") == 1
    assert f"{workdir}/trace.jsonl has 6 steps, not step 7" in errors
    with open(f"{workdir}/trace.jsonl", "w"):
        pass
    status, output, errors = run(f"--workdir={workdir}", capsys=capsys)
    assert status == 2 and "has 0 steps, not step 1" in errors
    changed = json.loads((tmp_path / "config.json").read_text())
    changed["no_such_field"] = 1
    (tmp_path / "config.json").write_text(json.dumps(changed))
    status, output, errors = run(f"--workdir={workdir}", capsys=capsys)
    assert status == 2 and "not written by this version" in errors
    assert run(capsys=capsys)[0] == 2
    assert calls == []
