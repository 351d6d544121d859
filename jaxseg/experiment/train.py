"""Trains a config, goes on where it was stopped, and evaluates the result on whole cases."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxseg import config as config_lib
from jaxseg import parallel
from jaxseg.config import ConfigProblems
from jaxseg.config_planned import undecided
from jaxseg.data import splits
from jaxseg.data.cases import DatasetProblems
from jaxseg.experiment import build, gather
from jaxseg.experiment.assess import assess
from jaxseg.experiment.fitting import resolved
from jaxseg.experiment.interrupts import stop_requests
from jaxseg.experiment.length import Counted, Timed, length_of
from jaxseg.experiment.members import kind_of_members
from jaxseg.experiment.plan_file import completed_by_file, naming_file
from jaxseg.experiment.planned import fingerprint_json
from jaxseg.experiment.resume import (
    SPLIT_NAME,
    complete_as_saved,
    describe_data,
    refuse_another_experiment,
    refuse_damaged_files,
    refuse_other_data,
)
from jaxseg.experiment.saved import saved_beginning
from jaxseg.experiment.setup import (
    Run,
    RunProblem,
    check_fits,
    create_run,
    training_batches,
    validation_batches,
    workdir_of,
)
from jaxseg.experiment.step_memory import compile_step, refuse_too_large
from jaxseg.experiment.validate import of_finite, validate
from jaxseg.run import checkpoint, identity, writers
from jaxseg.run.log import Log, RunLog, SilentLog, StepProgress, trace_row, without_lists
from jaxseg.run.ownership import owning
from jaxseg.training.state import TrainState

_NOTHING_OPEN = "decides what a config leaves open, here nothing: take configs/auto.py, or unset it"


def train(config: ConfigDict, begun_s: float | None = None) -> int | None:
    """Trains, or goes on training, and evaluates.

    Args:
      config: validated ConfigDict.
      begun_s: on the clock of `time.monotonic`, from when on `plan.minutes` are counted; None
        for now.
    Returns:
      None when the run is complete, or the number of the signal that stopped it after it had saved.
    Raises:
      RunProblem: the folder holds another experiment, or the loss is not finite.
      FileProblem: a file of the run in the folder is damaged.
      OwnershipProblem: another process works in the folder.
      CheckpointProblem: none of the saved checkpoints is whole, or one can not be written.
      ConfigProblems: the network can not take such a patch, or the devices not such a layout, or
        there is no time for them.
      GroupProblem: a pattern of `optim.groups` matches nothing.
      WeightsProblem, TransferProblem: the weights to start from can not be used.
      DatasetProblems, SplitProblem, OSError: the data can not be used.
    """
    begun_s = time.monotonic() if begun_s is None else begun_s
    workdir = workdir_of(config)
    checkpoints = os.path.join(workdir, "checkpoints")
    begins = not checkpoint.last_step(checkpoints)
    if config.plan.file and (begins or os.path.exists(os.path.expanduser(config.plan.file))):
        with naming_file(config):
            config = completed_by_file(config)
            check_fits(config, build.create_layout(config))
    elif not undecided(config):
        if begins and config.plan.preset:
            raise ConfigProblems([f"plan.preset {config.plan.preset!r} {_NOTHING_OPEN}"])
        check_fits(config, build.create_layout(config))
    if begins:
        build.check_initial_weights(config)
    os.makedirs(workdir, exist_ok=True)
    is_first = jax.process_index() == 0
    with owning(workdir) if is_first else contextlib.nullcontext():
        manager = checkpoint.open_checkpoints(checkpoints, keep=config.train.keep_checkpoints)
        try:
            is_new = manager.latest_step() is None
            refuse_damaged_files(workdir, is_new=is_new)
            if not is_new:
                config = complete_as_saved(workdir, config)
                refuse_another_experiment(workdir, config)
            log: Log = RunLog(workdir, begun_s) if is_first else SilentLog()
            with contextlib.closing(log):
                return _train(config, workdir, manager, log, begun_s)
        finally:
            checkpoint.close_checkpoints(manager)


def _train(config, workdir, manager, log, begun_s):
    is_new = manager.latest_step() is None
    begun = None if is_new else saved_beginning(workdir)
    with _listing_all(workdir):
        found = gather.find_data(config, log, begun)
        config = _decided(config, found, log)
        data = gather.prepare_data(config, found, log, begun)
    if not is_new:
        refuse_other_data(workdir, data)
    elif jax.process_index() == 0:
        writers.write_text(os.path.join(workdir, "config.json"), config_lib.to_json(config))
        writers.write_text(os.path.join(workdir, "plan.json"), data.plan.to_json())
        writers.write_text(os.path.join(workdir, "fingerprint.json"), fingerprint_json(found))
        writers.write_text(os.path.join(workdir, "data.json"), json.dumps(describe_data(data)))
        splits.save_split(os.path.join(workdir, SPLIT_NAME), describe_data(data)["split"])

    run, state = create_run(config, data, log, fresh=is_new)
    run = dataclasses.replace(run, workdir=workdir, manager=manager)
    first_step = 0
    if restored := checkpoint.restore_latest(manager, state, log_text=log.text):
        first_step, state = restored
        log.text(f"resuming at step {first_step}")
    log.start_at(first_step)
    if jax.process_index() == 0:
        identity.record(
            workdir, first_step, identity.describe(config_lib.to_json(config), data.sha256)
        )
    length = length_of(run, state, first_step, begun_s)
    with stop_requests() as stop_at:
        state, stopped_by = fit(run, state, first_step, length, stop_at)
    if stopped_by:
        return stopped_by
    state = jax.device_get(state_to_evaluate(run, state))
    if jax.process_index() == 0:
        assess(run, state)
    return None


def _decided(config, found, log):
    """The config with what it leaves open decided for the data; says why it is so."""
    if not undecided(config):
        if config.plan.file:
            log.text(f"plan: {config.plan.file}")
        return config
    config, lines = resolved(config, found)
    check_fits(config, build.create_layout(config))
    for line in lines:
        log.text(line)
    return config


@contextlib.contextmanager
def _listing_all(workdir):
    """Writes all problems to a file where the message shows but some of them."""
    try:
        yield
    except DatasetProblems as problems:
        if len(problems.shown()) != len(problems.problems) and jax.process_index() == 0:
            path = os.path.join(workdir, "problems.txt")
            writers.write_text(path, "\n".join([*problems.problems, ""]))
            problems.all_in = path
        raise


def fit(
    run: Run,
    state: TrainState,
    first_step: int,
    length: Counted | Timed,
    stop_at: Callable[[int], int],
) -> tuple[TrainState, int]:
    """Trains from `first_step` to the last step, or until asked to stop; saves on the way.

    Args:
      run: Run.
      state: TrainState on the devices; its memory is reused.
      first_step: number of updates done.
      length: of `length_of`.
      stop_at: of `stop_requests`.
    Returns:
      (state, signal): the last TrainState, which has been saved, and what stopped it, or 0.
    Raises:
      ConfigProblems: the devices can not hold what a step needs.
      RunProblem: a loss was not finite; what was saved before is kept.
      CheckpointProblem: a checkpoint could not be written; those before are kept.
    """
    config, log = run.config, run.log
    if length.is_over(first_step):
        return state, 0
    train_step = _compiled(run, state)
    val_batches = [parallel.shard(batch, run.layout) for batch in validation_batches(run)]
    batches = training_batches(run, first_step, length.most_steps)
    batch_size = config.train.batch_size * len(run.members)
    progress = StepProgress(log, first_step, batch_size)
    stopping = 0
    pending = []  # metrics still on the device: fetching them every step would stall it
    prefetched = parallel.prefetch_to_device(batches, run.layout)
    for step, batch in enumerate(prefetched, start=first_step + 1):
        state, step_metrics = train_step(state, batch, run.keys, length.rates(step))
        pending.append(step_metrics)
        progress.advance(length.num_steps)

        evaluate_now, is_over = length.after(step, state)
        stopping = stop_at(step)  # asked once: the answer may change at any moment
        save_now = stopping or evaluate_now or step % config.train.checkpoint_every == 0
        if save_now or step % config.train.log_every == 0:
            values = jax.device_get(pending)
            pending = []
            first = step - len(values) + 1
            log.trace([trace_row(n, row) for n, row in enumerate(values, start=first)])
            is_sweep = kind_of_members(config) == "rates"
            means = mean_metrics(values, step, enough=np.any if is_sweep else np.all)
            means["images_per_s"] = progress.report(step, length.num_steps, means)
            log.scalars(step, means)
        if evaluate_now:
            scores = validate(run, state, val_batches)
            shown = "  ".join(f"{n} {v:.4f}" for n, v in without_lists(scores).items())
            log.text(f"step {step}: {shown}")
            log.scalars(step, scores)
        if save_now:
            save(run, step, state, scores if evaluate_now else None)
            progress.restart_clock(step)
        if stopping:
            name = signal.Signals(stopping).name
            log.text(f"{name}: saved at step {step}; run the same command to go on")
        if stopping or is_over:
            break
    progress.close()
    return state, stopping


def _compiled(run, state):
    """The training step as a program that is known to fit into memory, where that can be known."""
    if not run.layout.compiles_ahead:
        return run.train_step
    members = (state, run.keys, run.learning_rates)
    channels, layout = run.data.num_channels, run.layout
    program = compile_step(run.train_step, run.config, members, channels, layout)
    run.log.text(refuse_too_large(program, run.config))
    return program


def mean_metrics(
    values: Sequence[dict[str, Any]], last_step: int, *, enough: Callable[..., Any] = np.all
) -> dict[str, Any]:
    """Means over steps, and over members; of several members also each one's loss.

    Args:
      values: metrics of one step after the other, on the host; the last is of `last_step`.
      last_step: number of the last step.
      enough: of which members they must be finite: `np.all`, or `np.any` where one will be chosen.
    Raises:
      RunProblem: the loss or the gradient of a step was not finite.
    """
    for step, row in enumerate(values, start=last_step - len(values) + 1):
        if not enough(np.isfinite(row["loss"]) & np.isfinite(row["grad_norm"])):
            raise RunProblem(
                f"the loss of step {step} is {row['loss']}, its gradient's norm "
                f"{row['grad_norm']}: the last checkpoint before it is kept. "
                "Lower --config.optim.learning_rate, or set --config.optim.clip_norm, in a new "
                "--config.workdir"
            )
    means = {
        name: of_finite(np.mean, np.ravel([row[name] for row in values]))
        for name in ("loss", "grad_norm")
    }
    if np.ndim(values[0]["loss"]):
        means["member_loss"] = np.mean([row["loss"] for row in values], axis=0).tolist()
    return means


def save(run: Run, step: int, state: TrainState, scores: dict[str, Any] | None) -> None:
    """Saves a checkpoint with all that is needed to use it; `scores` is None if not evaluated."""
    checkpoint.save(
        run.manager,
        step,
        parallel.joined(state, run.layout),
        config_json=config_lib.to_json(run.config),
        plan_json=run.data.plan.to_json(),
        data=describe_data(run.data),
        metrics=scores and without_lists(scores),
    )


def state_to_evaluate(run: Run, state: TrainState) -> TrainState:
    """The last state or, if test cases will judge it, the one with the best validation Dice."""
    best_step = run.manager.best_step()
    if not run.data.split["test"] or best_step == run.manager.latest_step():
        return state
    try:
        return checkpoint.restore(run.manager, best_step, parallel.joined(state, run.layout))
    except checkpoint.CheckpointProblem as problem:
        run.log.text(f"{problem}; the last step is evaluated in its place")
        return state
