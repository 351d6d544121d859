"""Checkpoints of a run. The only file that imports Orbax."""

import json
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

METRIC = "val_dice"


def open_checkpoints(directory, *, keep):
    """Opens, or creates, the checkpoints of a run.

    Args:
      directory: absolute path.
      keep: how many of the latest are kept; the best by validation Dice is kept besides.
    Returns:
      An orbax CheckpointManager for `save`, `restore` and `close_checkpoints`. A checkpoint is
      written to a temporary name and renamed, so a half-written one is never seen.
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
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(
        directory, options=options, item_names=("state", "config", "plan", "data")
    )


def save(manager, step, state, *, config_json, plan_json, data, metrics):
    """Saves a step in the background.

    Args:
      manager: from `open_checkpoints`.
      step: number of updates done.
      state: TrainState.
      config_json, plan_json: what is needed to rebuild the network and its preprocessing.
      data: JSON-ready dict about the dataset (class names, label values, channels, fingerprint).
      metrics: dict with "val_dice", or None when this step was not evaluated.
    """
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        config=ocp.args.JsonSave(json.loads(config_json)),
        plan=ocp.args.JsonSave(json.loads(plan_json)),
        data=ocp.args.JsonSave(data),
    )
    manager.save(step, args=items, metrics=metrics, force=True)


def restore(manager, step, template):
    """Returns the TrainState of a step, placed on devices as `template` is."""
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, template)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    return manager.restore(step, args=items).state


def load_variables(directory, step=None):
    """Reads the weights of a run of which nothing else is known, on whatever devices it was.

    Args:
      directory: absolute path of its checkpoints; not written to.
      step: which one; None for that with the best validation Dice, or the last if none was
        evaluated.
    Returns:
      {"params", "batch_stats"}: nested dicts of NumPy arrays.
    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_metric)
    handlers = {name: ocp.JsonCheckpointHandler() for name in ("config", "plan", "data")}
    handlers["state"] = ocp.PyTreeCheckpointHandler()
    with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        if step is None:
            step = manager.best_step()
        if step is None:
            step = manager.latest_step()
        if step not in manager.all_steps():
            raise FileNotFoundError(f"no checkpoint of step {step} in {directory}")
        saved = manager.item_metadata(step).state
        if saved is None:
            raise FileNotFoundError(f"the checkpoint of step {step} in {directory} is damaged")
        tree = {name: saved[name] for name in ("params", "batch_stats")}
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = ocp.args.PyTreeRestore(tree, restore_args=as_arrays, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=state)).state


def close_checkpoints(manager):
    """Waits until what was saved is on disk."""
    manager.wait_until_finished()
    manager.close()


def _metric(metrics):
    value = metrics[METRIC]
    return -math.inf if math.isnan(value) else value  # no case counted: never better than a number
