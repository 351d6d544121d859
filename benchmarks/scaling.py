"""How a training step scales over devices and processes, and what a model of it predicts beyond.

python benchmarks/scaling.py --output=scaling.json
python benchmarks/scaling.py --config=configs/hippocampus.py --devices=1,2,4,8 --modes=shard_map

Strong scaling keeps the global batch (--strong_batch), weak scaling the batch per device
(--weak_batch). Every setting runs in processes of its own: fake devices on CPU, the first N GPUs
on a GPU host, all chips of a TPU host. The data is noise: only shapes matter. Prints tables, and
writes the figures to --output and a plot beside it.

On CPU all devices share the cores. Step times of N fake devices show no speed-up, and nothing is
said of efficiency; what can be seen is the communication that was compiled, recompilation, memory,
compile time, what mapping costs over plain jit, and the time of an all-reduce between processes.
"""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from report import print_report
from scaling_measure import work
from scaling_model import (
    ACCELERATORS,
    OVERLAPS,
    PREDICTED_DEVICES,
    all_reduce_seconds,
    fit_line,
    ideal_bytes,
    predicted_efficiency,
)
from scaling_tables import plot, print_tables

FLAGS = flags.FLAGS

ON_FAKE_DEVICES = (
    "Fake CPU devices share {cores} cores: step times show no speed-up and are not efficiency, "
    "which is not measured here.",
    "XLA compiles synchronous collectives for CPU: whether they run beside compute is not seen.",
    "Processes beyond the {cores} cores wait for their turn in every round of an all-reduce: a "
    "ring of 4 is not expected to be predicted by a ring of 2 here.",
)


def main(_):
    if FLAGS.worker:
        print(json.dumps(work(json.loads(FLAGS.worker))))
        return
    machine = run({"measure": "probe"}, {})
    fake = machine["platform"] == "cpu"
    rows = []
    for setting in settings_for(machine):
        logging.info("%s", setting)
        rows.append(setting | run(setting, machine))
    for row in rows:
        row["ideal_bytes"] = ideal_bytes(row["devices"], row["parameter_bytes"])
        row["efficiency"] = None if fake else efficiency(row, rows)
        row["overlapped_share"] = None if fake else row["overlapped_share"]
    overhead = {"measure": "overhead", "devices": 1, "batch_size": FLAGS.weak_batch}
    figures = {
        "config": FLAGS.config.name,
        "patch_size": list(FLAGS.config.data.patch_size),
        "load_before": os.getloadavg()[0],
        "notes": [note.format(cores=os.cpu_count()) for note in ON_FAKE_DEVICES] if fake else [],
        "steps": rows,
        "overhead_over_jit": run(overhead, machine) if device_counts(machine, [1]) == [1] else None,
        "all_reduce": check_all_reduce(machine),
        "predicted": predict(rows[0]),
    }
    print_tables(figures)
    path = os.path.abspath(FLAGS.output)
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        print_report("scaling", figures, machine["kind"])
    picture = os.path.splitext(path)[0] + ".png"
    plot(figures, picture)
    print(f"wrote {path} and {picture}")


def device_counts(machine, wanted):
    """Of the wanted numbers of devices those that can be had; a TPU host gives all its chips."""
    if machine["platform"] == "cpu":
        return list(wanted)
    if machine["platform"] == "tpu":
        return [machine["devices"]]
    return [n for n in wanted if n <= machine["devices"]]


def settings_for(machine):
    """What to measure: everything on CPU, what the devices there allow elsewhere."""
    counts = device_counts(machine, map(int, FLAGS.devices))
    for kind, mode, processes, devices in itertools.product(
        ("strong", "weak"), FLAGS.modes, map(int, FLAGS.processes), counts
    ):
        if devices % processes == 0 and (processes == 1 or machine["platform"] != "tpu"):
            yield {
                "measure": "step",
                "scaling": kind,
                "mode": mode,
                "processes": processes,
                "devices": devices,
                "batch_size": FLAGS.strong_batch
                if kind == "strong"
                else FLAGS.weak_batch * devices,
            }


def run(setting, machine):
    """Figures of a setting, from processes of this file started for it.

    Raises:
      RuntimeError: one of them failed; the others are stopped.
    """
    told = {"processes": 1, "platform": machine.get("platform")} | setting
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told["address"] = f"localhost:{free.getsockname()[1]}"
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(told["processes"]):
                command = [
                    sys.executable,
                    *sys.argv,
                    f"--worker={json.dumps(told | {'rank': rank})}",
                ]
                path = os.path.join(folder, str(rank))
                with open(path + ".out", "w") as out, open(path + ".err", "w") as err:
                    environment = os.environ | visible_devices(told, rank)
                    started.append(
                        subprocess.Popen(command, stdout=out, stderr=err, env=environment)
                    )
            statuses = [None]
            while None in statuses and not any(statuses):
                time.sleep(0.05)
                statuses = [process.poll() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        if any(statuses):
            failed = next(rank for rank, status in enumerate(statuses) if status)
            with open(os.path.join(folder, f"{failed}.err")) as file:
                raise RuntimeError(f"{setting}: status {statuses[failed]}\n{file.read()[-2000:]}")
        with open(os.path.join(folder, "0.out")) as file:
            return json.loads(file.read().splitlines()[-1])


def visible_devices(told, rank):
    """The environment in which a process sees no GPU but its own."""
    if told["platform"] != "gpu":
        return {}
    present = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = present.split(",") if present else [str(i) for i in range(told["devices"])]
    per_process = told["devices"] // told["processes"]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[rank * per_process :][:per_process])}


def efficiency(row, rows):
    """Images per second over those of as many single devices; None if one was not measured."""
    alone = [
        other["images_per_s"]
        for other in rows
        if other["devices"] == 1 and all(other[k] == row[k] for k in ("mode", "scaling"))
    ]
    return row["images_per_s"] / row["devices"] / alone[0] if alone else None


def check_all_reduce(machine):
    """The alpha-beta model against measured all-reduces: fitted on every other size.

    Between processes on CPU, between the devices of one process elsewhere. The ring of two also
    predicts the ring of four, from the same latency and bandwidth.
    """
    fake = machine["platform"] == "cpu"
    figures, lines = {}, {}
    for num in device_counts(machine, (2, 4)):
        setting = {"measure": "all_reduce", "devices": num, "processes": num if fake else 1}
        found = run(setting, machine)
        sizes, seconds = np.asarray(found["bytes"]), np.asarray(found["median_s"])
        lines[num] = alpha, beta = fit_line(sizes[::2], seconds[::2])
        found |= {"alpha_s": float(alpha), "beta_s_per_byte": float(beta)}
        found["error_on_unseen_sizes"] = relative(alpha + beta * sizes[1::2], seconds[1::2])
        if num == 4 and 2 in lines:
            # Two rounds of half the bytes each.
            links = {"latency_s": lines[2][0] / 2, "bandwidth_bytes_per_s": 1 / lines[2][1]}
            ring = [all_reduce_seconds(4, size, **links) for size in sizes]
            found["error_of_ring_of_two"] = relative(np.asarray(ring), seconds)
        figures[num] = found
    return figures


def relative(predicted, measured):
    errors = np.abs(predicted / measured - 1)
    return {"median": float(np.median(errors)), "max": float(errors.max())}


def predict(row):
    """Rows of predicted efficiency, from the parameters and FLOP of a measured row."""
    predicted = []
    for name, accelerator in ACCELERATORS.items():
        image_s = row["flops_per_image"] / (FLAGS.utilisation * accelerator["flops_per_s"])
        for num_devices in PREDICTED_DEVICES:
            batch = FLAGS.predicted_batch
            batches = {"weak": batch, "strong": batch * PREDICTED_DEVICES[0] / num_devices}
            predicted.append({"accelerator": name, "devices": num_devices})
            for kind, overlap in itertools.product(batches, OVERLAPS):
                predicted[-1][f"{kind}, {overlap:.0%} hidden"] = predicted_efficiency(
                    num_devices,
                    compute_s=batches[kind] * image_s,
                    parameter_bytes=row["parameter_bytes"],
                    overlap=overlap,
                    **accelerator["links"],
                )
    return predicted


def define_flags():
    """Defined when run, so that tests can import this file beside others with such flags."""
    config_flags.DEFINE_config_file("config", "configs/unet.py")
    flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of devices.")
    flags.DEFINE_list("processes", ["1", "2"], "Numbers of processes that share them.")
    flags.DEFINE_list("modes", ["pmap", "shard_map"], "Of config.parallel.mode.")
    flags.DEFINE_integer("strong_batch", 8, "Global batch of strong scaling.")
    flags.DEFINE_integer("weak_batch", 2, "Batch per device of weak scaling.")
    flags.DEFINE_integer("predicted_batch", 32, "Batch per device of predictions.")
    flags.DEFINE_integer("num_steps", 10, "Timed steps after the first.")
    flags.DEFINE_integer("overhead_rounds", 60, "Timed steps of jit and each mode, in turns.")
    flags.DEFINE_float("utilisation", 0.2, "Share of peak FLOP/s of a step, for predictions.")
    flags.DEFINE_string("output", "scaling.json", "File of the figures; the plot lies beside it.")
    flags.DEFINE_string("worker", "", "A measurement as JSON, for a process started by this file.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
