"""One function, several ways to compute it: each operation as it is fastest on the backend.

Parameters have one layout whatever the formulation, so a checkpoint moves between backends; tests
hold each formulation to the plain one, forward and gradient. Arrays are [B, *S, C].
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.models import halo


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """Correlation, as `lax` and torch call it convolution.

    A 1-wide kernel is a matrix product. On CPU the gradient is spelt out and, in 3D, where XLA's
    own convolution is slow, all is computed slice by slice.

    Args:
      x: [B, *S, C].
      kernel: [*K, C, F].
      strides: one per axis.
      padding: (zeros in front, zeros behind) for each axis.
    Returns:
      [B, *S', F].
    """
    rank = x.ndim - 2
    unpadded = all(pad == (0, 0) for pad in padding)
    if math.prod(kernel.shape[:rank]) == 1 and unpadded:
        step = (slice(None), *(slice(None, None, s) for s in strides))
        return x[step] @ kernel.reshape(kernel.shape[-2:])
    native = functools.partial(convolve_native, strides=strides, padding=padding)
    on_cpu: Callable[..., jax.Array] = convolve_spelt_out if rank < 3 else convolve_by_slices
    on_cpu = functools.partial(on_cpu, strides=strides, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=native)


def convolve_native(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """`convolve` by XLA's own convolution."""
    layout = _layout_of(x.ndim - 2)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def _layout_of(rank):
    spatial = "DHW"[3 - rank :]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_spelt_out(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """`convolve` whose gradients are plain convolutions of arrays that are turned beforehand.

    They are the same to the bit. But left to itself XLA turns arrays within the convolution, which
    its fast CPU kernels can not; outside of loops it mends that, in the body of one it does not,
    and there the gradients take 20 to 50 times as long.
    """
    return convolve_native(x, kernel, strides, padding)


def _convolve_spelt_out_forward(x, kernel, strides, padding):
    return convolve_native(x, kernel, strides, padding), (x, kernel)


def _convolve_spelt_out_backward(strides, padding, kept, dy):
    x, kernel = kept
    rank = x.ndim - 2
    axes = tuple(range(1, rank + 1))
    taps = kernel.shape[:rank]
    # Voxels at the end of an axis that no stride reaches.
    spare = [
        n + sum(pad) - k - s * (m - 1)
        for n, pad, k, s, m in zip(x.shape[1:], padding, taps, strides, dy.shape[1:], strict=False)
    ]
    layout = _layout_of(rank)
    mirrored = lax.optimization_barrier(jnp.flip(kernel, range(rank)).swapaxes(-2, -1))
    around = [
        (k - 1 - front, k - 1 - behind + more)
        for k, (front, behind), more in zip(taps, padding, spare, strict=True)
    ]
    dx = lax.conv_general_dilated(
        dy, mirrored, (1,) * rank, around, lhs_dilation=strides, dimension_numbers=layout
    )
    turned = lax.optimization_barrier(x.transpose(rank + 1, *axes, 0))
    window = lax.optimization_barrier(dy.transpose(*axes, 0, rank + 1))
    around = [(front, behind - more) for (front, behind), more in zip(padding, spare, strict=True)]
    dkernel = lax.conv_general_dilated(
        turned, window, (1,) * rank, around, rhs_dilation=strides, dimension_numbers=layout
    )
    return dx, lax.optimization_barrier(dkernel).transpose(*axes, 0, rank + 1)


convolve_spelt_out.defvjp(_convolve_spelt_out_forward, _convolve_spelt_out_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_by_slices(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """`convolve` in 3D as 2D convolutions of slices, one for each tap along the first axis.

    It goes through a few slices at a time, which stay in the cache from tap to tap.
    """
    num_taps, stride = kernel.shape[0], strides[0]
    front, behind = padding[0]
    depth = (x.shape[1] + front + behind - num_taps) // stride + 1
    num_blocks = -(-depth // 4)
    size = -(-depth // num_blocks)
    behind += stride * (num_blocks * size - depth)
    # Not jnp.pad: the gradient of a wide padding crops, by a negative one.
    pads = [(0, 0, 0), (front, behind, 0), *[(0, 0, 0)] * (x.ndim - 2)]
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)

    def convolve_block(start):
        block = lax.dynamic_slice_in_dim(x, start, stride * (size - 1) + num_taps, axis=1)
        return _tap_by_tap(block, kernel, strides, ((0, 0), *padding[1:]))

    blocks = lax.map(convolve_block, stride * size * jnp.arange(num_blocks))
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(x.shape[0], num_blocks * size, *blocks.shape[3:])[:, :depth]


def _convolve_by_slices_forward(x, kernel, strides, padding):
    return convolve_by_slices(x, kernel, strides, padding), (x, kernel)


def _convolve_by_slices_backward(strides, padding, kept, dy):
    x, kernel = kept
    if max(strides) == 1:
        mirrored = jnp.flip(kernel, (0, 1, 2)).swapaxes(-2, -1)
        rest = tuple(
            (k - 1 - front, k - 1 - behind)
            for k, (front, behind) in zip(kernel.shape, padding, strict=False)
        )
        dx = convolve_by_slices(dy, mirrored, strides, rest)
    else:
        (dx,) = jax.vjp(lambda x: _tap_by_tap(x, kernel, strides, padding), x)[1](dy)
    if kernel.shape[-2] < 8:
        for_kernel = _taps_as_channels
    else:
        for_kernel = _tap_after_tap if strides[0] == 1 else _tap_by_tap
    (dkernel,) = jax.vjp(lambda kernel: for_kernel(x, kernel, strides, padding), kernel)[1](dy)
    return dx, dkernel


convolve_by_slices.defvjp(_convolve_by_slices_forward, _convolve_by_slices_backward)


def _tap_by_tap(x, kernel, strides, padding):
    """Shifted slices, convolved by each tap, added."""
    shifted = _shifts(x, kernel.shape[0], strides[0], padding[0])
    taps = [
        _convolve_slices(s, tap, strides, padding) for s, tap in zip(shifted, kernel, strict=True)
    ]
    return sum(taps)


def _tap_after_tap(x, kernel, strides, padding):
    """Slices convolved by each tap, then shifted and added."""
    total = 0
    for t, tap in enumerate(kernel):
        y = _convolve_slices(x, tap, strides, padding)
        total += _shifts(y, kernel.shape[0], strides[0], padding[0])[t]
    return total


def _taps_as_channels(x, kernel, strides, padding):
    """Shifted slices as channels of one convolution."""
    stacked = jnp.concatenate(_shifts(x, kernel.shape[0], strides[0], padding[0]), axis=-1)
    folded = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    return _convolve_slices(stacked, folded, strides, padding)


def _convolve_slices(x, kernel, strides, padding):
    """2D convolution of every slice across the first axis of x [B, X, Y, Z, C]."""
    y = convolve_spelt_out(x.reshape(-1, *x.shape[2:]), kernel, strides[1:], padding[1:])
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _shifts(x, num_taps, stride, padding):
    """What each tap along the first axis of x sees."""
    length = (x.shape[1] + sum(padding) - num_taps) // stride + 1
    x = jnp.pad(x, [(0, 0), padding, *[(0, 0)] * (x.ndim - 2)])
    end = stride * (length - 1) + 1
    return [x[:, t : t + end : stride] for t in range(num_taps)]


def upconvolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution whose stride is its kernel: out[k i + t] = x[i] @ kernel[t].

    No two inputs meet in one output, so it is a matrix product per voxel and a rearrangement.

    Args:
      x: [B, *S, C].
      kernel: [*K, C, F].
    Returns:
      [B, *(S K), F].
    """
    factors = kernel.shape[:-2]
    flat = jnp.moveaxis(kernel, -2, 0).reshape(kernel.shape[-2], -1)
    return depth_to_space(x @ flat, factors)


def transposed_convolve(x: jax.Array, kernel: jax.Array, factor: int) -> jax.Array:
    """Transposed convolution of stride `factor` and twice that width, in full.

    Each block of the output sees two inputs per axis: a 2-wide convolution and a rearrangement.

    Args:
      x: [B, *S, C].
      kernel: [2 factor, ..., C, F]; out[factor i + t] += x[i] @ kernel[t].
      factor: stride along every axis.
    Returns:
      [B, *((S + 1) factor), F].
    """
    rank, (channels, features) = x.ndim - 2, kernel.shape[-2:]
    # Block j holds tap t of input j and tap t + factor of input j - 1.
    taps = kernel.reshape(*(2, factor) * rank, channels, features)
    order = (*range(0, 2 * rank, 2), 2 * rank, *range(1, 2 * rank, 2), 2 * rank + 1)
    taps = jnp.flip(taps.transpose(order), range(rank)).reshape(*(2,) * rank, channels, -1)
    blocks = convolve_native(x, taps, (1,) * rank, ((1, 1),) * rank)
    return depth_to_space(blocks, (factor,) * rank)


def depth_to_space(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Moves `factors` from channels to space: [B, *S, prod(factors) F] to [B, *(S factors), F]."""
    rank = len(factors)
    batch, *shape, channels = x.shape
    x = x.reshape(batch, *shape, *factors, channels // math.prod(factors))
    order = [0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 2 * rank + 1]
    return x.transpose(order).reshape(
        batch, *(n * f for n, f in zip(shape, factors, strict=True)), -1
    )


def max_pool(x: jax.Array, window: Sequence[int]) -> jax.Array:
    """Maximum over blocks; an odd end forms a smaller block.

    As in torch, the gradient goes to the first of equal values, and NaN is the largest of all.

    Args:
      x: [B, *S, C].
      window: size of a block along each axis.
    Returns:
      [B, *ceil(S / window), C].
    """
    blocks = _blocks(x, window, -jnp.inf)
    result = blocks[0]
    for block in blocks[1:]:
        result = jnp.where((block > result) | jnp.isnan(block), block, result)
    return result


def avg_pool(x: jax.Array, window: Sequence[int]) -> jax.Array:
    """Mean over blocks of [B, *S, C]; an odd end forms a smaller block."""
    counts = _blocks(jnp.ones((1, *x.shape[1:-1], 1), x.dtype), window, 0)
    return sum(_blocks(x, window, 0)) / sum(counts)


def _blocks(x, window, fill):
    """The entries of all blocks: for each place in a block, an array over the blocks."""
    rest = [(0, -n % w) for n, w in zip(x.shape[1:-1], window, strict=True)]
    x = jnp.pad(x, [(0, 0), *rest, (0, 0)], constant_values=fill)
    places = [x]
    for axis, w in enumerate(window, start=1):
        places = [lax.slice_in_dim(p, i, None, w, axis) for p in places for i in range(w)]
    return places


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def instance_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    eps: float,
    space_axis: str | None = None,
) -> jax.Array:
    """Zero mean and unit variance per example and channel, then `scale` and `bias` [C].

    Args:
      x: [B, *S, C]; statistics are float32 whatever the dtype, in two passes.
      eps: added to the variance.
      space_axis: device axis over which volumes are cut; None if x holds whole ones.
    Returns:
      As x.
    """
    return _instance_norm(x, scale, bias, eps, space_axis)[0]


def _instance_norm(x, scale, bias, eps, space_axis):
    axes = tuple(range(1, x.ndim - 1))
    x32 = x.astype(jnp.float32)
    mean = halo.mean_of_parts(x32.mean(axes, keepdims=True), space_axis)
    var = halo.mean_of_parts(jnp.square(x32 - mean).mean(axes, keepdims=True), space_axis)
    inverse_sd = lax.rsqrt(var + eps)
    y = (x32 - mean) * (inverse_sd * scale) + bias
    return y.astype(x.dtype), (x, scale, bias, mean, inverse_sd)


def _instance_norm_backward(eps, space_axis, kept, dy):
    x, scale, bias, mean, inverse_sd = kept
    axes = tuple(range(1, x.ndim - 1))
    dy32 = dy.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse_sd
    mean_dy = dy32.mean(axes, keepdims=True)
    mean_dy_normal = (dy32 * normal).mean(axes, keepdims=True)
    whole_dy, whole_dy_normal = halo.mean_of_parts((mean_dy, mean_dy_normal), space_axis)
    dx = (scale * inverse_sd) * (dy32 - whole_dy - normal * whole_dy_normal)
    # Of this part alone: the gradients of parameters are summed over devices elsewhere.
    size = math.prod(x.shape[1:-1])
    dscale = (size * mean_dy_normal).sum(0).reshape(-1)
    dbias = (size * mean_dy).sum(0).reshape(-1)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


instance_norm.defvjp(_instance_norm, _instance_norm_backward)
