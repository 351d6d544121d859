"""What pretraining is worth when few images are labelled: nuclei to axons, against from scratch.

python benchmarks/transfer.py --nuclei=DIR/DSB2018 --axons=DIR/axondeepseg_sem --out=DIR

A U-Net is trained on nuclei in RGB microscopy; its weights (but the class head, and with the first
convolution adapted to grey images) start networks for axons and myelin in electron microscopy that
see 1, 2 or 4 training images. Every run has the same number of steps, ends with its last step, and
is tested on the same three rats, of which no image was in training. Seed s starts at image s of the
training rats, draws other weights and other patches; both arms see the same images. Finished runs
are kept: the same command goes on. Writes transfer.json and transfer.png.
"""

import json
import os
import subprocess
import sys

import matplotlib
import numpy as np
from absl import app, flags, logging
from report import print_report

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUCLEI = flags.DEFINE_string("nuclei", None, "Folder of DSB2018.", required=True)
AXONS = flags.DEFINE_string("axons", None, "Folder of axondeepseg_sem.", required=True)
OUT = flags.DEFINE_string("out", "runs/transfer", "Folder for all runs.")
PRETRAIN_STEPS = flags.DEFINE_integer("pretrain_steps", 600, "Steps on nuclei.")
STEPS = flags.DEFINE_integer("steps", 150, "Steps of every run on axons.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of every cell of the table.")

NUM_IMAGES = (1, 2, 4)
ARMS = ("scratch", "pretrained")
TRAINING = (
    "sub-rat1_sample-data1_SEM",
    "sub-rat4_sample-data12_SEM",
    "sub-rat3_sample-data9_SEM",
    "sub-rat3_sample-data10_SEM",
    "sub-rat3_sample-data11_SEM",
)
VALIDATION = ("sub-rat6_sample-data15_SEM",)
TEST = (
    "sub-rat5_sample-data14_SEM",
    "sub-rat7_sample-Maxo03img60_SEM",
    "sub-rat8_sample-V915_SEM",
)


def main(_):
    out = os.path.abspath(OUT.value)
    os.makedirs(out, exist_ok=True)
    pretrained = os.path.join(out, "nuclei")
    steps = PRETRAIN_STEPS.value
    train("nuclei", NUCLEI.value, pretrained, num_steps=steps, eval_every=steps // 2)

    dice = {arm: {num: [] for num in NUM_IMAGES} for arm in ARMS}
    for seed in range(SEEDS.value):
        for num_images in NUM_IMAGES:
            split = write_split(out, seed, num_images)
            for arm in ARMS:
                workdir = os.path.join(out, f"{arm}_{num_images}_{seed}")
                options = ["--config.split.file=" + split, f"--config.seed={seed}"]
                options.append("--config.split.test_regex=")
                if arm == "pretrained":
                    options.append("--config.init.checkpoint=" + pretrained)
                train("axons", AXONS.value, workdir, *options, num_steps=STEPS.value)
                dice[arm][num_images].append(read_dice(workdir))
    figures = {
        "steps": STEPS.value,
        "pretrain_steps": PRETRAIN_STEPS.value,
        "pretrained_on_nuclei_test_dice": float(np.nanmean(read_dice(pretrained))),
        "test_cases": TEST,
        "dice_by_seed": "mean over test cases of each seed: [myelin, axon]",
        "dice": dice,
    }
    with open(os.path.join(out, "transfer.json"), "w", encoding="utf-8") as file:
        json.dump(figures, file, indent=1)
    plot(dice, os.path.join(out, "transfer.png"))
    print_table(dice)
    print_report("transfer", figures, "the device of jaxseg.main")


def train(config, data_dir, workdir, *options, num_steps, eval_every=None):
    """Runs jaxseg.main in `workdir`, unless it has been; prints its last lines."""
    if os.path.exists(os.path.join(workdir, "test.json")):
        return
    command = [sys.executable, "-m", "jaxseg.main", f"--config=configs/{config}.py"]
    command += [f"--config.data.dir={data_dir}", f"--config.workdir={workdir}", *options]
    command += [f"--config.train.num_steps={num_steps}", "--config.optim.warmup_steps=25"]
    command += [f"--config.train.eval_every={eval_every or num_steps}"]
    command += [f"--config.train.checkpoint_every={num_steps}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    logging.info("%s: %s", os.path.basename(workdir), done.stdout.strip().splitlines()[-1])


def write_split(out, seed, num_images):
    """A split file of that many training images, from image `seed` on; returns its path."""
    chosen = [TRAINING[(seed + i) % len(TRAINING)] for i in range(num_images)]
    unused = [case for case in TRAINING if case not in chosen]
    path = os.path.join(out, f"split_{num_images}_{seed}.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"train": chosen, "val": VALIDATION, "test": TEST, "unused": unused}, file)
    return path


def read_dice(workdir):
    """Mean Dice over the test cases, one per foreground class."""
    with open(os.path.join(workdir, "test.json"), encoding="utf-8") as file:
        return json.load(file)["summary"]["dice"]["mean"][1:]


def print_table(dice):
    """Mean ± sd over seeds of the mean over both classes."""
    print("images " + "".join(f"{arm:>20}" for arm in ARMS), file=sys.stderr)
    for num in NUM_IMAGES:
        cells = [np.mean(dice[arm][num], axis=1) for arm in ARMS]
        row = "".join(f"{c.mean():>12.3f} ± {c.std(ddof=1):.3f}" for c in cells)
        print(f"{num:<7}{row}", file=sys.stderr)


def plot(dice, path):
    """One panel per class: a dot per seed, a line through the means."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), sharey=True, constrained_layout=True)
    for index, (axis, name) in enumerate(zip(axes, ("myelin", "axon"), strict=True)):
        for arm, colour in zip(ARMS, ("tab:grey", "tab:blue"), strict=True):
            values = np.array([[scores[index] for scores in dice[arm][n]] for n in NUM_IMAGES])
            axis.plot(NUM_IMAGES, values.mean(1), color=colour, label=arm)
            axis.plot(NUM_IMAGES, values, "o", color=colour, markersize=4)
        axis.set(title=name, xlabel="training images", xticks=NUM_IMAGES)
    axes[0].set_ylabel("Dice on three unseen rats")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    app.run(main)
