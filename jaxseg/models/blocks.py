"""The pieces FCN and U-Net are made of. Arrays are [B, *S, C]; their rank decides 2D or 3D."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

ACTIVATIONS = {"relu": nn.relu, "leaky_relu": nn.leaky_relu}


class InstanceNorm(nn.Module):
    """Zero mean, unit variance per example and channel, then a learned scale and shift.

    Reference: Ulyanov et al. 2016. Statistics are float32 whatever the compute dtype.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        spatial_axes = tuple(range(1, x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        mean = x32.mean(spatial_axes, keepdims=True)
        var = jnp.square(x32 - mean).mean(spatial_axes, keepdims=True)
        gain = scale * lax.rsqrt(var + self.eps)
        return ((x32 - mean) * gain + bias).astype(x.dtype)


class Norm(nn.Module):
    """The normalisation layer of that kind: "instance", "batch", "group" (8 per group) or "none".

    `axis_name` makes batch statistics those of the whole batch over all devices.
    """

    kind: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        if self.kind == "instance":
            return InstanceNorm()(x)
        if self.kind == "batch":
            norm = nn.BatchNorm(momentum=0.9, axis_name=self.axis_name, dtype=x.dtype)
            return norm(x, use_running_average=not train)
        if self.kind == "group":
            return nn.GroupNorm(num_groups=None, group_size=8, dtype=x.dtype)(x)
        return x


class Dropout(nn.Module):
    """Drops whole channels (Tompson et al. 2015), each example by a key of its own.

    The key is folded with the example's place in the global batch, so that the mask does not depend
    on how many devices share the batch.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        if not train or self.rate == 0:
            return x
        index = jnp.arange(x.shape[0])
        if self.axis_name is not None:
            index += lax.axis_index(self.axis_name) * x.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), index)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[-1:]))(keys)
        keep = keep.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
        return jnp.where(keep, x / (1 - self.rate), 0)


class ConvBlock(nn.Module):
    """`num_convs` times: 3-wide convolution, normalisation, activation; the first may stride."""

    features: int
    num_convs: int
    norm: str
    activation: str
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        rank = x.ndim - 2
        for i in range(self.num_convs):
            x = nn.Conv(
                self.features,
                (3,) * rank,
                strides=self.stride if i == 0 else 1,
                use_bias=self.norm in ("none", "group"),
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = Norm(self.norm, self.axis_name, name=f"norm{i}")(x, train=train)
            x = ACTIVATIONS[self.activation](x)
        return x


class UpConv(nn.Module):
    """Transposed convolution with kernel 2 and stride 2 along every axis: [B, *S, C] doubles S.

    Kernel and stride are equal, so no two inputs meet in one output: a matrix product per voxel and
    a rearrangement, which is many times faster on CPU than the strided form.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        rank = x.ndim - 2
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(in_axis=-2, batch_axis=tuple(range(rank))),
            (2,) * rank + (x.shape[-1], self.features),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        flat_kernel = jnp.moveaxis(kernel, -2, 0).reshape(x.shape[-1], -1)
        return depth_to_space(x @ flat_kernel, rank) + bias


def depth_to_space(x, rank):
    """Moves factors of 2 from channels to space: [B, *S, 2**rank * F] to [B, *(2 S), F]."""
    batch, *shape, channels = x.shape
    x = x.reshape(batch, *shape, *(2,) * rank, channels // 2**rank)
    order = [0]
    for axis in range(rank):
        order += [1 + axis, 1 + rank + axis]
    x = x.transpose(*order, 2 * rank + 1)
    return x.reshape(batch, *(2 * n for n in shape), -1)


def max_pool(x):
    """Maximum over blocks of 2 along every spatial axis; an odd end forms a smaller block."""
    rank = x.ndim - 2
    return nn.max_pool(x, (2,) * rank, strides=(2,) * rank, padding="SAME")


def resize_linear(x, shape):
    """Linear interpolation of [B, *S, C] to spatial `shape`, half-voxel convention."""
    return jax.image.resize(x, (x.shape[0], *shape, x.shape[-1]), "linear")


def crop_to(x, shape):
    """Cuts [B, *S, C] to its first `shape` voxels."""
    return x[(slice(None), *(slice(n) for n in shape))]
