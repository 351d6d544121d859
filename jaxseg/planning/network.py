"""The network on a topology: its channels, and how much of it a patch takes."""

import math
from collections.abc import Sequence

from jaxseg.planning.topology import Topology

FIRST_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}  # by the number of axes
# Of a plain network, in every stage of encoder and decoder.
PLAIN_CONVS = 2
# Of a network with a residual encoder, by stage; its decoder has one convolution in each.
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)


def features_of(topology: Topology) -> tuple[int, ...]:
    """Channels of each stage: doubled with every halving, up to a bound."""
    most = MAX_FEATURES[len(topology.patch_size)]
    return tuple(min(FIRST_FEATURES * 2**stage, most) for stage in range(len(topology.strides)))


def count_activations(topology: Topology, num_labels: int, *, residual: bool) -> int:
    """Numbers that the layers of the network put out for one patch.

    nnU-Net takes this for the memory that training needs.

    Args:
      topology: of the network.
      num_labels: background included.
      residual: whether the encoder is residual.
    """
    features, sizes = features_of(topology), _stage_sizes(topology)
    voxels = [math.prod(size) for size in sizes]
    encoder = [f * v for f, v in zip(features, voxels, strict=True)]
    if residual:
        blocks = RESIDUAL_BLOCKS[: len(features)]
        total = FIRST_FEATURES * voxels[0] + sum(
            2 * n * each for n, each in zip(blocks, encoder, strict=True)
        )
        # The shortcut of a stage's first block is a layer where shape or channels change.
        for stage, stride in enumerate(topology.strides):
            before = FIRST_FEATURES if stage == 0 else features[stage - 1]
            if max(stride) > 1 or features[stage] != before:
                total += encoder[stage]
        decoder_convs = 1
    else:
        total = PLAIN_CONVS * sum(encoder)
        decoder_convs = PLAIN_CONVS
    decoder = (decoder_convs + 1) * sum(encoder[:-1])
    return total + decoder + num_labels * voxels[0]


def _stage_sizes(topology: Topology) -> list[tuple[int, ...]]:
    sizes: list[tuple[int, ...]] = []
    size: Sequence[int] = topology.patch_size
    for stride in topology.strides:
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        sizes.append(size)
    return sizes
