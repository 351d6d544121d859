"""What follows training: mend, calibrate, score on whole cases, and report."""

import dataclasses
import json
import os

import numpy as np

from jaxseg import (
    calibration,
    evaluate,
    experiment,
    geometry,
    identity,
    metrics,
    parallel,
    plots,
    postprocess,
    program,
    report,
    statistics,
    writers,
)
from jaxseg import config as config_lib
from jaxseg import predictor as predictor_lib
from jaxseg.data.volumes import is_nifti, read_image, read_label, write_label

CASES_ON_SHEET = 6
TOLERANCE_MM = 1.0  # of the surface Dice
# Enough voxels of a set to measure its calibration.
CALIBRATION_VOXELS = 1_000_000
MEMBERS_NAME = "members.json"


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


def finish(run, state):
    """Chooses post-processing and temperature on validation cases, then evaluates the network.

    With test cases, the network is evaluated on them as it will be used. Without, it is evaluated
    on the validation cases, before post-processing, which these very cases chose.

    Of several members: seeds are averaged. Folds are averaged too, but on validation cases each
    predicts those of its own fold, on which it was not trained; so these choose for single members
    what is then used for their average. Of learning rates the one with the best validation Dice is
    the network, and the others are left behind.

    Args:
      run: `jaxseg.train.Run`.
      state: TrainState to evaluate, on the host.
    """
    kind = experiment.kind_of_members(run.config)
    step, has_test = int(np.max(state.step)), bool(run.data.split["test"])
    variables = parallel.replicate(predictor_lib.member_weights(state, len(run.members)))
    chosen = members = None
    if kind == "rates":
        scores_of_members = score_members(run, variables, "val", [])
        chosen = best_member(scores_of_members)
        members = summarise_members(kind, "val", run.members, scores_of_members, chosen)
        variables = predictor_lib.member_alone(variables, chosen)

    val_work = folds_apart(run, variables) if kind == "folds" else together(run, variables, "val")
    val_files, val_sample, val_flags = segment_set(run, val_work, "val", [])
    run.log.text(f"trying post-processing on {len(val_files)} validation cases")
    steps, decisions = postprocess.choose_steps(ValidationCases(val_files), run.data.num_classes)
    calibrated = calibration.calibrate(*val_sample, set_name="val")
    finished = {
        "step": step,
        "kind": kind,
        "member": chosen,
        "temperature": calibrated["temperature"],
        "postprocess": {"steps": steps, "decisions": decisions},
        "calibration": calibrated,
    }
    writers.write_json(os.path.join(run.workdir, predictor_lib.FINISHED_NAME), finished)

    set_name, files, flags = "val", val_files, val_flags
    if has_test:
        set_name = "test"
        files, sample, flags = segment_set(run, together(run, variables, "test"), "test", steps)
        temperature = calibrated["temperature"]
        calibrated = calibration.calibrate(*sample, set_name="test", temperature=temperature)
    if kind == "seeds":
        scores_of_members = score_members(run, variables, set_name, steps if has_test else [])
        members = summarise_members(kind, set_name, run.members, scores_of_members)
    elif kind == "folds":
        scores_of_members = _scores_by_fold(run, val_files)
        members = summarise_members(kind, "val", run.members, scores_of_members)
    scores = {case_files.case.case_id: _score(run, case_files) for case_files in files}
    about = {
        "set": set_name,
        "step": step,
        "members": kind,
        "data": run.data.fingerprint,
        "tolerance_mm": TOLERANCE_MM,
        "unit": "mm" if is_nifti(files[0].case.image_path) else "pixel",
    }
    class_names = run.data.dataset.class_names
    table, mean_dice = evaluate.save_scores(
        run.workdir, set_name, scores, class_names=class_names, about=about
    )
    if members:
        writers.write_json(os.path.join(run.workdir, MEMBERS_NAME), members)
    _draw(run, set_name, files, scores)
    _report(run, set_name, files, flags, calibrated, decisions, members)
    run.log.text(f"\nwhole {set_name} cases, checkpoint of step {step}\n{table}")
    run.log.text(f"mean {set_name} Dice {mean_dice:.4f}")
    if members:
        run.log.text(report.describe_members(members))


def together(run, variables, set_name):
    """What to predict of a set with which weights: every case with all of them."""
    return [(variables, case) for case in run.data.cases_of(set_name)]


def folds_apart(run, variables):
    """As `together` of the validation cases, but each fold's with the member that it validates."""
    return [
        (alone, case)
        for index in range(len(run.members))
        for alone in [predictor_lib.member_alone(variables, index)]
        for case in run.data.cases_of("val", member=index)
    ]


def segment_set(run, work, set_name, steps):
    """Predicts whole cases and writes them to a folder of the set's name.

    Args:
      run: `jaxseg.train.Run`.
      work: (variables, case) of each case, from `together` or `folds_apart`.
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
    for variables, case in run.log.progress(work, title=f"segmenting {set_name} cases"):
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
            _near_foreground(outputs["sample"], sampled, CALIBRATION_VOXELS // len(work))
        )
        reasons = predictor_lib.unlike_training(run.data.plan, image, affine)
        if reasons:
            flags[case.case_id] = reasons
    logits, labels = (np.concatenate(arrays) for arrays in zip(*samples, strict=True))
    return files, (logits, labels), flags


def score_members(run, variables, set_name, steps):
    """Dice of every member alone on the same cases.

    Args:
      run: `jaxseg.train.Run`.
      variables: from `predictor.member_weights`.
      set_name: "val" or "test".
      steps: post-processing.
    Returns:
      For each member a dict from case id to {"dice": [K] float64}.
    """
    alone = [predictor_lib.member_alone(variables, index) for index in range(len(run.members))]
    scores_of = [{} for _ in alone]
    title = f"scoring each member on {set_name} cases"
    for case in run.log.progress(run.data.cases_of(set_name), title=title):
        image, affine = read_image(case.image_path)
        reference, _ = read_label(case.label_path, run.data.dataset.label_values)
        spacing_mm = geometry.spacing_mm_from_affine(affine)
        for scores, member in zip(scores_of, alone, strict=True):
            label = run.segment_fn(member, image, affine)["label"]
            label = postprocess.apply_steps(label, spacing_mm, steps)
            scores[case.case_id] = _dice(label, reference, run.data.num_classes)
    return scores_of


def _scores_by_fold(run, files):
    """As `score_members`, of what each fold's member has predicted of its own fold."""
    by_id = {case_files.case.case_id: case_files for case_files in files}
    return [
        {
            case.case_id: _dice(*by_id[case.case_id].read_labels()[:2], run.data.num_classes)
            for case in run.data.cases_of("val", member=index)
        }
        for index in range(len(run.members))
    ]


def _dice(prediction, reference, num_classes):
    counts = metrics.confusion_counts(prediction, reference, num_classes)
    return {"dice": metrics.scores_from_counts(counts)["dice"]}


def best_member(scores_of_members):
    """Index of the member with the best mean Dice; the first if none has one."""
    dice = [metrics.mean_dice(scores.values()) for scores in scores_of_members]
    return int(np.argmax(np.nan_to_num(dice, nan=-1.0)))


def summarise_members(kind, set_name, members, scores_of_members, chosen=None):
    """What the members of a run say of the recipe that they share.

    Args:
      kind: "seeds", "folds" or "rates".
      set_name: that they were scored on.
      members: `jaxseg.experiment.Member` of each.
      scores_of_members: as from `score_members`.
      chosen: index of the member that is the result; None where they are averaged.
    Returns:
      Dict, JSON-ready: "kind", "set", "chosen"; "members", for each its fields with "num_cases",
      mean Dice "dice" (over cases) and "dice_by_class" of the foreground; and, but for rates,
      "summary": for "dice" and each of "dice_by_class" what `statistics.t_interval` says of them.
    """
    rows = []
    for member, scores in zip(members, scores_of_members, strict=True):
        by_class = metrics.summarise(list(scores.values()))["dice"]["mean"][1:]
        rows.append(
            dataclasses.asdict(member)
            | {
                "num_cases": len(scores),
                "dice": metrics.mean_dice(scores.values()),
                "dice_by_class": by_class.tolist(),
            }
        )
    found = {"kind": kind, "set": set_name, "chosen": chosen, "members": rows}
    if kind != "rates":  # which are no repetitions of one thing
        by_class = zip(*(row["dice_by_class"] for row in rows), strict=True)
        found["summary"] = {
            "dice": statistics.t_interval([row["dice"] for row in rows]),
            "dice_by_class": [statistics.t_interval(values) for values in by_class],
        }
    return writers.json_ready(found)


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


def _report(run, set_name, files, flags, calibrated, decisions, members):
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
        versions=_origin(run),
        fingerprint=run.data.fingerprint,
        flags=flags,
        members=members,
        load_case=lambda case_id: by_id[case_id].read_canonical(),
    )
    report.write_report(run.workdir, content)


def _origin(run):
    """What computed the result, for the report."""
    sessions = identity.read_sessions(run.workdir)
    source = sessions[-1]["source"] if sessions else None
    return identity.versions() | ({"git revision": source} if source else {})
