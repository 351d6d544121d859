"""Dice on held-out subjects within minutes: configs/auto.py beside MONAI's U-Net.

python benchmarks/versus_monai.py --data=DIR --monai=VENV/bin/python --minutes=10,30 --seeds=0,1,2

Same training cases, same validation cases, same minutes from command to predictions, same scores;
`monai_side.py` says what MONAI trains. VENV has monai, nibabel and scipy. Leave the machine to it.
Each line is printed as soon as it is known; with --kept=FILE they are appended to a file too, and
what it has already is not done again.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import accuracy

# By dataset: the patch, the grid (0 leaves an axis as it is), the classes with background.
TASKS = {
    "hippocampus": {"patch_size": (48, 64, 48), "spacing_mm": (0, 0, 0), "num_classes": 3},
    "acdc": {"patch_size": (160, 160), "spacing_mm": (1.5, 1.5, 0), "num_classes": 4},
}


def main():
    parser = accuracy.parser_for(__doc__, TASKS, "auto,monai")
    parser.add_argument("--monai", default=sys.executable, help="python that has MONAI")
    parser.set_defaults(minutes="10,30", seeds="0,1,2")
    accuracy.measure_all(parser.parse_args(), measure)


def measure(case, asked, options):
    """Trains a network within its minutes; what it scored, by our own scores."""
    if asked["config"] == "auto":
        return accuracy.measure(case, asked, options)
    root = pathlib.Path(options.data, case.folder)
    (split_file,) = (s.partition("=")[2] for s in case.settings if s.startswith("split.file"))
    split = json.loads((root / split_file).read_text())
    split = split[0] if isinstance(split, list) else split
    with tempfile.TemporaryDirectory() as folder:
        out, references = pathlib.Path(folder, "out"), pathlib.Path(folder, "references")
        out.mkdir()
        references.mkdir()
        task = TASKS[asked["data"]] | {
            "minutes": asked["minutes"],
            "seed": asked["seed"],
            "out": str(out),
            "train": [files_of(root, case_id) for case_id in split["train"]],
            "val": [files_of(root, case_id) for case_id in split["val"]],
        }
        for of in task["val"]:
            label = pathlib.Path(of["label"])
            (references / label.name).symlink_to(label.resolve())
        path = pathlib.Path(folder, "task.json")
        path.write_text(json.dumps(task))
        side = pathlib.Path(__file__).with_name("monai_side.py")
        command = [options.monai, str(side), str(path)]
        # Threads that wait actively for a core that another process holds take minutes for seconds.
        passive = os.environ | {"OMP_WAIT_POLICY": "passive"}
        said = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=passive
        ).stdout
        about = json.loads(said.splitlines()[-1])
        scores = scored(out, references, pathlib.Path(folder, "scores"))
    return {
        "file": "monai_side.py",
        "steps": about["steps"],
        "wall_min": about["minutes"],
        "set": "val",
        **scores,
    }


def files_of(root, case_id):
    """Paths of a case of a Decathlon or an nnU-Net folder."""
    (image,) = (root / "imagesTr").glob(f"{case_id}*.nii.gz")
    return {"id": case_id, "image": str(image), "label": str(root / f"labelsTr/{case_id}.nii.gz")}


def scored(predictions, references, output):
    """Mean Dice, and that of each class, as `jaxseg.evaluate` says."""
    command = [sys.executable, "-m", "jaxseg.evaluate", f"--predictions={predictions}"]
    command += [f"--references={references}", f"--output={output}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return accuracy.dice_in(output / "evaluation.json")


if __name__ == "__main__":
    main()
