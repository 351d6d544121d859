import csv
import importlib.util
import json
import re

import numpy as np
import pytest

from jaxseg import writers
from jaxseg.writers import RunLog, StepProgress, json_ready, read_metrics, replacing


@pytest.fixture
def open_log(tmp_path):
    logs = []

    def open_log(first_step=0):
        logs.append(RunLog(str(tmp_path), first_step))
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    return now


class TextLog:
    def __init__(self):
        self.lines = []

    def text(self, line):
        self.lines.append(line)


def test_numbers_are_appended_as_json_lines_at_once(open_log, tmp_path):
    log = open_log()
    log.scalars(5, {"loss": np.float32(0.25), "count": np.int64(3)})
    log.scalars(10, {"val_dice": 0.5})
    text = (tmp_path / writers.METRICS_NAME).read_text()  # not closed yet
    assert text == '{"step": 5, "loss": 0.25, "count": 3}\n{"step": 10, "val_dice": 0.5}\n'
    assert read_metrics(tmp_path)[1] == {"step": 10, "val_dice": 0.5}


def test_a_number_that_is_not_finite_becomes_null(open_log, tmp_path):
    open_log().scalars(1, {"a": float("nan"), "b": float("inf"), "c": np.float32("-inf"), "d": 1.0})
    line = (tmp_path / writers.METRICS_NAME).read_text()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}


def test_resuming_drops_the_steps_about_to_be_done_again(open_log, tmp_path):
    log = open_log()
    for step in range(1, 7):
        log.scalars(step, {"loss": float(step)})
        log.scalars(step, {"val_dice": 0.1 * step})
    log.close()
    log = open_log(first_step=4)
    log.scalars(5, {"loss": -5.0})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert rows[7] == {"step": 4, "val_dice": 0.4} and rows[8]["loss"] == -5.0
    log.close()
    open_log(first_step=0)
    assert read_metrics(tmp_path) == []


def test_text_goes_to_the_terminal_and_with_the_time_to_the_file(open_log, tmp_path, capsys):
    log = open_log()
    log.text("Dice 0.9 ± 0.1")
    log.close()
    open_log().text("again")
    assert capsys.readouterr().out == "Dice 0.9 ± 0.1\nagain\n"
    lines = (tmp_path / writers.LOG_NAME).read_text(encoding="utf-8").splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(stamp + "Dice 0.9 ± 0.1", lines[0])
    assert re.fullmatch(stamp + "again", lines[1])


def test_progress_passes_items_on_and_says_how_many_and_how_long(open_log, clock, capsys):
    seen = []
    for item in open_log().progress(["a", "b", "c"], "verifying"):
        seen.append(item)
        clock[0] += 2.0
    assert seen == ["a", "b", "c"]
    assert capsys.readouterr().out == "verifying: 3 cases in 6.0 s\n"


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_gets_the_same_numbers(open_log, tmp_path):
    import tensorflow as tf

    log = open_log()
    log.scalars(3, {"loss": 0.5})
    log.scalars(4, {"loss": 0.25, "val_dice": 0.75})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = [
        (event.step, value.tag, float(tf.make_ndarray(value.tensor)))
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    ]
    assert found == [(3, "loss", 0.5), (4, "loss", 0.25), (4, "val_dice", 0.75)]


def test_rate_and_time_to_go_by_hand(clock):
    log = TextLog()
    progress = StepProgress(log, first_step=100, num_steps=200, batch_size=8)
    clock[0] += 20
    assert progress.report(110, {"loss": 0.12345}) == pytest.approx(4.0)  # 2 s a step, 8 images
    assert log.lines == ["step 110/200  loss 0.1235  4.0 images/s  ETA 03:00"]
    clock[0] += 5
    assert progress.report(120, {}) == pytest.approx(16.0)  # since the last report, not the start
    assert log.lines[1].endswith("ETA 00:40")
    progress.close()


def test_what_is_not_training_does_not_lower_the_rate(clock):
    progress = StepProgress(TextLog(), first_step=0, num_steps=100, batch_size=4)
    clock[0] += 10
    progress.report(10, {})
    clock[0] += 1000  # validation
    progress.restart_clock(10)
    clock[0] += 5
    assert progress.report(20, {}) == pytest.approx(8.0)
    progress.close()


def test_json_ready_goes_all_the_way_down():
    nested = {
        "array": np.array([[1.0, np.nan], [np.inf, 2.5]]),
        "tuple": (np.int32(3), np.float64("nan"), "nan", None, True),
        "dict": {"index": np.arange(2), "scalar": np.array(-np.inf)},
    }
    ready = json_ready(nested)
    assert ready == {
        "array": [[1.0, None], [None, 2.5]],
        "tuple": [3, None, "nan", None, True],
        "dict": {"index": [0, 1], "scalar": None},
    }
    assert json.loads(json.dumps(ready, allow_nan=False)) == ready


def test_a_file_is_replaced_when_nothing_fails(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    with replacing(str(path)) as temporary:
        assert temporary.endswith(".json") and temporary != str(path)
        with open(temporary, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_partly(path):
    with replacing(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError("in the middle")


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (write_partly, RuntimeError),
        (lambda path: writers.write_text(path, "lone surrogate \ud800"), UnicodeEncodeError),
        (lambda path: writers.write_csv(path, [{"a": 1}, {"b": 2}]), ValueError),
    ],
    ids=["replacing", "write_text", "write_csv"],
)
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_fails_changes_nothing(tmp_path, write, error, existed):
    path = tmp_path / "file.txt"
    if existed:
        path.write_text("old")
    with pytest.raises(error):
        write(str(path))
    assert list(tmp_path.iterdir()) == ([path] if existed else [])
    assert not existed or path.read_text() == "old"


def test_csv_is_what_csv_reads(tmp_path):
    path = tmp_path / "scores.csv"
    writers.write_csv(str(path), [{"case": 'a "b", c', "dice": 0.1}, {"case": "é", "dice": 2 / 3}])
    assert path.read_bytes().startswith(b"case,dice\r\n")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["case"] == 'a "b", c' and rows[1]["case"] == "é"
    assert float(rows[1]["dice"]) == 2 / 3


def test_text_is_written_as_utf8(tmp_path):
    writers.write_text(str(tmp_path / "a.txt"), "± é\n")
    assert (tmp_path / "a.txt").read_bytes() == "± é\n".encode()
