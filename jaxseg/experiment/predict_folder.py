"""Segments a folder of images: reads, computes, writes at the same time, goes on after errors."""

import concurrent.futures
import contextlib
import functools
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxseg import geometry
from jaxseg.data import memory
from jaxseg.data.formats.registry import is_volume
from jaxseg.data.images import bytes_to_read, read_volume, write_map
from jaxseg.data.labels import write_label
from jaxseg.data.predictions import (
    ImageCase,
    Records,
    find_images,
    left_out,
    state_of,
    written_bytes,
)
from jaxseg.experiment.predictor import check_image, load_predictor, segment
from jaxseg.inference import postprocess
from jaxseg.problem import Problem, file_problem

LOG_NAME = "predict.log"


class Job:
    """A case on its way from file to files; holds no array for longer than it is needed."""

    image: np.ndarray | None = None
    affine: np.ndarray | None = None
    results: dict[str, np.ndarray] | None = None
    trace = ""

    def __init__(self, case: ImageCase):
        self.case = case
        self.record: dict[str, Any] = {"file": case.path, "seconds": {}}

    @property
    def failed(self) -> bool:
        return "error" in self.record

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage and keeps its failure, so that other cases go on."""
        start = time.monotonic()
        try:
            yield
        except (Problem, OSError) as error:
            self.record["error"] = str(error)
        except Exception as error:
            self.record["error"] = f"{type(error).__name__}: {error}"
            self.trace = traceback.format_exc()
        self.record["seconds"][name] = round(time.monotonic() - start, 3)


def predict(
    workdirs: Sequence[str],
    input_path: str,
    folder: str,
    *,
    outputs: Sequence[str] = ("label",),
    mirror: bool = False,
    recursive: bool = False,
) -> tuple[int, int, dict[str, str]]:
    """Segments the images that are not done yet.

    Args:
      workdirs: Folders of runs; of one that has not finished the best network so far is taken.
      input_path: An image or a folder of them.
      folder: Where outputs go; made if missing.
      outputs: Names that `jaxseg.experiment.predictor.load_predictor` knows, "label" among them.
      mirror: Whether to average over mirrored images.
      recursive: Whether images in subfolders count.
    Returns:
      (num_done, num_before, failed): number of cases predicted now and before, and a dict from case
      id to message of those that failed.
    Raises:
      FolderProblem, PredictorProblem: Nothing can be predicted.
      OSError: The folder cannot be written.
    """
    find_images(input_path, folder, outputs, recursive)  # before seconds are spent on the network
    predictor = load_predictor(
        list(workdirs), mirror=mirror, outputs=tuple(outputs), unfinished=True
    )
    cases = find_images(input_path, folder, outputs, recursive, predictor.num_channels)
    os.makedirs(folder, exist_ok=True)
    records = Records(
        folder,
        cases,
        identity=predictor.identity,
        workdirs=workdirs,
        class_names=predictor.class_names,
    )
    waiting = [case for case in cases if not records.is_done(case)]
    num_before = len(cases) - len(waiting)
    altered = [path for case in cases if case not in waiting for path in records.altered(case)]
    failed = {}
    with (
        open(os.path.join(folder, LOG_NAME), "a", encoding="utf-8") as log,
        tqdm(total=len(cases), initial=num_before, unit="case", disable=None) as bar,
    ):
        _say(log, *predictor.notes)
        if others := left_out(input_path, folder, recursive):
            _say(log, f"left out, no image that can be read: {', '.join(others)}")
        for path in altered:
            _say(log, f"kept: {path} was changed since it was predicted; delete it to have it anew")

        def finish(job):
            # Whose the files are must be known before they are there.
            records.add(job.case, {"error": "interrupted while it was written"} | job.record)
            _write(job, predictor.label_values)
            records.add(job.case, job.record)
            _tell(job, log)
            if job.failed:
                failed[job.case.case_id] = job.record["error"]
            bar.update()

        spacing_from = predictor.plan.spacing_from
        read = functools.partial(_read, spacing_from=spacing_from)
        _overlap(waiting, read, lambda job: _compute(job, predictor), finish)
    return len(waiting) - len(failed), num_before, failed


def _overlap(cases, read, compute, finish):
    """Reads one case ahead of the one that is computed, and finishes the one behind it.

    An interrupt lets the case that is being finished be finished.
    """
    pool = concurrent.futures.ThreadPoolExecutor
    with pool(1) as reader, pool(1) as finisher:
        finishing = None
        for job in _one_ahead(reader, read, cases):
            compute(job)
            if finishing:
                finishing.result()
            finishing = finisher.submit(finish, job)
        if finishing:
            finishing.result()


def _one_ahead(pool, function, items):
    pending = None
    for item in items:
        following = pool.submit(function, item)
        if pending:
            yield pending.result()
        pending = following
    if pending:
        yield pending.result()


def _read(case, spacing_from):
    job = Job(case)
    with job.stage("read"):
        job.record |= state_of(case)
        _check_memory(case, spacing_from)
        volume = read_volume(case.paths, spacing_from)
        job.image, job.affine = volume.values, volume.affine
        job.record["remarks"] = [f"{r.kind} ({r.detail})" for r in volume.remarks]
    return job


def _check_memory(case, spacing_from):
    """Refuses an image that takes more memory than there is, before it is asked for."""
    if wrong := memory.too_large(bytes_to_read(case.paths, spacing_from)):
        raise file_problem(case.path, wrong, "cut it into parts, or use a larger machine")


def _compute(job, predictor):
    if job.failed:
        return
    with job.stage("compute"):
        _check_channels(job, predictor)
        job.record["warnings"] = check_image(predictor, job.image, job.affine)
        _check_grid(job, predictor)
        results = segment(predictor, job.image, job.affine)
        spacing_mm = geometry.spacing_mm_from_affine(job.affine)
        job.record["remarks"] += postprocess.shortened(predictor.steps, spacing_mm)
        job.results = {name: np.asarray(results[name]) for name in job.case.files}
        job.record |= _sizes(job, predictor.class_names)
    job.image = None


def _check_channels(job, predictor):
    """Names the files that a channel of an image is without."""
    if job.case.lacks and job.image.shape[-1] != predictor.num_channels:
        wrong = f"is a channel of an image without {', '.join(job.case.lacks)}"
        raise file_problem(job.case.path, wrong, "give a folder that holds them all")


def _check_grid(job, predictor):
    """Refuses an image whose spacing would make a grid of it that memory does not hold."""
    image, affine = geometry.to_canonical(job.image, job.affine)
    shape, spacing_mm = image.shape, geometry.spacing_mm_from_affine(affine)
    grid = geometry.resampled_shape(shape[:3], spacing_mm, predictor.recipe.spacing_mm)
    if wrong := memory.grid_too_large(shape[:3], spacing_mm, grid, shape[-1]):
        raise file_problem(job.case.path, wrong, "correct its spacing, or cut it into parts")


def _sizes(job, class_names):
    """Size of each structure and, if there is a map of it, mean confidence."""
    label, confidence = job.results["label"], job.results.get("confidence")
    counts, confident = np.zeros((2, len(class_names)))
    for x in range(len(label)):  # bincount takes 8 bytes a voxel
        indices = label[x].ravel()
        counts += np.bincount(indices, minlength=len(class_names))
        if confidence is not None:
            confident += np.bincount(indices, confidence[x].ravel(), len(class_names))
    if is_volume(job.case.path):
        sizes = {"volume_ml": counts * abs(np.linalg.det(job.affine[:3, :3])) / 1000}
    else:
        sizes = {"num_pixels": counts.astype(int)}
    if confidence is not None:
        with np.errstate(invalid="ignore"):  # of a structure that is not there
            sizes["confidence"] = confident / counts
    return {
        name: dict(zip(class_names[1:], values[1:].tolist(), strict=True))
        for name, values in sizes.items()
    }


def _write(job, label_values):
    if job.failed:
        return
    with job.stage("write"):
        for name, path in job.case.files.items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            values = job.results.pop(name)
            if name == "label":
                write_label(path, values, job.affine, label_values, like=job.case.path)
            else:
                write_map(path, values, job.affine, like=job.case.path)
        job.record["written_bytes"] = written_bytes(job.case)
    job.results = None


def _tell(job, log):
    """Logs what became of a case; what is wrong is shown on the terminal too."""
    case_id, record = job.case.case_id, job.record
    lines = [f"{case_id}: {text}" for text in record.get("remarks", ())]
    lines += [f"{case_id}: unlike the training set: {text}" for text in record.get("warnings", ())]
    if job.failed:
        lines.append(f"{case_id}: failed: {record['error']}")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record["seconds"].items())
    _say(log, *lines)
    _note(log, *job.trace.splitlines(), f"{case_id}: {stages}")


def _say(log, *lines):
    """Shows lines on the terminal, and logs them."""
    for line in lines:
        tqdm.write(line, file=sys.stderr)
    _note(log, *lines)


def _note(log, *lines):
    for line in lines:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    log.flush()
