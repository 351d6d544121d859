"""Checks every file of a dataset before anything is trained on it."""

import collections
import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from jaxseg.data import cases, images, labels
from jaxseg.geometry import AFFINE_TOLERANCE_MM
from jaxseg.problem import FileProblem


def verify(
    dataset: cases.Dataset,
    progress: Callable[[Iterable[cases.Case]], Iterable[cases.Case]] | None = None,
) -> None:
    """Reads every image and label once and reports all that is wrong with them.

    Files must be readable, with finite and varying image values, an invertible affine, known label
    values, image and label on one grid, the same channels in every case, and no image twice.

    Args:
      dataset: cases.Dataset.
      progress: Called with the cases, returns an iterable over them (such as tqdm); None for none.
    Raises:
      cases.DatasetProblems: One sentence for each problem of each case, in the order of the cases,
        then those that only show between cases.
    """
    problems: list[FileProblem | str] = []
    num_channels: dict[str, int] = {}
    id_by_content: dict[tuple[tuple[int, ...], bytes], str] = {}
    for case in progress(dataset.cases) if progress else dataset.cases:
        image, image_affine = _try(problems, images.decode_image, case.image_path)
        values, label_affine = _try(problems, labels.decode_label, case.label_path)
        if image is not None:
            problems += images.affine_problems(case.image_path, image_affine)
            problems += images.image_problems(case.image_path, image)
            problems += _constant_problems(case.image_path, image)
            num_channels[case.image_path] = image.shape[3]
            other_id = id_by_content.setdefault(_content_key(image), case.case_id)
            if other_id != case.case_id:
                problems.append(
                    f"{case.image_path}: same image as case {other_id}; remove one of the two"
                )
        if values is not None:
            problems += images.affine_problems(case.label_path, label_affine)
            try:
                labels.encode_label(case.label_path, values, dataset.label_values)
            except FileProblem as problem:
                problems.append(problem)
        if image is not None and values is not None:
            problems += _grid_problems(case, image.shape[:3], image_affine, values, label_affine)
    problems += _channel_problems(num_channels, dataset.modalities)
    if problems:
        raise cases.DatasetProblems([str(problem) for problem in problems])


def _try(problems, decode, path):
    try:
        return decode(path)
    except FileProblem as problem:
        problems.append(problem)
        return None, None


def _content_key(image):
    return image.shape, hashlib.sha256(np.ascontiguousarray(image).data).digest()


def _constant_problems(path, image):
    if image.size and (image == image.flat[0]).all():
        wrong = f"every value is {image.flat[0]:g}, so there is nothing to see"
        return [f"{path}: {wrong}; copy it again from the source or remove the case"]
    return []


def _grid_problems(case, image_shape, image_affine, values, label_affine):
    problems = []
    if image_shape != values.shape:
        problems.append(
            f"{case.label_path}: shape {list(values.shape)}, but the image {case.image_path} has "
            f"{list(image_shape)}; resample the label to the image's grid"
        )
    difference = np.abs(image_affine - label_affine).max()
    if difference > AFFINE_TOLERANCE_MM:
        problems.append(
            f"{case.label_path}: its affine differs from that of {case.image_path} by up to "
            f"{difference:.4g} (label {_compact(label_affine)}, image {_compact(image_affine)}); "
            "copy the image's affine if the voxels match, else resample the label"
        )
    return problems


def _channel_problems(num_channels, modalities):
    """Images whose channels are not those declared or, if none are, not those of most images."""
    if not num_channels:
        return []
    if modalities:
        expected = len(modalities)
        source = f"the dataset declares {expected} ({', '.join(modalities)})"
    else:
        expected, num_images = collections.Counter(num_channels.values()).most_common(1)[0]
        source = f"{num_images} of {len(num_channels)} images have {expected}"
    return [
        f"{path}: {number} channels, but {source}; correct the image or the dataset's description"
        for path, number in num_channels.items()
        if number != expected
    ]


def _compact(affine):
    return np.round(affine[:3], 4).tolist()
