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

from jaxseg import checkpoint, experiment, finish, metrics, parallel, program, writers
from jaxseg import config as config_lib
from jaxseg.data import pipeline, splits
from jaxseg.data.volumes import read_image, read_label
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
      segment_fn: of `jaxseg.program.create_segment_fn`, for "label" and "sample".
      recipe: that it was made from.
      val_batches: validation patches, on the devices.
    """

    config: object
    workdir: str
    data: experiment.Data
    manager: object
    log: writers.RunLog
    train_step: object
    eval_step: object
    segment_fn: object
    recipe: program.Recipe
    val_batches: list


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
    recipe = experiment.create_recipe(
        config, data.plan, data.dataset.class_names, margin, outputs=("label", "sample")
    )
    run = Run(
        config=config,
        workdir=workdir,
        data=data,
        manager=manager,
        log=log,
        train_step=train_step,
        eval_step=eval_step,
        segment_fn=program.create_segment_fn(recipe),
        recipe=recipe,
        val_batches=validation_batches(config, data, margin),
    )
    with stop_signals() as stop:
        state = fit(run, state, first_step, parallel.replicate(step_key), stop)
    if stop.signal:
        return stop.signal
    finish.finish(run, state)
    return None


def pipeline_options(config, data, margin):
    """What training and validation patches have in common."""
    return {
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "patch_size": tuple(config.data.patch_size),
        "num_channels": data.num_channels,
        "foreground_fraction": config.data.foreground_fraction,
        "margin": margin,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def validation_batches(config, data, margin):
    """Patches drawn as for training but not augmented, about four of each validation case.

    They are the same at every evaluation, so that their loss can be compared.
    """
    augment = config.augment.to_dict()
    batches = pipeline.train_batches(
        data.store,
        data.split["val"],
        start_step=0,
        num_steps=-(-4 * len(data.split["val"]) // config.train.batch_size),
        augment_params={name: params | {"prob": 0.0} for name, params in augment.items()},
        **pipeline_options(config, data, margin),
    )
    return [parallel.shard(batch) for batch in batches]


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
        start_step=first_step,
        num_steps=num_steps,
        augment_params=config.augment.to_dict(),
        **pipeline_options(config, run.data, run.recipe.margin),
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
    """Mean loss over validation patches, and mean Dice over whole cases on their own grid."""
    sums = jax.device_get([run.eval_step(state, batch) for batch in run.val_batches])
    variables = finish.members_of(state)
    dice = []
    for case in run.data.cases_of("val"):
        image, affine = read_image(case.image_path)
        label, _ = read_label(case.label_path, run.data.dataset.label_values)
        prediction = run.segment_fn(variables, image, affine)["label"]
        counts = metrics.confusion_counts(prediction, label, run.data.num_classes)
        dice.append(metrics.scores_from_counts(counts))
    return {
        "val_loss": float(sum(s["loss"] for s in sums) / sum(s["count"] for s in sums)),
        "val_dice": metrics.mean_dice(dice),
    }


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
