"""Encoders: an image [B, *S, C] to one feature map per resolution, finest first.

All are called as `encoder(image, train)`. `VGG16` and `ResNet` are the published networks, so that
published weights fit; the others are sized by their attributes.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxseg.models import formulations, halo
from jaxseg.models.blocks import (
    Conv,
    ConvBlock,
    Dropout,
    ResidualBlock,
    Style,
    in_blocks,
    per_axis,
)


class Encoder(nn.Module):
    """A stage of convolutions, or of residual blocks after a stem, at each resolution.

    Between stages a pooling, or a stride in the next stage's first convolution.

    Attributes:
      features, num_convs, kernel_sizes: channels, convolutions (or residual blocks) and kernel of
        each resolution.
      strides: from each resolution to the next, the first from the image.
      down: "conv" (strided convolution) or "max_pool".
      residual: residual blocks, as in nnU-Net's ResEnc.
      dropout: share of channels dropped at the two coarsest resolutions while training.
      style: of all blocks.
    """

    features: tuple[int, ...]
    num_convs: tuple[int, ...]
    kernel_sizes: tuple[int | tuple[int, ...], ...]
    strides: tuple[int | tuple[int, ...], ...]
    down: str
    residual: bool
    dropout: float
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        style, maps = self.style, []
        block = in_blocks(ConvBlock, style)
        stage = ResidualStage if self.residual else block
        if self.residual:
            size, strides = self.kernel_sizes[0], self.strides[0]
            x = block(self.features[0], 1, style, size, strides, name="stem")(x, train)
        for level, features in enumerate(self.features):
            strides = self.strides[level] if level or not self.residual else 1
            if level and self.down == "max_pool":
                window = per_axis(strides, x.ndim - 2)
                if style.padding == "valid":
                    check_exact_pooling(x.shape[1:-1], window, level)
                if style.space_axis is not None:
                    halo.check_stride(x, window[0])
                x, strides = formulations.max_pool(x, window), 1
            x = stage(
                features,
                self.num_convs[level],
                style,
                self.kernel_sizes[level],
                strides,
                name=f"stage{level}",
            )(x, train)
            if 0 < level >= len(self.features) - 2:
                x = Dropout(self.dropout, style.axis_name)(x, train)
            maps.append(x)
        return maps


def check_exact_pooling(shape: Sequence[int], window: Sequence[int], level: int) -> None:
    """Raises ValueError if blocks do not fill `shape`: unpadded maps would lose their centre."""
    if any(n % w for n, w in zip(shape, window, strict=True)):
        raise ValueError(
            f"a U-Net without padding must halve its maps exactly, but the one before level "
            f"{level} measures {'x'.join(map(str, shape))}; with two 3-wide convolutions per level "
            "and depth 5 an image side of 572 fits, as do those that differ by a multiple of 16"
        )


class ResidualStage(nn.Module):
    """Residual blocks of one resolution; the first may stride."""

    features: int
    num_blocks: int
    style: Style
    kernel_size: int | tuple[int, ...]
    strides: int | tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        block = in_blocks(ResidualBlock, self.style)
        for i in range(self.num_blocks):
            strides = self.strides if i == 0 else 1
            x = block(self.features, self.style, self.kernel_size, strides, name=f"block{i}")(
                x, train
            )
        return x


VGG16_FEATURES = (64, 128, 256, 512, 512)


class VGG16(nn.Module):
    """The convolutions of VGG16, each map before its pooling; strides 1, 2, 4, 8, 16.

    14,714,688 parameters for an RGB image (Simonyan and Zisserman 2015, configuration D). It has no
    blocks that `remat` could forget.
    """

    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        maps = []
        for stage, num_convs in enumerate((2, 2, 3, 3, 3), start=1):
            if stage > 1:
                x = formulations.max_pool(x, per_axis(2, x.ndim - 2))
            for i in range(1, num_convs + 1):
                features = VGG16_FEATURES[stage - 1]
                x = nn.relu(Conv(features, dtype=self.style.dtype, name=f"conv{stage}_{i}")(x))
            maps.append(x)
        return maps


RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
FULL_FEATURES = 32


def resnet_features(num_layers: int) -> tuple[int, ...]:
    """Channels of `ResNet`'s maps."""
    factor = 4 if num_layers == 50 else 1
    return (FULL_FEATURES, 64, *(factor * f for f in (64, 128, 256, 512)))


class ResNet(nn.Module):
    """ResNet-18, -34 or -50; strides 1, 2, 4, 8, 16, 32.

    The published network sees nothing at full resolution: a block of two convolutions does.

    Reference: He et al. 2016; in ResNet-50 the 3x3 convolution strides, as in torchvision.
    """

    num_layers: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        rank = x.ndim - 2
        style = dataclasses.replace(self.style, norm="batch", activation="relu", padding="same")
        full = in_blocks(ConvBlock, style)(FULL_FEATURES, 2, self.style, name="full")
        maps = [full(x, train)]
        x = style.activate(style.convolve(x, train, 64, 7, 2, conv="conv1", norm="bn1"))
        maps.append(x)
        x = nn.max_pool(x, (3,) * rank, (2,) * rank, ((1, 1),) * rank)
        block = in_blocks(ResNetBlock, style)
        for layer, num_blocks in enumerate(RESNET_BLOCKS[self.num_layers], start=1):
            for i in range(num_blocks):
                strides = 2 if layer > 1 and i == 0 else 1
                name = f"layer{layer}_{i}"
                x = block(32 * 2**layer, self.num_layers == 50, strides, style, name=name)(x, train)
            maps.append(x)
        return maps


class ResNetBlock(nn.Module):
    """Two 3-wide convolutions, or a bottleneck of 1, 3 and 1, beside a shortcut."""

    features: int
    bottleneck: bool
    strides: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        features, activate = self.features, self.style.activate

        def convolve(x, number, features, size, strides=1):
            names = {"conv": f"conv{number}", "norm": f"bn{number}"}
            return self.style.convolve(x, train, features, size, strides, **names)

        if self.bottleneck:
            y = activate(convolve(x, 1, features, 1))
            y = activate(convolve(y, 2, features, 3, self.strides))
            y = convolve(y, 3, 4 * features, 1)
        else:
            y = activate(convolve(x, 1, features, 3, self.strides))
            y = convolve(y, 2, features, 3)
        if y.shape != x.shape:
            names = {"conv": "downsample_conv", "norm": "downsample_bn"}
            x = self.style.convolve(x, train, y.shape[-1], 1, self.strides, **names)
        return activate(x + y)
