"""FCN: a classification encoder whose coarse scores are upsampled and fused with finer ones."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseg.models.blocks import ConvBlock, Dropout, crop_to, max_pool

# How many finer pooling layers lend their scores to the coarsest one.
NUM_SKIPS = {"32s": 0, "16s": 1, "8s": 2}


def bilinear_kernel(factor, rank, num_channels):
    """Weights that make a transposed convolution interpolate linearly.

    Args:
      factor: up-sampling factor; the kernel is twice as wide, for even factors.
      rank: number of spatial axes.
      num_channels: each channel is interpolated alone.
    Returns:
      [2 factor, ..., num_channels, num_channels] float32.
    Reference: Long et al. 2015, section 3.3.
    """
    width = 2 * factor
    profile = 1 - np.abs(np.arange(width) - (width - 1) / 2) / factor
    kernel = np.ones(())
    for _ in range(rank):
        kernel = kernel[..., None] * profile
    return (kernel[..., None, None] * np.eye(num_channels)).astype(np.float32)


class Upsample(nn.Module):
    """Transposed convolution from bilinear weights, learned or fixed; S becomes S times factor."""

    factor: int
    learned: bool

    @nn.compact
    def __call__(self, scores):
        rank, num_channels = scores.ndim - 2, scores.shape[-1]
        kernel = bilinear_kernel(self.factor, rank, num_channels)
        if self.learned:
            kernel = self.param("kernel", lambda _: jnp.asarray(kernel))
        return transposed_convolution(scores, jnp.asarray(kernel, scores.dtype), self.factor)


def transposed_convolution(x, kernel, factor):
    """Transposed convolution of stride `factor`, "same" size: S times `factor`.

    Args:
      x: [B, *S, C].
      kernel: [2 factor, ..., C, F].
      factor: stride along every axis.
    """
    rank = x.ndim - 2
    spatial = "DHW"[-rank:]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    width, before = 2 * factor, factor // 2
    # Crop `before` of the full transposed output at the start, the rest of `factor` at the end.
    padding = [(width - 1 - before, width - 1 - (factor - before))] * rank
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,) * rank,
        padding=padding,
        lhs_dilation=(factor,) * rank,
        dimension_numbers=layout,
    )


class FCN(nn.Module):
    """Fully convolutional network with a compact encoder for medical images.

    Five stages of convolutions and pooling; 1x1 convolutions score pool5 (and pool4, pool3), and
    the scores are added up from coarse to fine. Any image size: pooling rounds up, up-sampling is
    cropped.

    Attributes:
      num_classes: classes to tell apart, background included.
      features: channels of the five stages.
      num_convs: convolutions per stage.
      norm, activation: as in U-Net.
      head: "32s", "16s" (fuses pool4) or "8s" (fuses pool4 and pool3).
      upsample: "learned" or "fixed" bilinear transposed convolutions.
      dropout: share of channels dropped before the coarsest score layer while training.
      dtype: of the computation; parameters and logits are float32.
      axis_name: device axis over which batch statistics are taken.
    Reference: Long, Shelhamer, Darrell 2015.
    """

    num_classes: int
    features: tuple[int, ...] = (16, 32, 64, 128, 256)
    num_convs: int = 2
    norm: str = "instance"
    activation: str = "relu"
    head: str = "8s"
    upsample: str = "learned"
    dropout: float = 0.0
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, *, train=False):
        """Maps an image [B, *S, C] of any float to logits [B, *S, num_classes] float32."""
        dtype = jnp.dtype(self.dtype)
        rank = image.ndim - 2
        x = image.astype(dtype)
        pools = []
        for stage, features in enumerate(self.features, start=1):
            x = ConvBlock(
                features,
                self.num_convs,
                self.norm,
                self.activation,
                dtype=dtype,
                axis_name=self.axis_name,
                name=f"stage{stage}",
            )(x, train=train)
            x = max_pool(x)
            pools.append(x)
        x = Dropout(self.dropout, self.axis_name)(x, train=train)

        def score(features, pool):
            return nn.Conv(self.num_classes, (1,) * rank, dtype=dtype, name=f"score{pool}")(
                features
            )

        def upsample(scores, factor, name):
            return Upsample(factor, self.upsample == "learned", name=name)(scores)

        num_skips = NUM_SKIPS[self.head]
        scores = score(x, 5)
        for pool in range(4, 4 - num_skips, -1):
            finer = score(pools[pool - 1], pool)
            scores = crop_to(upsample(scores, 2, f"upsample{pool}"), finer.shape[1:-1]) + finer
        logits = upsample(scores, 32 // 2**num_skips, "upsample")
        return crop_to(logits, image.shape[1:-1]).astype(jnp.float32)
