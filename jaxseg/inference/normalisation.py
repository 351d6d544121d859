"""Intensities on the network's scale, for arrays that may be larger than the volume in them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.inference.resampling import voxels_inside
from jaxseg.planning.normalisation import CONSTANTS

# What is fixed about the normalisation of a channel.
Statistics = tuple[float | str, ...]


def statistics_of(scheme: str, intensity: Sequence[float]) -> Statistics:
    """What `normalise` takes for a channel of a plan.

    Args:
      scheme: of `planning.normalisation.SCHEMES`.
      intensity: of "ct": (low, high, mean, std); else empty.
    """
    if scheme == "zscore":
        return ()
    if scheme == "ct":
        return tuple(intensity)
    return CONSTANTS.get(scheme, (scheme,))


def normalise(image: jax.Array, size: jax.Array, statistics: Sequence[Statistics]) -> jax.Array:
    """Brings intensities to the network's scale, as `data.preprocess` does.

    Args:
      image: [*S, C] float32.
      size: [3] int32.
      statistics: for each channel (low, high, mean, std) to clip to, subtract and divide by; or ()
        for those of the channel itself: percentiles 0.5 and 99.5, then mean and deviation; or
        ("zscore_inside",) for those inside the `mask_of` the image, beyond which it is 0; or
        ("rescale_to_0_1",).
    Returns:
      [*S, C] float32; 0 beyond `size`.
    """
    inside = voxels_inside(image.shape[:3], size)
    mask = mask_of(image, size) if ("zscore_inside",) in statistics else inside
    channels = []
    for channel, known in zip(jnp.moveaxis(image, -1, 0), statistics, strict=True):
        part = mask if known == ("zscore_inside",) else inside
        if known == ("rescale_to_0_1",):
            low, high = _limits(channel, inside)
            mean, std = low, jnp.where(high > low, high - low, 1)
        elif len(known) == 4:
            low, high, mean, std = map(jnp.float32, known)
        else:
            low, high, mean, std = _robust_statistics(channel, part)
        scaled = (jnp.clip(channel, low, high) - mean) / std
        channels.append(jnp.where(part, scaled, 0))
    return jnp.stack(channels, axis=-1)


def mask_of(image: jax.Array, size: jax.Array) -> jax.Array:
    """What is not background: not 0 in every channel, or enclosed by such voxels; [*S] bool.

    Background reaches the border of the volume through faces of voxels that are 0. All voxels if
    there are no others. Equals scipy.ndimage.binary_fill_holes.
    """
    inside = voxels_inside(image.shape[:3], size)
    there = jnp.pad((image != 0).any(-1) & inside, 1)
    around = jnp.pad(~inside, 1, constant_values=True)

    def spread(state):
        reached, _ = state
        grown = reached
        for axis in range(3):
            for reverse in (False, True):
                grown = _swept(grown, there, axis, reverse)
        return grown, (grown != reached).any()

    reached, _ = lax.while_loop(lambda state: state[1], spread, (around, jnp.bool_(True)))
    mask = ~reached[1:-1, 1:-1, 1:-1]
    return jnp.where(mask.any(), mask, inside)


def _swept(reached, walls, axis, reverse):
    """What is reached when it spreads in one direction, up to the next wall."""
    place = lax.broadcasted_iota(jnp.int32, reached.shape, axis)
    place = reached.shape[axis] - 1 - place if reverse else place
    last_reached = lax.cummax(jnp.where(reached, place, -1), axis, reverse=reverse)
    last_wall = lax.cummax(jnp.where(walls, place, -1), axis, reverse=reverse)
    return last_reached > last_wall


def _limits(channel, inside):
    """The smallest and the largest value."""
    return (
        jnp.where(inside, channel, jnp.inf).min(),
        jnp.where(inside, channel, -jnp.inf).max(),
    )


def _robust_statistics(channel, inside):
    count = _total(inside.astype(jnp.int32))
    low, high = _low_percentile(channel, inside, count), -_low_percentile(-channel, inside, count)
    # Almost all background: the few other voxels are the image.
    flat = low == high
    lowest, highest = _limits(channel, inside)
    low, high = jnp.where(flat, lowest, low), jnp.where(flat, highest, high)
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
