"""U-Net on the embedded demonstration cohort, or on a Medical Segmentation Decathlon folder.

python -m jaxseg.main --config=configs/unet.py
python -m jaxseg.main --config=configs/unet.py --config.data.dir=DIR --config.workdir=runs/mine
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("unet")
    config.data.patch_size = (112, 128)
    config.model.features = (16, 32, 64, 128)
    config.train.num_steps = 400
    config.train.batch_size = 8
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
