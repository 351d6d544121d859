"""A brain-tissue cohort made on the spot, so that every command runs before real data are at hand.

Each case is the MNI152 2009a template (T1, grey and white matter maps), read from the installed
nilearn package, under its own smooth deformation, tissue contrast, bias field and noise.
"""

import concurrent.futures
import gzip
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

SPACING_MM = 2
CONTROL_SPACING_MM = 30
# Below 1 / 2.48 of the control spacing a cubic B-spline deformation cannot fold (Choi & Lee 2000).
MAX_CONTROL_SHIFT = 0.4
MAX_ROTATION_DEG = 10
SCALE_RANGE = (0.9, 1.1)
BIAS_SPACING_MM = 70
MAX_LOG_BIAS = 0.4
# Intensities relative to white matter; CSF < grey < white holds, as in every T1-weighted image.
CSF_RANGE = (0.25, 0.55)
GREY_RANGE = (0.65, 0.85)
NOISE_RANGE = (0.01, 0.03)
WHITE_RANGE = (500, 1500)

# A case of a cohort: its index, and what dataset.json says of it.
Entry = tuple[int, dict[str, str]]

NOTICE = """\
This cohort is synthetic: no image in it belongs to a person. jaxseg made every case by deforming
the ICBM 152 nonlinear symmetric 2009a template (T1, grey and white matter maps, 1 mm) as shipped
in the Python package nilearn, and by changing its contrast, shading and noise. Results on it say
that the software works, not how well it would do on patients.

The template is a population average made at the Montreal Neurological Institute. Its terms allow
use, copying, change and distribution for any purpose and ask that this notice stay with copies:

  Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
  Institute, McGill University. Permission to use, copy, modify, and distribute this software and
  its documentation for any purpose and without fee is hereby granted, provided that the above
  copyright notice appear in all copies. The authors and McGill University make no
  representations about the suitability of this software for any purpose. It is provided "as is"
  without express or implied warranty. The authors are not responsible for any data loss,
  equipment damage, property loss, or injury to subjects or patients resulting from the use or
  misuse of this software package.

Copies of the 2009 templates also circulate with the years 1993-2004 in the first line.

Please cite
  Fonov V, Evans AC, Botteron K, Almli CR, McKinstry RC, Collins DL, BDCG. Unbiased average
    age-appropriate atlases for pediatric studies. NeuroImage 54(1):313-327, 2011.
    doi:10.1016/j.neuroimage.2010.07.033
  Fonov VS, Evans AC, McKinstry RC, Almli CR, Collins DL. Unbiased nonlinear average
    age-appropriate brain templates from birth to adulthood. NeuroImage 47(S1):S102, 2009.
    doi:10.1016/S1053-8119(09)70884-5
"""


def create_demo_cohort(
    out_dir: str | Path,
    num_cases: int = 32,
    seed: int = 0,
    progress: Callable[[Iterable[Entry]], Iterable[Entry]] | None = None,
) -> str:
    """Write a synthetic brain-tissue cohort in Medical Segmentation Decathlon layout.

    Images are skull-stripped T1-like int16 volumes at 2 mm, [99, 117, 95]; labels are uint8:
    0 background, 1 CSF, 2 grey matter, 3 white matter. Case k depends on (seed, k) alone and files
    are equal byte for byte when made again by the same versions. The folder appears under its name
    only once it is whole; a folder that already holds this cohort is returned as it is.

    Args:
      out_dir: Folder to make; absent, empty, or holding this very cohort.
      num_cases: Number of cases, at least 1.
      seed: Non-negative integer.
      progress: Callable that wraps the iterable of cases (such as tqdm), or None.
    Returns:
      out_dir as a str.
    Raises:
      ValueError: num_cases is below 1.
      FileExistsError: out_dir holds something else.
      FileNotFoundError: nilearn, or a template in it, is missing.
    """
    out_dir = os.fspath(out_dir)
    if num_cases < 1:
        raise ValueError(f"num_cases is {num_cases}; give at least 1.")
    metadata = cohort_metadata(num_cases, seed)
    if os.path.exists(out_dir) and (not os.path.isdir(out_dir) or os.listdir(out_dir)):
        return checked_cohort(out_dir, metadata)
    template, affine = load_template()
    affine = affine @ np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1])

    parent = os.path.dirname(os.path.abspath(out_dir))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".jaxseg-demo-") as staging:
        # A folder of our own inside: mkdtemp's is closed to the user's group.
        cohort = os.path.join(staging, "cohort")
        for folder in ("imagesTr", "labelsTr"):
            os.makedirs(os.path.join(cohort, folder))
        entries = list(enumerate(metadata["training"]))

        def write_case(k, entry):
            image, label = create_case(template, seed, k)
            write_nifti(os.path.join(cohort, entry["image"]), image, affine)
            write_nifti(os.path.join(cohort, entry["label"]), label, affine)

        # Threads suffice: SciPy and zlib let go of the interpreter while they compute.
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        try:
            written = [pool.submit(write_case, *numbered) for numbered in entries]
            for k, _ in progress(entries) if progress else entries:
                written[k].result()
        finally:
            pool.shutdown(cancel_futures=True)
        with open(os.path.join(cohort, "NOTICE"), "w", encoding="utf-8") as file:
            file.write(NOTICE)
        with open(os.path.join(cohort, "dataset.json"), "w", encoding="utf-8") as file:
            json.dump(metadata, file, indent=2)
        try:
            os.replace(cohort, out_dir)
        except OSError:  # another process may have finished the same cohort meanwhile
            return checked_cohort(out_dir, metadata)
    return out_dir


def cohort_metadata(num_cases: int, seed: int) -> dict[str, Any]:
    """Content of dataset.json: a dict that also tells one cohort from another."""
    names = [f"brain_{k + 1:03d}.nii.gz" for k in range(num_cases)]
    return {
        "name": "BrainTissueDemo",
        "description": f"Synthetic brain-tissue cases from the MNI152 2009a template, seed {seed}",
        "reference": "Fonov et al. 2011, doi:10.1016/j.neuroimage.2010.07.033",
        "licence": "MNI copyright and permission notice, see NOTICE",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "CSF", "2": "grey matter", "3": "white matter"},
        "numTraining": num_cases,
        "numTest": 0,
        "training": [
            {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
        ],
        "test": [],
    }


def checked_cohort(out_dir: str, metadata: Mapping[str, Any]) -> str:
    """Return out_dir if it holds the cohort that metadata describes, else raise FileExistsError."""
    try:
        with open(os.path.join(out_dir, "dataset.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        found = None
    files = [path for entry in metadata["training"] for path in entry.values()]
    if found != metadata or not all(os.path.isfile(os.path.join(out_dir, f)) for f in files):
        raise FileExistsError(
            f"{out_dir} exists but is not the demo cohort of {metadata['numTraining']} cases "
            f"({metadata['description']}); remove it or name another folder."
        )
    return out_dir


def load_template() -> tuple[np.ndarray, np.ndarray]:
    """Read the template out of the nilearn package, without importing nilearn.

    Returns:
      (maps, affine): maps is float32 [4, 197, 233, 189]: brain mask in {0, 1}, T1 with mean
      white matter at 1, grey and white matter probability inside the brain; affine [4, 4], mm.
    Raises:
      FileNotFoundError: nilearn, or a template in it, is missing.
    """
    spec = importlib.util.find_spec("nilearn")
    package = os.path.dirname(spec.origin) if spec and spec.origin else "nilearn"
    folder = os.path.join(package, "datasets", "data")
    paths = [
        os.path.join(folder, f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
        for name in ("t1", "gm", "wm")
    ]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"The demo cohort is made from {path}, which is not installed: run "
                "pip install 'jaxseg[demo]', or point --config.data.dir at your own data."
            )
    images = [nib.Nifti1Image.from_filename(path) for path in paths]
    t1, grey_255, white_255 = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    brain = (t1 > 0).astype(np.float32)  # the T1 is skull-stripped; ventricles are inside
    grey, white = brain * grey_255 / 255, brain * white_255 / 255
    return np.stack([brain, t1 / np.average(t1, weights=white), grey, white]), images[0].affine


def create_case(template: np.ndarray, seed: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Make case k of a cohort.

    Args:
      template: Maps from load_template, [4, *S] at 1 mm.
      seed: Non-negative integer.
      k: Index of the case, from 0.
    Returns:
      (image, label) on the 2 mm grid: int16, 0 outside the brain; uint8 in {0, 1, 2, 3}.
    """
    seeds = np.random.SeedSequence(seed, spawn_key=(k,))
    rng = np.random.Generator(np.random.Philox(seeds))
    shape = tuple(-(-size // SPACING_MM) for size in template.shape[1:])
    points = sampling_points(rng, shape)
    brain, t1, grey, white = (ndimage.map_coordinates(m, points, order=1) for m in template)

    # Inside the brain the warped maps are divided by the warped mask: its edge stays undimmed.
    inside = brain > 0.5
    t1, grey, white = (m[inside] / brain[inside] for m in (t1, grey, white))
    tissues = np.stack([1 - grey - white, grey, white])
    label = np.zeros(shape, np.uint8)
    label[inside] = 1 + tissues.argmax(axis=0)

    means = np.array([np.average(t1, weights=tissue) for tissue in tissues])
    wanted = np.array([rng.uniform(*CSF_RANGE), rng.uniform(*GREY_RANGE), 1])
    signal = t1 + (wanted - means) @ tissues
    signal *= np.exp(MAX_LOG_BIAS * smooth_field(rng, shape, BIAS_SPACING_MM)[inside])
    noise = rng.uniform(*NOISE_RANGE) * rng.standard_normal((2, signal.size))
    image = np.zeros(shape, np.int16)
    # Never 0: in a skull-stripped image that means outside the brain.
    magnitude = rng.uniform(*WHITE_RANGE) * np.hypot(signal + noise[0], noise[1])
    image[inside] = np.maximum(np.rint(magnitude), 1)
    return image, label


def sampling_points(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Where each voxel of the 2 mm grid looks into the 1 mm template: affine(x + displacement(x)).

    The map is one-to-one: the displacement's bound keeps it from folding, the affine is regular.

    Args:
      rng: numpy Generator.
      shape: Three sizes of the 2 mm grid.
    Returns:
      [3, *shape] float64, template voxels (= mm from its first voxel).
    """
    grid = SPACING_MM * np.indices(shape, dtype=np.float64)
    centre = SPACING_MM * (np.array(shape).reshape(3, 1, 1, 1) - 1) / 2
    angles_deg = rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG, 3)
    scales = rng.uniform(*SCALE_RANGE, 3)
    matrix = np.diag(1 / scales) @ Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    moved = grid + displacement_mm(rng, shape) - centre
    return np.tensordot(matrix, moved, axes=1) + centre


def displacement_mm(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Smooth random displacement on the 2 mm grid, [3, *shape] float64, mm.

    A cubic B-spline deformation whose control points move by at most 0.4 of their spacing.

    Reference: Choi & Lee 2000, Injectivity conditions of 2D and 3D uniform cubic B-spline
    functions; Rueckert et al. 1999 for the deformation model.
    """
    intervals = num_intervals(shape, CONTROL_SPACING_MM)
    limits = MAX_CONTROL_SHIFT * SPACING_MM * (np.array(shape) - 1) / intervals
    return np.stack([limit * smooth_field(rng, shape, CONTROL_SPACING_MM) for limit in limits])


def smooth_field(rng: np.random.Generator, shape: Sequence[int], spacing_mm: float) -> np.ndarray:
    """Random cubic B-spline on the 2 mm grid, [*shape] float64 in [-1, 1].

    Its coefficients are uniform in [-1, 1], about `spacing_mm` apart.
    """
    intervals = num_intervals(shape, spacing_mm)
    field = rng.uniform(-1, 1, intervals + 3)
    for size, count in zip(shape, intervals, strict=True):
        spline = BSpline(np.arange(-3, count + 4), np.eye(count + 3), 3)
        # Contracting the first axis appends the new one: after three turns the order is X, Y, Z.
        field = np.tensordot(field, spline(np.linspace(0, count, size)), axes=(0, 1))
    return field


def num_intervals(shape: Sequence[int], spacing_mm: float) -> np.ndarray:
    """How many intervals of about `spacing_mm` span each axis of the 2 mm grid, [3] int."""
    extent_mm = SPACING_MM * (np.array(shape) - 1)
    return np.maximum(np.rint(extent_mm / spacing_mm).astype(int), 1)


def write_nifti(path: str | Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume as .nii.gz whose bytes depend on nothing but the arguments."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, code="aligned")
    image.header.set_xyzt_units("mm")
    with open(path, "wb") as file:
        file.write(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
