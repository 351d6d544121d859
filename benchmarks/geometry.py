"""Does a segmentation lie where its scan lies, on whatever grid the scan is stored?

python benchmarks/geometry.py --workdir=RUN --images=DIR [--cases=ID,ID,...]

Stores each image on four other grids: axes permuted; axes flipped; turned and sheared to an oblique
grid; a third axis 2.5 times as coarse. `python -m jaxseg.predict` segments all of them. Of every
output the shape, the affine and the placement fields of the header must equal the input's to the
bit. Then labels are brought back to the original grid and compared with the plain prediction: mean
Dice over classes and cases. For oblique and coarse grids, whose voxels are others, the same is
computed for the plain prediction put on that grid and back: the most that can be expected.
"""

import dataclasses
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import nibabel
import numpy as np
from absl import app, flags
from report import print_report
from scipy import ndimage

from jaxseg import geometry
from jaxseg.evaluation import metrics

WORKDIR = flags.DEFINE_string("workdir", None, "finished run", required=True)
IMAGES = flags.DEFINE_string("images", None, "folder of NIfTI images", required=True)
CASES = flags.DEFINE_list("cases", [], "ids of the images to use; all if not given")
PLACEMENT = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A way to store an image.

    Attributes:
      values, affine: of the image on it.
      put, back: functions that bring a label to the grid and from it.
      codes: (sform, qform).
    """

    values: np.ndarray
    affine: np.ndarray
    put: Callable
    back: Callable
    codes: tuple[int, int]


def make_grids(values, affine, rng):
    """The image on its own grid and on four others, as a dict from name to Grid."""
    return {
        "plain": Grid(values, affine, lambda label: label, lambda label: label, (1, 1)),
        "permuted": permuted_grid(values, affine, rng),
        "flipped": flipped_grid(values, affine, rng),
        "oblique": oblique_grid(values, affine),
        "anisotropic": anisotropic_grid(values, affine),
    }


def permuted_grid(values, affine, rng):
    order = rng.permutation(3)
    while (order == np.arange(3)).all():
        order = rng.permutation(3)
    return Grid(
        values.transpose(order),
        affine[:, [*order, 3]],
        lambda label: label.transpose(order),
        lambda label: label.transpose(np.argsort(order)),
        (2, 0),
    )


def flipped_grid(values, affine, rng):
    axes = tuple(np.flatnonzero(rng.integers(0, 2, 3))) or (1,)
    flip = np.eye(4)
    for axis in axes:
        flip[axis, axis], flip[axis, 3] = -1, values.shape[axis] - 1

    def flipped(label):
        return np.flip(label, axes)

    return Grid(flipped(values), affine @ flip, flipped, flipped, (0, 1))


def oblique_grid(values, affine):
    turn, shear, centre = np.eye(4), np.eye(4), np.eye(4)
    turn[:2, :2] = [[np.cos(0.25), -np.sin(0.25)], [np.sin(0.25), np.cos(0.25)]]
    shear[0, 2], shear[1, 0] = 0.15, 0.1
    centre[:3, 3] = (np.array(values.shape) - 1) / 2
    oblique = centre @ turn @ shear @ np.linalg.inv(centre)  # voxel of the new grid to old

    def moved(array, matrix, order):
        return ndimage.affine_transform(array, matrix[:3, :3], matrix[:3, 3], order=order)

    return Grid(
        moved(values.astype(np.float32), oblique, 1),
        affine @ oblique,
        lambda label: moved(label, oblique, 0),
        lambda label: moved(label, np.linalg.inv(oblique), 0),
        (1, 0),
    )


def anisotropic_grid(values, affine):
    shape = values.shape
    coarse = (*shape[:2], max(1, round(shape[2] / 2.5)))

    def resized(label, shape):
        return geometry.resample_label_to_shape(label, shape, 256, order=1)

    return Grid(
        geometry.resample_to_shape(values[..., None], coarse, order=1)[..., 0],
        geometry.resampled_affine(affine, shape, coarse),
        lambda label: resized(label, coarse),
        lambda label: resized(label, shape),
        (4, 1),
    )


def save(path, grid):
    image = nibabel.Nifti1Image(grid.values, None)
    image.set_sform(grid.affine, grid.codes[0])
    image.set_qform(grid.affine, grid.codes[1], strip_shears=True)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def differing_fields(image, output):
    """What of the placement of two NIfTI images is not equal to the bit."""
    wrong = [f for f in PLACEMENT if image.header[f].tobytes() != output.header[f].tobytes()]
    wrong += ["shape"] * (image.shape != output.shape)
    return wrong + ["affine"] * (image.affine.tobytes() != output.affine.tobytes())


def mean_dice(label, reference):
    num_classes = int(max(label.max(), reference.max())) + 1
    counts = metrics.confusion_counts(label, reference, num_classes)
    return metrics.mean_foreground(metrics.scores_from_counts(counts)["dice"])


def main(_):
    rng = np.random.default_rng(0)
    paths = sorted(pathlib.Path(IMAGES.value).expanduser().glob("[!.]*.nii.gz"))
    if CASES.value:
        paths = [path for path in paths if path.name.removesuffix(".nii.gz") in CASES.value]
    differing, dice, most = [], {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "in").mkdir()
        grids = {}
        for path in paths:
            image = nibabel.load(path)
            grids[path.name] = make_grids(np.asarray(image.dataobj), image.affine, rng)
            for kind, grid in grids[path.name].items():
                save(folder / "in" / f"{kind}_{path.name}", grid)
        command = [sys.executable, "-m", "jaxseg.predict", f"--workdir={WORKDIR.value}"]
        command += [f"--input={folder / 'in'}", f"--output={folder / 'out'}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        for case, of_case in grids.items():
            labels = {}
            for kind in of_case:
                output = nibabel.load(folder / "out" / f"{kind}_{case}")
                differing += differing_fields(
                    nibabel.load(folder / "in" / f"{kind}_{case}"), output
                )
                labels[kind] = np.asarray(output.dataobj)
            plain = labels.pop("plain")
            for kind, label in labels.items():
                grid = of_case[kind]
                dice.setdefault(kind, []).append(mean_dice(grid.back(label), plain))
                most.setdefault(kind, []).append(mean_dice(grid.back(grid.put(plain)), plain))
    print_report(
        "geometry",
        {
            "num_outputs": 5 * len(paths),
            "fields_that_differ": differing,
            "dice_with_plain": {kind: float(np.mean(values)) for kind, values in dice.items()},
            "lowest_dice_with_plain": {kind: float(min(values)) for kind, values in dice.items()},
            "most_to_expect": {kind: float(np.mean(values)) for kind, values in most.items()},
        },
        str(jax.devices()[0].device_kind),
    )


if __name__ == "__main__":
    app.run(main)
