"""Time of one training step and one evaluation step, mapped over all devices as in a run.

python benchmarks/step_time.py --config=configs/unet.py
python benchmarks/step_time.py --config=configs/unet.py --config.parallel.mode=shard_map
python benchmarks/step_time.py --config=configs/auto.py --config.plan.file=FILE  # of jaxseg.plan

The data is noise: only shapes matter. Prints compile time apart from the steps after it, and the
memory that the compiler says training takes beside the most that was in use on the device.
"""

import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from report import print_report

from jaxseg import parallel
from jaxseg.experiment import build
from jaxseg.experiment.plan_file import completed_by_file
from jaxseg.experiment.step_memory import bytes_of, compile_step
from jaxseg.models.summary import count_flops

CONFIG = config_flags.DEFINE_config_file("config", "configs/unet.py")
NUM_STEPS = flags.DEFINE_integer("num_steps", 10, "Timed steps after the first.")
NUM_CHANNELS = flags.DEFINE_integer("num_channels", 1, "Channels of an image.")
NUM_CLASSES = flags.DEFINE_integer("num_classes", 4, "Classes, background included.")


def main(_):
    config = completed_by_file(CONFIG.value) if CONFIG.value.plan.file else CONFIG.value
    image_shape = (*config.data.patch_size, NUM_CHANNELS.value)
    batch_size = config.train.batch_size
    model = build.create_model_for(config, NUM_CLASSES.value)
    tx = build.create_tx(config)
    layout = build.create_layout(config)
    train_step, eval_step = build.create_steps(config, model, tx, layout)
    members = tuple(
        parallel.place(tree, layout)
        for tree in build.create_members(config, model, tx, image_shape)
    )
    state, *keys_and_rates = members
    batch = parallel.shard(noise((batch_size, *image_shape)), layout)

    start = time.perf_counter()
    program = compile_step(train_step, config, members, NUM_CHANNELS.value, layout)
    compile_s = time.perf_counter() - start
    carried = [state]

    def train_once():
        carried[0], metrics = program(carried[0], batch, *keys_and_rates)
        return metrics

    train_times = seconds_per_call(train_once)
    most_in_use = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    eval_times = seconds_per_call(lambda: eval_step(carried[0], batch))
    flops = 3 * batch_size * count_flops(model, image_shape)
    print_report(
        "step_time",
        {
            "config": config.name,
            "batch_shape": [batch_size, *image_shape],
            "dtype": config.model.dtype,
            "devices": jax.device_count(),
            "mode": config.parallel.mode,
            "train_compile_s": compile_s,
            "train_gib_as_compiled": bytes_of(program) / 2**30,
            "gib_in_use_at_most": most_in_use and most_in_use / 2**30,
            "train_median_s": float(np.median(train_times[1:])),
            "train_min_s": min(train_times[1:]),
            "eval_first_s": eval_times[0],
            "eval_median_s": float(np.median(eval_times[1:])),
            "images_per_s": batch_size / float(np.median(train_times[1:])),
            "gflops_per_s_at_3x_forward": flops / float(np.median(train_times[1:])) / 1e9,
        },
        str(jax.devices()[0].device_kind),
    )


def noise(shape):
    """A batch of images [B, *S, C], and of labels that mean nothing."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=shape).astype(np.float32),
        "label": rng.integers(NUM_CLASSES.value, size=shape[:-1]).astype(np.int32),
        "valid": np.ones(shape[:-1], np.float32),
    }


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
