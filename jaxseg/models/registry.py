"""The networks by name."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jaxseg.models.fcn import FCN
from jaxseg.models.unet import UNet

MODELS: dict[str, Callable[..., nn.Module]] = {"fcn": FCN, "unet": UNet}


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Builds an uninitialised network.

    Args:
      name: a key of `MODELS`.
      num_classes: classes to tell apart, background included.
      **options: the module's own fields.
    Returns:
      A flax.linen module: `model.apply(variables, image, train=False)` maps an image [B, *S, C] to
      float32 logits [B, *S, num_classes]; 2D or 3D by the image's rank.
    Raises:
      KeyError: no model has that name.
    """
    return MODELS[name](num_classes=num_classes, **options)
