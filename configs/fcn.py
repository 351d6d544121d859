"""FCN-8s on the embedded demonstration cohort, trained as `configs/unet.py` is.

python -m jaxseg.main --config=configs/fcn.py
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("fcn")
    config.data.patch_size = (112, 128)
    config.train.num_steps = 400
    config.train.batch_size = 8
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
