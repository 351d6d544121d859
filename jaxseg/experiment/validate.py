"""What a network is worth while it trains: loss over patches, Dice over whole cases."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxseg import parallel
from jaxseg.data.label_values import without_ignored
from jaxseg.data.reading import read_case_image, read_case_label
from jaxseg.evaluation import metrics
from jaxseg.experiment.members import kind_of_members, member_alone, member_weights
from jaxseg.experiment.setup import Run
from jaxseg.training.state import TrainState


def validate(run: Run, state: TrainState, val_batches: Iterable[Any]) -> dict[str, Any]:
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
    is_sweep = kind_of_members(run.config) == "rates"
    losses = np.asarray(loss, float).tolist()
    return {
        "val_loss": of_finite(min if is_sweep else np.mean, losses),
        "val_dice": of_finite(max if is_sweep else np.mean, dice),
        "member_val_loss": losses,
        "member_val_dice": dice,
    }


def validation_dice(run: Run, variables: Any, member: int) -> float:
    """Mean Dice of a member, weights as for `run.segment_fn`, over its whole validation cases."""
    dataset, cases = run.data.dataset, run.data.cases_of("val", member)
    rank, num_processes = jax.process_index(), jax.process_count()
    dice = np.full((len(cases), run.data.num_classes), np.nan)
    for index in range(rank, len(cases), num_processes):
        image, affine = read_case_image(dataset, cases[index])
        label = read_case_label(dataset, cases[index])
        prediction = run.segment_fn(variables, image, affine)["label"]
        prediction, label = without_ignored(prediction, label, dataset.coding)
        counts = metrics.confusion_counts(prediction, label, run.data.num_classes)
        dice[index] = metrics.scores_from_counts(counts)["dice"]
    everywhere = parallel.gather_from_processes(dice)
    owners = np.arange(len(cases)) % num_processes
    return metrics.mean_dice({"dice": row} for row in everywhere[owners, np.arange(len(cases))])


def of_finite(function: Callable[[list[float]], Any], values: Iterable[float]) -> float:
    """What the function makes of those values that are finite; NaN if none is."""
    finite = [value for value in values if np.isfinite(value)]
    return float(function(finite)) if finite else float("nan")
