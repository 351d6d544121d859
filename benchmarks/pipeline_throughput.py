"""Images per second that the tf.data pipeline supplies, and what each part of it costs.

python benchmarks/pipeline_throughput.py --config=configs/unet.py

The cases are noise held in memory, so disk is left out. "crop" samples patches and augments
nothing, "all" is the config's augmentation, the rest each transform alone at its probability.
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from report import print_report

from jaxseg.data import pipeline
from jaxseg.data.builder import PreparedCase

CONFIG = config_flags.DEFINE_config_file("config", "configs/unet.py")
NUM_BATCHES = flags.DEFINE_integer("num_batches", 30, "Timed batches.")
NUM_CHANNELS = flags.DEFINE_integer("num_channels", 1, "Channels of an image.")


def main(_):
    config = CONFIG.value
    store = {f"case{i}": noise_case(i, NUM_CHANNELS.value) for i in range(4)}
    everything = config.augment.to_dict()
    nothing = {name: options | {"prob": 0.0} for name, options in everything.items()}
    variants = {"crop": nothing, "all": everything}
    for name, options in everything.items():
        if options["prob"] > 0:
            variants[name] = nothing | {name: options}
    figures = {name: images_per_s(config, store, params) for name, params in variants.items()}
    figures = {"config": config.name, "images_per_s": figures}
    figures["patch_size"] = list(config.data.patch_size)
    print_report("pipeline_throughput", figures, "cpu")


def noise_case(seed, num_channels):
    rng = np.random.default_rng(seed)
    shape = (160, 160, 64)
    label = np.zeros(shape, np.uint8)
    label[40:120, 40:120, 16:48] = 1
    return PreparedCase(
        image=rng.normal(size=(*shape, num_channels)).astype(np.float32),
        label=label,
        original_affine=np.eye(4),
        original_shape=shape,
        locations=(np.argwhere(label)[::64],),
    )


def images_per_s(config, store, augment_params):
    batches = pipeline.train_batches(
        store,
        list(store),
        seed=0,
        start_step=0,
        num_steps=10**6,
        batch_size=config.train.batch_size,
        patch_size=tuple(config.data.patch_size),
        num_channels=NUM_CHANNELS.value,
        foreground_fraction=config.data.foreground_fraction,
        augment_params=augment_params,
    )
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    for _ in range(NUM_BATCHES.value):
        next(batches)
    return NUM_BATCHES.value * config.train.batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    app.run(main)
