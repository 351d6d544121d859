"""The U-Net of Ronneberger et al. 2015 on cell nuclei, as published but for the optimiser.

python -m jaxseg.main --config=configs/unet2015.py --config.data.dir=DIR/DSB2018

Unpadded convolutions label the centre of each tile (572 -> 388), images are mirrored at their
border, and gaps between touching cells weigh more. Plain U-Net of 31 million parameters: for a GPU.
On a CPU try --config.data.patch_size='(284, 284)' --config.model.features='(16, 32, 64, 128, 256)'.
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("unet")
    config.name = "unet2015"
    config.data.kind = "images"
    config.data.image_glob = "images/*.png"
    config.data.label_pattern = "masks/{case}.png"
    config.data.class_names = ("background", "nucleus")
    config.data.patch_size = (572, 572)
    config.split.val_fraction = 0.15
    config.split.test_fraction = 0.25
    config.augment.elastic.prob = 1.0
    config.augment.elastic.spacing_voxels = 128
    config.augment.elastic.range_magnitude_voxels = (0.0, 20.0)
    config.model.features = (64, 128, 256, 512, 1024)
    config.model.norm = "none"
    config.model.activation = "relu"
    config.model.down = "max_pool"
    config.model.padding = "valid"
    config.model.dropout = 0.5
    config.loss.name = "cross_entropy"
    config.loss.border_weight.w0 = 10.0
    config.optim.learning_rate = 1e-4
    config.train.num_steps = 6000
    config.train.batch_size = 1
    return config
