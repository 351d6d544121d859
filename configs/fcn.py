"""FCN-8s on the embedded demonstration cohort, trained as `configs/unet.py` is.

python -m jaxseg.main --config=configs/fcn.py
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("fcn")
    config.data.patch_size = (104, 120)
    config.data.foreground_fraction = 0.67
    config.augment.flip.axes = (0,)  # left and right; front and back differ in anatomy
    config.augment.rotation.range_deg = (-15.0, 15.0)
    config.augment.blur.prob = 0.0
    config.augment.low_resolution.prob = 0.0
    config.optim.learning_rate = 3e-3
    config.train.num_steps = 1200
    config.train.batch_size = 4
    config.train.log_every = 50
    config.train.eval_every = 400
    config.train.checkpoint_every = 400
    return config
