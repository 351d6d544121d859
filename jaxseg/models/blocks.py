"""The pieces networks are made of. Arrays are [B, *S, C]; their rank decides 2D or 3D."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxseg.models import formulations, halo

ACTIVATIONS = {"relu": nn.relu, "leaky_relu": nn.leaky_relu}
NORMS = ("instance", "batch", "group", "none")
EPS = 1e-5
CHANNELS_PER_GROUP = 8


def check_choices(model: nn.Module, **choices: tuple[str, ...]) -> None:
    """Raises ValueError if a field of a module is none of its choices."""
    for name, allowed in choices.items():
        value = getattr(model, name)
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(repr, allowed))}")


def per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """A number for every axis, from one number or from a tuple of `rank` numbers."""
    return (value,) * rank if isinstance(value, int) else tuple(value)


def strides_of(
    strides: Sequence[int | Sequence[int]], depth: int, rank: int
) -> list[tuple[int, ...]]:
    """For each resolution what it is coarser by than the one before, the first than the image.

    Args:
      strides: one entry per step down, and one in front where the first resolution is coarser than
        the image; a number or one per axis. () means 2.
      depth: number of resolutions.
      rank: of the image.
    """
    steps = [per_axis(step, rank) for step in strides or (2,) * (depth - 1)]
    return steps if len(steps) == depth else [(1,) * rank, *steps]


def he_normal(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Normal with variance 2 / fan-in (He et al. 2015) for a kernel [*K, C, F]."""
    return _normal(key, shape, dtype, 2 / math.prod(shape[:-1]))


def lecun_normal_per_tap(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Normal with variance 1 / C for a kernel [*K, C, F] of which each output sees one tap."""
    return _normal(key, shape, dtype, 1 / shape[-2])


def _normal(key, shape, dtype, variance):
    # Drawn flat: XLA compiles that in a third of the time.
    flat = jax.random.normal(key, (math.prod(shape),), dtype)
    return flat.reshape(shape) * math.sqrt(variance)


class Conv(nn.Module):
    """Convolution with a kernel [*K, C, F] and a bias [F].

    "same" pads (K - 1) // 2 zeros in front and K // 2 behind, also when it strides, as torch and
    nnU-Net do: the size becomes ceil(S / strides). "valid" pads nothing. With `space_axis`, the
    device axis over which volumes are cut, "same" pads the first axis from the neighbours' parts.
    """

    features: int
    kernel_size: int | tuple[int, ...] = 3
    strides: int | tuple[int, ...] = 1
    padding: str = "same"
    use_bias: bool = True
    kernel_init: Callable[..., jax.Array] = he_normal
    dtype: jnp.dtype = jnp.float32
    space_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rank = x.ndim - 2
        strides = per_axis(self.strides, rank)
        size = per_axis(self.kernel_size, rank)
        kernel = self.param("kernel", self.kernel_init, (*size, x.shape[-1], self.features))
        same = self.padding == "same"
        padding = tuple(((k - 1) // 2, k // 2) if same else (0, 0) for k in size)
        if not same and any(n < k for n, k in zip(x.shape[1:-1], size, strict=True)):
            raise ValueError(
                f"a map of {'x'.join(map(str, x.shape[1:-1]))} is too small for an unpadded "
                f"convolution {'x'.join(map(str, size))}: give a larger image or fewer resolutions"
            )
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.space_axis is not None:
            x = halo.pad_from_neighbours(x, size[0], strides[0], self.space_axis)
            padding = ((0, 0), *padding[1:])
        x = formulations.convolve(x, kernel, strides, padding)
        if self.use_bias:
            x = _with_bias(x, self.param("bias", nn.initializers.zeros, (self.features,)))
        return x


class UpConv(nn.Module):
    """Transposed convolution whose stride is its kernel: [B, *S, C] becomes [B, *(S K), F]."""

    features: int
    strides: int | tuple[int, ...] = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*per_axis(self.strides, x.ndim - 2), x.shape[-1], self.features)
        kernel = self.param("kernel", lecun_normal_per_tap, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel = (a.astype(self.dtype) for a in (x, kernel))
        return _with_bias(formulations.upconvolve(x, kernel), bias)


def _with_bias(x, bias):
    """The sum, of x's dtype, taken in float32: so is that over all voxels, the bias's gradient."""
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


class Norm(nn.Module):
    """Zero mean and unit variance, then a learned scale and shift per channel.

    The parameters are the same whatever the kind; statistics are float32 whatever the dtype.

    Attributes:
      kind: "instance" (Ulyanov et al. 2016), "batch" (Ioffe and Szegedy 2015; running mean and
        biased variance with momentum 0.9), "group" (8 channels each; Wu and He 2018) or "none".
      axis_name: device axis, so that batch statistics are those of the whole batch.
      space_axis: device axis over which volumes are cut, so that statistics are of whole ones.
      frozen: use the running statistics of "batch" also while training, and keep them.
    """

    kind: str
    axis_name: str | None = None
    space_axis: str | None = None
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.kind == "none":
            return x
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        if self.kind == "instance":
            return formulations.instance_norm(x, scale, bias, EPS, self.space_axis)
        x32 = x.astype(jnp.float32)
        if self.kind == "group":
            groups = x32.reshape(*x.shape[:-1], -1, CHANNELS_PER_GROUP)
            axes = (*range(1, x.ndim - 1), x.ndim)
            mean, var = _moments(groups, axes, self.space_axis)
            x32 = ((groups - mean) * lax.rsqrt(var + EPS)).reshape(x.shape)
            return (x32 * scale + bias).astype(x.dtype)
        mean, var = self._batch_statistics(x32, train)
        return ((x32 - mean) * (scale * lax.rsqrt(var + EPS)) + bias).astype(x.dtype)

    def _batch_statistics(self, x, train):
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        running_var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if not train or self.frozen:
            return running_mean.value, running_var.value
        mean, var = _moments(x, tuple(range(x.ndim - 1)), self.axis_name, self.space_axis)
        mean, var = mean.reshape(-1), var.reshape(-1)
        if not self.is_initializing():
            running_mean.value = 0.9 * running_mean.value + 0.1 * mean
            running_var.value = 0.9 * running_var.value + 0.1 * var
        return mean, var


def _moments(x, axes, *device_axes):
    """Mean and variance in two passes, over devices too; axes are kept with size 1."""
    names = tuple(name for name in device_axes if name is not None)

    def mean_of(values):
        mean = values.mean(axes, keepdims=True)
        return lax.pmean(mean, names) if names else mean

    mean = mean_of(x)
    return mean, mean_of(jnp.square(x - mean))


class Dropout(nn.Module):
    """Drops whole channels (Tompson et al. 2015), each example by a key of its own.

    The key is folded with the example's place in the global batch, so that the mask does not depend
    on how many devices share the batch.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        index = jnp.arange(x.shape[0])
        if self.axis_name is not None:
            index += lax.axis_index(self.axis_name) * x.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), index)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[-1:]))(keys)
        keep = keep.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
        return jnp.where(keep, x / (1 - self.rate), 0)


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common.

    Attributes:
      norm: kind of `Norm`.
      activation: "relu" or "leaky_relu" (slope 0.01).
      padding: "same" or "valid", as for `Conv`.
      dtype: of the computation.
      axis_name, space_axis, freeze_batch_stats: as for `Norm`.
      remat: compute a block's insides again in the backward pass instead of keeping them.
    """

    norm: str
    activation: str
    padding: str = "same"
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    space_axis: str | None = None
    freeze_batch_stats: bool = False
    remat: bool = False

    def activate(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](x)

    def convolve(
        self,
        x: jax.Array,
        train: bool,
        features: int,
        kernel_size: int | tuple[int, ...] = 3,
        strides: int | tuple[int, ...] = 1,
        *,
        conv: str,
        norm: str,
    ) -> jax.Array:
        """Convolution and normalisation under these two names; called inside a block."""
        has_bias = self.norm in ("none", "group")  # the others take the mean away again
        layer = Conv(
            features,
            kernel_size,
            strides,
            self.padding,
            has_bias,
            dtype=self.dtype,
            space_axis=self.space_axis,
            name=conv,
        )
        return self.normalise(layer(x), train, norm)

    def normalise(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        norm = Norm(self.norm, self.axis_name, self.space_axis, self.freeze_batch_stats, name=name)
        return norm(x, train)


def in_blocks(block: type[nn.Module], style: Style) -> Callable[..., nn.Module]:
    """The block's class, or one that forgets its insides until the backward pass."""
    return nn.remat(block, static_argnums=2) if style.remat else block


class ConvBlock(nn.Module):
    """`num_convs` times: convolution, normalisation, activation; the first may stride."""

    features: int
    num_convs: int
    style: Style
    kernel_size: int | tuple[int, ...] = 3
    strides: int | tuple[int, ...] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.num_convs):
            strides = self.strides if i == 0 else 1
            x = self.style.convolve(
                x, train, self.features, self.kernel_size, strides, conv=f"conv{i}", norm=f"norm{i}"
            )
            x = self.style.activate(x)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut that is averaged and projected where shapes change.

    Reference: He et al. 2016, with the average-pooled shortcut of ResNet-D (He et al. 2019), as in
      nnU-Net's residual encoder (Isensee et al. 2024).
    """

    features: int
    style: Style
    kernel_size: int | tuple[int, ...] = 3
    strides: int | tuple[int, ...] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        style, size = self.style, self.kernel_size
        strides = per_axis(self.strides, x.ndim - 2)
        shortcut = formulations.avg_pool(x, strides) if max(strides) > 1 else x
        if x.shape[-1] != self.features:
            project = Conv(self.features, 1, use_bias=False, dtype=style.dtype, name="project_conv")
            shortcut = style.normalise(project(shortcut), train, "project_norm")
        x = style.convolve(x, train, self.features, size, strides, conv="conv1", norm="norm1")
        x = style.activate(x)
        x = style.convolve(x, train, self.features, size, conv="conv2", norm="norm2")
        return style.activate(x + shortcut)


class AttentionGate(nn.Module):
    """Weighs each voxel of a skip connection by what the coarser level looks at.

    Additive attention on the coarser grid, resized linearly: Oktay et al. 2018.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, skip: jax.Array, coarse: jax.Array, strides: tuple[int, ...]) -> jax.Array:
        """skip [B, *S, C], coarse [B, *ceil(S / strides), D]; returns the weighed skip."""
        rest = [(0, -n % s) for n, s in zip(skip.shape[1:-1], strides, strict=True)]
        padded = jnp.pad(skip, [(0, 0), *rest, (0, 0)])

        def conv(features, name, size=1, use_bias=True, padding="same"):
            return Conv(features, size, size, padding, use_bias, dtype=self.dtype, name=name)

        looked_at = conv(self.features, "skip", strides, use_bias=False, padding="valid")(padded)
        looked_at = nn.relu(looked_at + conv(self.features, "gating")(coarse))
        weight = nn.sigmoid(conv(1, "psi")(looked_at))
        return skip * resize_linear(weight, skip.shape[1:-1])


def resize_linear(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Linear interpolation of [B, *S, C] to spatial `shape`, half-voxel convention."""
    return jax.image.resize(x, (x.shape[0], *shape, x.shape[-1]), "linear")


def crop_to(x: jax.Array, shape: Sequence[int], offsets: Sequence[int] | None = None) -> jax.Array:
    """Cuts spatial `shape` out of [B, *S, C], from `offsets` on; None cuts out the centre."""
    if offsets is None:
        offsets = tuple((n - m) // 2 for n, m in zip(x.shape[1:-1], shape, strict=True))
    window = (slice(o, o + m) for o, m in zip(offsets, shape, strict=True))
    return x[(slice(None), *window)]
