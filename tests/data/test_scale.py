"""Data at scale: several processes prepare, and training reads more than memory holds."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import nibabel
import numpy as np
import pytest

from jaxseg.data import builder, parts, prepared, workers
from jaxseg.data.layouts import decathlon
from jaxseg.data.surveyed import survey_once

OPTIONS = {"spacing_mm": (), "normalisation": "auto", "crop": False}
OPTIONS |= {"image_order": 1, "label_order": 1}


def prepare(dataset, cache_dir, **options):
    case_ids = [case.case_id for case in dataset.cases]
    cache_dir = str(cache_dir)
    shown = {name: options[name] for name in ("progress",) if name in options}
    survey, sha256, _ = survey_once(dataset, cache_dir=cache_dir, **shown)
    known = {"survey": survey, "sha256": sha256, "cache_dir": cache_dir}
    return prepared.prepare(dataset, case_ids, **known, **options, **OPTIONS)


def contents(cache_dir):
    """Bytes of every array of every record of the prepared set; and of the plan.

    Not those of the files: protobuf writes the fields of a record in an order that differs between
    processes.
    """
    [plan] = cache_dir.glob("*/plan.json")
    found = {"plan": plan.read_text()}
    for folder in sorted(plan.parent.glob("part-???-of-???")):
        for split in ("cases", "blocks"):
            for index, record in enumerate(builder.open_split(folder, split)):
                for name, array in record.items():
                    key = folder.name, split, index, name
                    found[key] = (array.dtype, array.shape, array.tobytes())
    return found


@pytest.mark.multiprocess
def test_a_pool_makes_what_one_process_makes_also_after_a_worker_was_killed(
    tmp_path, make_msd_folder, monkeypatch
):
    dataset = decathlon.find(make_msd_folder(num_cases=3))
    monkeypatch.setattr(parts, "CASES_PER_PART", 1)
    prepare(dataset, tmp_path / "one")
    monkeypatch.setattr(workers, "POOL_BYTES", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def kill_a_worker():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    def lethal(items, title):
        if title == "preprocessing":
            threading.Thread(target=kill_a_worker, daemon=True).start()
        return items

    with pytest.raises(OSError, match=r"one of 2 processes that prepare cases in .* was killed"):
        prepare(dataset, tmp_path / "pool", progress=lethal)
    assert not multiprocessing.active_children()

    shown, pids = [], set()

    def watching(items, title):
        for item in items:
            shown.append((title, item.case_id))
            pids.update(child.pid for child in multiprocessing.active_children())
            yield item

    prepare(dataset, tmp_path / "pool", progress=watching)
    assert shown == [("preprocessing", case.case_id) for case in dataset.cases]
    assert len(pids) == 2 and not multiprocessing.active_children()
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "pool") == expected
    assert len([key for key in expected if key[-1] == "shape" and key[1] == "cases"]) == 3


# Reads batches under a limit on the memory that is its own, counted from what its imports take.
UNDER_A_LIMIT = """
import json, re, resource, sys, time
import numpy as np
from jaxseg.config import base_config, transforms_of
from jaxseg.data import builder, prepared, workers
from jaxseg.data.layouts import decathlon
from jaxseg.data.pipeline import train_batches
from jaxseg.data.prepared_case import PreparedCase
from jaxseg.data.surveyed import survey_once

folder, root, limit_mib, cache_mib, num_steps, rank = sys.argv[1:3] + [int(a) for a in sys.argv[3:]]
builder.CACHE_BYTES = cache_mib << 20
workers.MAX_WORKERS = 1

def memory(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

def batches(store, case_ids, num_steps):
    config = base_config(rank=rank)
    return train_batches(
        store, case_ids, seed=0, start_step=0, num_steps=num_steps, batch_size=2,
        patch_size=(96 // rank,) * rank, num_channels=1, foreground_fraction=0.33,
        augment_params=transforms_of(config),
    )

small = PreparedCase(np.zeros((40, 40, 9, 1), np.float32), np.zeros((40, 40, 9)), ())
for _ in batches({"small": small}, ["small"], 2):  # the threads and buffers of tf.data itself
    pass
start, start_rss = memory("VmData"), memory("VmRSS")
resource.setrlimit(resource.RLIMIT_DATA, (start + (limit_mib << 20),) * 2)
dataset = decathlon.find(root)
case_ids = [case.case_id for case in dataset.cases]
began = time.perf_counter()
survey, sha256, _ = survey_once(dataset, cache_dir=folder)
store, _ = prepared.prepare(
    dataset, case_ids, survey=survey, sha256=sha256, cache_dir=folder, spacing_mm=(),
    normalisation="auto", crop=False, image_order=1, label_order=1,
)
ready = time.perf_counter()
means = [float(batch["image"].mean()) for batch in batches(store, case_ids, num_steps)]
read = time.perf_counter()
num_bytes = sum(5 * np.prod(store[case_id].label.shape) for case_id in case_ids)
try:
    np.ones(limit_mib << 20, np.uint8)
    refused = False
except MemoryError:
    refused = True
print(json.dumps({
    "data_bytes": int(num_bytes), "peak_bytes": memory("VmHWM") - start_rss,
    "num_batches": len(means), "refused": refused, "prepare_s": ready - began,
    "images_per_s": 2 * num_steps / (read - ready),
}))
"""


def read_under_a_limit(cache_dir, root, *, limit_mib, cache_mib, num_steps=20, rank=2):
    """What a process reports that prepares, where need be, and reads batches."""
    numbers = map(str, (limit_mib, cache_mib, num_steps, rank))
    # Stacks and arenas of malloc, one per thread, are reserved and count, though they are not used.
    small_stacks = ["sh", "-c", 'ulimit -s 2048; exec "$@"', "sh"]
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(cache_dir), str(root), *numbers]
    done = subprocess.run(
        small_stacks + command,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def make_large_set(folder, num_cases, shape):
    """An MSD folder of few different values, which is written fast and small."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    training = []
    for index in range(num_cases):
        image = label.astype(np.int16) * 100
        image.flat[index] = 7  # no two are equal
        for name, values in (("imagesTr", image), ("labelsTr", label)):
            path = folder / name / f"c{index:03d}.nii"
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
        entry = {"image": f"imagesTr/c{index:03d}.nii", "label": f"labelsTr/c{index:03d}.nii"}
        training.append(entry)
    metadata = {
        "name": "large",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "box"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def large_prepared(tmp_path_factory):
    """(cache folder, data folder, bytes) of a set whose files are tiny, but not its blocks."""
    folder, shape = tmp_path_factory.mktemp("large"), (256, 256, 128)
    root = make_large_set(folder / "msd", 32, (8, 8, 8))

    def blown_up(self, case):
        label = np.zeros(shape, np.uint8)
        label[20:200, 90:110, 40:100] = 1
        return {"image": label[..., None].astype(np.float32), "label": label}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder.CaseBuilder, "_preprocess", blown_up)
        prepare(decathlon.find(root), folder / "cache")
    return folder / "cache", root, 32 * 5 * np.prod(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="limits what Linux counts")
@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [2, 3])
def test_batches_of_a_set_larger_than_memory(large_prepared, rank):
    cache_dir, root, num_bytes = large_prepared
    found = read_under_a_limit(cache_dir, root, limit_mib=384, cache_mib=32, rank=rank)
    assert found["num_batches"] == 20 and found["refused"]
    assert found["data_bytes"] == num_bytes > 3 * (384 << 20)
    assert found["peak_bytes"] < 384 << 20


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="limits what Linux counts")
def test_a_set_larger_than_memory_is_prepared_and_read(tmp_path):
    root = make_large_set(tmp_path / "msd", 72, (128, 128, 96))
    found = read_under_a_limit(tmp_path / "cache", root, limit_mib=256, cache_mib=32)
    assert found["num_batches"] == 20 and found["refused"]
    assert found["data_bytes"] > 2 * (256 << 20)
