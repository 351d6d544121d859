"""A volume cut along its first spatial axis: each device holds one part of [B, X, *S, C].

All parts have the same size. What a convolution sees beyond its part is fetched from the neighbours
(halo exchange); everything else here is local, or a sum over the parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def pad_from_neighbours(x: jax.Array, kernel_size: int, stride: int, space_axis: str) -> jax.Array:
    """Pads the first spatial axis with what the neighbours hold, as "same" padding would see it.

    A convolution that then pads nothing on this axis gives its part of the whole volume's result.
    The first part has zeros in front and the last one behind, as the volume has.

    Args:
      x: this device's part, [B, X, *S, C].
      kernel_size, stride: of the convolution, along this axis.
      space_axis: device axis over which the volume is cut.
    Returns:
      [B, X + kernel_size - 1, *S, C].
    Raises:
      ValueError: as `check_stride`, or a neighbour holds less than is fetched from it.
    """
    check_stride(x, stride)
    front, behind = (kernel_size - 1) // 2, kernel_size // 2
    if behind > x.shape[1]:
        raise ValueError(
            f"a device's part of the volume is {x.shape[1]} wide along its first axis at some "
            f"resolution, but a {kernel_size}-wide convolution looks {behind} into it: set a "
            "larger config.data.patch_size or fewer devices in config.parallel.space"
        )
    num_parts = lax.axis_size(space_axis)
    forward = [(part, part + 1) for part in range(num_parts - 1)]
    backward = [(part + 1, part) for part in range(num_parts - 1)]
    parts = [x]
    if front:
        parts.insert(0, lax.ppermute(x[:, -front:], space_axis, forward))
    if behind:
        parts.append(lax.ppermute(x[:, :behind], space_axis, backward))
    return jnp.concatenate(parts, axis=1)


def check_stride(x: jax.Array, stride: int) -> None:
    """Raises ValueError if a stride along the first spatial axis does not end with the part x."""
    if x.shape[1] % stride:
        raise ValueError(
            f"a device's part of the volume is {x.shape[1]} wide along its first axis at some "
            f"resolution, which a stride of {stride} does not divide: set the first side of "
            "config.data.patch_size to a multiple of all its strides times "
            "config.parallel.space, or fewer devices there"
        )


def mean_of_parts(means: Any, space_axis: str | None) -> Any:
    """The volume's means from its parts' means, a tree of arrays; unchanged without an axis."""
    return means if space_axis is None else lax.pmean(means, space_axis)
