"""U-Net: an encoder, a decoder, and a skip connection at every resolution."""

import flax.linen as nn
import jax.numpy as jnp

from jaxseg.models.blocks import ConvBlock, Dropout, UpConv, crop_to, max_pool, resize_linear


class UNet(nn.Module):
    """U-Net with same-padding: logits have the image's size, whatever that is.

    Attributes:
      num_classes: classes to tell apart, background included.
      features: channels at each resolution, finest first; their number is the depth.
      num_convs: convolutions per resolution.
      norm: "instance", "batch", "group" or "none".
      activation: "relu" or "leaky_relu".
      down: "conv" (strided convolution) or "max_pool".
      up: "conv" (transposed convolution) or "resize" (linear).
      dropout: share of channels dropped at the two coarsest resolutions while training.
      dtype: of the computation; parameters and logits are float32.
      axis_name: device axis over which batch statistics are taken.
    Reference: Ronneberger et al. 2015; normalisation, strided down-sampling and same-padding as in
      nnU-Net (Isensee et al. 2021).
    """

    num_classes: int
    features: tuple[int, ...] = (32, 64, 128, 256)
    num_convs: int = 2
    norm: str = "instance"
    activation: str = "leaky_relu"
    down: str = "conv"
    up: str = "conv"
    dropout: float = 0.0
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, *, train=False):
        """Maps an image [B, *S, C] of any float to logits [B, *S, num_classes] float32."""
        dtype = jnp.dtype(self.dtype)
        depth = len(self.features)

        def block(level, name, stride=1):
            return ConvBlock(
                self.features[level],
                self.num_convs,
                self.norm,
                self.activation,
                stride,
                dtype,
                self.axis_name,
                name=f"{name}{level}",
            )

        x = block(0, "down")(image.astype(dtype), train=train)
        skips = []
        for level in range(1, depth):
            skips.append(x)
            if self.down == "max_pool":
                x = block(level, "down")(max_pool(x), train=train)
            else:
                x = block(level, "down", stride=2)(x, train=train)
            if level >= depth - 2:
                x = Dropout(self.dropout, self.axis_name)(x, train=train)
        for level in reversed(range(depth - 1)):
            skip = skips[level]
            x = self._upsample(x, level, skip.shape[1:-1], dtype)
            x = block(level, "up")(jnp.concatenate([skip, x], axis=-1), train=train)
        head = nn.Conv(self.num_classes, (1,) * (image.ndim - 2), dtype=dtype, name="head")
        return head(x).astype(jnp.float32)

    def _upsample(self, x, level, shape, dtype):
        if self.up == "conv":
            return crop_to(UpConv(self.features[level], dtype, name=f"upconv{level}")(x), shape)
        return resize_linear(x, shape)
