"""Dice on held-out subjects after some minutes of steps: configs/auto.py beside configs by hand.

python benchmarks/accuracy.py --data=DIR --minutes=15 --only=acdc,hippocampus --configs=auto,hand

DIR holds the folders that `CASES` names. Every network is trained with nothing set but what the
folder and its split are; how many steps fit into the minutes is found by training a little first,
so leave the machine to it. Dice is that of whole cases on their own grid: of the test cases where
there are some, else of the validation cases. Each line is printed as soon as it is known; with
--kept=FILE they are appended to a file too, and what it has already is not done again.
"""

import argparse
import dataclasses
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

# Steps by which the rate is found: the first are slow.
TRIAL_STEPS, TRIAL_EVERY = 80, 10
_VESSELS = (
    "data.image_glob=Image_*.jpg",
    "data.label_pattern={case}_1stHO.png",
    r"split.subject_regex=Image_(\d+)[LR]",
    "split.test_regex=Image_1[1-4]",
)
_NUCLEI = (
    "data.image_glob=images/*.png",
    "data.label_pattern=masks/{case}.png",
    "data.objects=True",
    "split.test_fraction=0.25",
)
_AXONS = (
    "data.image_glob=sub-rat[!2]/micr/*_SEM.png",
    "data.label_pattern=derivatives/labels/{dir}/{case}_seg-axonmyelin-manual.png",
    "data.class_names=('background','myelin','axon')",
    "data.label_values=(0,127,255)",
    r"split.subject_regex=(sub-rat\d+)_",
    "split.test_regex=sub-rat[578]",
    "split.val_fraction=0.25",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A dataset: its folder, the config by hand for it, and what both configs must be told."""

    folder: str
    by_hand: str
    settings: tuple[str, ...]


CASES = {
    "acdc": Case("Dataset027_ACDC", "unet", ("split.file=splits_final.json",)),
    "head_neck": Case("Dataset501_HeadNeckCT", "unet", ("split.file=splits_final.json",)),
    "hippocampus": Case("Task04_Hippocampus", "hippocampus", ("split.file=subject_split.json",)),
    "vessels": Case("CHASE_DB1", "vessels", _VESSELS),
    "nuclei": Case("DSB2018", "nuclei", _NUCLEI),
    "axons": Case("axondeepseg_sem", "axons", _AXONS),
}


def main():
    options = parsed()
    kept = pathlib.Path(options.kept) if options.kept else None
    done = read_rows(kept)
    for name in options.only.split(","):
        for kind in options.configs.split(","):
            for seed in map(int, options.seeds.split(",")):
                asked = {
                    "data": name, "config": kind, "seed": seed, "minutes": options.minutes
                }  # fmt: skip
                if any(asked.items() <= row.items() for row in done):
                    continue
                row = asked | measure(CASES[name], kind, seed, options)
                print(json.dumps(row), flush=True)
                if kept:
                    with kept.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of the folders")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training steps")
    parser.add_argument("--only", default=",".join(CASES), help="datasets")
    parser.add_argument("--configs", default="auto,hand")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--kept", default="", help="file for the lines")
    parser.add_argument("--cache", default="~/.cache/jaxseg", help="of prepared cases")
    return parser.parse_args()


def read_rows(kept):
    if not kept or not kept.exists():
        return []
    return [json.loads(line) for line in kept.read_text().splitlines()]


def measure(case, kind, seed, options):
    """Trains one network for the minutes; what it scored, and what that took."""
    config = "auto" if kind == "auto" else case.by_hand
    settings = [f"data.dir={pathlib.Path(options.data, case.folder)}", f"seed={seed}"]
    settings += [f"data.cache_dir={options.cache}", *case.settings]
    with tempfile.TemporaryDirectory() as folder:
        rate = steps_per_s(config, settings, pathlib.Path(folder, "trial"))
        num_steps = int(60 * options.minutes * rate)
        whole = (f"train.num_steps={num_steps}", f"train.eval_every={num_steps}")
        whole += (f"train.checkpoint_every={num_steps}",)
        workdir = pathlib.Path(folder, "run")
        start = time.perf_counter()
        run = started(config, (*settings, *whole), workdir)
        if run.wait():
            raise RuntimeError(f"{config} ended with {run.returncode}: {settings}")
        wall_min = (time.perf_counter() - start) / 60
        scores = next(iter(workdir.glob("test.json")), workdir / "val.json")
        content = json.loads(scores.read_text())
    dice = content["summary"]["dice"]["mean"][1:]
    return {
        "file": f"configs/{config}.py",
        "steps": num_steps,
        "steps_per_s": rate,
        "wall_min": wall_min,
        "set": scores.stem,
        "mean_dice": content["mean_dice"],
        "dice": dict(zip(content["class_names"][1:], dice, strict=True)),
    }


def started(config, settings, workdir):
    file = pathlib.Path(__file__).parents[1] / "configs" / f"{config}.py"
    command = [sys.executable, "-m", "jaxseg.main", f"--config={file}"]
    command += [f"--config.{setting}" for setting in (*settings, f"workdir={workdir}")]
    return subprocess.Popen(command, stdout=sys.stderr)


def steps_per_s(config, settings, workdir):
    """How fast the network of a config is trained once it runs."""
    far = 10**6
    trial = (f"train.num_steps={far}", f"train.eval_every={far}", f"train.checkpoint_every={far}")
    run = started(config, (*settings, *trial, f"train.log_every={TRIAL_EVERY}"), workdir)
    rows = []
    while len(rows) < TRIAL_STEPS // TRIAL_EVERY:
        if run.poll() is not None:
            raise RuntimeError(f"{config} ended with {run.returncode}: {settings}")
        time.sleep(1)
        metrics = workdir / "metrics.jsonl"
        rows = metrics.read_text().splitlines() if metrics.exists() else []
    run.send_signal(signal.SIGTERM)
    run.wait()
    batch_size = json.loads((workdir / "config.json").read_text())["train"]["batch_size"]
    rates = [json.loads(row)["images_per_s"] for row in rows[len(rows) // 2 :]]
    return statistics.median(rates) / batch_size


if __name__ == "__main__":
    main()
