"""U-Net for retinal vessels on CHASE_DB1 (Fraz et al. 2012), first observer as reference.

python -m jaxseg.main --config=configs/vessels.py --config.data.dir=DIR/CHASE_DB1

The customary split: children 11 to 14 (the last 8 images) are the test set; both eyes of a child
stay together.
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("unet")
    config.name = "vessels"
    config.data.kind = "images"
    config.data.image_glob = "Image_*.jpg"
    config.data.label_pattern = "{case}_1stHO.png"
    config.data.class_names = ("background", "vessel")
    config.data.patch_size = (192, 192)
    config.data.foreground_fraction = 0.5
    config.split.subject_regex = r"Image_(\d+)[LR]"
    config.split.test_regex = r"Image_1[1-4]"
    config.split.val_fraction = 0.15
    config.augment.scaling.range = (0.8, 1.25)
    config.augment.low_resolution.prob = 0.0
    config.model.features = (16, 32, 64, 128)
    config.train.num_steps = 600
    config.train.batch_size = 6
    config.train.eval_every = 300
    config.train.checkpoint_every = 300
    return config
