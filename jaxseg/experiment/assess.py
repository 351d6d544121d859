"""What follows training: mend, calibrate, score on whole cases, and report."""

import json
import os

import numpy as np

from jaxseg import config as config_lib
from jaxseg import parallel
from jaxseg.data.formats.registry import is_volume
from jaxseg.evaluation import calibration, metrics, plots, report, report_numbers, scoring
from jaxseg.experiment import member_scores
from jaxseg.experiment.members import kind_of_members, member_alone, member_weights
from jaxseg.experiment.predictor import FINISHED_NAME
from jaxseg.experiment.segmented import (
    ValidationCases,
    folds_apart,
    predict_unlabelled,
    segment_set,
    together,
)
from jaxseg.experiment.setup import Run
from jaxseg.inference import postprocess
from jaxseg.run import identity, writers
from jaxseg.run.log import read_metrics
from jaxseg.training.state import TrainState

CASES_ON_SHEET = 6
TOLERANCE_MM = 1.0  # of the surface Dice
MEMBERS_NAME = "members.json"


def assess(run: Run, state: TrainState) -> None:
    """Chooses post-processing and temperature on validation cases, then evaluates the network.

    With test cases, the network is evaluated on them as it will be used. Without, it is evaluated
    on the validation cases, before post-processing, which these very cases chose.

    Of several members: seeds are averaged. Folds are averaged too, but on validation cases each
    predicts those of its own fold, on which it was not trained; so these choose for single members
    what is then used for their average. Of learning rates the one with the best validation Dice is
    the network, and the others are left behind.

    Args:
      run: what has been trained.
      state: TrainState to evaluate, on the host.
    """
    kind, has_test = kind_of_members(run.config), bool(run.data.split["test"])
    variables = parallel.replicate(member_weights(state, len(run.members)))
    chosen = members = None
    if kind == "rates":
        scores_alone = member_scores.score_members(run, variables, "val", [])
        chosen = member_scores.best_member(scores_alone)
        members = member_scores.summarise_members(kind, "val", run.members, scores_alone, chosen)
        variables = member_alone(variables, chosen)

    val_work = folds_apart(run, variables) if kind == "folds" else together(run, variables, "val")
    validated = segment_set(run, val_work, "val", [])
    finished = {"step": _step(state), "kind": kind, "member": chosen} | _choose(run, validated)
    writers.write_json(os.path.join(run.workdir, FINISHED_NAME), finished)

    segmented, calibrated = validated, finished["calibration"]
    steps = finished["postprocess"]["steps"] if has_test else []
    if has_test:
        segmented = segment_set(run, together(run, variables, "test"), "test", steps)
        calibrated = calibration.calibrate(
            *segmented.sample, set_name="test", temperature=finished["temperature"]
        )
    if kind == "seeds":
        scores_alone = member_scores.score_members(run, variables, segmented.name, steps)
        members = member_scores.summarise_members(kind, segmented.name, run.members, scores_alone)
    elif kind == "folds":
        scores_alone = member_scores.scores_by_fold(run, validated.files)
        members = member_scores.summarise_members(kind, "val", run.members, scores_alone)
    _publish(run, state, segmented, calibrated, finished["postprocess"]["decisions"], members)
    if run.data.dataset.unlabelled:
        predict_unlabelled(run, variables, finished["postprocess"]["steps"])


def _step(state):
    return int(np.max(state.step))


def _choose(run, validated):
    """What validation cases say of how the network is to be used, JSON-ready."""
    run.log.text(f"trying post-processing on {len(validated.files)} validation cases")
    steps, decisions = postprocess.choose_steps(
        ValidationCases(validated.files), run.data.num_classes
    )
    if radii := {d["step"]["radius_mm"] for d in decisions if "radius_mm" in d["step"]} - {
        *postprocess.RADII_MM
    }:
        run.log.text(
            f"sizes were tried in units of {min(radii):.4g} mm, the smallest spacing, in place of 1"
        )
    calibrated = calibration.calibrate(*validated.sample, set_name="val")
    return {
        "temperature": calibrated["temperature"],
        "postprocess": {"steps": steps, "decisions": decisions},
        "calibration": calibrated,
    }


def _publish(run, state, segmented, calibrated, decisions, members):
    """Writes scores, pictures and the report, and says on the terminal how well it went."""
    name, files = segmented.name, segmented.files
    scores = {case_files.case.case_id: _score(run, case_files) for case_files in files}
    about = {
        "set": name,
        "step": _step(state),
        "members": kind_of_members(run.config),
        "data": run.data.sha256,
        "tolerance_mm": TOLERANCE_MM,
        "unit": "mm" if is_volume(files[0].case.image_path) else "pixel",
    }
    class_names = run.data.dataset.class_names
    table, mean_dice = scoring.save_scores(
        run.workdir, name, scores, class_names=class_names, about=about
    )
    if members:
        writers.write_json(os.path.join(run.workdir, MEMBERS_NAME), members)
    _draw(run, name, files, scores)
    _report(run, segmented, calibrated, decisions, members)
    run.log.text(f"\nwhole {name} cases, checkpoint of step {_step(state)}\n{table}")
    run.log.text(f"mean {name} Dice {mean_dice:.4f}")
    if members:
        run.log.text(report_numbers.describe_members(members))


def _score(run, case_files):
    prediction, label, affine = case_files.read_labels()
    return scoring.score_case(
        prediction, label, affine, run.data.num_classes, tolerance_mm=TOLERANCE_MM
    )


def _draw(run, set_name, files, scores):
    panels = [
        _panel(case_files, metrics.mean_foreground(scores[case_files.case.case_id]["dice"]))
        for case_files in files[:CASES_ON_SHEET]
    ]
    path = os.path.join(run.workdir, f"{set_name}.png")
    plots.save_contact_sheet(path, panels, run.data.dataset.class_names)
    rows = read_metrics(run.workdir)
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


def _report(run, segmented, calibrated, decisions, members):
    with open(os.path.join(run.workdir, f"{segmented.name}.json"), encoding="utf-8") as file:
        scores = json.load(file)
    by_id = {case_files.case.case_id: case_files for case_files in segmented.files}
    content = report.ReportContent(
        title=run.config.name,
        set_name=segmented.name,
        scores=scores,
        curves=read_metrics(run.workdir),
        calibration=calibrated,
        decisions=decisions,
        config=config_lib.to_json(run.config),
        versions=_origin(run),
        sha256=run.data.sha256,
        flags=segmented.flags,
        members=members,
        load_case=lambda case_id: by_id[case_id].read_canonical(),
    )
    report.write_report(run.workdir, content)


def _origin(run):
    """What computed the result, for the report."""
    sessions = identity.read_sessions(run.workdir)
    source = sessions[-1]["source"] if sessions else None
    return identity.versions() | ({"git revision": source} if source else {})
