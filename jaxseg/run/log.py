"""Where a run speaks: the terminal, a log file, JSON lines, and TensorBoard when installed."""

import contextlib
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from jaxseg.run.readers import read_rows
from jaxseg.run.writers import json_ready, naming, write_text

LOG_NAME = "train.log"
METRICS_NAME = "metrics.jsonl"
TRACE_NAME = "trace.jsonl"
MINUTES = "minutes"
# What is kept of a step, in the order in which one follows from the other.
TRACED = ("batch", "loss", "grad_norm", "params")

Item = TypeVar("Item")


def bar_over(items: Iterable[Item], title: str) -> Iterator[Item]:
    """Wraps an iterable: a bar on a terminal, nothing elsewhere."""
    return iter(tqdm(items, desc=title, leave=False, disable=not sys.stderr.isatty()))


class SilentLog:
    """Says and writes nothing: of all processes of a run only the first speaks."""

    def start_at(self, first_step: int) -> None:
        pass

    def text(self, line: str) -> None:
        pass

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        pass

    def trace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def progress(self, items: Iterable[Item], title: str) -> Iterator[Item]:
        return iter(items)

    def close(self) -> None:
        pass


class TerminalLog(SilentLog):
    """Says on the terminal what a RunLog says, and writes nothing."""

    def text(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)

    def progress(self, items: Iterable[Item], title: str) -> Iterator[Item]:
        """Wraps an iterable: a bar on a terminal, and a line at the end."""
        start = time.monotonic()
        count = 0
        for item in bar_over(items, title):
            yield item
            count += 1
        self.text(f"{title}: {count} cases in {time.monotonic() - start:.1f} s")


class RunLog(TerminalLog):
    """Text and numbers of one run, appended to the files in its folder.

    Args:
      workdir: existing folder.
      begun_s: on the clock of `time.monotonic`, when the command began; None for now.
    """

    def __init__(self, workdir: str | Path, begun_s: float | None = None):
        self._workdir = workdir
        self._zero_s = time.monotonic() if begun_s is None else begun_s
        self._text = open(os.path.join(workdir, LOG_NAME), "a", encoding="utf-8")  # noqa: SIM115
        self._metrics = self._trace = io.StringIO()
        self._tensorboard = None
        if importlib.util.find_spec("tensorboard"):
            import tensorflow as tf  # takes seconds, which commands that do not train are spared

            self._summary = tf.summary
            self._tensorboard = tf.summary.create_file_writer(os.path.join(workdir, "tensorboard"))

    def start_at(self, first_step: int) -> None:
        """Opens the files of numbers, and says from which step on they will come.

        Those of later steps, written before an interruption, are dropped: these steps are about to
        be done again.
        """
        self._metrics, rows = _open_rows(self._workdir, METRICS_NAME, read_metrics, first_step)
        self._trace, _ = _open_rows(self._workdir, TRACE_NAME, read_trace, first_step)
        if rows:
            self._zero_s -= 60 * rows[-1].get(MINUTES, 0.0)

    def text(self, line: str) -> None:
        """Shows a line on the terminal and appends it, with the time, to the log file."""
        super().text(line)
        self._append(self._text, LOG_NAME, [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"])

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Appends a row of numbers to the metrics file; a non-finite number becomes null.

        It also says after how many minutes, of this command and of those that were stopped. Lists
        of numbers, one of each member, are not shown in TensorBoard.
        """
        minutes = round((time.monotonic() - self._zero_s) / 60, 4)
        row = {"step": step, MINUTES: minutes} | json_ready(values)
        self._append(self._metrics, METRICS_NAME, [json.dumps(row) + "\n"])
        if self._tensorboard is not None:
            with self._tensorboard.as_default():
                for name, value in without_lists(values).items():
                    self._summary.scalar(name, value, step)

    def trace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows of `trace_row` to the trace file."""
        self._append(self._trace, TRACE_NAME, (json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        files = (self._text, self._metrics, self._trace, self._tensorboard)
        with naming(self._workdir), contextlib.ExitStack() as stack:
            for file in filter(None, files):
                stack.callback(file.close)

    def _append(self, file, name, lines):
        with naming(os.path.join(self._workdir, name)):
            file.writelines(lines)
            file.flush()


Log = RunLog | TerminalLog | SilentLog


class StepProgress:
    """Progress over training steps: a bar on a terminal, and lines with rate and time to go."""

    def __init__(self, log: Log, first_step: int, batch_size: int):
        self._log = log
        self._batch_size = batch_size
        self._bar = tqdm(initial=first_step, unit="step", disable=not sys.stderr.isatty())
        self._last = (time.monotonic(), first_step)

    def advance(self, num_steps: int) -> None:
        """Says that a step is done, of so many as there will be."""
        self._bar.total = num_steps
        self._bar.update()

    def report(self, step: int, num_steps: int, values: Mapping[str, Any]) -> float:
        """Logs numbers at a step, with images/s since the last report; returns images/s."""
        now = time.monotonic()
        then, last_step = self._last
        seconds_per_step = (now - then) / max(step - last_step, 1)
        images_per_s = self._batch_size / max(seconds_per_step, 1e-9)
        eta_s = seconds_per_step * (num_steps - step)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in without_lists(values).items())
        self._log.text(
            f"step {step}/{num_steps}  {shown}  {images_per_s:.1f} images/s  "
            f"ETA {tqdm.format_interval(eta_s)}"
        )
        self.restart_clock(step)
        return images_per_s

    def restart_clock(self, step: int) -> None:
        """Leaves what happened since the last report (validation, say) out of the next rate."""
        self._last = (time.monotonic(), step)

    def close(self) -> None:
        self._bar.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics file as dicts, without a last line that a crash cut.

    Raises:
      FileProblem: the file is missing or damaged.
    """
    return read_rows(workdir, METRICS_NAME, _check_numbers)


def read_trace(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's trace file as dicts, without a last line that a crash cut.

    Raises:
      FileProblem: the file is missing or damaged.
    """
    return read_rows(workdir, TRACE_NAME, _check_traced)


def trace_row(step: int, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a step did, to the bit, JSON-ready.

    Args:
      step: its number.
      metrics: of `jaxseg.training.steps.train_step`, on the host: "batch_checksum" and
        "params_checksum" uint32, "loss" and "grad_norm" float32; scalars, or [M] of as many
        members.
    Returns:
      {"step": int, "batch": 8 hexadecimal digits, "params": the same, "loss": text of
      `float.hex`, "grad_norm": the same}; of several members lists of these.
    """
    return {
        "step": int(step),
        "batch": _each("{:08x}".format, metrics["batch_checksum"]),
        "params": _each("{:08x}".format, metrics["params_checksum"]),
        "loss": _each(float.hex, metrics["loss"]),
        "grad_norm": _each(float.hex, metrics["grad_norm"]),
    }


def _each(text_of, numbers):
    numbers = np.asarray(numbers)
    if numbers.ndim:
        return [text_of(number) for number in numbers.tolist()]
    return text_of(numbers.item())


def without_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a dict's values that are single numbers, not one for each member."""
    return {name: value for name, value in values.items() if np.ndim(value) == 0}


def _check_traced(row):
    for name in TRACED:
        for text in row[name] if isinstance(row[name], list) else [row[name]]:
            int(text, 16) if name in ("batch", "params") else float.fromhex(text)


def _check_numbers(row):
    for value in row.values():
        np.asarray(value, np.float64)


def _open_rows(workdir, name, read, first_step):
    """Opens a file of rows to append to, without those of later steps; and those it keeps."""
    path = os.path.join(workdir, name)
    kept: list[dict[str, Any]] = []
    if os.path.exists(path):
        kept = [row for row in read(workdir) if row["step"] <= first_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return open(path, "a", encoding="utf-8"), kept
