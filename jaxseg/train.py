"""Trains a config, goes on where it was stopped, and evaluates the result on whole cases."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading

import jax
import numpy as np

from jaxseg import checkpoint, evaluate, experiment, parallel, plots, writers
from jaxseg import config as config_lib
from jaxseg.data import pipeline, splits
from jaxseg.models.summary import summarise_model
from jaxseg.train_state import create_train_state


class RunProblem(RuntimeError):
    """The run can not go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last.

    Attributes:
      config: validated ConfigDict.
      workdir: absolute path of the run's folder.
      data: `jaxseg.experiment.Data`.
      manager: checkpoints.
      log: RunLog.
      train_step, eval_step: mapped over the devices.
      margin: of `jaxseg.experiment.margin_of`.
    """

    config: object
    workdir: str
    data: experiment.Data
    manager: object
    log: writers.RunLog
    train_step: object
    eval_step: object
    margin: tuple[int, ...]


def train(config):
    """Trains, or goes on training, and evaluates.

    Args:
      config: validated ConfigDict.
    Returns:
      None when the run is complete, or the number of the signal that stopped it after it had saved.
    Raises:
      RunProblem: the folder holds another experiment, or the loss is not finite.
      ConfigProblems: the network can not take such a patch.
      GroupProblem: a pattern of `optim.groups` matches nothing.
      WeightsProblem, TransferProblem: the weights to start from can not be used.
      DatasetProblems, SplitProblem, OSError: the data can not be used.
    """
    check_batch_size(config)
    margin = experiment.margin_of(config)
    workdir = experiment.workdir_of(config)
    checkpoints = os.path.join(workdir, "checkpoints")
    if not os.path.exists(checkpoints):
        experiment.check_initial_weights(config)
    os.makedirs(workdir, exist_ok=True)
    manager = checkpoint.open_checkpoints(checkpoints, keep=config.train.keep_checkpoints)
    first_step = manager.latest_step() or 0
    try:
        if first_step:
            refuse_another_experiment(workdir, config)
        with contextlib.closing(writers.RunLog(workdir, first_step)) as log:
            return _train(config, workdir, manager, first_step, margin, log)
    finally:
        checkpoint.close_checkpoints(manager)


def check_batch_size(config):
    """Raises RunProblem if the devices can not share the batch."""
    parts = jax.device_count() * config.optim.accumulate_steps
    if config.train.batch_size % parts:
        raise RunProblem(
            f"train.batch_size {config.train.batch_size} can not be shared by {jax.device_count()} "
            f"device(s) x {config.optim.accumulate_steps} accumulation step(s); use a multiple of "
            f"{parts}"
        )


def refuse_another_experiment(workdir, config):
    """Raises RunProblem if the saved run in `workdir` has another config."""
    with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
        changes = config_lib.differences(file.read(), config_lib.to_json(config))
    if changes:
        raise RunProblem(_another_run(workdir, changes))


def refuse_other_data(workdir, data):
    """Raises RunProblem if the saved run in `workdir` was trained on other data."""
    with open(os.path.join(workdir, "data.json"), encoding="utf-8") as file:
        saved = json.load(file)
    now = describe_data(data)
    changes = [f"{key}: {saved[key]} -> {now[key]}" for key in now if saved[key] != now[key]]
    if changes:
        raise RunProblem(_another_run(workdir, changes))


def describe_data(data):
    """What a model must know of the data it was trained on, JSON-ready."""
    return writers.json_ready(
        {
            "class_names": data.dataset.class_names,
            "label_values": data.dataset.label_values,
            "modalities": data.dataset.modalities,
            "num_channels": data.num_channels,
            "fingerprint": data.fingerprint,
            "split": data.split,
        }
    )


def _another_run(workdir, changes):
    lines = "\n".join(f"  - {change}" for change in changes)
    return (
        f"{workdir} holds a run that was started differently; give this one a folder of its own "
        f"with --config.workdir=DIR, or undo:\n{lines}"
    )


def _train(config, workdir, manager, first_step, margin, log):
    data = experiment.load_data(config, log)
    if first_step:
        refuse_other_data(workdir, data)
    else:
        writers.write_text(os.path.join(workdir, "config.json"), config_lib.to_json(config))
        writers.write_text(os.path.join(workdir, "plan.json"), data.plan.to_json())
        writers.write_text(os.path.join(workdir, "data.json"), json.dumps(describe_data(data)))
        splits.save_split(os.path.join(workdir, "split.json"), data.split)

    image_shape = (*config.data.patch_size, data.num_channels)
    model = experiment.create_model_for(config, data.num_classes)
    tx = experiment.create_tx(config)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    state = create_train_state(model, tx, init_key, image_shape)
    if config.init.checkpoint and not first_step:
        state = experiment.load_initial_weights(config, state, log)
    state = parallel.replicate(state)

    counts = ", ".join(f"{len(case_ids)} {name}" for name, case_ids in data.split.items())
    log.text(summarise_model(model, image_shape))
    log.text(
        f"{counts} cases; {jax.device_count()} {jax.default_backend()} device(s); "
        f"results in {workdir}"
    )
    if first_step:
        state = checkpoint.restore(manager, first_step, state)
        log.text(f"resuming at step {first_step}")

    train_step, eval_step = experiment.create_steps(config, model, tx)
    run = Run(config, workdir, data, manager, log, train_step, eval_step, margin)
    with stop_signals() as stop:
        state = fit(run, state, first_step, parallel.replicate(step_key), stop)
    if stop.signal:
        return stop.signal
    finish(run, state)
    return None


class StopRequest:
    """Set by the first SIGTERM or Ctrl-C; `signal` is its number, 0 before."""

    signal = 0

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(number, signal.default_int_handler)  # a second one does not wait


@contextlib.contextmanager
def stop_signals():
    """Turns SIGTERM and Ctrl-C into a request to stop after the current step."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread alone
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def fit(run, state, first_step, key, stop):
    """Trains from `first_step` to the last step, or until `stop` is set; saves on the way.

    Returns:
      The last TrainState, which has been saved.
    Raises:
      RunProblem: a loss was not finite; what was saved before is kept.
    """
    config, log = run.config, run.log
    num_steps, batch_size = config.train.num_steps, config.train.batch_size
    batches = pipeline.train_batches(
        run.data.store,
        run.data.split["train"],
        seed=config.seed,
        start_step=first_step,
        num_steps=num_steps,
        batch_size=batch_size,
        patch_size=tuple(config.data.patch_size),
        num_channels=run.data.num_channels,
        foreground_fraction=config.data.foreground_fraction,
        augment_params=config.augment.to_dict(),
        margin=run.margin,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    progress = writers.StepProgress(log, first_step, num_steps, batch_size)
    pending = []  # metrics still on the device: fetching them every step would stall it
    for step, batch in enumerate(parallel.prefetch_to_device(batches), start=first_step + 1):
        state, metrics = run.train_step(state, batch, key)
        pending.append(metrics)
        progress.advance()

        stopping = stop.signal  # read once: it may be set at any moment
        evaluate_now = step == num_steps or step % config.train.eval_every == 0
        save_now = stopping or evaluate_now or step % config.train.checkpoint_every == 0
        if save_now or step % config.train.log_every == 0:
            means = mean_metrics(pending, step)
            pending = []
            means["images_per_s"] = progress.report(step, means)
            log.scalars(step, means)
        if evaluate_now:
            scores = validate(run, state)
            log.text(f"step {step}: " + "  ".join(f"{n} {v:.4f}" for n, v in scores.items()))
            log.scalars(step, scores)
        if save_now:
            save(run, step, state, scores if evaluate_now else None)
            progress.restart_clock(step)
        if stopping:
            name = signal.Signals(stopping).name
            log.text(f"{name}: saved at step {step}; run the same command to go on")
            break
    progress.close()
    return state


def mean_metrics(pending, last_step):
    """Means over steps of metrics that are on the device.

    Args:
      pending: one dict of scalars per step; the last is of `last_step`.
      last_step: number of the last step.
    Raises:
      RunProblem: the loss or the gradient of a step was not finite.
    """
    values = jax.device_get(pending)
    for step, row in enumerate(values, start=last_step - len(values) + 1):
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise RunProblem(
                f"the loss of step {step} is {row['loss']}, its gradient's norm "
                f"{row['grad_norm']}: the last checkpoint before it is kept. "
                "Lower --config.optim.learning_rate, or set --config.optim.clip_norm, in a new "
                "--config.workdir"
            )
    names = ("loss", "grad_norm")
    return {name: float(np.mean([row[name] for row in values])) for name in names}


def validate(run, state):
    """Mean loss over patches, and mean Dice over whole validation cases on their own grid."""
    sums = []

    def predict_fn(batch):
        probs, batch_sums = run.eval_step(state, parallel.shard(batch))
        sums.append(batch_sums)
        return parallel.unshard(probs)

    val_dice = evaluate.mean_dice(result.scores for result in predicted(run, predict_fn, "val"))
    sums = jax.device_get(sums)
    val_loss = float(sum(s["loss"] for s in sums) / sum(s["count"] for s in sums))
    return {"val_loss": val_loss, "val_dice": val_dice}


def predicted(run, predict_fn, set_name):
    """Yields a CaseResult for every case of a set."""
    return evaluate.evaluate_cases(
        predict_fn,
        run.data.store,
        run.data.cases_of(set_name),
        label_values=run.data.dataset.label_values,
        num_classes=run.data.num_classes,
        patch_size=tuple(run.config.data.patch_size),
        batch_size=run.config.train.batch_size,
        margin=run.margin,
    )


def save(run, step, state, scores):
    """Saves a checkpoint with all that is needed to use it; `scores` is None if not evaluated."""
    checkpoint.save(
        run.manager,
        step,
        state,
        config_json=config_lib.to_json(run.config),
        plan_json=run.data.plan.to_json(),
        data=describe_data(run.data),
        metrics=scores,
    )


def finish(run, state):
    """Evaluates the trained network and draws its curves.

    With test cases, the checkpoint with the best validation Dice is evaluated on them. Without, the
    last step's is evaluated on the validation cases: the best one was chosen by these very cases.
    """
    run.manager.wait_until_finished()
    set_name, step = "val", int(state.step)
    if run.data.split["test"]:
        set_name, step = "test", run.manager.best_step()
        state = checkpoint.restore(run.manager, step, state)

    def predict_fn(batch):
        return parallel.unshard(run.eval_step(state, parallel.shard(batch))[0])

    table, mean_dice = evaluate.save_evaluation(
        run.workdir,
        set_name,
        predicted(run, predict_fn, set_name),
        class_names=run.data.dataset.class_names,
        label_values=run.data.dataset.label_values,
        about={"set": set_name, "step": step, "data": run.data.fingerprint},
    )
    rows = writers.read_metrics(run.workdir)
    plots.save_learning_curves(os.path.join(run.workdir, "curves.png"), rows)
    run.log.text(f"\nwhole {set_name} cases, checkpoint of step {step}\n{table}")
    run.log.text(f"mean {set_name} Dice {mean_dice:.4f}")
