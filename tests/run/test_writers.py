import csv
import importlib.util
import json
import os
import re
import socket

import numpy as np
import pytest

from jaxseg.run import log as run_log
from jaxseg.run import writers
from jaxseg.run.log import RunLog, SilentLog, StepProgress, read_metrics, read_trace
from jaxseg.run.writers import json_ready, replacing


@pytest.fixture
def open_log(tmp_path):
    logs = []

    def open_log(first_step=0):
        logs.append(RunLog(str(tmp_path)))
        logs[-1].start_at(first_step)
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    return now


class TextLog:
    def __init__(self):
        self.lines = []

    def text(self, line):
        self.lines.append(line)


@pytest.mark.parametrize("named", [None, "the temporary file"])
def test_an_error_of_the_system_names_the_file_that_was_to_be(tmp_path, named):
    path = tmp_path / "a.bin"
    with pytest.raises(OSError) as caught, replacing(path) as temporary:
        raise OSError(28, "No space left on device", named and temporary)
    assert caught.value.filename == str(path)


def test_numbers_are_appended_as_json_lines_at_once(open_log, clock, tmp_path):
    log = open_log()
    clock[0] += 90
    log.scalars(5, {"loss": np.float32(0.25), "count": np.int64(3)})
    log.scalars(10, {"val_dice": 0.5})
    text = (tmp_path / run_log.METRICS_NAME).read_text()  # not closed yet
    first = '{"step": 5, "minutes": 1.5, "loss": 0.25, "count": 3}\n'
    assert text == first + '{"step": 10, "minutes": 1.5, "val_dice": 0.5}\n'
    assert read_metrics(tmp_path)[1] == {"step": 10, "minutes": 1.5, "val_dice": 0.5}


def test_a_number_that_is_not_finite_becomes_null(open_log, clock, tmp_path):
    open_log().scalars(1, {"a": float("nan"), "b": float("inf"), "c": np.float32("-inf"), "d": 1.0})
    line = (tmp_path / run_log.METRICS_NAME).read_text()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert row == {"step": 1, "minutes": 0.0, "a": None, "b": None, "c": None, "d": 1.0}


def test_resuming_drops_the_steps_about_to_be_done_again(open_log, clock, tmp_path):
    log = open_log()
    for step in range(1, 7):
        clock[0] += 60
        log.scalars(step, {"loss": float(step)})
        log.scalars(step, {"val_dice": 0.1 * step})
    log.close()
    clock[0] += 6000  # nobody works
    log = open_log(first_step=4)
    clock[0] += 30
    log.scalars(5, {"loss": -5.0})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert rows[7] == {"step": 4, "minutes": 4.0, "val_dice": 0.4}
    assert rows[8] == {"step": 5, "minutes": 4.5, "loss": -5.0}
    log.close()
    open_log(first_step=0)
    assert read_metrics(tmp_path) == []


TRACED = {"batch": "000000ff", "params": "deadbeef", "loss": "0x1.0p+0", "grad_norm": "0x0.0p+0"}


def test_a_row_of_the_trace_holds_every_bit():
    metrics = {
        "batch_checksum": np.uint32(255),
        "params_checksum": np.uint32(2**32 - 1),
        "loss": np.float32(0.1),
        "grad_norm": np.float32("inf"),
    }
    row = run_log.trace_row(np.int32(7), metrics)
    assert row == {
        "step": 7,
        "batch": "000000ff",
        "params": "ffffffff",
        "loss": "0x1.99999a0000000p-4",  # 0.1 as float32
        "grad_norm": "inf",
    }
    assert json.loads(json.dumps(row)) == row
    assert np.float32(float.fromhex(row["loss"])) == np.float32(0.1)
    metrics["loss"] = np.nextafter(np.float32(0.1), np.float32(1))
    assert run_log.trace_row(7, metrics)["loss"] != row["loss"]


def test_a_row_of_the_trace_lists_the_members():
    metrics = {
        "batch_checksum": np.array([1, 2, 2**31], np.uint32),
        "params_checksum": np.array([10, 11, 12], np.uint32),
        "loss": np.array([0.5, 1, -2], np.float32),
        "grad_norm": np.array([0, np.nan, 1], np.float32),
    }
    assert run_log.trace_row(1, metrics) == {
        "step": 1,
        "batch": ["00000001", "00000002", "80000000"],
        "params": ["0000000a", "0000000b", "0000000c"],
        "loss": ["0x1.0000000000000p-1", "0x1.0000000000000p+0", "-0x1.0000000000000p+1"],
        "grad_norm": ["0x0.0p+0", "nan", "0x1.0000000000000p+0"],
    }
    one = {name: values[:1] for name, values in metrics.items()}
    assert run_log.trace_row(1, one)["batch"] == ["00000001"]


def test_the_trace_is_appended_at_once_and_goes_on_where_the_run_does(open_log, tmp_path):
    log = open_log()
    log.trace([{"step": step} | TRACED for step in (1, 2, 3)])
    assert read_trace(tmp_path) == [{"step": step} | TRACED for step in (1, 2, 3)]  # not closed yet
    log.trace([])
    log.trace([{"step": 4} | TRACED])
    log.close()
    with open(tmp_path / run_log.TRACE_NAME, "a") as file:
        file.write('{"step": 5, "ba')  # cut by a crash
    assert [row["step"] for row in read_trace(tmp_path)] == [1, 2, 3, 4]
    log = open_log(first_step=3)
    assert [row["step"] for row in read_trace(tmp_path)] == [1, 2, 3]
    log.trace([{"step": 4} | TRACED | {"loss": "0x0.0p+0"}])
    assert [row["step"] for row in read_trace(tmp_path)] == [1, 2, 3, 4]
    assert read_trace(tmp_path)[3]["loss"] == "0x0.0p+0"
    open_log(first_step=0)
    assert read_trace(tmp_path) == []


def test_a_silent_log_has_what_a_log_has_and_says_nothing(tmp_path, capsys, monkeypatch):
    def public(cls):
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(SilentLog) == public(RunLog)
    monkeypatch.chdir(tmp_path)
    log = SilentLog()
    log.start_at(3)
    log.text("a")
    log.scalars(1, {"loss": 1.0})
    log.trace([{"step": 1} | TRACED])
    assert list(log.progress(iter("abc"), title="cases")) == ["a", "b", "c"]
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_text_goes_to_the_terminal_and_with_the_time_to_the_file(open_log, tmp_path, capsys):
    log = open_log()
    log.text("Dice 0.9 ± 0.1")
    log.close()
    open_log().text("again")
    assert capsys.readouterr().out == "Dice 0.9 ± 0.1\nagain\n"
    lines = (tmp_path / run_log.LOG_NAME).read_text(encoding="utf-8").splitlines()
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
    progress = StepProgress(log, first_step=100, batch_size=8)
    clock[0] += 20
    assert progress.report(110, 200, {"loss": 0.12345}) == pytest.approx(
        4.0
    )  # 2 s a step, 8 images
    assert log.lines == ["step 110/200  loss 0.1235  4.0 images/s  ETA 03:00"]
    clock[0] += 5
    assert progress.report(120, 200, {}) == pytest.approx(
        16.0
    )  # since the last report, not the start
    assert log.lines[1].endswith("ETA 00:40")
    progress.close()


def test_numbers_of_members_are_kept_but_not_shown(open_log, clock, tmp_path, capsys):
    log = open_log()
    progress = StepProgress(log, first_step=0, batch_size=8)
    clock[0] += 1
    values = {"loss": 0.5, "member_loss": [0.25, 0.75]}
    progress.report(1, 10, values)
    log.scalars(1, values)
    progress.close()
    assert capsys.readouterr().out == "step 1/10  loss 0.5000  8.0 images/s  ETA 00:09\n"
    assert read_metrics(tmp_path) == [{"step": 1, "minutes": 0.0167} | values]


def test_before_a_run_knows_where_it_starts_no_number_is_touched(open_log, clock, tmp_path):
    log = open_log()
    log.scalars(1, {"loss": 1.0})
    log.trace([{"step": 1} | TRACED])
    log.close()
    log = RunLog(str(tmp_path))
    log.text("the data can not be read")
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "minutes": 0.0, "loss": 1.0}]
    assert read_trace(tmp_path) == [{"step": 1} | TRACED]


def test_what_is_not_training_does_not_lower_the_rate(clock):
    progress = StepProgress(TextLog(), first_step=0, batch_size=4)
    clock[0] += 10
    progress.report(10, 100, {})
    clock[0] += 1000  # validation
    progress.restart_clock(10)
    clock[0] += 5
    assert progress.report(20, 100, {}) == pytest.approx(8.0)
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    (tmp_path / run_log.LOG_NAME).symlink_to("/dev/full")
    log = RunLog(str(tmp_path))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/train.log'"):
        log.text("a")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        log.close()  # what was not written is tried again
    for write in (writers.write_text, lambda path, text: writers.write_csv(path, [{text: 1}])):
        (tmp_path / f".{socket.gethostname()}.{os.getpid()}.scores").symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/scores'"):
            write(str(tmp_path / "scores"), "a")
    assert [path.name for path in tmp_path.iterdir()] == [run_log.LOG_NAME]


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
