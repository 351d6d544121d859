"""U-Net for cell nuclei on the 2018 Data Science Bowl (BBBC038, Caicedo et al. 2019).

python -m jaxseg.main --config=configs/nuclei.py --config.data.dir=DIR/DSB2018

Masks are instance maps; every value above 0 is nucleus. There is no canonical split: images are
split at random, each being its own subject for lack of better knowledge.
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("unet")
    config.name = "nuclei"
    config.data.kind = "images"
    config.data.image_glob = "images/*.png"
    config.data.label_pattern = "masks/{case}.png"
    config.data.class_names = ("background", "nucleus")
    config.data.objects = True  # a mask numbers its nuclei
    config.data.patch_size = (192, 192)
    config.data.foreground_fraction = 0.5
    config.split.val_fraction = 0.15
    config.split.test_fraction = 0.25
    config.model.features = (16, 32, 64, 128)
    config.train.num_steps = 600
    config.train.batch_size = 6
    config.train.eval_every = 300
    config.train.checkpoint_every = 300
    return config
