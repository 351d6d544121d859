"""Dice on held-out subjects within minutes: configs/auto.py beside configs by hand.

python benchmarks/accuracy.py --data=DIR --minutes=10,30,60 --seeds=0,1,2 --only=hippocampus,acdc

DIR holds the folders that `CASES` names. Every command has nothing set but what the folder and its
split are, and `plan.minutes`: preparation, training and evaluation end with them, on a machine
that does nothing else. Dice is that of whole cases on their own grid: of the test cases where there
are some, else of the validation cases. Each line is printed as soon as it is known; with
--kept=FILE they are appended to a file too, and what it has already is not done again.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

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
    measure_all(parser_for(__doc__, CASES, "auto,hand").parse_args(), measure)


def measure_all(options, measure):
    """Prints and keeps a row of each dataset, budget, config and seed that has none yet."""
    kept = pathlib.Path(options.kept) if options.kept else None
    done = read_rows(kept)
    asked_for = (options.only, options.minutes, options.configs, options.seeds)
    for name, minutes, kind, seed in itertools.product(*(some.split(",") for some in asked_for)):
        asked = {"data": name, "config": kind, "seed": int(seed), "minutes": float(minutes)}
        if any(asked.items() <= row.items() for row in done):
            continue
        row = asked | measure(CASES[name], asked, options)
        print(json.dumps(row), flush=True)
        if kept:
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")


def parser_for(text, names, configs):
    """What every benchmark of budgets is told; its first line says which it is."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of the folders")
    parser.add_argument("--minutes", default="10", help="that a command has")
    parser.add_argument("--only", default=",".join(names), help="datasets")
    parser.add_argument("--configs", default=configs)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--kept", default="", help="file for the lines")
    parser.add_argument("--cache", default="~/.cache/jaxseg", help="of prepared cases")
    return parser


def read_rows(kept):
    if not kept or not kept.exists():
        return []
    return [json.loads(line) for line in kept.read_text().splitlines()]


def measure(case, asked, options):
    """Trains and evaluates one network within its minutes; what it scored, and what that took."""
    config = "auto" if asked["config"] == "auto" else case.by_hand
    settings = [f"data.dir={pathlib.Path(options.data, case.folder)}", *case.settings]
    settings += [f"data.cache_dir={options.cache}", f"seed={asked['seed']}"]
    with tempfile.TemporaryDirectory() as folder:
        settings += [f"plan.minutes={asked['minutes']}", f"workdir={folder}"]
        file = pathlib.Path(__file__).parents[1] / "configs" / f"{config}.py"
        command = [sys.executable, "-m", "jaxseg.main", f"--config={file}"]
        command += [f"--config.{setting}" for setting in settings]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr)
        wall_min = (time.perf_counter() - start) / 60
        workdir = pathlib.Path(folder)
        scores = next(iter(workdir.glob("test.json")), workdir / "val.json")
        dice = dice_in(scores)
        steps = json.loads((workdir / "pace.jsonl").read_text().splitlines()[-1])
    return {
        "file": f"configs/{config}.py",
        "steps": steps["step"] + steps["num_steps"],
        "wall_min": wall_min,
        "set": scores.stem,
        **dice,
    }


def dice_in(scores):
    """Mean Dice in a file of scores, and that of each class."""
    content = json.loads(scores.read_text())
    dice = content["summary"]["dice"]["mean"][1:]
    names = content["class_names"][1:]
    return {"mean_dice": content["mean_dice"], "dice": dict(zip(names, dice, strict=True))}


if __name__ == "__main__":
    main()
