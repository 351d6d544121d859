"""U-Net on the embedded demonstration cohort, or on a Medical Segmentation Decathlon folder.

python -m jaxseg.main --config=configs/unet.py
python -m jaxseg.main --config=configs/unet.py --config.data.dir=DIR --config.workdir=runs/mine
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("unet")
    config.data.patch_size = (104, 120)
    config.data.foreground_fraction = 0.67
    config.augment.flip.axes = (0,)  # left and right; front and back differ in anatomy
    config.augment.rotation.range_deg = (-15.0, 15.0)
    config.augment.blur.prob = 0.0
    config.augment.low_resolution.prob = 0.0
    config.model.features = (16, 32, 64, 128)
    config.optim.learning_rate = 3e-3
    config.train.num_steps = 1200
    config.train.batch_size = 4
    config.train.log_every = 50
    config.train.eval_every = 400
    config.train.checkpoint_every = 400
    return config
