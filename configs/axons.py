"""U-Net for axons and myelin in electron microscopy (AxonDeepSeg SEM, doi 10.5281/zenodo.5498378).

python -m jaxseg.main --config=configs/axons.py --config.data.dir=DIR/axondeepseg_sem

Split by rat: 5, 7 and 8 are the test set. The label image of rat 2 holds values that its data
description does not define (128, 130, 233), so that rat is left out.
"""

from jaxseg.config import base_config


def get_config():
    config = base_config("unet")
    config.name = "axons"
    config.data.kind = "images"
    config.data.image_glob = "sub-rat[!2]/micr/*_SEM.png"
    config.data.label_pattern = "derivatives/labels/{dir}/{case}_seg-axonmyelin-manual.png"
    config.data.class_names = ("background", "myelin", "axon")
    config.data.label_values = (0, 127, 255)
    config.data.patch_size = (128, 128)
    config.data.foreground_fraction = 0.5
    config.split.subject_regex = r"(sub-rat\d+)_"
    config.split.test_regex = r"sub-rat[578]"
    config.split.val_fraction = 0.25
    config.model.features = (16, 32, 64, 128)
    config.train.num_steps = 600
    config.train.batch_size = 4
    config.train.eval_every = 300
    config.train.checkpoint_every = 300
    return config
