"""Checkpoints of a run. The only file that imports Orbax."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxseg.problem import Problem
from jaxseg.training.state import TrainState

METRIC = "val_dice"
ITEMS = ("state", "config", "plan", "data", "digest")
NOTE = "_CHECKPOINT_METADATA"  # what Orbax writes into a step for itself
DISCARDED = ".discarded"  # where a step goes in one move before its files are removed one by one


class CheckpointProblem(Problem, RuntimeError):
    """A checkpoint can not be written or read; the message says why and what to do."""


class _Manager(ocp.CheckpointManager):
    """Opens although the metrics of a step, which all are read then, are damaged."""

    def metrics(self, step: int) -> dict[str, Any] | None:
        try:
            found = super().metrics(step)
            if found is not None:
                _metric(found)
            return found
        except (LookupError, RecursionError, TypeError, ValueError):
            return None


def _opened(directory: str | Path, **options: Any) -> _Manager:
    """The manager of a folder; raises CheckpointProblem where Orbax trips over its own notes."""
    try:
        return _Manager(directory, **options)
    except (RecursionError, ValueError) as error:
        notes = sorted(Path(directory).glob(f"*/{NOTE}"))
        damaged = [str(path) for path in notes if not _is_object(path)]
        if not damaged:
            raise
        raise CheckpointProblem(
            f"{', '.join(damaged)}: damaged; delete it, nothing in a checkpoint is lost with it"
        ) from error


def _is_object(path):
    try:
        return isinstance(_read_json(path), dict)
    except ValueError:
        return False


def open_checkpoints(directory: str | Path, *, keep: int) -> ocp.CheckpointManager:
    """Opens, or creates, the checkpoints of a run.

    Args:
      directory: absolute path.
      keep: how many of the latest are kept; the best by validation Dice is kept besides.
    Returns:
      An orbax CheckpointManager for `save`, `restore_latest`, `restore` and `close_checkpoints`. A
      checkpoint is written to a temporary name and renamed, so a half-written one is never seen.
    Raises:
      CheckpointProblem: they can not be opened.
    """
    options = ocp.CheckpointManagerOptions(
        best_fn=_metric,
        preservation_policy=preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        ),
        enable_async_checkpointing=False,
        todelete_subdir=DISCARDED,
    )
    manager = _opened(directory, options=options, item_names=ITEMS)
    _remove_leftovers(manager)
    return manager


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    *,
    config_json: str,
    plan_json: str,
    data: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Saves a step; it is on disk, whole, when this returns.

    Args:
      manager: from `open_checkpoints`.
      step: number of updates done.
      state: TrainState.
      config_json, plan_json: what is needed to rebuild the network and its preprocessing.
      data: JSON-ready dict about the dataset (class names, label values, channels, fingerprint).
      metrics: dict with "val_dice", or None when this step was not evaluated.
    Raises:
      CheckpointProblem: it could not be written; what was saved before is kept.
    """
    texts = {"config": json.loads(config_json), "plan": json.loads(plan_json), "data": data}
    digests = {"state": digest(state), "texts": _digest_of_texts(texts, metrics)}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        digest=ocp.args.JsonSave(digests),
        **{name: ocp.args.JsonSave(content) for name, content in texts.items()},
    )
    try:
        with _orbax_is_silent():
            manager.save(step, args=items, metrics=metrics, force=True)
    except (OSError, ValueError) as error:
        kept = ", ".join(map(str, sorted(manager.all_steps()))) or "none"
        raise CheckpointProblem(
            f"the checkpoint of step {step} could not be written to {manager.directory}: "
            f"{_cause(error)}; those that are kept, by step: {kept}. Free or mend the disk, then "
            "run the same command to go on"
        ) from error
    _remove_leftovers(manager)


def restore_latest(
    manager: ocp.CheckpointManager, template: TrainState, *, log_text: Callable[[str], None]
) -> tuple[int, TrainState] | None:
    """Finds the newest checkpoint that is whole.

    Damaged newer ones are moved to `damaged/` beside the checkpoints.

    Args:
      manager: from `open_checkpoints`.
      template: TrainState of the wanted structure, types and places.
      log_text: called with a line for each damaged one.
    Returns:
      (step, state), or None if there are no checkpoints.
    Raises:
      CheckpointProblem: there are checkpoints, but none is whole; they stay where they are.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = restore(manager, step, template)
        except Exception as error:  # whatever Orbax makes of files that are not as it left them
            damaged[step] = str(error).partition("\n")[0]
            continue
        _set_aside(manager, damaged, log_text)
        return step, state
    if damaged:
        lines = "\n".join(f"  - step {step}: {problem}" for step, problem in damaged.items())
        raise CheckpointProblem(
            f"no checkpoint in {manager.directory} is whole; bring back a copy of one, or begin "
            f"anew with another --config.workdir:\n{lines}"
        )
    return None


def restore(manager: ocp.CheckpointManager, step: int, template: TrainState) -> TrainState:
    """Returns the TrainState of a step, placed on devices as `template` is.

    Raises:
      CheckpointProblem: it is damaged.
      ValueError: it is of another structure.
    """
    _verify_together(manager.directory / str(step))
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, template)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    with _orbax_is_silent():
        return manager.restore(step, args=items).state


def digest(state: TrainState) -> str:
    """SHA-256, in hexadecimal, of name, type, shape and bytes of every array in a TrainState."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return _digest_of_arrays((name, jax.device_get(named[name])) for name in sorted(named))


def step_to_use(directory: str | Path) -> int | None:
    """The step with the best validation Dice, or the last if none was evaluated; None if none is.

    Args:
      directory: absolute path of the checkpoints of a run, which may still add to them.
    """
    options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_metric)
    with _opened(directory, options=options, item_names=ITEMS) as manager:
        best = manager.best_step()
        return manager.latest_step() if best is None else best


def load_variables(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """Reads the weights of a run of which nothing else is known, on whatever devices it was.

    Args:
      directory: absolute path of its checkpoints; not written to.
      step: which one; None for that of `step_to_use`.
    Returns:
      {"params", "batch_stats"}: nested dicts of NumPy arrays.
    Raises:
      FileNotFoundError: there is no such checkpoint.
      CheckpointProblem: it is damaged.
    """
    step = step_to_use(directory) if step is None else step
    options = ocp.CheckpointManagerOptions(read_only=True)
    handlers = {name: ocp.JsonCheckpointHandler() for name in ITEMS if name != "state"}
    handlers["state"] = ocp.PyTreeCheckpointHandler()
    with _opened(directory, options=options, item_handlers=handlers) as manager:
        if step not in manager.all_steps():
            raise FileNotFoundError(f"no checkpoint of step {step} in {directory}")
        folder = manager.directory / str(step)
        # Those of the first versions say nothing of what they should be.
        problem = _damage_of(folder) if (folder / "digest").exists() else ""
        if not problem:
            try:
                return _restore_variables(manager, step)
            except Exception as error:  # whatever Orbax makes of files that are not as it left them
                problem = str(error).partition("\n")[0]
        steps = [n for n in manager.all_steps() if not _damage_of(manager.directory / str(n))]
        again = f"goes on from step {max(steps)}, which is whole" if steps else "can not go on"
        raise CheckpointProblem(
            f"the checkpoint in {folder} is damaged: {problem}; bring back a copy of it (the "
            f"command of its training, if it is run again, {again})"
        )


def _restore_variables(manager, step):
    saved = manager.item_metadata(step).state
    tree = {name: saved[name] for name in ("params", "batch_stats")}
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = ocp.args.PyTreeRestore(tree, restore_args=as_arrays, partial_restore=True)
    with _orbax_is_silent():
        return manager.restore(step, args=ocp.args.Composite(state=state)).state


def last_step(directory: str | Path) -> int:
    """The step of the newest checkpoint in a folder, damaged or not; 0 where there is none."""
    steps = [int(path.name) for path in Path(directory).glob("*") if path.name.isdecimal()]
    return max(steps, default=0)


def close_checkpoints(manager: ocp.CheckpointManager) -> None:
    """Ends the threads that the manager keeps; what was saved is on disk already."""
    manager.close()


def _set_aside(manager, damaged, log_text):
    """Moves damaged checkpoints to `damaged/` in the run's folder, and says so."""
    for step, problem in damaged.items():
        target = manager.directory.parent / "damaged" / str(step)
        while target.exists():
            target = target.with_name(f"{target.name}-again")
        if jax.process_index() == 0:
            os.makedirs(target.parent, exist_ok=True)
            os.rename(manager.directory / str(step), target)
        log_text(f"{problem}; moved to {target}, going on from the one before")
    if damaged:
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        manager.reload()


@contextlib.contextmanager
def _orbax_is_silent():
    """Keeps what is raised from being logged besides, once per thread and with its traceback.

    After a failure it stays so: threads that were not waited for still have to fail.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.disabled for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.disabled = True
    sys.unraisablehook = lambda event: _answers_too_late(event) or hook(event)
    yield
    sys.unraisablehook = hook
    for logger, disabled in zip(loggers, before, strict=True):
        logger.disabled = disabled


def _answers_too_late(event):
    return str(event.exc_value) == "Event loop is closed"


def _cause(error):
    """What the system said, of all that a library says about it."""
    code = re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", str(error))
    return os.strerror(int(code[1] or code[2])) if code else str(error)


def _remove_leftovers(manager):
    """Removes steps that are no longer wanted, and those that were never finished."""
    if jax.process_index() == 0:
        unfinished = manager.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")
        for folder in (manager.directory / DISCARDED, *unfinished):
            shutil.rmtree(folder, ignore_errors=True)


def _verify_together(folder):
    """Raises CheckpointProblem in all processes if one of them finds the folder damaged."""
    problem = _damage_of(folder)
    if np.any(multihost_utils.process_allgather(np.asarray(bool(problem)))):
        problem = problem or "another process could not read it"
        raise CheckpointProblem(f"the checkpoint in {folder} is damaged: {problem}")


def _damage_of(folder):
    """What is damaged in the folder of a step, "" for nothing."""
    try:
        return _damage_in(folder)
    except (OSError, LookupError, TypeError, ValueError) as error:
        return str(error).partition(" [tensorstore_spec")[0]  # what it was opened with


def _damage_in(folder):
    """Says what in the folder of a step is not what was saved; raises if it can not be read.

    Array by array, since Orbax reads all at once and, if that fails, leaves a traceback for each.
    """
    state = folder / "state"
    for path in (state / "_METADATA", *state.glob("array_metadatas/*")):
        _read_json(path)
    texts = {name: _read_json(folder / name / "metadata") for name in ("config", "plan", "data")}
    metrics_path = folder / "metrics" / "metrics"
    metrics = _read_json(metrics_path) if metrics_path.exists() else None
    found = {
        "state": _digest_of_arrays(_stored_arrays(folder / "state")),
        "texts": _digest_of_texts(texts, metrics),
    }
    saved = _read_json(folder / "digest" / "metadata")
    return ", ".join(
        f"SHA-256 of {name} {found[name][:12]}… instead of {saved[name][:12]}…"
        for name in found
        if found[name] != saved[name]
    )


def _stored_arrays(folder):
    """Yields (name, array) in order of the names, as Orbax writes them: zarr in one OCDBT store."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    keys = tensorstore.KvStore.open(store).result().list().result()
    for name in sorted(key.decode().removesuffix("/.zarray") for key in keys if b"/.z" in key):
        spec = {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
        yield name, np.asarray(tensorstore.open(spec).result().read().result())


def _digest_of_arrays(named):
    found = hashlib.sha256()
    for name, array in named:
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()


def _digest_of_texts(texts, metrics):
    return hashlib.sha256(json.dumps([texts, metrics], sort_keys=True).encode()).hexdigest()


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _metric(metrics):
    value = metrics[METRIC]
    return -math.inf if math.isnan(value) else value  # no case counted: never better than a number
