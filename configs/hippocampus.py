"""2D U-Net on axial slices of the Medical Segmentation Decathlon's hippocampus task.

python -m jaxseg.main --config=configs/hippocampus.py --config.data.dir=DIR/Task04_Hippocampus

DIR/Task04_Hippocampus/subject_split.json names the training and validation cases by person: both
sides of one person must be on the same side of the split. Without that file, set
--config.split.file= and a --config.split.subject_regex.
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("unet")
    config.name = "hippocampus"
    config.data.patch_size = (48, 64)
    config.data.foreground_fraction = 0.5
    config.split.file = "subject_split.json"
    config.augment.flip.axes = (0,)  # left and right; front and back differ in anatomy
    config.augment.rotation.range_deg = (-15.0, 15.0)
    config.augment.scaling.range = (0.85, 1.15)
    config.augment.elastic.prob = 0.2
    config.augment.low_resolution.prob = 0.0
    config.model.features = (24, 48, 96, 192)
    config.optim.warmup_steps = 100
    config.train.num_steps = 1500
    config.train.batch_size = 16
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    return config
