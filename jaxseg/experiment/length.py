"""How long a run trains: some number of steps, or as long as `plan.minutes` leaves."""

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

from jaxseg import parallel
from jaxseg.config import ConfigProblems
from jaxseg.experiment import build
from jaxseg.experiment.members import learning_rates_of, member_weights
from jaxseg.experiment.segmented import segment_set, together
from jaxseg.experiment.setup import Run
from jaxseg.run.log import SilentLog
from jaxseg.run.readers import read_rows
from jaxseg.run.writers import naming, write_text
from jaxseg.training.pace import Stretch, next_stretch, shares
from jaxseg.training.state import TrainState

PACE_NAME = "pace.jsonl"
# Steps by which the speed is found, and the share of the schedule that they are taken for.
_FIRST = Stretch(0, 5, 0.0, 0.005)
# Of the minutes, a stretch: short enough to follow what else the machine does.
_STRETCH = 0.04
# What evaluating takes besides segmenting: of the same, and in seconds for pictures and report.
_BESIDES, _REPORT_S = 0.5, 10.0
# Of the minutes, what training must have at least.
_LEAST_SHARE = 0.3


class Counted:
    """A training of `train.num_steps` steps, whose schedule its optimiser knows."""

    def __init__(self, run: Run):
        self._rates = run.learning_rates
        self._every = run.config.train.eval_every
        self.num_steps = self.most_steps = run.config.train.num_steps

    def is_over(self, step: int) -> bool:
        """Whether nothing is left to do after a step."""
        return step == self.num_steps

    def rates(self, step: int) -> jax.Array:
        """Learning rates of a step, as the training step takes them."""
        return self._rates

    def after(self, step: int, state: TrainState) -> tuple[bool, bool]:
        """(whether the network is to be evaluated, whether training is over), after a step."""
        return self.is_over(step) or step % self._every == 0, self.is_over(step)


class Timed:
    """A training of as many steps as a clock allows, by stretches; those that are known are kept.

    Args:
      run: Run.
      stretches: that are known, from the first step on.
      clock: that decides what follows them; None if nothing will.
    """

    def __init__(self, run: Run, stretches: Sequence[Stretch], clock: "Clock | None" = None):
        self._config, self._layout = run.config, run.layout
        self._stretches, self._clock = list(stretches), clock
        self._schedule = build.schedule_of(run.config)
        self._base = learning_rates_of(run.members)
        self._now: tuple[Stretch, np.ndarray] | None = None
        self.most_steps = np.iinfo(np.int32).max // run.config.train.batch_size

    @property
    def num_steps(self) -> int:
        """How many there will be, as far as is known."""
        last = self._stretches[-1]
        per_step = (last.end - last.begin) / last.num_steps
        return last.last_step + round((1 - last.end) / per_step)

    def is_over(self, step: int) -> bool:
        """As of `Counted`."""
        return any(step == s.last_step and s.end == 1.0 for s in self._stretches)

    def rates(self, step: int) -> jax.Array:
        """As of `Counted`."""
        if self._now is None or step > self._now[0].last_step:
            stretch = next(s for s in self._stretches if step <= s.last_step)
            steps = (shares(stretch) * self._config.train.num_steps).astype(np.float32)
            self._now = stretch, np.asarray(jax.vmap(self._schedule)(steps), np.float32)
            if self._clock:
                self._clock.begin(step)
        stretch, factors = self._now
        return parallel.place(self._base * factors[step - stretch.first_step - 1], self._layout)

    def after(self, step: int, state: TrainState) -> tuple[bool, bool]:
        """As of `Counted`."""
        ended = [s for s in self._stretches if s.last_step == step]
        if not ended:
            return False, False
        is_over = ended[0].end == 1.0
        if self._clock and not is_over and step == self._stretches[-1].last_step:
            jax.block_until_ready(state)  # the clock counts steps that are done
            self._stretches.append(self._clock.decide(ended[0]))
        return _evaluations(self._config, ended[0].begin, ended[0].end) > 0, is_over


class Clock:
    """Decides how far each stretch comes, by the time that is left, and writes it to a file.

    Args:
      run: Run; its folder gets the file.
      begun_s: on the clock of `time.monotonic`, when the command began.
      used_s: of the minutes, before this command.
      segmenting_s: what segmenting the validation cases takes.
      evaluation_s: what evaluating takes once training is over.
    """

    def __init__(
        self, run: Run, *, begun_s: float, used_s: float, segmenting_s: float, evaluation_s: float
    ):
        self._config = run.config
        self._path = os.path.join(run.workdir, PACE_NAME)
        self._zero_s = begun_s - used_s
        self._segmenting_s, self._evaluation_s = segmenting_s, evaluation_s
        self._from = (0.0, 0)

    def begin(self, step: int) -> None:
        """Says that a step begins, from which on speed is measured."""
        self._from = (time.monotonic(), step - 1)

    def decide(self, last: Stretch) -> Stretch:
        """The stretch after one that has just ended."""
        now_s = time.monotonic()
        since_s, since_step = self._from
        step_s = (now_s - since_s) / (last.last_step - since_step)
        here = np.array([now_s - self._zero_s, step_s])
        used_s, step_s = parallel.gather_from_processes(here).max(axis=0).tolist()
        budget_s = 60 * self._config.plan.minutes
        validating_s = self._segmenting_s * _evaluations(self._config, last.begin, 1.0)
        stretch = next_stretch(
            last.last_step,
            last.end,
            num_steps=max(round(_STRETCH * budget_s / step_s), 1),
            seconds_per_step=step_s,
            seconds_left=budget_s - used_s - validating_s - self._evaluation_s,
        )
        self.record(stretch, used_s, step_s)
        return stretch

    def record(self, stretch: Stretch, used_s: float, step_s: float) -> None:
        """Appends a stretch to the file of those of the run."""
        if jax.process_index() == 0:
            with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(_row(stretch, used_s, step_s))


def length_of(run: Run, state: TrainState, first_step: int, begun_s: float) -> Counted | Timed:
    """How long a run trains from a step on.

    Args:
      run: Run.
      state: TrainState on the devices.
      first_step: number of updates done.
      begun_s: on the clock of `time.monotonic`, when the command began.
    Raises:
      ConfigProblems: `plan.minutes` are too few to train and evaluate.
      FileProblem: what was recorded of the run's pace is damaged.
    """
    config = run.config
    if not config.plan.minutes:
        return Counted(run)
    rows = _recorded_rows(run.workdir) if first_step else []
    stretches = [_stretch(row) for row in rows] or [_FIRST]
    if first_step and Timed(run, stretches).is_over(first_step):
        return Timed(run, stretches)
    used_s = _used_s(rows, first_step)
    segmenting_s, evaluation_s = _rehearsed(run, state)
    _refuse_too_short(config, time.monotonic() - begun_s + used_s, segmenting_s + evaluation_s)
    if jax.process_index() == 0:  # without a row that a crash has cut
        path = os.path.join(run.workdir, PACE_NAME)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    clock = Clock(
        run,
        begun_s=begun_s,
        used_s=used_s,
        segmenting_s=segmenting_s,
        evaluation_s=evaluation_s,
    )
    if not rows:
        clock.record(_FIRST, time.monotonic() - begun_s, 0.0)
    return Timed(run, stretches, clock)


def recorded_stretches(workdir: str) -> list[Stretch]:
    """The stretches of a run with `plan.minutes`, from the first step on.

    Raises:
      FileProblem: their file is missing or damaged.
    """
    return [_stretch(row) for row in _recorded_rows(workdir)]


def _recorded_rows(workdir):
    return read_rows(workdir, PACE_NAME, _check_row)


def _check_row(row):
    stretch = _stretch(row)
    float(row["used_s"]), float(row["step_s"])
    if stretch.num_steps < 1 or not 0 <= stretch.begin < stretch.end <= 1:
        raise ValueError("it is no stretch of a training")


def _row(stretch, used_s, step_s):
    content = {
        "step": stretch.first_step,
        "num_steps": stretch.num_steps,
        "begin": stretch.begin,
        "end": stretch.end,
        "used_s": used_s,
        "step_s": step_s,
    }
    return json.dumps(content) + "\n"


def _stretch(row):
    return Stretch(int(row["step"]), int(row["num_steps"]), float(row["begin"]), float(row["end"]))


def _used_s(rows, first_step):
    """Seconds that a run had used up to a step."""
    before = [row for row in rows if row["step"] < first_step]
    if not before:
        return 0.0
    return before[-1]["used_s"] + (first_step - before[-1]["step"]) * before[-1]["step_s"]


def _evaluations(config, begin, end):
    """How many times the network is evaluated after one share of the schedule up to another."""
    every = config.train.eval_every / config.train.num_steps
    inside = int(end / every + 1e-9) - int(begin / every + 1e-9)
    is_between = end == 1.0 and abs(round(1 / every) * every - 1) > 1e-9
    return inside + is_between


def _rehearsed(run, state):
    """(seconds of segmenting the validation cases, seconds of evaluating at the end)."""
    variables = parallel.replicate(member_weights(jax.device_get(state), len(run.members)))
    first, *others = together(run, variables, "val")
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = dataclasses.replace(run, workdir=folder, log=SilentLog())
        segment_set(rehearsal, [first], "val", [])  # compiles
        start = time.monotonic()
        few = [first, *others[:1]]
        segment_set(rehearsal, few, "val", [])
        case_s = (time.monotonic() - start) / len(few)
    num_val, num_test = (len(run.data.split[name]) for name in ("val", "test"))
    times = 1 if len(run.members) == 1 else 1 + len(run.members)
    whole_s = times * (num_val + num_test) * case_s
    return num_val * len(run.members) * case_s, (1 + _BESIDES) * whole_s + _REPORT_S


def _refuse_too_short(config, used_s, after_s):
    budget_s = 60 * config.plan.minutes
    if budget_s - used_s - after_s < _LEAST_SHARE * budget_s:
        needed = math.ceil((used_s + after_s) / (1 - _LEAST_SHARE) / 6) / 10
        raise ConfigProblems(
            [
                f"plan.minutes {config.plan.minutes:g} are too few: before the first step "
                f"{used_s:.0f} s are over, and evaluating will take {after_s:.0f} s; set at least "
                f"{needed}"
            ]
        )
