"""Replays a run from its settings and says where it first differs."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxseg import parallel
from jaxseg.experiment import build, gather
from jaxseg.experiment.gather import Data
from jaxseg.experiment.length import Counted, Timed, recorded_stretches
from jaxseg.experiment.predictor import FINISHED_NAME
from jaxseg.experiment.saved import saved_beginning, saved_config
from jaxseg.experiment.setup import check_batch_size, create_run, training_batches
from jaxseg.problem import Problem
from jaxseg.run import checkpoint, identity
from jaxseg.run.log import TRACE_NAME, TRACED, Log, SilentLog, read_trace, trace_row
from jaxseg.run.readers import read_file
from jaxseg.training.pace import Stretch


class ReproduceProblem(Problem, ValueError):
    """The run can not be replayed; the message says why."""


def reproduce(workdir: str, num_steps: int | None = None, *, say: Callable[[str], None]) -> bool:
    """Replays the first steps of a run up to one that differs.

    Args:
      workdir: the run's folder.
      num_steps: how many; None for all that were recorded.
      say: called with each line for the user: what has changed since the run, what was found.
    Returns:
      Whether all steps agree.
    Raises:
      ReproduceProblem: so many steps were not recorded, or fewer than the run has done.
      FileProblem: a file of the run is missing or damaged.
      ConfigProblems and what `replay` raises: the run can not be started again.
    """
    config = saved_config(workdir)
    config_json = read_file(workdir, "config.json", str)  # as it was recorded, whatever its version
    begun, sessions = saved_beginning(workdir), identity.read_sessions(workdir)
    stretches = recorded_stretches(workdir) if config.plan.minutes else []
    recorded = _recorded_steps(workdir, config, stretches, num_steps)
    log = SilentLog()
    data = gather.load_data(config, log, begun)
    now = identity.describe(config_json, data.sha256)
    for session in sessions:
        for line in identity.differences(session, now):
            say(f"the run from step {session['first_step'] + 1} on -> now: {line}")

    rows = replay(config, data, log, len(recorded), stretches)
    for row in tqdm(rows, total=len(recorded), unit="step", disable=None):
        found = differences(recorded[row["step"]], row)
        if found:
            say("\n  ".join([f"step {row['step']} is the first that differs:", *found]))
            return False
    say(f"all {len(recorded)} steps agree to the bit")
    return True


def _recorded_steps(workdir, config, stretches, num_steps):
    """By step the rows that are to be replayed."""
    path = os.path.join(workdir, TRACE_NAME)
    recorded = {row["step"]: row for row in read_trace(workdir)}
    last = num_steps or max(recorded, default=1)
    missing = [step for step in range(1, last + 1) if step not in recorded]
    if missing:
        raise ReproduceProblem(
            f"{path} has {len(recorded)} steps, not step {missing[0]}; choose a smaller "
            "--num_steps, or a run that was recorded"
        )
    if num_steps is None and last < (done := _steps_done(workdir, config, stretches)):
        raise ReproduceProblem(
            f"{path}: ends at step {last}, but the run has come to step {done}; bring back a copy, "
            f"or replay what is left with --num_steps={last}"
        )
    return {step: recorded[step] for step in range(1, last + 1)}


def _steps_done(workdir, config, stretches):
    """How many steps a run is known to have done."""
    if os.path.exists(os.path.join(workdir, FINISHED_NAME)):
        return stretches[-1].last_step if stretches else config.train.num_steps
    return checkpoint.last_step(os.path.join(workdir, "checkpoints"))


def replay(
    config: ConfigDict, data: Data, log: Log, num_steps: int, stretches: Sequence[Stretch] = ()
) -> Iterator[dict[str, Any]]:
    """Trains from the beginning, and writes nothing.

    Args:
      config: validated ConfigDict.
      data: `jaxseg.experiment.gather.Data`.
      log: where to say what is done.
      num_steps: steps to do.
      stretches: of a run with `plan.minutes`.
    Yields:
      The row of `jaxseg.run.log.trace_row` of each step.
    Raises:
      RunProblem, ConfigProblems: the devices can not share the batch.
      GroupProblem, WeightsProblem, TransferProblem: as `train`.
    """
    check_batch_size(config, build.create_layout(config))
    run, state = create_run(config, data, log, fresh=True)
    length = Timed(run, stretches) if stretches else Counted(run)
    batches = training_batches(run, 0, num_steps)
    for step, batch in enumerate(parallel.prefetch_to_device(batches, run.layout), start=1):
        state, step_metrics = run.train_step(state, batch, run.keys, length.rates(step))
        yield trace_row(step, jax.device_get(step_metrics))


def differences(recorded: dict[str, Any], replayed: dict[str, Any]) -> list[str]:
    """What differs between two rows of `jaxseg.run.log.trace_row`, as lines."""
    lines = []
    for name in TRACED:
        pairs = [_as_list(recorded[name]), _as_list(replayed[name])]
        if len(pairs[0]) != len(pairs[1]):
            lines.append(f"{name}: of {len(pairs[0])} members -> of {len(pairs[1])}")
            continue
        for member, (then, now) in enumerate(zip(*pairs, strict=True)):
            if then != now:
                of = f" of member {member}" if len(pairs[0]) > 1 else ""
                lines.append(f"{name}{of}: {_shown(name, then)} -> {_shown(name, now)}")
    return lines


def _as_list(value):
    return value if isinstance(value, list) else [value]


def _shown(name, text):
    return text if name in ("batch", "params") else repr(float.fromhex(text))
