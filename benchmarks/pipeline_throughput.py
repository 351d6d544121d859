"""Images per second that the data pipeline supplies, against those that training consumes.

python benchmarks/pipeline_throughput.py --config=configs/unet.py
python benchmarks/pipeline_throughput.py --config=configs/unet.py --images_per_s_needed=800

The cases are noise, prepared on disk as those of a run. Each figure is of the whole tf.data program
on all cores, so that stages are compared as differences of time per image: "crop" samples patches
of arrays in memory and augments nothing; "read_warm" does so from blocks that are in the cache,
"read_cold" from blocks that are not; "augment" adds the config's
augmentation to "crop", and so does each transform alone, at its probability; "whole_warm" and
"whole_cold" are what training gets. A set much larger than the cache is near the cold figures.
Without --images_per_s_needed, the config's training step is measured on this machine.
"""

import copy
import glob
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from jaxseg import command

command.prepare_environment()

import nibabel
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from report import print_report

from jaxseg.config import transforms_of
from jaxseg.data import builder, pipeline, prepared
from jaxseg.data.blocked_arrays import RecordCache
from jaxseg.data.layouts import decathlon
from jaxseg.data.surveyed import survey_once
from jaxseg.training.augment import region_size

CONFIG = config_flags.DEFINE_config_file("config", "configs/unet.py")
NUM_BATCHES = flags.DEFINE_integer("num_batches", 30, "Timed batches.")
NUM_CASES = flags.DEFINE_integer("num_cases", 4, "Cases on disk.")
SHAPE = flags.DEFINE_list("shape", ["160", "160", "64"], "Voxels of a case.")
NUM_CHANNELS = flags.DEFINE_integer("num_channels", 1, "Channels of an image.")
NEEDED = flags.DEFINE_float("images_per_s_needed", None, "Images/s that training consumes.")


def main(_):
    config = CONFIG.value
    needed = NEEDED.value or measured_appetite()
    augment = transforms_of(config)
    nothing = {name: options | {"prob": 0.0} for name, options in augment.items()}
    with tempfile.TemporaryDirectory() as folder:
        root = make_noise_cases(pathlib.Path(folder, "data"))
        cache_dir = os.path.join(folder, "cache")
        blocks = open_store(root, cache_dir)
        memory = {case_id: in_memory(blocks[case_id]) for case_id in case_ids()}
        uncached = Uncached(blocks)

        rates = {"crop": images_per_s(config, memory, nothing)}
        rates["read_warm"] = images_per_s(config, blocks, nothing)
        forget_files(cache_dir)
        rates["read_cold"] = images_per_s(config, uncached, nothing)
        rates["augment"] = images_per_s(config, memory, augment)
        rates["whole_warm"] = images_per_s(config, blocks, augment)
        forget_files(cache_dir)
        rates["whole_cold"] = images_per_s(config, uncached, augment)
        transforms = {
            name: images_per_s(config, memory, nothing | {name: options})
            for name, options in augment.items()
            if options["prob"] > 0
        }
    costs = milliseconds(rates, transforms)
    advice = advise(costs, rates, needed, os.cpu_count())
    print("\n".join(advice), file=sys.stderr)
    figures = {
        "config": config.name,
        "patch_size": list(config.data.patch_size),
        "region_size": list(region_size(tuple(config.data.patch_size), augment)),
        "case_shape": [*map(int, SHAPE.value), NUM_CHANNELS.value],
        "images_per_s": rates | transforms,
        "images_per_s_needed": needed,
        "ms_per_image": costs,
        "advice": advice,
    }
    print_report("pipeline_throughput", figures, "cpu")


def measured_appetite():
    """Images/s of the config's training step, in a process of its own that feeds it noise."""
    script = os.path.join(os.path.dirname(__file__), "step_time.py")
    chosen = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
    command = [sys.executable, script, *chosen, f"--num_channels={NUM_CHANNELS.value}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["figures"]["images_per_s"]


def case_ids():
    return [f"case{index:03d}" for index in range(NUM_CASES.value)]


def make_noise_cases(root):
    """Writes an MSD folder of noise around a box; returns its path."""
    shape = tuple(map(int, SHAPE.value))
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 4, 3 * n // 4) for n in shape)] = 1
    training = []
    for seed, case_id in enumerate(case_ids()):
        noise = np.random.default_rng(seed).normal(size=(*shape, NUM_CHANNELS.value))
        entry = {}
        for name, values in (("image", noise.astype(np.float32)), ("label", label)):
            entry[name] = f"{name}sTr/{case_id}.nii"
            (root / entry[name]).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values.squeeze(), np.eye(4)), root / entry[name])
        training.append(entry)
    metadata = {
        "name": "noise",
        "modality": {str(channel): "MRI" for channel in range(NUM_CHANNELS.value)},
        "labels": {"0": "background", "1": "box"},
        "training": training,
    }
    (root / "dataset.json").write_text(json.dumps(metadata))
    return root


def open_store(root, cache_dir):
    dataset = decathlon.find(root)
    survey, sha256, _ = survey_once(dataset, cache_dir=cache_dir)
    store, _ = prepared.prepare(
        dataset,
        case_ids(),
        survey=survey,
        sha256=sha256,
        cache_dir=cache_dir,
        spacing_mm=(),
        normalisation="auto",
        crop=False,
        image_order=1,
        label_order=1,
    )
    return store


class Uncached:
    """A CaseStore that reads the blocks of every patch anew."""

    def __init__(self, store):
        self._store = store

    def __getitem__(self, case_id):
        store = copy.copy(self._store)
        store._records = RecordCache(store._read, builder.CACHE_BYTES)
        return store[case_id]


def in_memory(case):
    return builder.PreparedCase(case.image[:, :, :], case.label[:, :, :], case.locations)


def forget_files(folder):
    """Asks the system to drop what it keeps of the records in memory."""
    for path in glob.glob(f"{folder}/**/*.array_record*", recursive=True):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def images_per_s(config, store, augment_params):
    batches = pipeline.train_batches(
        store,
        case_ids(),
        seed=0,
        start_step=0,
        num_steps=10**6,
        batch_size=config.train.batch_size,
        patch_size=tuple(config.data.patch_size),
        num_channels=NUM_CHANNELS.value,
        foreground_fraction=config.data.foreground_fraction,
        augment_params=augment_params,
    )
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    for _ in range(NUM_BATCHES.value):
        next(batches)
    return NUM_BATCHES.value * config.train.batch_size / (time.perf_counter() - start)


def milliseconds(rates, transforms):
    """What each stage adds to the time of an image; noise can not make it negative.

    Args:
      rates: images/s of each variant.
      transforms: images/s with each transform alone.
    """

    def added(rate, base):
        return max(1e3 / rate - 1e3 / base, 0.0)

    return {
        "sampling": 1e3 / rates["crop"],
        "reading from the cache": added(rates["read_warm"], rates["crop"]),
        "reading from disk": added(rates["read_cold"], rates["read_warm"]),
        "augmentation": added(rates["augment"], rates["crop"]),
        "transforms": {name: added(rate, rates["crop"]) for name, rate in transforms.items()},
    }


def advise(costs, rates, needed, num_cores):
    """Sentences that say whether the pipeline keeps up and what to do where it does not.

    Args:
      costs: of `milliseconds`.
      rates: images/s of each variant.
      needed: images/s that training consumes.
      num_cores: of this machine.
    """
    warm, cold = rates["whole_warm"], rates["whole_cold"]
    supply = f"supplies {warm:.1f} images/s from the cache and {cold:.1f} from disk"
    if cold >= needed:
        return [f"The pipeline {supply}; training consumes {needed:.1f}: it keeps up."]
    stages = {name: cost for name, cost in costs.items() if name != "transforms"}
    bottleneck = "reading from disk" if warm >= needed else max(stages, key=stages.get)
    dearest = max(costs["transforms"], key=costs["transforms"].get, default=None)
    remedies = {
        "sampling": "a smaller patch, or smaller ranges of rotation, scaling and translation, "
        "which the sampled region must hold",
        "reading from the cache": "a larger patch, which leaves less of each block unused",
        "reading from disk": "a faster or local disk (config.data.cache_dir), or a larger cache "
        "(jaxseg.data.builder.CACHE_BYTES) where memory allows",
        "augmentation": f"less of the dearest transform, {dearest} "
        f"({costs['transforms'].get(dearest, 0.0):.2f} ms per image): lower "
        f"config.augment.{dearest}.prob",
    }
    share = stages[bottleneck] / max(sum(stages.values()), 1e-9)
    cores = math.ceil(num_cores * needed / (cold if warm >= needed else warm))
    return [
        f"The pipeline {supply}; training consumes {needed:.1f}: the accelerator waits.",
        f"The bottleneck is {bottleneck}: {stages[bottleneck]:.2f} ms per image, {share:.0%} of "
        f"the time of all stages from disk.",
        f"What helps: {remedies[bottleneck]}; or more CPU cores, about {cores} instead of "
        f"{num_cores}.",
    ]


if __name__ == "__main__":
    app.run(main)
