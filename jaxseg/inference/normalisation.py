"""Intensities on the network's scale, for arrays that may be larger than the volume in them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.inference.resampling import voxels_inside


def normalise(
    image: jax.Array, size: jax.Array, statistics: Sequence[Sequence[float]]
) -> jax.Array:
    """Brings intensities to the network's scale, as `data.preprocess` does.

    Args:
      image: [*S, C] float32.
      size: [3] int32.
      statistics: for each channel (low, high, mean, std) to clip to, subtract and divide by; or ()
        for those of the channel itself: percentiles 0.5 and 99.5, then mean and deviation.
    Returns:
      [*S, C] float32; 0 beyond `size`.
    """
    inside = voxels_inside(image.shape[:3], size)
    channels = []
    for channel, known in zip(jnp.moveaxis(image, -1, 0), statistics, strict=True):
        low, high, mean, std = known or _robust_statistics(channel, inside)
        scaled = (jnp.clip(channel, low, high) - mean) / std
        channels.append(jnp.where(inside, scaled, 0))
    return jnp.stack(channels, axis=-1)


def _robust_statistics(channel, inside):
    count = _total(inside.astype(jnp.int32))
    low, high = _low_percentile(channel, inside, count), -_low_percentile(-channel, inside, count)
    # Almost all background: the few other voxels are the image.
    flat = low == high
    low = jnp.where(flat, jnp.where(inside, channel, jnp.inf).min(), low)
    high = jnp.where(flat, jnp.where(inside, channel, -jnp.inf).max(), high)
    clipped = jnp.where(inside, jnp.clip(channel, low, high), 0)
    mean = _total(clipped) / count
    std = jnp.sqrt(_total(jnp.where(inside, (clipped - mean) ** 2, 0)) / count)
    floor = jnp.where(flat, jnp.where(std > 0, std, 1), jnp.maximum(std, 1e-8))
    return low, high, mean, floor


def _low_percentile(values, inside, count):
    """The 0.5 percentile with linear interpolation: two order statistics, found by bisection."""
    bits = lax.bitcast_convert_type(values + 0.0, jnp.int32)  # + 0: there is one zero
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the values
    rank, rest = (count - 1) // 200, (count - 1) % 200

    def num_up_to(key):
        return _total((inside & (keys <= key)).astype(jnp.int32))

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        enough = num_up_to(middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    limits = jnp.iinfo(jnp.int32)
    bounds = jnp.int32(limits.min), jnp.int32(limits.max)
    key, _ = lax.fori_loop(0, 32, halve, bounds)
    above = jnp.where(inside & (keys > key), keys, limits.max).min()
    next_key = jnp.where(num_up_to(key) > rank + 1, key, above)

    def value_of(key):
        return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)

    lower, upper = value_of(key), value_of(next_key)
    # The last of all has no next; its key would not even be a number.
    return jnp.where(rest > 0, lower + (upper - lower) * (rest / 200), lower)


def _total(values):
    """Sum over a volume, axis after axis: a float32 sum in one go would lose digits."""
    return values.sum(2).sum(1).sum(0)
