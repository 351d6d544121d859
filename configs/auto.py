"""A network that fits the data: everything is decided by a plan but what is set.

python -m jaxseg.main --config=configs/auto.py --config.data.dir=DIR
python -m jaxseg.plan --dir=DIR

The second prints the plan with its reasons and trains nothing. `--config.plan.preset` takes nnunet,
resenc_m, resenc_l, resenc_xl (the rules and the sizes of nnU-Net v2) or compact; left alone it is
nnunet with an accelerator and compact without. What is set is obeyed, for example
`--config.train.batch_size=4`.
"""

from jaxseg.config_planned import open_config


def get_config():
    config = open_config()
    config.name = "auto"
    return config
