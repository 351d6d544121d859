"""Wall time of a whole run, from the command to the evaluated network, stage by stage.

python benchmarks/end_to_end.py --config=configs/unet.py

Runs `python -m jaxseg.main` in an empty working folder with an empty cache. Further arguments are
passed on, such as --config.train.num_steps=100.
"""

import datetime
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
from report import print_report


def main():
    arguments = sys.argv[1:] or ["--config=configs/unet.py"]
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        command = [sys.executable, "-m", "jaxseg.main", *arguments]
        command += [f"--config.workdir={workdir}", f"--config.data.cache_dir={folder}/cache"]
        began = datetime.datetime.now().replace(microsecond=0)
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr)
        wall_s = time.perf_counter() - start
        marks = stage_marks(workdir / "train.log", began)
        evaluation = next(iter(workdir.glob("test.json")), workdir / "val.json")
        content = json.loads(evaluation.read_text())
    print_report(
        "end_to_end",
        {
            "arguments": arguments,
            "wall_s": wall_s,
            "seconds_until": marks,
            "set": evaluation.stem,
            "mean_dice": content["mean_dice"],
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        },
        str(jax.devices()[0].device_kind),
    )


def stage_marks(log_path, began):
    """Seconds from `began` to the log lines that end a stage."""
    marks = {}
    for line in log_path.read_text().splitlines():
        if not line[:4].isdigit():
            continue  # a table's row
        seconds = (datetime.datetime.fromisoformat(line[:19]) - began).total_seconds()
        text = line[20:]
        if text.startswith("preprocessing:"):
            marks["data_ready"] = seconds
        elif text.startswith("step ") and "images/s" in text:
            marks.setdefault("first_report", seconds)
            marks["last_step"] = seconds
        elif text.startswith("mean "):
            marks["evaluated"] = seconds
    return marks


if __name__ == "__main__":
    main()
