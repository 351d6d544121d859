"""Time of one training step and one evaluation step, mapped over all devices as in a run.

python benchmarks/step_time.py --config=configs/unet.py
python benchmarks/step_time.py --config=configs/unet.py --config.parallel.mode=shard_map

The data is noise: only shapes matter. Prints compile time apart from the steps after it.
"""

import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from report import print_report

from jaxseg import parallel
from jaxseg.experiment import build
from jaxseg.models.summary import count_flops

CONFIG = config_flags.DEFINE_config_file("config", "configs/unet.py")
NUM_STEPS = flags.DEFINE_integer("num_steps", 10, "Timed steps after the first.")
NUM_CHANNELS = flags.DEFINE_integer("num_channels", 1, "Channels of an image.")
NUM_CLASSES = flags.DEFINE_integer("num_classes", 4, "Classes, background included.")


def main(_):
    config = CONFIG.value
    patch_size = tuple(config.data.patch_size)
    image_shape = (*patch_size, NUM_CHANNELS.value)
    batch_size = config.train.batch_size
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(batch_size, *image_shape)).astype(np.float32),
        "label": rng.integers(NUM_CLASSES.value, size=(batch_size, *patch_size)).astype(np.int32),
        "valid": np.ones((batch_size, *patch_size), np.float32),
    }
    model = build.create_model_for(config, NUM_CLASSES.value)
    tx = build.create_tx(config)
    layout = build.create_layout(config)
    train_step, eval_step = build.create_steps(config, model, tx, layout)
    state, key, learning_rate = (
        parallel.place(tree, layout)
        for tree in build.create_members(config, model, tx, image_shape)
    )
    batch = parallel.shard(batch, layout)

    eval_times = seconds_per_call(lambda: eval_step(state, batch))
    carried = [state]

    def train_once():
        carried[0], metrics = train_step(carried[0], batch, key, learning_rate)
        return metrics

    train_times = seconds_per_call(train_once)
    flops = 3 * batch_size * count_flops(model, image_shape)
    print_report(
        "step_time",
        {
            "config": config.name,
            "batch_shape": [batch_size, *image_shape],
            "dtype": config.model.dtype,
            "devices": jax.device_count(),
            "mode": config.parallel.mode,
            "train_first_s": train_times[0],
            "train_median_s": float(np.median(train_times[1:])),
            "train_min_s": min(train_times[1:]),
            "eval_first_s": eval_times[0],
            "eval_median_s": float(np.median(eval_times[1:])),
            "images_per_s": batch_size / float(np.median(train_times[1:])),
            "gflops_per_s_at_3x_forward": flops / float(np.median(train_times[1:])) / 1e9,
        },
        str(jax.devices()[0].device_kind),
    )


def seconds_per_call(function):
    """Seconds of each call until its result is there; the first includes compilation."""
    times = []
    for _ in range(1 + NUM_STEPS.value):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    app.run(main)
