"""Rows of a wrong shape; files that are no text at all are in tests/data/test_fuzz.py."""

import json
import os

import pytest

from jaxseg.problem import FileProblem
from jaxseg.run import identity, log, readers

STEP = {"step": 2, "batch": "0f", "loss": ["0x1p+0", "0x0p+0"], "grad_norm": "nan", "params": "1"}


def refusal(read, folder):
    with pytest.raises(FileProblem) as caught:
        read(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (STEP | {"step": "2"}, "its step is '2'"),
        (STEP | {"loss": 0.5}, "TypeError"),
        (STEP | {"loss": "high"}, "invalid hexadecimal"),
        (STEP | {"batch": ["xyz"]}, "invalid literal"),
        ({name: STEP[name] for name in ("step", "batch", "loss")}, "KeyError"),
        ({name: STEP[name] for name in STEP if name != "step"}, "it has no 'step'"),
        ([1, 2], "it holds a list"),
    ],
)
def test_a_damaged_step_is_named_with_its_line(tmp_path, row, words):
    lines = [json.dumps(content) + "\n" for content in (STEP | {"step": 1}, row, STEP)]
    (tmp_path / "trace.jsonl").write_text("".join(lines))
    text = refusal(log.read_trace, tmp_path)
    assert text.startswith(f"{tmp_path}/trace.jsonl: can not be read (line 2: ") and words in text
    assert text.endswith("or delete it, after which the steps so far can not be reproduced")


def test_numbers_that_are_none_are_named_and_those_that_are_not_finite_are_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null, "member_loss": [1.0, null]}\n{"step": 2, "lo')
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [1]
    path.write_text('{"step": 1, "loss": {"a": 1}}\n')
    assert f"{path}: can not be read (line 1: " in refusal(log.read_metrics, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"sessions": 5}',
        '{"sessions": [5]}',
        '{"sessions": [{}]}',
        '{"sessions": [{"first_step": null}]}',
    ],
)
def test_a_record_of_starts_that_is_none_can_be_deleted(tmp_path, content):
    path = tmp_path / "identity.json"
    path.write_text(content)
    text = refusal(identity.read_sessions, tmp_path)
    assert text.startswith(f"{path}: can not be read (") and "or delete it, which forgets" in text
    path.unlink()
    assert identity.read_sessions(tmp_path) == []


def test_the_newest_copy_is_the_one_that_is_named(tmp_path):
    text = refusal(lambda folder: readers.read_file(folder, "plan.json", str), tmp_path)
    assert text.endswith("(No such file or directory); bring back a copy, or give the folder of a "
                         "run that has it")  # fmt: skip
    for step in ("80", "100", "9", ".discarded"):
        os.makedirs(tmp_path / "checkpoints" / step / "plan")
    text = refusal(lambda folder: readers.read_file(folder, "plan.json", str), tmp_path)
    assert text.endswith(f"{tmp_path}/checkpoints/100/plan/metadata is a copy, put it there")
