"""jaxseg beside PyTorch on one GPU: time of a step, memory, and Dice against minutes of training.

python benchmarks/gpu_duel.py --data=DIR/Task04_Hippocampus --out=duel.jsonl

Both train nnU-Net's network by its recipe (dice and cross-entropy at all scales, SGD with Nesterov
momentum, clipped gradients) in bfloat16: from the same weights, on the same batches, which lie on
the card. torch has autocast, torch.compile of network and loss, and cuDNN's search for algorithms.
"hippocampus" is nnU-Net's 3D plan for the cases of DIR, trained for --minutes a side, mirrored at
random; Dice is that of whole held-out cases, with the clock stopped. "synthetic" is two patches of
128^3 voxels at a time. All sides live side by side, each in a process of its own, and take turns.

Time is that of five steps between two waits for the card, as training has them; TFLOP/s count three
times the forward pass; "peak_gib" is the most in use up to then, what searching for
algorithms took included. What the input pipeline supplies, with host augmentation and without, is
measured where TensorFlow is installed. Rows are printed, and appended to --out, as soon as they are
known. Without a GPU nothing is measured.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import numpy as np
from gpu_duel_sides import Jaxseg, Task, Torch, fit, initial_weights

from jaxseg.data.cases import DatasetProblems
from jaxseg.data.layouts import decathlon
from jaxseg.data.preprocess import Plan, preprocess_image, preprocess_label
from jaxseg.data.reading import read_case_image, read_case_label

PACKAGES = ("jax", "jaxlib", "flax", "torch")
EVALUATION_EVERY_S = 15
SYNTHETIC_ROUNDS, SYNTHETIC_ROUND_S = 5, 3
LAST_WORDS = 600  # characters of what a failed side said
# Of the table: title, width, decimals.
COLUMNS = (
    ("step ms", 9, 2),
    ("patches/s", 11, 1),
    ("TFLOP/s", 9, 1),
    ("peak GiB", 10, 2),
    ("minutes", 9, 2),
    ("Dice", 8, 4),
)
# As in nnU-Net, intensities are normalised case by case; these cases share one spacing.
AS_STORED = Plan((0.0, 0.0, 0.0), ("zscore",), ((),), image_order=1, label_order=0)


def hippocampus(folder):
    """The cases of the Medical Segmentation Decathlon's task that a folder holds."""
    try:
        dataset = decathlon.find(folder)
    except DatasetProblems as problems:  # a part of the folder will do
        if not problems.found:
            raise
        dataset = problems.found
    split = json.loads(pathlib.Path(folder, "subject_split.json").read_text())
    patch, features = (40, 56, 40), (32, 64, 128, 256)
    train, val = (
        [prepared(dataset, case) for case in dataset.cases if case.case_id in split[name]]
        for name in ("train", "val")
    )
    divisor = 2 ** (len(features) - 1)
    largest = np.max([label.shape for _, label in val], axis=0)
    whole = tuple(int(n) for n in -(-largest // divisor) * divisor)
    return Task(
        "hippocampus",
        np.stack([fit(image, patch) for image, _ in train]),
        np.stack([fit(label, patch) for _, label in train]),
        9,
        features,
        len(dataset.class_names),
        np.stack([fit(image, whole) for image, _ in val]),
        tuple(label for _, label in val),
    )


def prepared(dataset, case):
    image, affine = read_case_image(dataset, case)
    label = preprocess_label(
        read_case_label(dataset, case), affine, AS_STORED, len(dataset.class_names)
    )
    return preprocess_image(image, affine, AS_STORED)[0], label


def synthetic(size=128, features=(32, 64, 128, 256, 320, 320), num_patches=4):
    """A bright and a brighter ball in noise."""
    rng = np.random.default_rng(0)
    places = np.indices((size,) * 3, np.float32)
    labels = np.zeros((num_patches, *places.shape[1:]), np.uint8)
    for label in labels:
        for index in (1, 2):
            centre = rng.uniform(0.25, 0.75, (3, 1, 1, 1)) * size
            inside = np.square(places - centre).sum(0) < (rng.uniform(0.1, 0.25) * size) ** 2
            label[inside] = index
    noise = rng.standard_normal((*labels.shape, 1), np.float32)
    return Task("synthetic", noise + labels[..., None], labels, 2, features)


SIDES = {
    "jaxseg": Jaxseg,
    "torch": Torch,
    "jaxseg, NHWC": functools.partial(Jaxseg, xla_gpu_force_conv_nhwc=True),
    "torch, not compiled": functools.partial(Torch, compiled=False),
}
# Who steps in for one that fails.
SUBSTITUTES = {"torch": "torch, not compiled"}


class Worker:
    """A side in a process of its own; what it says to stderr is kept in a file."""

    def __init__(self, name, task, weights, said):
        context = multiprocessing.get_context("spawn")
        self.said = pathlib.Path(said)
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, said, name, task, weights)
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        theirs.close()

    def ask(self, method, *arguments):
        """The row that a method of the side returns, or one that says how the process ended."""
        try:
            self.pipe.send((method, arguments))
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            words = self.said.read_text(errors="replace").strip()
            return {"error": f"ended with {self.process.exitcode}: {words[-LAST_WORDS:]}"}

    def stop(self):
        self.process.kill()
        self.process.join()


def serve(pipe, said, name, task, weights):
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    side = SIDES[name](task, weights)
    while True:
        method, arguments = pipe.recv()
        pipe.send(getattr(side, method)(*arguments))


def duel(task, names, *, rounds, seconds, write):
    """Sides train in turns, `rounds` times `seconds` each; `write` gets a row at a time."""
    weights = initial_weights(task)
    workers = {}

    def ask(name, method, *arguments):
        row = workers[name].ask(method, *arguments)
        write({"task": task.name, "side": name, "after": method} | row)
        if "error" in row:
            workers.pop(name).stop()

    with tempfile.TemporaryDirectory() as folder:
        start = functools.partial(Worker, task=task, weights=weights)
        try:
            for name in names:  # all load at once what they need
                workers[name] = start(name, said=os.path.join(folder, name))
            for name in names:  # but tune themselves one after the other
                ask(name, "warm_up")
                if name not in workers and name in SUBSTITUTES:
                    name = SUBSTITUTES[name]
                    workers[name] = start(name, said=os.path.join(folder, name))
                    ask(name, "warm_up")
            for turn in range(rounds):
                for name in tuple(workers):
                    ask(name, "train", seconds, turn / rounds, (turn + 1) / rounds)
            if "jaxseg" in workers:
                ask("jaxseg", "size")
        finally:
            for worker in workers.values():
                worker.stop()


def pipeline_rates(task):
    """Patches per second that tf.data supplies, without and with augmentation."""
    if not importlib.util.find_spec("tensorflow"):
        return {"not_measured": "TensorFlow is not installed"}
    here = pathlib.Path(__file__).parent
    patch = ",".join(map(str, task.labels.shape[1:]))
    settings = {
        "config": here.parent / "configs" / "unet.py",
        "config.data.patch_size": f"({patch})",
        "config.train.batch_size": task.batch_size,
        "shape": patch,
        "images_per_s_needed": 1,
    }
    command = [sys.executable, str(here / "pipeline_throughput.py")]
    command += [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rates = json.loads(done.stdout)["figures"]["images_per_s"]
    return {"patches_per_s": rates["crop"], "patches_per_s_augmented": rates["augment"]}


def table(rows):
    """Lines, one for each side of a task, from all rows."""
    tflop = {row["task"]: row["tflop_per_step"] for row in rows if row.get("tflop_per_step")}
    by_side = {}
    for row in rows:
        if "side" in row:
            by_side.setdefault((row["task"], row["side"]), []).append(row)
    lines = [f"{'':34}" + "".join(f"{title:>{width}}" for title, width, _ in COLUMNS)]
    for (task, side), of_side in by_side.items():
        line = f"{task + ', ' + side:34}"
        if trained := [row for row in of_side if row["after"] == "train" and "error" not in row]:
            step_ms = statistics.median(row["step_ms"] for row in trained)
            last = trained[-1]
            figures = {
                "step ms": step_ms,
                "patches/s": 1e3 * last["batch_size"] / step_ms,
                "TFLOP/s": 1e3 * tflop.get(task, np.nan) / step_ms,
                "peak GiB": last["peak_gib"],
                "minutes": last["minutes"],
                "Dice": last.get("dice", np.nan),
            }
            line += "".join(f"{figures[title]:{width}.{n}f}" for title, width, n in COLUMNS)
        lines.append(line + ("  failed" if "error" in of_side[-1] else ""))
    return lines


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of Task04_Hippocampus, or of a part")
    parser.add_argument("--out", required=True, help="file to which rows are appended")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training steps, a side")
    parser.add_argument("--only", default="hippocampus,synthetic", help="tasks, in order")
    return parser.parse_args()


def what_is_missing():
    """Why nothing can be measured here; "" if it can."""
    if not importlib.util.find_spec("torch"):
        return "gpu_duel: torch is not installed; nothing was measured"
    import torch

    return "" if torch.cuda.is_available() else "gpu_duel: no GPU here; nothing was measured"


def main():
    options = parsed()
    if missing := what_is_missing():
        sys.exit(missing)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all sides find memory
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"  # a card that JAX can not use is an error
    import torch

    rows, began = [], time.perf_counter()
    with open(options.out, "a", encoding="utf-8") as file:

        def write(row):
            row["at_s"] = time.perf_counter() - began
            rows.append(row)
            short = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
            for stream in (sys.stdout, file):
                print(json.dumps(short), file=stream, flush=True)

        versions = {package: metadata.version(package) for package in PACKAGES}
        write({"device": torch.cuda.get_device_name(), "versions": versions})
        for name in options.only.split(","):
            if name == "hippocampus":
                rounds = max(round(60 * options.minutes / EVALUATION_EVERY_S), 1)
                seconds = 60 * options.minutes / rounds
                task, names = hippocampus(options.data), ("jaxseg", "torch")
            else:
                rounds, seconds = SYNTHETIC_ROUNDS, SYNTHETIC_ROUND_S
                task, names = synthetic(), ("jaxseg", "torch", "jaxseg, NHWC")
            duel(task, names, rounds=rounds, seconds=seconds, write=write)
            write({"task": name} | pipeline_rates(task))
    print("\n".join(table(rows)))
    if any("error" in row and row["side"] in ("jaxseg", "torch") for row in rows):
        sys.exit("gpu_duel: a side failed; its row says how")


if __name__ == "__main__":
    main()
