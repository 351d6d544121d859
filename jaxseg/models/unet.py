"""U-Net: an encoder, a decoder, and a skip connection at every resolution."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.models import encoders
from jaxseg.models.blocks import (
    ACTIVATIONS,
    NORMS,
    AttentionGate,
    Conv,
    ConvBlock,
    Style,
    UpConv,
    check_choices,
    crop_to,
    in_blocks,
    resize_linear,
    strides_of,
)

# Encoders whose size is published: channels of each resolution, and how to make one.
PUBLISHED: dict[str, tuple[tuple[int, ...], Callable[..., nn.Module]]] = {
    "vgg16": (encoders.VGG16_FEATURES, encoders.VGG16),
    **{
        f"resnet{n}": (
            encoders.resnet_features(n),
            functools.partial(encoders.ResNet, n),
        )
        for n in encoders.RESNET_BLOCKS
    },
}


class UNet(nn.Module):
    """U-Net, from the published one to nnU-Net's.

    The network of the paper is `UNet(2, features=(64, 128, 256, 512, 1024), norm="none",
    activation="relu", down="max_pool", padding="valid")`. With padding "same" logits have the
    image's size, whatever that is.

    Attributes:
      num_classes: classes to tell apart, background included.
      features: channels at each resolution, finest first; their number is the depth. () for
        encoders whose channels are published.
      encoder: "plain", "residual" (nnU-Net's ResEnc), or "vgg16", "resnet18", "resnet34",
        "resnet50", which take published weights.
      num_convs: convolutions per resolution in a "plain" encoder, blocks in a "residual" one;
        one number for all or one each.
      decoder_convs: convolutions per resolution in the decoder.
      kernel_sizes: one entry per resolution, a number or one per axis; () means 3.
      strides: one entry per step down, a number or one per axis; () means 2. One more entry in
        front makes the finest resolution coarser than the image by it, which costs a fraction;
        logits are brought back by a transposed convolution.
      norm: "instance", "batch", "group" or "none".
      activation: "relu" or "leaky_relu".
      down: "conv" (strided convolution) or "max_pool"; of the "plain" encoder.
      up: "conv" (transposed convolution) or "resize" (linear).
      padding: "same", or "valid": nothing is padded, and logits cover the centre of the image.
      attention: gate the skip connections (Oktay et al. 2018).
      deep_supervision: while training, return logits at all resolutions but the two coarsest.
      dropout: share of channels dropped at the two coarsest resolutions while training; not of
        published encoders.
      freeze_batch_stats: batch normalisation uses and keeps its running statistics while training.
      remat: save memory by computing blocks again in the backward pass.
      dtype: of the computation; parameters and logits are float32.
      axis_name: device axis over which batch statistics are taken.
      space_axis: device axis over which volumes are cut along their first axis, in equal parts, for
        those too large for one device: each device gives its part of the whole volume's logits.
        For "plain" and "residual" encoders with up "conv", padding "same" and no attention; the
        first strides must divide the parts.
    Reference: Ronneberger et al. 2015; normalisation, strided down-sampling, anisotropic kernels
      and deep supervision as in nnU-Net (Isensee et al. 2021).
    """

    num_classes: int
    features: tuple[int, ...] = (32, 64, 128, 256)
    encoder: str = "plain"
    num_convs: int | tuple[int, ...] = 2
    decoder_convs: int = 2
    kernel_sizes: tuple[int | tuple[int, ...], ...] = ()
    strides: tuple[int | tuple[int, ...], ...] = ()
    norm: str = "instance"
    activation: str = "leaky_relu"
    down: str = "conv"
    up: str = "conv"
    padding: str = "same"
    attention: bool = False
    deep_supervision: bool = False
    dropout: float = 0.0
    freeze_batch_stats: bool = False
    remat: bool = False
    dtype: str = "float32"
    axis_name: str | None = None
    space_axis: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array | tuple[jax.Array, ...]:
        """Maps an image [B, *S, C] of any float to logits [B, *S, num_classes] float32.

        With `deep_supervision` and `train` a tuple of logits, finest first, each [B, *S / strides,
        num_classes]. Without padding S shrinks.
        """
        check_choices(
            self,
            encoder=("plain", "residual", *PUBLISHED),
            norm=NORMS,
            activation=tuple(ACTIVATIONS),
            down=("conv", "max_pool"),
            up=("conv", "resize"),
            padding=("same", "valid"),
        )
        rank = image.ndim - 2
        style = Style(
            self.norm,
            self.activation,
            self.padding,
            jnp.dtype(self.dtype),
            self.axis_name,
            self.space_axis,
            self.freeze_batch_stats,
            self.remat,
        )
        features = self.level_features
        depth = len(features)
        kernel_sizes = self.kernel_sizes or (3,) * depth
        strides = strides_of(self.strides, depth, rank)
        if self.padding == "valid" and max(strides[0]) > 1:
            raise ValueError("a U-Net without padding has no stride before its first resolution")

        *skips, x = self._encode(kernel_sizes, strides, style)(image.astype(style.dtype), train)
        block = in_blocks(ConvBlock, style)
        coarser = []
        for level in reversed(range(depth - 1)):
            x = block(
                features[level], self.decoder_convs, style, kernel_sizes[level], name=f"up{level}"
            )(self._joined(x, skips[level], level, strides[level + 1]), train)
            if self.deep_supervision and 0 < level < depth - 2:
                coarser.append(self._score(x, f"head{level}"))
        logits = self._logits(x, strides[0], image.shape[1:-1])
        if self.deep_supervision and train:
            return (logits, *reversed(coarser))
        return logits

    def _joined(self, coarse, skip, level, stride):
        """Channels of the coarser level, brought to this one's resolution, beside its own."""
        features, dtype = self.level_features[level], jnp.dtype(self.dtype)
        if self.up == "conv":
            x = UpConv(features, stride, dtype, name=f"upconv{level}")(coarse)
        else:
            shape = [n * s for n, s in zip(coarse.shape[1:-1], stride, strict=True)]
            x = resize_linear(coarse, shape)
        if self.padding == "same":
            x = crop_to(x, skip.shape[1:-1], (0,) * len(stride))
        else:
            skip = crop_to(skip, x.shape[1:-1])
        if self.attention:
            gate = AttentionGate(max(features // 2, 1), dtype, name=f"gate{level}")
            skip = gate(skip, coarse, stride)
        return jnp.concatenate([skip, x], axis=-1)

    def _logits(self, x, stride, shape):
        """Of the image, from the finest map, which may be coarser."""
        if max(stride) == 1:
            return self._score(x, "head")
        enlarge = UpConv(self.num_classes, stride, jnp.dtype(self.dtype), name="upconv_head")
        return crop_to(enlarge(x).astype(jnp.float32), shape, (0,) * len(shape))

    def _score(self, x, name):
        init = nn.initializers.lecun_normal()
        head = Conv(self.num_classes, 1, kernel_init=init, dtype=jnp.dtype(self.dtype), name=name)
        return head(x).astype(jnp.float32)

    @property
    def level_features(self) -> tuple[int, ...]:
        """Channels at each resolution."""
        return PUBLISHED[self.encoder][0] if self.encoder in PUBLISHED else self.features

    def _encode(self, kernel_sizes, strides, style):
        if self.encoder in PUBLISHED:
            return PUBLISHED[self.encoder][1](style=style, name="encoder")
        depth = len(self.features)
        num_convs = self.num_convs if isinstance(self.num_convs, tuple) else (self.num_convs,)
        num_convs = num_convs * depth if len(num_convs) == 1 else num_convs
        residual = self.encoder == "residual"
        return encoders.Encoder(
            self.features,
            num_convs,
            tuple(kernel_sizes),
            tuple(strides),
            down="conv" if residual else self.down,
            residual=residual,
            dropout=self.dropout,
            style=style,
            name="encoder",
        )
