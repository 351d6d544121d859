"""A finished run, or an ensemble of them, as a function from an image to its segmentation."""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxseg import geometry, parallel
from jaxseg.data import familiarity
from jaxseg.data.preprocess import Plan
from jaxseg.experiment import build
from jaxseg.experiment.members import kind_of_members, member_alone, members_of
from jaxseg.experiment.saved import saved_config, saved_data, saved_plan
from jaxseg.inference import postprocess, whole_volume
from jaxseg.problem import Problem
from jaxseg.run import checkpoint
from jaxseg.run.readers import json_object, read_file

# What `train` leaves beside the checkpoints once it has finished: which step, and what was chosen
# on validation cases.
FINISHED_NAME = "predictor.json"


class PredictorProblem(Problem, ValueError):
    """A run or an image can not be used; the message names it and says how to mend it."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """All that prediction needs.

    Attributes:
      plan: preprocessing Plan.
      class_names: background first.
      label_values: file value of each class, or None.
      num_channels: of an image.
      steps: post-processing.
      recipe: `jaxseg.inference.whole_volume.Recipe`.
      variables: stacked weights of all members of all runs, on the devices.
      segment_fn: from `jaxseg.inference.whole_volume.create_segment_fn`.
      identity: SHA-256 of all that decides what is predicted.
      notes: what the user should know of the runs.
    """

    plan: Plan
    class_names: tuple[str, ...]
    label_values: tuple[int, ...] | None
    num_channels: int
    steps: list[dict[str, Any]]
    recipe: whole_volume.Recipe
    variables: Any
    segment_fn: whole_volume.SegmentFn
    identity: str
    notes: tuple[str, ...] = ()


def load_predictor(
    workdirs: Sequence[str],
    *,
    mirror: bool = False,
    outputs: Sequence[str] = ("label",),
    unfinished: bool = False,
) -> Predictor:
    """Restores what runs left behind.

    Args:
      workdirs: folders of finished runs. Logits are averaged over all members of all runs; of a run
        over learning rates, only the one that it chose is a member.
      mirror: whether to average over mirrored images too, along the axes that training mirrored.
      outputs: names of `jaxseg.inference.maps.voxel_outputs`.
      unfinished: whether a run that has not finished will do, with the best network so far.
    Returns:
      Predictor. The temperature is the geometric mean of the runs', post-processing that of the
      first.
    Raises:
      PredictorProblem: a folder holds no finished run, runs do not fit together, or an output can
        not be had.
      FileProblem, CheckpointProblem: a file of a run is missing or damaged.
    """
    folders = [os.path.abspath(os.path.expanduser(workdir)) for workdir in workdirs]
    runs = [_read_run(folder, unfinished=unfinished) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        _refuse_other_kind(first, run)
    config = first["config"]
    class_names = tuple(first["data"]["class_names"])
    mirror_axes = tuple(config.augment.flip.axes) if mirror else ()
    for run in runs if mirror else ():
        flip = run["config"].augment.flip
        if tuple(flip.axes) != mirror_axes or not (mirror_axes and flip.prob > 0):
            raise PredictorProblem(
                f"{run['workdir']} was trained without mirroring, or along other axes: predict "
                "without it too"
            )
    variables = jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *(run["variables"] for run in runs)
    )
    num_sets = len(jax.tree.leaves(variables)[0])
    _check_outputs(outputs, class_names, num_sets * 2 ** len(mirror_axes))
    recipe = build.create_recipe(
        config,
        first["plan"],
        class_names,
        first["margin"],
        mirror_axes=mirror_axes,
        outputs=tuple(outputs),
        temperature=float(np.exp(np.mean([np.log(r["finished"]["temperature"]) for r in runs]))),
    )
    values = first["data"]["label_values"]
    steps = first["finished"]["postprocess"]["steps"]
    return Predictor(
        plan=first["plan"],
        class_names=class_names,
        label_values=None if values is None else tuple(values),
        num_channels=first["data"]["num_channels"],
        steps=steps,
        recipe=recipe,
        variables=parallel.replicate(variables),
        segment_fn=whole_volume.create_segment_fn(recipe),
        identity=_identity(recipe, steps, variables),
        notes=tuple(run["note"] for run in runs if run["note"]),
    )


def check_image(predictor: Predictor, image: np.ndarray, affine: np.ndarray) -> list[str]:
    """Compares an image with those that the networks were trained on.

    Args:
      predictor: Predictor.
      image, affine: as for `segment`.
    Returns:
      List of reasons that the image is unlike the training set.
    Raises:
      PredictorProblem: the image has another number of channels.
    """
    if image.shape[-1] != predictor.num_channels:
        raise PredictorProblem(
            f"the image has {image.shape[-1]} channel(s), the network was trained on "
            f"{predictor.num_channels}; give the same channels in the same order, as the last axis "
            "or as CASE_0000, CASE_0001 ..."
        )
    return unlike_training(predictor.plan, image, affine)


def unlike_training(plan: Plan, image: np.ndarray, affine: np.ndarray) -> list[str]:
    """Reasons that an image on its own grid is unlike those that the plan was made from."""
    image, affine = geometry.to_canonical(image, affine)
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    # A slice of 1 mm looks like a picture, whose spacing nobody knows.
    is_picture = image.shape[2] == 1 and (spacing_mm == 1).all() and "extent_px/x" in plan.typical
    features = familiarity.describe_image(
        image, spacing_mm, plan.normalisation, is_picture=is_picture
    )
    return familiarity.unlike_reasons(features, plan.typical)


def segment(predictor: Predictor, image: np.ndarray, affine: np.ndarray) -> dict[str, np.ndarray]:
    """Segments one image.

    Args:
      predictor: Predictor.
      image: [X, Y, Z, C] float32 as read.
      affine: [4, 4] of its grid (mm).
    Returns:
      Dict of arrays on that grid: "label" [X, Y, Z] uint8 class indices, post-processed, and each
      other output that was asked for, float32 [X, Y, Z] or [X, Y, Z, K].
    """
    outputs = predictor.segment_fn(predictor.variables, image, affine)
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    label = postprocess.apply_steps(outputs["label"], spacing_mm, predictor.steps)
    return outputs | {"label": label}


def _read_run(workdir, *, unfinished):
    checkpoints, note = os.path.join(workdir, "checkpoints"), ""
    has_finished = os.path.exists(os.path.join(workdir, FINISHED_NAME))
    if not has_finished and not (unfinished and checkpoint.last_step(checkpoints)):
        raise _unfinished(workdir, f"{FINISHED_NAME} is not there")
    config, plan, data = saved_config(workdir), saved_plan(workdir), saved_data(workdir)
    try:
        if has_finished:
            choices_in = functools.partial(_choices_in, config, len(data["class_names"]))
            finished = read_file(workdir, FINISHED_NAME, choices_in)
            variables = checkpoint.load_variables(checkpoints, finished["step"])
        else:
            finished, variables = _best_so_far(workdir, config, checkpoints)
            note = (
                f"{workdir} has not finished: this is its best network so far, of step "
                f"{finished['step']}, without the post-processing and temperature chosen at its end"
            )
    except FileNotFoundError as error:
        raise _unfinished(workdir, error) from None
    run = {
        "workdir": workdir,
        "config": config,
        "margin": build.margin_of(config),
        "plan": plan,
        "data": data,
        "finished": finished,
        "variables": _sets_of(variables, config, finished),
        "note": note,
    }
    _refuse_mixed_files(run)
    return run


def _refuse_mixed_files(run):
    """Refuses files each of which is whole, but that are not of one run."""
    workdir, config, num_channels = run["workdir"], run["config"], run["data"]["num_channels"]
    mend = f"bring back the copies in {workdir}/checkpoints"
    if len(run["plan"].normalisation) != num_channels:
        raise PredictorProblem(
            f"{workdir}: plan.json is of images with {len(run['plan'].normalisation)} channel(s), "
            f"data.json of {num_channels}; {mend}"
        )
    model = build.create_model_for(config, len(run["data"]["class_names"]))
    image = jax.ShapeDtypeStruct((1, *config.data.patch_size, num_channels), np.float32)
    described = jax.eval_shape(model.init, jax.random.key(0), image)
    wanted, found = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (described, run["variables"]))
    )
    for name in sorted(wanted | found):
        if (shape := found.get(name, (0,))[1:]) != wanted.get(name):
            raise PredictorProblem(
                f"{workdir}: config.json and data.json describe another network than that whose "
                f"weights were saved ({name} is {wanted.get(name)}, not {shape}); {mend}"
            )


def _best_so_far(workdir, config, checkpoints):
    """(choices, weights) of a run that may still be training."""
    if kind_of_members(config) == "rates":
        raise _unfinished(workdir, "which of its learning rates is best is chosen at its end")
    step = checkpoint.step_to_use(checkpoints)
    while True:
        choices: dict[str, Any] = {"step": step, "temperature": 1.0, "postprocess": {"steps": []}}
        try:
            return choices, checkpoint.load_variables(checkpoints, step)
        except (FileNotFoundError, checkpoint.CheckpointProblem):
            # Training may just have replaced it by a better one.
            step, before = checkpoint.step_to_use(checkpoints), step
            if step == before:
                raise


def _unfinished(workdir, why):
    return PredictorProblem(
        f"{workdir} holds no finished run ({why}); give the --config.workdir of a training that "
        "has ended, or run its command again to let it finish"
    )


def _choices_in(config, num_classes, text):
    finished = json_object(text, ("step", "temperature", "postprocess"))
    if not isinstance(finished["step"], int):
        raise ValueError(f"its step is {finished['step']!r}")
    postprocess.check_steps(finished["postprocess"]["steps"], num_classes)
    if not 0 < finished["temperature"] < math.inf:
        raise ValueError(f"its temperature is {finished['temperature']}")
    num_members = len(members_of(config))
    if kind_of_members(config) == "rates" and finished["member"] not in range(num_members):
        raise ValueError(f"its member is {finished['member']}, of {num_members}")
    return finished


def _sets_of(variables, config, finished):
    """The weights that a run predicts with, leaves [E, ...]."""
    if len(members_of(config)) == 1:
        return jax.tree.map(lambda x: x[None], variables)
    if kind_of_members(config) == "rates":
        return member_alone(variables, finished["member"])
    return variables


def _refuse_other_kind(first, other):
    differing = [
        name
        for name, mine, theirs in (
            ("model", first["config"].model, other["config"].model),
            ("patch size", first["config"].data.patch_size, other["config"].data.patch_size),
            ("preprocessing", _preprocessing(first["plan"]), _preprocessing(other["plan"])),
            ("classes", first["data"]["class_names"], other["data"]["class_names"]),
            ("label values", first["data"]["label_values"], other["data"]["label_values"]),
        )
        if mine != theirs
    ]
    if differing:
        raise PredictorProblem(
            f"{other['workdir']} differs from {first['workdir']} in {', '.join(differing)}: only "
            "runs of one network and one preprocessing can be averaged (of CT, each split has the "
            "intensities of its own training cases; folds of one --config.split share them)"
        )


def _preprocessing(plan):
    return dataclasses.replace(plan, typical={})


def _check_outputs(outputs, class_names, num_members):
    if num_members == 1 and "mutual_information" in outputs:
        raise PredictorProblem(
            "mutual_information says how far members of an ensemble disagree, and there is one; "
            "predict with mirroring, or with several members or runs"
        )
    for name in outputs:
        class_name = name.partition(":")[2]
        if class_name and class_name not in class_names[1:]:
            raise PredictorProblem(
                f"there is no class {class_name!r} to explain; choose from {class_names[1:]}"
            )


def _identity(recipe, steps, variables):
    known = dataclasses.replace(recipe, outputs=(), buffer_bytes=0, batch_size=0)
    digest = hashlib.sha256(repr((known, steps)).encode())
    # What a recipe does not show, as none of the versions before did.
    if recipe.axes != (0, 1, 2):
        digest.update(repr(recipe.axes).encode())
    ways = recipe.crop, recipe.normalise_first, recipe.coarse_apart
    if any(ways):
        digest.update(repr(ways).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
