"""The arrays of a case, read as its dataset says. A label has no place of its own: it lies on the
grid of its image, or can not be used."""

import numpy as np

from jaxseg.data.cases import Case, Dataset
from jaxseg.data.images import read_image
from jaxseg.data.labels import read_instances, read_label


def read_case_image(dataset: Dataset, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Reads the image of a case.

    Returns:
      (image, affine): [X, Y, Z, C] float32, and [4, 4] float64 in mm.
    Raises:
      FileProblem: It can not be used.
    """
    return read_image(case.image_paths, dataset.spacing_from)


def read_case_label(dataset: Dataset, case: Case) -> np.ndarray:
    """Reads the label of a case as class indices, [X, Y, Z] uint8, see `labels.read_label`."""
    return read_label(_label_path(case), dataset.coding, dataset.spacing_from)[0]


def read_case_instances(dataset: Dataset, case: Case) -> np.ndarray:
    """Reads which object each voxel is of, [X, Y, Z] int32, see `labels.read_instances`."""
    return read_instances(_label_path(case), dataset.coding, dataset.spacing_from)[0]


def _label_path(case):
    assert case.label_path is not None, f"case {case.case_id} has no label"
    return case.label_path
