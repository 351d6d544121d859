"""Time of a training step of M members: by vmap, by lax.map, and each member's step on its own.

python benchmarks/ensemble.py
python benchmarks/ensemble.py --members=2,4,8 --features=16,32,64,128 --batch_size=8

The measurement behind the default of `ensemble.by`, on one device, for U-Nets in 2D and 3D. The
three take turns; the data is noise. "alone" is M steps of the program of a single member, one after
the other.
"""

import os

import jax
import numpy as np
from absl import app, flags
from report import print_report
from scaling_measure import seconds_per_call, trainer
from scaling_tables import print_table

from jaxseg import parallel
from jaxseg.config import base_config
from jaxseg.experiment import build

MEMBERS = flags.DEFINE_list("members", ["2", "4", "8"], "Numbers of members.")
FEATURES = flags.DEFINE_list("features", ["8", "16", "32"], "Channels of the U-Net.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 2, "Of each member.")
ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed steps of each, in turns.")

NUM_CLASSES = 4
PATCH_SIZES = {"2D": (96, 96), "3D": (24, 32, 24)}


def main(_):
    rows = [
        {"network": name, "members": int(num)} | compare(PATCH_SIZES[name], int(num))
        for name in PATCH_SIZES
        for num in MEMBERS.value
    ]
    figures = {
        "features": list(map(int, FEATURES.value)),
        "patch_sizes": PATCH_SIZES,
        "batch_size": BATCH_SIZE.value,
        "rounds": ROUNDS.value,
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    print_table(
        [{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    )
    for row in rows:
        slow, fast = ("vmap", "map") if row["vmap_over_map"] > 1 else ("map", "vmap")
        factor = max(row["vmap_over_map"], 1 / row["vmap_over_map"])
        print(
            f"{row['network']}, {row['members']} members: {fast} is {factor:.2f} times as fast as "
            f"{slow}"
        )
    print_report("ensemble", figures, str(jax.devices()[0].device_kind))


def compare(patch_size, num_members):
    """Median seconds of a step of all members in each way, and vmap's over map's."""
    calls = {by: training(patch_size, num_members, by) for by in ("map", "vmap")}
    one = training(patch_size, 1, "map")
    calls["alone"] = lambda: [one() for _ in range(num_members)]
    for call in calls.values():
        jax.block_until_ready(call())
    times = {by: t[:, 0] for by, t in seconds_per_call(calls, ROUNDS.value).items()}
    figures = {f"{by}_s": float(np.median(t)) for by, t in times.items()}
    return figures | {
        "vmap_over_map": float(np.median(times["vmap"] / times["map"])),
        "map_over_alone": float(np.median(times["map"] / times["alone"])),
    }


def training(patch_size, num_members, by):
    """Function that trains all members one step on."""
    config = base_config(rank=len(patch_size))
    config.model.features = tuple(map(int, FEATURES.value))
    config.ensemble.size, config.ensemble.by = num_members, by
    model = build.create_model_for(config, NUM_CLASSES)
    tx, layout = build.create_tx(config), build.create_layout(config)
    step = build.create_steps(config, model, tx, layout)[0]
    members = build.create_members(config, model, tx, (*patch_size, 1))
    state, keys, learning_rates = (parallel.place(tree, layout) for tree in members)

    rng = np.random.default_rng(0)
    axes = (num_members,) if layout.has_members else ()
    shape = (*axes, BATCH_SIZE.value, *patch_size)
    batch = {
        "image": rng.normal(size=(*shape, 1)).astype(np.float32),
        "label": rng.integers(NUM_CLASSES, size=shape).astype(np.int32),
        "valid": np.ones(shape, np.float32),
    }
    return trainer(step, (state, parallel.shard(batch, layout), keys, learning_rates))


if __name__ == "__main__":
    app.run(main)
