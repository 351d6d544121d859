"""A CT of 512 x 512 x 600 voxels with 20 classes, from file to file: time of each stage, memory.

python benchmarks/whole_volume.py [--size=512,512,600]

Trains a small 3D U-Net on phantoms, then runs `python -m jaxseg.predict` on a large one in a
process of its own, whose peak memory is reported. The time of the network is what is left of the
compute stage once the same program has been timed without a network, here in this process. "export"
is all that follows the network: blending, resampling to the file's grid, argmax, post-processing
and writing.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import nibabel
import numpy as np
from absl import app, flags, logging
from report import print_report

from jaxseg import geometry
from jaxseg.data.images import read_image
from jaxseg.experiment import predictor
from jaxseg.inference import normalisation, postprocess, resampling, whole_volume

SIZE = flags.DEFINE_list("size", ["512", "512", "600"], "voxels of the volume")
NUM_CLASSES = 20
SPACING_MM, TRAINING_SPACING_MM = (0.8, 0.8, 1.0), (1.5, 1.5, 1.5)
EXTENT_MM = np.array([512, 512, 600]) * SPACING_MM
MEMORY_LIMIT_GIB, EXPORT_LIMIT = 6.0, 0.25


class WithoutNetwork(nn.Module):
    """Logits of the right shape for next to no work."""

    num_classes: int

    @nn.compact
    def __call__(self, image, train=False):
        return image[..., :1] * jnp.arange(self.num_classes, dtype=jnp.float32)


def make_phantom(size, spacing_mm, seed, centre_mm=None):
    """Balls of rising density in soft tissue: an int16 CT and its label.

    Args:
      size: voxels, 3 ints.
      spacing_mm: of the voxels.
      seed: of places and noise.
      centre_mm: where in the body the volume lies; None for its middle.
    """
    rng = np.random.default_rng(seed)
    centre_mm = EXTENT_MM / 2 if centre_mm is None else centre_mm
    axes = [
        (np.arange(n) - (n - 1) / 2) * mm + c
        for n, mm, c in zip(size, spacing_mm, centre_mm, strict=True)
    ]
    label = np.zeros(size, np.uint8)
    places = np.random.default_rng(0).uniform(0.2, 0.8, (NUM_CLASSES - 1, 3)) * EXTENT_MM
    for index, place in enumerate(places, start=1):
        near = [np.flatnonzero(np.abs(axis - p) < 45) for axis, p in zip(axes, place, strict=True)]
        if all(len(indices) for indices in near):
            box = tuple(slice(indices[0], indices[-1] + 1) for indices in near)
            x, y, z = (axis[s] - p for axis, s, p in zip(axes, box, place, strict=True))
            ball = x[:, None, None] ** 2 + y[:, None] ** 2 + z**2 < 40**2
            label[box][ball] = index
    image = rng.integers(-60, 60, size, dtype=np.int16)
    image += (label * np.int16(80)) + np.int16(40)
    return image, label


def save(path, values, spacing_mm):
    image = nibabel.Nifti1Image(values, np.diag([*spacing_mm, 1]), dtype=values.dtype)
    nibabel.openers.Opener.default_compresslevel = 1
    nibabel.save(image, path)


def make_dataset(folder):
    """Small phantoms around some of the balls, as a Medical Segmentation Decathlon folder."""
    names = [f"case_{index:02d}" for index in range(6)]
    places = np.random.default_rng(0).uniform(0.2, 0.8, (NUM_CLASSES - 1, 3)) * EXTENT_MM
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for index, name in enumerate(names):
        image, label = make_phantom((64, 64, 64), TRAINING_SPACING_MM, index + 1, places[index])
        save(folder / "imagesTr" / f"{name}.nii.gz", image, TRAINING_SPACING_MM)
        save(folder / "labelsTr" / f"{name}.nii.gz", label, TRAINING_SPACING_MM)
    classes = ["background", *(f"ball {index}" for index in range(1, NUM_CLASSES))]
    content = {
        "modality": {"0": "CT"},
        "labels": {str(index): name for index, name in enumerate(classes)},
        "numTraining": len(names),
        "training": [
            {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
            for name in names
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def train(folder):
    """A small network, trained for long enough to tell the balls apart."""
    command = [sys.executable, "-m", "jaxseg.main", "--config=configs/unet.py"]
    fields = {
        "data.dir": folder / "data",
        "data.cache_dir": folder / "cache",
        "data.patch_size": (64, 64, 64),
        "workdir": folder / "run",
        "model.features": (8, 16, 32),
        "augment.flip.axes": (0, 1, 2),
        "train.num_steps": 300,
        "train.eval_every": 300,
        "train.batch_size": 1,
        "optim.warmup_steps": 0,
    }
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    subprocess.run(command, check=True, stdout=sys.stderr)


def predict(folder):
    """Runs the command; returns its record of the case, wall time and peak memory in GiB."""
    command = [sys.executable, "-m", "jaxseg.predict", f"--workdir={folder / 'run'}"]
    command += [f"--input={folder / 'ct.nii.gz'}", f"--output={folder / 'out'}"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - start
    if process.returncode:
        sys.exit("the prediction failed")
    record = json.loads((folder / "out" / "predictions.json").read_text())["cases"]["ct"]
    return record, wall_s, usage.ru_maxrss / 2**20


def seconds_of(function, *arguments):
    """(seconds to compile, seconds to run)."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    middle = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return middle - start, time.perf_counter() - middle


def time_without_network(restored, image, affine):
    """Seconds of stages of the compiled program, and of post-processing."""
    recipe = restored.recipe
    image, affine = geometry.to_canonical(image, affine)
    size = image.shape[:3]
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    grid = geometry.resampled_shape(size, spacing_mm, recipe.spacing_mm)
    coarse = np.int32(whole_volume.coarse_axis(spacing_mm, recipe))
    arguments = resampling.boxed(image), np.int32(size), np.int32(grid), coarse

    def prepare(volume, size, grid, coarse):
        volume = normalisation.normalise(volume, size, recipe.statistics)
        along = np.arange(3) == coarse
        return resampling.resample(volume, size, grid, along, grid_box, recipe.image_order)

    grid_box = resampling.box_of(grid)

    def whole(recipe, variables, *arguments):
        return whole_volume.segment_volume(
            variables, *arguments, 0, recipe=recipe, grid_box=grid_box, num_parts=1
        )["label"]

    _, prepare_s = seconds_of(prepare, *arguments)
    start = time.perf_counter()
    jax.jit(lambda *a: whole(recipe, restored.variables, *a)).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    cheap = dataclasses.replace(recipe, model=WithoutNetwork(NUM_CLASSES))
    _, without_s = seconds_of(
        lambda *a: whole(cheap, {"params": {"x": jnp.zeros(1)}}, *a), *arguments
    )
    return {"compile": compile_s, "resample and normalise": prepare_s, "without network": without_s}


def main(_):
    logging.set_verbosity(logging.ERROR)
    size = tuple(map(int, SIZE.value))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_dataset(folder / "data")
        train(folder)
        image, _ = make_phantom(size, SPACING_MM, seed=100)
        save(folder / "ct.nii.gz", image, SPACING_MM)
        record, wall_s, peak_gib = predict(folder)
        restored = predictor.load_predictor([str(folder / "run")])
        ct, affine = read_image(str(folder / "ct.nii.gz"))
        timed = time_without_network(restored, ct, affine)
        label = np.asarray(nibabel.load(folder / "out" / "ct.nii.gz").dataobj)
    steps = restored.steps or [{"name": "keep_largest", "classes": list(range(1, NUM_CLASSES))}]
    start = time.perf_counter()
    postprocess.apply_steps(label, SPACING_MM, steps)
    one_step_s = time.perf_counter() - start

    seconds = record["seconds"]
    after_s = timed["without network"] - timed["resample and normalise"]
    mend_s = one_step_s if restored.steps else 0.0
    network_s = seconds["compute"] - timed["compile"] - timed["without network"] - mend_s
    export_s = after_s + mend_s + seconds["write"]
    stages = {
        "read": seconds["read"],
        "compile": timed["compile"],
        "resample and normalise": timed["resample and normalise"],
        "network": network_s,
        "blend, resample back, argmax": after_s,
        "post-processing": mend_s,
        "write": seconds["write"],
    }
    for stage, value in stages.items():
        print(f"{stage:<30}{value:8.1f} s", file=sys.stderr)
    print_report(
        "whole_volume",
        {
            "size": size,
            "num_classes": NUM_CLASSES,
            "network_grid": geometry.resampled_shape(size, SPACING_MM, restored.recipe.spacing_mm),
            "seconds": stages,
            "wall_s": wall_s,
            "export_share": export_s / wall_s,
            "export_share_limit": EXPORT_LIMIT,
            "postprocessing_s_of_kept_or_one_step": one_step_s,
            "peak_memory_gib": peak_gib,
            "peak_memory_limit_gib": MEMORY_LIMIT_GIB,
        },
        str(jax.devices()[0].device_kind),
    )


if __name__ == "__main__":
    app.run(main)
