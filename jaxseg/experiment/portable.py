"""The whole predictor as one file that needs jax and numpy alone.

The file is four parts with a line feed between them: `MAGIC`, the SHA-256 of the rest, a line of
JSON ("spacing_mm" of the network's grid, 0 along an axis that stays as it is, and "largest_grid",
the most voxels it may have, "crop", whether the program takes the box of what is not 0 alone,
"class_names", "label_values"), and the program, which `jax.export.deserialize` reads.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export
from safetensors.numpy import save_file

from jaxseg import geometry
from jaxseg.data import memory
from jaxseg.data.images import read_image
from jaxseg.experiment.predictor import Predictor, load_predictor
from jaxseg.inference import resampling, whole_volume
from jaxseg.problem import Problem, file_problem
from jaxseg.run import writers

MAGIC = b"jaxseg predictor 2"
# Programs of version 0.1 take no spacings.
MAGICS = (MAGIC, b"jaxseg predictor 1")
PLATFORMS = ("cpu", "cuda", "tpu")


class ExportProblem(Problem, ValueError):
    """An exported file can not be used; the message names it and says how to mend it."""


def export_predictor(
    predictor: Predictor, box: tuple[int, ...], grid_box: tuple[int, ...]
) -> bytes:
    """Turns a predictor into bytes that need nothing of this package.

    Args:
      predictor: `jaxseg.experiment.predictor.Predictor`.
      box: array shape [X, Y, Z] that volumes are padded to.
      grid_box: array shape that holds the network's grid.
    Returns:
      bytes, as described above. The program takes volumes [b, *box, C] float32 of any number b,
      their sizes [b, 3] int32, the sizes of the network's grid [b, 3] int32 and the spacings of the
      volumes [b, 3] float32 (mm), and returns class indices [b, *box] uint8.
    """
    variables = jax.device_get(predictor.variables)
    segment = functools.partial(_segment, variables, predictor.recipe, grid_box)
    batch = jax_export.symbolic_shape("b")
    arguments = (
        jax.ShapeDtypeStruct((*batch, *box, predictor.num_channels), jnp.float32),
        jax.ShapeDtypeStruct((*batch, 3), jnp.int32),
        jax.ShapeDtypeStruct((*batch, 3), jnp.int32),
        jax.ShapeDtypeStruct((*batch, 3), jnp.float32),
    )
    exported = jax_export.export(jax.jit(segment), platforms=PLATFORMS)(*arguments)
    about = {
        "spacing_mm": predictor.recipe.spacing_mm,
        "largest_grid": grid_box,
        "crop": predictor.recipe.crop,
        "class_names": predictor.class_names,
        "label_values": predictor.label_values,
    }
    rest = json.dumps(about).encode() + b"\n" + bytes(exported.serialize())
    return b"\n".join((MAGIC, hashlib.sha256(rest).hexdigest().encode(), rest))


def _segment(variables, recipe, grid_box, volumes, sizes, grids, spacings_mm):
    def segment_one(arguments):
        volume, size, grid, spacing_mm = arguments
        coarse = whole_volume.coarse_axis(spacing_mm, recipe)
        outputs = whole_volume.segment_volume(
            variables, volume, size, grid, coarse, 0, recipe=recipe, grid_box=grid_box, num_parts=1
        )
        return jnp.moveaxis(outputs["label"], (0, 1, 2), recipe.axis_order)

    return jax.lax.map(segment_one, (volumes, sizes, grids, spacings_mm))


def load_exported(path: str | Path) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Reads what `export_predictor` made.

    Returns:
      (about, function): its JSON as a dict, and the program's function.
    Raises:
      ExportProblem: the file is missing, of another kind, cut, altered, or of another version.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ExportProblem(f"{path}: cannot be read ({error.strerror})") from None
    magic, _, rest = content.partition(b"\n")
    if magic not in MAGICS:
        raise ExportProblem(f"{path}: not a file that jaxseg.export wrote; export the run again")
    digest, _, rest = rest.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        raise ExportProblem(f"{path}: cut short or altered; copy it again from the source")
    about, _, serialized = rest.partition(b"\n")
    try:
        return json.loads(about), jax_export.deserialize(bytearray(serialized)).call
    except Exception as error:  # whatever a parser trips over
        raise ExportProblem(
            f"{path}: jax {jax.__version__} can not read it ({type(error).__name__}); export the "
            "run again, or use the version of jax that it was exported with"
        ) from error


def save_weights(path: str, predictor: Predictor, workdir: str) -> None:
    """Writes weights by name, with "memberN/" before it if there are several members.

    Args:
      path: of the safetensors file; its metadata are the JSON files of `workdir`.
      predictor: `jaxseg.experiment.predictor.Predictor`.
      workdir: folder of its first run.
    """
    metadata = {}
    for name in ("config", "plan", "data", "predictor"):
        with open(os.path.join(workdir, f"{name}.json"), encoding="utf-8") as file:
            metadata[name] = file.read()
    stacked = traverse_util.flatten_dict(jax.device_get(predictor.variables), sep="/")
    num_members = len(next(iter(stacked.values())))
    arrays = {
        f"member{index}/{name}" if num_members > 1 else name: np.ascontiguousarray(leaf[index])
        for name, leaf in stacked.items()
        for index in range(num_members)
    }
    with writers.replacing(path) as temporary:
        save_file(arrays, temporary, metadata)


def export(workdirs: Sequence[str], like: str, folder: str, *, mirror: bool = False) -> str:
    """Writes `predictor.jaxseg` and `weights.safetensors`.

    Args:
      workdirs: folders of finished runs.
      like: image of the largest size and the spacing that are to be served.
      folder: where to; made if missing.
      mirror: whether to average over mirrored images.
    Returns:
      Text for the terminal.
    Raises:
      PredictorProblem, FileProblem, OSError: a run, the image or the folder can not be used.
    """
    predictor = load_predictor(workdirs, mirror=mirror)
    image, affine = geometry.to_canonical(*read_image(like, predictor.plan.spacing_from))
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    grid = geometry.resampled_shape(image.shape[:3], spacing_mm, predictor.recipe.spacing_mm)
    if wrong := memory.grid_too_large(image.shape[:3], spacing_mm, grid, image.shape[-1]):
        raise file_problem(like, wrong, "correct its spacing, or give another --like")
    box = resampling.box_of(image.shape[:3])
    content = export_predictor(predictor, box, resampling.box_of(grid))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "predictor.jaxseg")
    weights_path = os.path.join(folder, "weights.safetensors")
    with writers.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
    save_weights(weights_path, predictor, workdirs[0])
    largest = " x ".join(map(str, box))
    return (
        f"{path}: {len(content) / 2**20:.1f} MiB, volumes of up to {largest} voxels, for "
        f"{', '.join(PLATFORMS)}\n{weights_path}"
    )
