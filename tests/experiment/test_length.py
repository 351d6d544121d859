"""Trainings whose length is a time, on a clock that counts steps."""

import itertools
import json
import os
import pathlib
import signal
import types

import numpy as np
import pytest

from jaxseg.config import ConfigProblems, base_config
from jaxseg.experiment import build, length, train
from jaxseg.experiment.members import members_of
from jaxseg.experiment.replay import reproduce
from jaxseg.problem import Problem
from jaxseg.run.log import read_metrics, read_trace
from jaxseg.training.pace import Stretch

STEP_S = 0.8


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes with steps, and a little when it is looked at; nothing is scored in the end."""
    seconds, rates = [0.0], length.Timed.rates

    def monotonic():
        seconds[0] += 0.05
        return seconds[0]

    def rates_of(self, step):
        found = rates(self, step)
        seconds[0] += STEP_S
        return found

    for module in (length, train):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(length.Timed, "rates", rates_of)
    monkeypatch.setattr(train, "assess", lambda run, state: None)
    return seconds


def timed_config(data, tmp_path, **changes):
    config = base_config()
    config.data.dir, config.data.cache_dir = str(data), str(tmp_path / "cache")
    config.workdir = str(tmp_path / "run")
    config.update_from_flattened_dict(
        {
            "plan.minutes": 1.0,
            "data.patch_size": (16, 16),
            "model.features": (4, 4),
            "model.num_convs": (1,),
            "train.batch_size": 2,
            "train.num_steps": 40,
            "train.eval_every": 20,
            "train.checkpoint_every": 7,
            "optim.warmup_steps": 4,
        }
        | changes
    )
    return config


def test_a_timed_run_ends_with_its_time(boxes, tmp_path):
    config = timed_config(boxes, tmp_path)
    assert train.train(config) is None
    rows = [json.loads(line) for line in (tmp_path / "run/pace.jsonl").read_text().splitlines()]
    assert rows[0]["num_steps"] == 5 and rows[-1]["end"] == 1.0 and len(rows) > 5
    for before, after in itertools.pairwise(rows):
        assert after["step"] == before["step"] + before["num_steps"]
        assert after["begin"] == before["end"] and after["used_s"] > before["used_s"]
    assert 30 < rows[-1]["used_s"] < 60
    num_steps = rows[-1]["step"] + rows[-1]["num_steps"]
    assert [row["step"] for row in read_trace(config.workdir)] == list(range(1, num_steps + 1))
    # Halfway through the schedule, and at the end, whatever the number of steps.
    evaluated = [row["step"] for row in read_metrics(config.workdir) if "val_dice" in row]
    half = next(row["step"] + row["num_steps"] for row in rows if row["end"] >= 0.5)
    assert evaluated == [half, num_steps]
    assert train.train(config) is None  # there is nothing left to do
    assert len(read_trace(config.workdir)) == num_steps


def test_stopped_and_gone_on_with_it_can_be_reproduced(boxes, tmp_path, clock):
    config = timed_config(boxes, tmp_path)
    workdir = pathlib.Path(config.workdir)
    begun = length.Timed.rates

    def stopping(self, step):
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return begun(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length.Timed, "rates", stopping)
        assert train.train(config) == signal.SIGTERM
    known = (workdir / "pace.jsonl").read_text()
    used_s = json.loads(known.splitlines()[-1])["used_s"]
    clock[0] += 1e6  # a night
    with (workdir / "pace.jsonl").open("a") as file:
        file.write('{"step": 30, "num_')  # cut by a crash
    assert train.train(config) is None
    text = (workdir / "pace.jsonl").read_text()
    assert text.startswith(known)
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[-1]["end"] == 1.0 and used_s < rows[-1]["used_s"] < 60
    lines = []
    assert reproduce(config.workdir, say=lines.append)
    num_steps = rows[-1]["step"] + rows[-1]["num_steps"]
    assert f"all {num_steps} steps agree to the bit" in lines[-1]

    (workdir / "pace.jsonl").write_text(text.replace('"end": 1.0', '"end": 2.0'))
    with pytest.raises(Problem, match=r"pace\.jsonl.*it is no stretch of a training"):
        reproduce(config.workdir, say=lines.append)


def test_the_rate_rises_and_falls_over_stretches_of_any_length(tmp_path):
    config = timed_config("", tmp_path, **{"optim.schedule": "cosine", "ensemble.size": 2})
    run = types.SimpleNamespace(
        config=config, members=members_of(config), layout=build.create_layout(config)
    )
    stretches = [Stretch(0, 5, 0.0, 0.05), Stretch(5, 8, 0.05, 0.8), Stretch(13, 3, 0.8, 1.0)]
    timed = length.Timed(run, stretches)
    rates = [np.asarray(timed.rates(step)).ravel() for step in range(1, 17)]
    done = [0.01 * n for n in range(5)] + [0.05 + 0.75 * n / 8 for n in range(8)]
    for rate, share in zip(rates, [*done, 0.8, 0.8 + 0.2 / 3, 0.8 + 0.4 / 3], strict=True):
        step = 40 * share  # of 40, of which four are warm-up
        factor = step / 4 if step < 4 else (1 + np.cos(np.pi * (step - 4) / 36)) / 2
        np.testing.assert_allclose(rate, [config.optim.learning_rate * factor] * 2, rtol=1e-5)
    assert timed.num_steps == 16 and timed.is_over(16) and not timed.is_over(13)


def test_minutes_that_are_too_few_are_refused_before_the_first_step(boxes, tmp_path):
    config = timed_config(boxes, tmp_path, **{"plan.minutes": 0.2})
    with pytest.raises(ConfigProblems, match=r"plan\.minutes 0\.2 are too few: .*at least 0\.3"):
        train.train(config)
    assert not read_trace(config.workdir)
