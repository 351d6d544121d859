"""FCN: a classification encoder whose coarse scores are upsampled and fused with finer ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.models import encoders, formulations
from jaxseg.models.blocks import (
    ACTIVATIONS,
    NORMS,
    Conv,
    Dropout,
    Style,
    check_choices,
    crop_to,
)

# How many finer pooling layers lend their scores to the coarsest one.
NUM_SKIPS = {"32s": 0, "16s": 1, "8s": 2}
HIDDEN = 4096  # channels of the two layers between encoder and scores, with VGG16
# Where the paper's networks crop, having padded the image by 100.
PAPER_PADDING = 100
POOL_OFFSETS = {4: 5, 3: 9}
LOGITS_OFFSETS = {"32s": 19, "16s": 27, "8s": 31}


def bilinear_kernel(factor: int, rank: int, num_channels: int) -> np.ndarray:
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
    """Transposed convolution from bilinear weights, learned or fixed: S becomes (S + 1) factor."""

    factor: int
    learned: bool

    @nn.compact
    def __call__(self, scores: jax.Array) -> jax.Array:
        rank, num_channels = scores.ndim - 2, scores.shape[-1]
        kernel: np.ndarray | jax.Array = bilinear_kernel(self.factor, rank, num_channels)
        if self.learned:
            kernel = self.param("kernel", lambda _: jnp.asarray(kernel))
        return formulations.transposed_convolve(
            scores, jnp.asarray(kernel, scores.dtype), self.factor
        )


class FCN(nn.Module):
    """Fully convolutional network, for any image size.

    The network of the paper is `FCN(21, encoder="vgg16", features=(), head="8s", padding="paper",
    dropout=0.5)`: VGG16 with its fully connected layers as convolutions, 134 million parameters
    before the up-sampling (Long et al. 2015, table 1). All up-sampling is learned or all is fixed,
    and dropout drops channels. The plain encoder is a compact one for medical images.

    Attributes:
      num_classes: classes to tell apart, background included.
      encoder: "plain" or "vgg16".
      features, num_convs, norm, activation: of the plain encoder, which has five stages; `features`
        is () for VGG16.
      head: "32s", "16s" (fuses pool4) or "8s" (fuses pool4 and pool3).
      upsample: "learned" or "fixed" bilinear transposed convolutions.
      padding: "same" (pooling rounds up, up-sampling is cropped) or, for VGG16, "paper" (the image
        is padded by 100 zeros and every fusion is cropped).
      dropout: share of channels dropped before the coarsest score layer, and between the former
        fully connected layers, while training.
      freeze_batch_stats, remat: as for `UNet`.
      dtype: of the computation; parameters and logits are float32.
      axis_name: device axis over which batch statistics are taken.
    Reference: Long, Shelhamer, Darrell 2015.
    """

    num_classes: int
    encoder: str = "plain"
    features: tuple[int, ...] = (16, 32, 64, 128, 256)
    num_convs: int = 2
    norm: str = "instance"
    activation: str = "relu"
    head: str = "8s"
    upsample: str = "learned"
    padding: str = "same"
    dropout: float = 0.0
    freeze_batch_stats: bool = False
    remat: bool = False
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Maps an image [B, *S, C] of any float to logits [B, *S, num_classes] float32."""
        check_choices(
            self,
            encoder=("plain", "vgg16"),
            norm=NORMS,
            activation=tuple(ACTIVATIONS),
            head=tuple(NUM_SKIPS),
            upsample=("learned", "fixed"),
            padding=("same", "paper"),
        )
        dtype, rank = jnp.dtype(self.dtype), image.ndim - 2
        paper = self.padding == "paper"
        x = image.astype(dtype)
        if paper:  # the first convolution pads by 1 itself
            x = jnp.pad(x, [(0, 0), *[(PAPER_PADDING - 1,) * 2] * rank, (0, 0)])
        maps = self._encode(dtype)(x, train)
        pools = [formulations.max_pool(x, (2,) * rank) for x in maps]
        x = pools[-1]
        if self.encoder == "vgg16":
            for name, size in (("fc6", 7), ("fc7", 1)):
                layer = Conv(
                    HIDDEN, size, padding="valid" if paper else "same", dtype=dtype, name=name
                )
                x = Dropout(self.dropout, self.axis_name)(nn.relu(layer(x)), train)
        else:
            x = Dropout(self.dropout, self.axis_name)(x, train)

        def score(x, pool):
            init = nn.initializers.lecun_normal()
            if self.encoder == "vgg16":
                init = nn.initializers.zeros  # as in the paper, section 4.1
            return Conv(self.num_classes, 1, kernel_init=init, dtype=dtype, name=f"score{pool}")(x)

        def upsample(scores, factor, name):
            return Upsample(factor, self.upsample == "learned", name=name)(scores)

        num_skips = NUM_SKIPS[self.head]
        scores = score(x, 5)
        for pool in range(4, 4 - num_skips, -1):
            scores, finer = upsample(scores, 2, f"upsample{pool}"), score(pools[pool - 1], pool)
            if paper:
                finer = crop_to(finer, scores.shape[1:-1], (POOL_OFFSETS[pool],) * rank)
            else:
                scores = crop_to(scores, finer.shape[1:-1], (1,) * rank)
            scores += finer
        factor = 32 // 2**num_skips
        offset = LOGITS_OFFSETS[self.head] if paper else factor // 2
        logits = upsample(scores, factor, "upsample")
        return crop_to(logits, image.shape[1:-1], (offset,) * rank).astype(jnp.float32)

    def _encode(self, dtype):
        style = Style(
            self.norm,
            self.activation,
            dtype=dtype,
            axis_name=self.axis_name,
            freeze_batch_stats=self.freeze_batch_stats,
            remat=self.remat,
        )
        if self.encoder == "vgg16":
            return encoders.VGG16(style, name="encoder")
        return encoders.Encoder(
            self.features,
            (self.num_convs,) * 5,
            kernel_sizes=(3,) * 5,
            strides=(1, 2, 2, 2, 2),
            down="max_pool",
            residual=False,
            dropout=0.0,
            style=style,
            name="encoder",
        )
