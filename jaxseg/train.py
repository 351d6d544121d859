"""Trains a config, goes on where it was stopped, and evaluates the result on whole cases."""

import contextlib
import dataclasses
import json
import os
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxseg import checkpoint, experiment, finish, identity, metrics, parallel, program, writers
from jaxseg import config as config_lib
from jaxseg.data import pipeline, splits
from jaxseg.data.volumes import read_image, read_label
from jaxseg.models.summary import summarise_model
from jaxseg.ownership import owning
from jaxseg.predictor import member_alone, member_weights


class RunProblem(RuntimeError):
    """The run can not go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last.

    Attributes:
      config: validated ConfigDict.
      workdir: absolute path of the run's folder.
      members: of `jaxseg.experiment.members_of`.
      data: `jaxseg.experiment.Data`.
      log: RunLog, or SilentLog in all processes but the first.
      layout: of `jaxseg.experiment.create_layout`.
      train_step, eval_step: mapped over members and devices.
      keys, learning_rates: what the training step takes besides, on the devices.
      segment_fn: of `jaxseg.program.create_segment_fn`, for "label" and "sample".
      recipe: that it was made from.
      manager: checkpoints; None when nothing is saved.
    """

    config: object
    workdir: str
    members: tuple[experiment.Member, ...]
    data: experiment.Data
    log: writers.RunLog
    layout: parallel.Layout
    train_step: object
    eval_step: object
    keys: object
    learning_rates: object
    segment_fn: object
    recipe: program.Recipe
    manager: object = None


def train(config):
    """Trains, or goes on training, and evaluates.

    Args:
      config: validated ConfigDict.
    Returns:
      None when the run is complete, or the number of the signal that stopped it after it had saved.
    Raises:
      RunProblem: the folder holds another experiment, or the loss is not finite.
      OwnershipProblem: another process works in the folder.
      CheckpointProblem: none of the saved checkpoints is whole, or one can not be written.
      ConfigProblems: the network can not take such a patch, or the devices not such a layout.
      GroupProblem: a pattern of `optim.groups` matches nothing.
      WeightsProblem, TransferProblem: the weights to start from can not be used.
      DatasetProblems, SplitProblem, OSError: the data can not be used.
    """
    check_batch_size(config, experiment.create_layout(config))
    experiment.margin_of(config)
    workdir = experiment.workdir_of(config)
    checkpoints = os.path.join(workdir, "checkpoints")
    if not os.path.exists(checkpoints):
        experiment.check_initial_weights(config)
    os.makedirs(workdir, exist_ok=True)
    is_first = jax.process_index() == 0
    with owning(workdir) if is_first else contextlib.nullcontext():
        manager = checkpoint.open_checkpoints(checkpoints, keep=config.train.keep_checkpoints)
        try:
            if manager.latest_step() is not None:
                refuse_another_experiment(workdir, config)
            log = writers.RunLog(workdir) if is_first else writers.SilentLog()
            with contextlib.closing(log):
                return _train(config, workdir, manager, log)
        finally:
            checkpoint.close_checkpoints(manager)


def check_batch_size(config, layout):
    """Raises RunProblem if the devices can not share the batch."""
    num_parts, virtual_shards = layout.num_batch_parts, config.parallel.virtual_shards
    if virtual_shards and (virtual_shards % num_parts or num_parts & (num_parts - 1)):
        raise RunProblem(
            f"parallel.virtual_shards {virtual_shards} can not be shared by {num_parts} device(s): "
            "use a power of two of each, no more devices than shards"
        )
    parts = num_parts * config.optim.accumulate_steps
    if config.train.batch_size % parts:
        raise RunProblem(
            f"train.batch_size {config.train.batch_size} can not be shared by {num_parts} "
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
            "split": data.split if all(s == data.split for s in data.splits) else data.splits,
        }
    )


def _another_run(workdir, changes):
    lines = "\n".join(f"  - {change}" for change in changes)
    return (
        f"{workdir} holds a run that was started differently; give this one a folder of its own "
        f"with --config.workdir=DIR, or undo:\n{lines}"
    )


def _train(config, workdir, manager, log):
    data = experiment.load_data(config, log)
    is_new = manager.latest_step() is None
    if not is_new:
        refuse_other_data(workdir, data)
    elif jax.process_index() == 0:
        writers.write_text(os.path.join(workdir, "config.json"), config_lib.to_json(config))
        writers.write_text(os.path.join(workdir, "plan.json"), data.plan.to_json())
        writers.write_text(os.path.join(workdir, "data.json"), json.dumps(describe_data(data)))
        splits.save_split(os.path.join(workdir, "split.json"), describe_data(data)["split"])

    run, state = create_run(config, data, log, fresh=is_new)
    run = dataclasses.replace(run, workdir=workdir, manager=manager)
    first_step = 0
    if not is_new:
        first_step, state = checkpoint.restore_latest(manager, state, log_text=log.text)
        log.text(f"resuming at step {first_step}")
    log.start_at(first_step)
    if jax.process_index() == 0:
        identity.record(
            workdir, first_step, identity.describe(config_lib.to_json(config), data.fingerprint)
        )
    with stop_requests() as stop_at:
        state, stopped_by = fit(run, state, first_step, stop_at)
    if stopped_by:
        return stopped_by
    state = jax.device_get(state_to_evaluate(run, state))
    if jax.process_index() == 0:
        finish.finish(run, state)
    return None


def create_run(config, data, log, *, fresh):
    """Makes all that training needs, but a folder to write to.

    Args:
      config: validated ConfigDict.
      data: `jaxseg.experiment.Data`.
      log: RunLog.
      fresh: whether the run begins, perhaps from the weights that `init.checkpoint` names.
    Returns:
      (run, state): Run, and TrainState on the devices.
    """
    image_shape = (*config.data.patch_size, data.num_channels)
    layout = experiment.create_layout(config)
    model = experiment.create_model_for(config, data.num_classes)
    tx = experiment.create_tx(config)
    state, keys, learning_rates = (
        parallel.place(tree, layout)
        for tree in experiment.create_members(
            config, model, tx, image_shape, log if fresh else None
        )
    )
    log.text(summarise_model(model, image_shape))
    counts = ", ".join(f"{len(case_ids)} {name}" for name, case_ids in data.split.items())
    members = experiment.members_of(config)
    several = f"{len(members)} members; " if len(members) > 1 else ""
    log.text(
        f"{several}{counts} cases; {jax.device_count()} {jax.default_backend()} device(s) of "
        f"{jax.process_count()} process(es); results in {experiment.workdir_of(config)}"
    )
    train_step, eval_step = experiment.create_steps(config, model, tx, layout)
    recipe = experiment.create_recipe(
        config,
        data.plan,
        data.dataset.class_names,
        experiment.margin_of(config),
        outputs=("label", "sample"),
    )
    run = Run(
        config=config,
        workdir="",
        members=members,
        data=data,
        log=log,
        layout=layout,
        train_step=train_step,
        eval_step=eval_step,
        keys=keys,
        learning_rates=learning_rates,
        segment_fn=program.create_segment_fn(recipe),
        recipe=recipe,
    )
    return run, state


def training_batches(run, first_step, num_steps):
    """This process's part of the batches of all members, on the host.

    Leaves have a leading axis of members where there are several. Members with the same seed and
    split share what is read and augmented.
    """
    return _member_batches(run, "train", first_step, num_steps, run.config.augment.to_dict())


def validation_batches(run):
    """Patches drawn as for training but not augmented, about four of each validation case.

    They are the same at every evaluation, so that their loss can be compared.
    """
    most = max(len(split["val"]) for split in run.data.splits)
    num_steps = -(-4 * most // run.config.train.batch_size)
    augment = run.config.augment.to_dict()
    nothing = {name: options | {"prob": 0.0} for name, options in augment.items()}
    return _member_batches(run, "val", 0, num_steps, nothing)


def _member_batches(run, set_name, first_step, num_steps, augment_params):
    config, streams = run.config, {}
    for member, split in zip(run.members, run.data.splits, strict=True):
        if (member.seed, member.fold) not in streams:
            streams[member.seed, member.fold] = pipeline.train_batches(
                run.data.store,
                split[set_name],
                seed=member.seed,
                start_step=first_step,
                num_steps=num_steps,
                batch_size=config.train.batch_size,
                patch_size=tuple(config.data.patch_size),
                num_channels=run.data.num_channels,
                foreground_fraction=config.data.foreground_fraction,
                augment_params=augment_params,
                margin=run.recipe.margin,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
    if not run.layout.has_members:
        yield from streams[run.members[0].seed, run.members[0].fold]
        return
    for batches in zip(*streams.values(), strict=True):
        batch_of = dict(zip(streams, batches, strict=True))
        of_members = [batch_of[member.seed, member.fold] for member in run.members]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *of_members)


class StopRequest:
    """Set by the first SIGTERM or Ctrl-C; calling it with a step gives the signal's number or 0."""

    signal = 0

    def __call__(self, step):
        return self.signal

    def set(self, number, frame):
        self.signal = number
        signal.signal(number, signal.default_int_handler)  # a second one does not wait


@contextlib.contextmanager
def stop_requests():
    """Turns SIGTERM and Ctrl-C into a request to stop after the current step.

    Yields:
      Function from a step to the number of the signal because of which to stop there, or 0. Of
      several processes, which must agree on the step, it is JAX that hears SIGTERM.
    """
    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of no use to JAX after the last step
        return
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread alone
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, stop.set) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def fit(run, state, first_step, stop_at):
    """Trains from `first_step` to the last step, or until asked to stop; saves on the way.

    Args:
      run: Run.
      state: TrainState on the devices; its memory is reused.
      first_step: number of updates done.
      stop_at: of `stop_requests`.
    Returns:
      (state, signal): the last TrainState, which has been saved, and what stopped it, or 0.
    Raises:
      RunProblem: a loss was not finite; what was saved before is kept.
      CheckpointProblem: a checkpoint could not be written; those before are kept.
    """
    config, log = run.config, run.log
    num_steps = config.train.num_steps
    val_batches = [parallel.shard(batch, run.layout) for batch in validation_batches(run)]
    batches = training_batches(run, first_step, num_steps)
    batch_size = config.train.batch_size * len(run.members)
    progress = writers.StepProgress(log, first_step, num_steps, batch_size)
    stopping = 0
    pending = []  # metrics still on the device: fetching them every step would stall it
    prefetched = parallel.prefetch_to_device(batches, run.layout)
    for step, batch in enumerate(prefetched, start=first_step + 1):
        state, step_metrics = run.train_step(state, batch, run.keys, run.learning_rates)
        pending.append(step_metrics)
        progress.advance()

        stopping = stop_at(step)  # asked once: the answer may change at any moment
        evaluate_now = step == num_steps or step % config.train.eval_every == 0
        save_now = stopping or evaluate_now or step % config.train.checkpoint_every == 0
        if save_now or step % config.train.log_every == 0:
            values = jax.device_get(pending)
            pending = []
            first = step - len(values) + 1
            log.trace([writers.trace_row(n, row) for n, row in enumerate(values, start=first)])
            is_sweep = experiment.kind_of_members(config) == "rates"
            means = mean_metrics(values, step, enough=np.any if is_sweep else np.all)
            means["images_per_s"] = progress.report(step, means)
            log.scalars(step, means)
        if evaluate_now:
            scores = validate(run, state, val_batches)
            shown = "  ".join(f"{n} {v:.4f}" for n, v in writers.without_lists(scores).items())
            log.text(f"step {step}: {shown}")
            log.scalars(step, scores)
        if save_now:
            save(run, step, state, scores if evaluate_now else None)
            progress.restart_clock(step)
        if stopping:
            name = signal.Signals(stopping).name
            log.text(f"{name}: saved at step {step}; run the same command to go on")
            break
    progress.close()
    return state, stopping


def replay(config, data, log, num_steps):
    """Trains from the beginning, and writes nothing.

    Args:
      config: validated ConfigDict.
      data: `jaxseg.experiment.Data`.
      log: where to say what is done.
      num_steps: steps to do.
    Yields:
      The row of `jaxseg.writers.trace_row` of each step.
    Raises:
      RunProblem, ConfigProblems: the devices can not share the batch.
      GroupProblem, WeightsProblem, TransferProblem: as `train`.
    """
    check_batch_size(config, experiment.create_layout(config))
    run, state = create_run(config, data, log, fresh=True)
    batches = training_batches(run, 0, num_steps)
    for step, batch in enumerate(parallel.prefetch_to_device(batches, run.layout), start=1):
        state, step_metrics = run.train_step(state, batch, run.keys, run.learning_rates)
        yield writers.trace_row(step, jax.device_get(step_metrics))


def mean_metrics(values, last_step, *, enough=np.all):
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
        name: _of_finite(np.mean, np.ravel([row[name] for row in values]))
        for name in ("loss", "grad_norm")
    }
    if np.ndim(values[0]["loss"]):
        means["member_loss"] = np.mean([row["loss"] for row in values], axis=0).tolist()
    return means


def validate(run, state, val_batches):
    """Mean loss over validation patches, and mean Dice over whole cases on their own grid.

    Of several members these are means too, or of learning rates those of the best; each one's are
    in "member_val_loss" and "member_val_dice". Processes share the cases.

    Args:
      run: Run.
      state: TrainState on the devices.
      val_batches: of `validation_batches`, on the devices.
    """
    sums = jax.device_get([run.eval_step(state, batch) for batch in val_batches])
    loss = sum(s["loss"] for s in sums) / sum(s["count"] for s in sums)
    num_members = len(run.members)
    variables = parallel.replicate(member_weights(jax.device_get(state), num_members))
    dice = [
        validation_dice(run, member_alone(variables, member), member)
        for member in range(num_members)
    ]
    if num_members == 1:
        return {"val_loss": float(loss), "val_dice": dice[0]}
    is_sweep = experiment.kind_of_members(run.config) == "rates"
    losses = np.asarray(loss, float).tolist()
    return {
        "val_loss": _of_finite(min if is_sweep else np.mean, losses),
        "val_dice": _of_finite(max if is_sweep else np.mean, dice),
        "member_val_loss": losses,
        "member_val_dice": dice,
    }


def _of_finite(function, values):
    """What the function makes of those values that are finite; NaN if none is."""
    finite = [value for value in values if np.isfinite(value)]
    return float(function(finite)) if finite else float("nan")


def validation_dice(run, variables, member):
    """Mean Dice of a member, weights as for `run.segment_fn`, over its whole validation cases."""
    cases = run.data.cases_of("val", member)
    rank, num_processes = jax.process_index(), jax.process_count()
    dice = np.full((len(cases), run.data.num_classes), np.nan)
    for index in range(rank, len(cases), num_processes):
        image, affine = read_image(cases[index].image_path)
        label, _ = read_label(cases[index].label_path, run.data.dataset.label_values)
        prediction = run.segment_fn(variables, image, affine)["label"]
        counts = metrics.confusion_counts(prediction, label, run.data.num_classes)
        dice[index] = metrics.scores_from_counts(counts)["dice"]
    everywhere = parallel.gather_from_processes(dice)
    owners = np.arange(len(cases)) % num_processes
    return metrics.mean_dice({"dice": row} for row in everywhere[owners, np.arange(len(cases))])


def save(run, step, state, scores):
    """Saves a checkpoint with all that is needed to use it; `scores` is None if not evaluated."""
    checkpoint.save(
        run.manager,
        step,
        parallel.joined(state, run.layout),
        config_json=config_lib.to_json(run.config),
        plan_json=run.data.plan.to_json(),
        data=describe_data(run.data),
        metrics=scores and writers.without_lists(scores),
    )


def state_to_evaluate(run, state):
    """The last state or, if test cases will judge it, the one with the best validation Dice."""
    best_step = run.manager.best_step()
    if not run.data.split["test"] or best_step == run.config.train.num_steps:
        return state
    try:
        return checkpoint.restore(run.manager, best_step, parallel.joined(state, run.layout))
    except checkpoint.CheckpointProblem as problem:
        run.log.text(f"{problem}; the last step is evaluated in its place")
        return state
