"""What follows training: mend, calibrate, score on whole cases, and report."""

import dataclasses
import importlib.metadata
import json
import os
import platform

import jax
import numpy as np

from jaxseg import (
    calibration,
    checkpoint,
    evaluate,
    geometry,
    metrics,
    plots,
    postprocess,
    program,
    report,
    writers,
)
from jaxseg import config as config_lib
from jaxseg import predictor as predictor_lib
from jaxseg.data.volumes import is_nifti, read_image, read_label, write_label

CASES_ON_SHEET = 6
TOLERANCE_MM = 1.0  # of the surface Dice
# Enough voxels of a set to measure its calibration.
CALIBRATION_VOXELS = 1_000_000
VERSIONS_OF = ("jaxseg", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "nibabel")


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """A segmented case on disk, readable as one thing.

    Attributes:
      case: `jaxseg.data.cases.Case`.
      prediction_path: file of its predicted label.
      label_values: file value of each class, or None.
    """

    case: object
    prediction_path: str
    label_values: tuple[int, ...] | None

    def read_labels(self):
        """Returns (prediction, reference, affine); labels are [X, Y, Z] uint8."""
        prediction, _ = read_label(self.prediction_path, self.label_values)
        return prediction, *read_label(self.case.label_path, self.label_values)

    def read_canonical(self):
        """Returns (image, reference, prediction, spacing_mm or None) in RAS+ axes."""
        image, affine = read_image(self.case.image_path)
        prediction, reference, _ = self.read_labels()
        reference, prediction = (
            geometry.to_canonical(label, affine)[0] for label in (reference, prediction)
        )
        image, canonical_affine = geometry.to_canonical(image, affine)
        if not is_nifti(self.case.image_path):
            return image, reference, prediction, None
        spacing_mm = geometry.spacing_mm_from_affine(canonical_affine)
        return image, reference, prediction, spacing_mm


class ValidationCases:
    """(prediction, reference, spacing_mm) of cases, read again whenever they are iterated over."""

    def __init__(self, files):
        self._files = files

    def __iter__(self):
        for case_files in self._files:
            prediction, reference, affine = case_files.read_labels()
            yield prediction, reference, geometry.spacing_mm_from_affine(affine)


def members_of(state):
    """The weights of a TrainState as an ensemble of one, as `program` takes them."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jax.tree.map(lambda x: x[None], variables)


def finish(run, state):
    """Chooses post-processing and temperature on validation cases, then evaluates the network.

    With test cases, the checkpoint with the best validation Dice is evaluated on them as it will be
    used. Without, the last step's is evaluated on the validation cases, before post-processing,
    which these very cases chose.

    Args:
      run: `jaxseg.train.Run`.
      state: the last TrainState.
    """
    run.manager.wait_until_finished()
    step, has_test = int(state.step), bool(run.data.split["test"])
    if has_test and run.manager.best_step() != step:
        step = run.manager.best_step()
        state = checkpoint.restore(run.manager, step, state)
    variables = members_of(state)

    val_files, val_sample, val_flags = segment_set(run, variables, "val", [])
    run.log.text(f"trying post-processing on {len(val_files)} validation cases")
    steps, decisions = postprocess.choose_steps(ValidationCases(val_files), run.data.num_classes)
    calibrated = calibration.calibrate(*val_sample, set_name="val")
    chosen = {
        "step": step,
        "temperature": calibrated["temperature"],
        "postprocess": {"steps": steps, "decisions": decisions},
        "calibration": calibrated,
    }
    writers.write_json(os.path.join(run.workdir, predictor_lib.FINISHED_NAME), chosen)

    set_name, files, flags = "val", val_files, val_flags
    if has_test:
        set_name = "test"
        files, sample, flags = segment_set(run, variables, "test", steps)
        temperature = calibrated["temperature"]
        calibrated = calibration.calibrate(*sample, set_name="test", temperature=temperature)
    scores = {case_files.case.case_id: _score(run, case_files) for case_files in files}
    about = {
        "set": set_name,
        "step": step,
        "data": run.data.fingerprint,
        "tolerance_mm": TOLERANCE_MM,
        "unit": "mm" if is_nifti(files[0].case.image_path) else "pixel",
    }
    class_names = run.data.dataset.class_names
    table, mean_dice = evaluate.save_scores(
        run.workdir, set_name, scores, class_names=class_names, about=about
    )
    _draw(run, set_name, files, scores)
    _report(run, set_name, files, flags, calibrated, decisions)
    run.log.text(f"\nwhole {set_name} cases, checkpoint of step {step}\n{table}")
    run.log.text(f"mean {set_name} Dice {mean_dice:.4f}")


def segment_set(run, variables, set_name, steps):
    """Predicts whole cases and writes them to a folder of the set's name.

    Args:
      run: `jaxseg.train.Run`.
      variables: from `members_of`.
      set_name: "val" or "test".
      steps: post-processing.
    Returns:
      (files, sample, flags): list of CaseFiles; logits [N, K] and label [N] of voxels around the
      foreground, before post-processing; and for each case that is unlike the training
      set the reasons.
    """
    folder = os.path.join(run.workdir, set_name)
    os.makedirs(folder, exist_ok=True)
    label_values = run.data.dataset.label_values
    files, samples, flags = [], [], {}
    cases = run.data.cases_of(set_name)
    for case in run.log.progress(cases, title=f"segmenting {set_name} cases"):
        image, affine = read_image(case.image_path)
        reference, _ = read_label(case.label_path, label_values)
        outputs = run.segment_fn(variables, image, affine)
        spacing_mm = geometry.spacing_mm_from_affine(affine)
        label = postprocess.apply_steps(outputs["label"], spacing_mm, steps)
        path = os.path.join(
            folder, case.case_id + (".nii.gz" if is_nifti(case.image_path) else ".png")
        )
        write_label(path, label, affine, label_values, like=case.image_path)
        files.append(CaseFiles(case, path, label_values))
        sampled = program.sampled(reference, affine, run.recipe)
        samples.append(
            _near_foreground(outputs["sample"], sampled, CALIBRATION_VOXELS // len(cases))
        )
        reasons = predictor_lib.unlike_training(run.data.plan, image, affine)
        if reasons:
            flags[case.case_id] = reasons
    logits, labels = (np.concatenate(arrays) for arrays in zip(*samples, strict=True))
    return files, (logits, labels), flags


def _near_foreground(logits, label, most):
    """At most `most` voxels in the box of what is or was taken for foreground.

    The air around it would make any network look sure.
    """
    places = np.nonzero((label > 0) | (logits.argmax(-1) > 0))
    if places[0].size:
        box = tuple(slice(axis.min(), axis.max() + 1) for axis in places)
        logits, label = logits[box], label[box]
    logits, label = logits.reshape(-1, logits.shape[-1]), label.reshape(-1)
    chosen = np.random.default_rng(0).permutation(len(label))[:most]
    return logits[chosen], label[chosen]


def _score(run, case_files):
    labels_and_affine = case_files.read_labels()
    return evaluate.score_case(*labels_and_affine, run.data.num_classes, tolerance_mm=TOLERANCE_MM)


def _draw(run, set_name, files, scores):
    panels = [
        _panel(case_files, metrics.mean_foreground(scores[case_files.case.case_id]["dice"]))
        for case_files in files[:CASES_ON_SHEET]
    ]
    path = os.path.join(run.workdir, f"{set_name}.png")
    plots.save_contact_sheet(path, panels, run.data.dataset.class_names)
    rows = writers.read_metrics(run.workdir)
    plots.save_learning_curves(os.path.join(run.workdir, "curves.png"), rows)


def _panel(case_files, dice):
    image, label, prediction, spacing_mm = case_files.read_canonical()
    is_colour = spacing_mm is None and image.shape[-1] == 3
    image = image if is_colour else image[..., 0]
    aspect = 1.0
    if spacing_mm is not None:
        aspect = spacing_mm[1] / spacing_mm[0]
        # Shown as on a light box: first axis to the right, second upwards.
        image, label, prediction = (np.rot90(a, axes=(0, 1)) for a in (image, label, prediction))
    z = int(np.argmax((label > 0).sum((0, 1))))
    case_id = case_files.case.case_id
    shown_id = case_id if len(case_id) <= 24 else f"{case_id[:23]}…"
    title = f"{shown_id}: Dice {dice:.3f}"
    return title, image[:, :, z], label[:, :, z], prediction[:, :, z], aspect


def _report(run, set_name, files, flags, calibrated, decisions):
    with open(os.path.join(run.workdir, f"{set_name}.json"), encoding="utf-8") as file:
        scores = json.load(file)
    by_id = {case_files.case.case_id: case_files for case_files in files}
    content = report.ReportContent(
        title=run.config.name,
        set_name=set_name,
        scores=scores,
        curves=writers.read_metrics(run.workdir),
        calibration=calibrated,
        decisions=decisions,
        config=config_lib.to_json(run.config),
        versions=versions(),
        fingerprint=run.data.fingerprint,
        flags=flags,
        load_case=lambda case_id: by_id[case_id].read_canonical(),
    )
    report.write_report(run.workdir, content)


def versions():
    """Versions of what computed a result: packages, Python, and the device."""
    found = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    device = jax.devices()[0]
    return found | {
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }
