"""Whole cases, segmented by a network: made, written beside the run, and read again."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxseg import geometry
from jaxseg.data.cases import Case, Dataset
from jaxseg.data.formats import registry
from jaxseg.data.label_values import IGNORED, LabelCoding, without_ignored
from jaxseg.data.labels import read_label, write_label
from jaxseg.data.reading import read_case_image, read_case_label
from jaxseg.experiment.members import member_alone
from jaxseg.experiment.predictor import unlike_training
from jaxseg.experiment.setup import Run
from jaxseg.inference import postprocess, whole_volume

# Enough voxels of a set to measure its calibration.
CALIBRATION_VOXELS = 1_000_000


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """A segmented case on disk, readable as one thing.

    Attributes:
      dataset: that the case is of.
      case: `jaxseg.data.cases.Case`.
      prediction_path: file of its predicted label.
      affine: of the image, [4, 4] (mm).
    """

    dataset: Dataset
    case: Case
    prediction_path: str
    affine: np.ndarray

    def read_labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (prediction, reference, affine); labels are [X, Y, Z] uint8.

        Where the reference does not count both are background.
        """
        coding = LabelCoding(self.dataset.coding.values)
        prediction, _ = read_label(self.prediction_path, coding)
        reference = read_case_label(self.dataset, self.case)
        return *without_ignored(prediction, reference, self.dataset.coding), self.affine

    def read_canonical(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns (image, reference, prediction, spacing_mm or None) in RAS+ axes."""
        image, affine = read_case_image(self.dataset, self.case)
        prediction, reference, _ = self.read_labels()
        reference, prediction = (
            geometry.to_canonical(label, affine)[0] for label in (reference, prediction)
        )
        image, canonical_affine = geometry.to_canonical(image, affine)
        if not registry.is_volume(self.case.image_path):
            return image, reference, prediction, None
        spacing_mm = geometry.spacing_mm_from_affine(canonical_affine)
        return image, reference, prediction, spacing_mm


@dataclasses.dataclass(frozen=True)
class SegmentedSet:
    """All cases of a set, segmented.

    Attributes:
      name: "val" or "test".
      files: CaseFiles of each case.
      sample: logits [N, K] and label [N] of voxels around the foreground, before post-processing.
      flags: for each case that is unlike the training set the reasons.
    """

    name: str
    files: list[CaseFiles]
    sample: tuple[np.ndarray, np.ndarray]
    flags: dict[str, list[str]]


class ValidationCases:
    """(prediction, reference, spacing_mm) of cases, read again whenever they are iterated over."""

    def __init__(self, files: Sequence[CaseFiles]):
        self._files = files

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for case_files in self._files:
            prediction, reference, affine = case_files.read_labels()
            yield prediction, reference, geometry.spacing_mm_from_affine(affine)


def together(run: Run, variables: Any, set_name: str) -> list[tuple[Any, Case]]:
    """What to predict of a set with which weights: every case with all of them."""
    return [(variables, case) for case in run.data.cases_of(set_name)]


def folds_apart(run: Run, variables: Any) -> list[tuple[Any, Case]]:
    """As `together` of the validation cases, but each fold's with the member that it validates."""
    return [
        (alone, case)
        for index in range(len(run.members))
        for alone in [member_alone(variables, index)]
        for case in run.data.cases_of("val", member=index)
    ]


def segment_set(
    run: Run, work: Sequence[tuple[Any, Case]], set_name: str, steps: Sequence[dict[str, Any]]
) -> SegmentedSet:
    """Predicts whole cases and writes them to a folder of the set's name.

    Args:
      run: what has been trained.
      work: (variables, case) of each case, from `together` or `folds_apart`.
      set_name: "val" or "test".
      steps: post-processing.
    Returns:
      SegmentedSet.
    """
    dataset = run.data.dataset
    files, samples, flags = [], [], {}
    for variables, case in run.log.progress(work, title=f"segmenting {set_name} cases"):
        image, affine = read_case_image(dataset, case)
        reference = read_case_label(dataset, case)
        outputs, path = _segment_and_write(run, variables, case, image, affine, set_name, steps)
        files.append(CaseFiles(dataset, case, path, affine))
        sampled = whole_volume.sampled(reference, image, affine, run.recipe)
        ignored = sampled == IGNORED if dataset.coding.ignore else None
        samples.append(
            _near_foreground(outputs["sample"], sampled, CALIBRATION_VOXELS // len(work), ignored)
        )
        reasons = unlike_training(run.data.plan, image, affine)
        if reasons:
            flags[case.case_id] = reasons
    logits, labels = (np.concatenate(arrays) for arrays in zip(*samples, strict=True))
    return SegmentedSet(set_name, files, (logits, labels), flags)


def predict_unlabelled(run: Run, variables: Any, steps: Sequence[dict[str, Any]]) -> None:
    """Predicts the cases of the dataset that have no label, into a folder "predicted"."""
    dataset = run.data.dataset
    for case in run.log.progress(dataset.unlabelled, title="segmenting cases without label"):
        image, affine = read_case_image(dataset, case)
        _segment_and_write(run, variables, case, image, affine, "predicted", steps)


def _segment_and_write(run, variables, case, image, affine, folder_name, steps):
    """(outputs, path of the written label) of a case."""
    folder = os.path.join(run.workdir, folder_name)
    os.makedirs(folder, exist_ok=True)
    outputs = run.segment_fn(variables, image, affine)
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    label = postprocess.apply_steps(outputs["label"], spacing_mm, steps)
    suffix, _ = registry.output_suffixes(case.image_path)
    path = os.path.join(folder, case.case_id + suffix)
    write_label(path, label, affine, run.data.dataset.coding.values, like=case.image_path)
    return outputs, path


def _near_foreground(logits, label, most, ignored=None):
    """At most `most` voxels in the box of what is or was taken for foreground.

    The air around it would make any network look sure. Those that are `ignored` are left out.
    """
    places = np.nonzero((label > 0) | (logits.argmax(-1) > 0))
    if ignored is not None:
        logits, label = logits[~ignored], label[~ignored]
        places = (np.flatnonzero((label > 0) | (logits.argmax(-1) > 0)),)
    if places[0].size:
        box = tuple(slice(axis.min(), axis.max() + 1) for axis in places)
        logits, label = logits[box], label[box]
    logits, label = logits.reshape(-1, logits.shape[-1]), label.reshape(-1)
    chosen = np.random.default_rng(0).permutation(len(label))[:most]
    return logits[chosen], label[chosen]
