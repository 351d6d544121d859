"""Where a network halves its maps, and which axes its kernels look along."""

import dataclasses
import math
from collections.abc import Sequence

# No axis is halved to fewer voxels than this.
MIN_EDGE = 4
# Axes are treated alike where their spacings differ by less than this factor.
SAME_SPACING = 2.0


@dataclasses.dataclass(frozen=True)
class Topology:
    """The stages of a network, the full resolution first.

    Attributes:
      patch_size: voxels, each axis a multiple of what the network halves it by.
      strides: for each stage what it is coarser by than the one before, the first than the patch.
      kernels: for each stage the size of its convolutions; 3 throughout for the last.
    """

    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def divisors(self) -> tuple[int, ...]:
        """What each axis of a patch is a multiple of."""
        return _divisors(self.strides)


def topology_of(
    spacing_mm: Sequence[float], patch_size: Sequence[int], most_stages: int | None = None
) -> Topology:
    """The topology for patches of at least a size, on a grid of a spacing.

    An axis that is `SAME_SPACING` times as coarse as the finest is neither halved nor looked along
    until the others have come near it.

    Args:
      spacing_mm: [D], any unit.
      patch_size: [D] voxels, rounded up to what can be halved.
      most_stages: where to stop, though more could be halved; None for no such bound.
    """
    spacing, size = list(map(float, spacing_mm)), list(map(int, patch_size))
    axes = range(len(size))
    kernel = [1] * len(size)
    strides, kernels = [(1,) * len(size)], []
    while len(strides) != most_stages and (halved := _axes_to_halve(spacing, size)):
        kernel = [
            3 if spacing[axis] / min(spacing) < SAME_SPACING else kernel[axis] for axis in axes
        ]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in halved else 1 for axis in axes))
        for axis in halved:
            spacing[axis] *= 2
            size[axis] = -(-size[axis] // 2)
    kernels.append((3,) * len(size))
    padded = tuple(-(-n // d) * d for n, d in zip(patch_size, _divisors(strides), strict=True))
    return Topology(padded, tuple(strides), tuple(kernels))


def without_finest(topology: Topology) -> Topology:
    """The same without its first stage, so that the second looks at the patch; two are left."""
    strides, kernels = topology.strides, topology.kernels
    if len(strides) < 3:
        return topology
    return dataclasses.replace(topology, strides=strides[1:], kernels=kernels[1:])


def _divisors(strides):
    return tuple(math.prod(along) for along in zip(*strides, strict=True))


def _axes_to_halve(spacing, size):
    large = [axis for axis in range(len(size)) if size[axis] >= 2 * MIN_EDGE]
    finest = min((spacing[axis] for axis in large), default=0)
    found = [axis for axis in large if spacing[axis] / finest < SAME_SPACING]
    alone_and_small = len(found) == 1 and size[found[0]] < 3 * MIN_EDGE
    return [] if alone_and_small else found
