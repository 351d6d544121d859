"""The network on a topology: its channels, and how much of it a patch takes."""

import dataclasses
import math
from collections.abc import Sequence

from jaxseg.planning.topology import Topology

# Of a plain network, in every stage of encoder and decoder.
PLAIN_CONVS = 2
# Of a network with a residual encoder, by stage; its decoder has one convolution in each.
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)


@dataclasses.dataclass(frozen=True)
class Style:
    """What networks have in common, whatever they are trained on.

    Attributes:
      residual: whether the encoder is residual.
      first_features: channels of the first stage.
      half_in_3d: whether the first stage of volumes is as coarse as the second would be.
      max_features_2d, max_features_3d: of any stage.
    """

    residual: bool = False
    first_features: int = 32
    half_in_3d: bool = False
    max_features_2d: int = 512
    max_features_3d: int = 320


def features_of(topology: Topology, style: Style) -> tuple[int, ...]:
    """Channels of each stage: doubled with every halving, up to a bound."""
    flat = len(topology.patch_size) == 2
    most = style.max_features_2d if flat else style.max_features_3d
    stages = range(len(topology.strides))
    return tuple(min(style.first_features * 2**stage, most) for stage in stages)


def convs_of(num_stages: int, style: Style) -> tuple[tuple[int, ...], int]:
    """(convolutions, or residual blocks, of each stage of the encoder; those of the decoder's)."""
    if style.residual:
        return RESIDUAL_BLOCKS[:num_stages], 1
    return (PLAIN_CONVS,) * num_stages, PLAIN_CONVS


def count_activations(topology: Topology, num_labels: int, style: Style) -> int:
    """Numbers that the layers of the network put out for one patch.

    nnU-Net takes this for the memory that training needs.

    Args:
      topology: of the network.
      num_labels: background included.
      style: Style.
    """
    features, sizes = features_of(topology, style), _stage_sizes(topology)
    convs, decoder_convs = convs_of(len(features), style)
    voxels = [math.prod(size) for size in sizes]
    encoder = [f * v for f, v in zip(features, voxels, strict=True)]
    in_encoder = sum(n * each for n, each in zip(convs, encoder, strict=True))
    if style.residual:
        total = style.first_features * voxels[0] + 2 * in_encoder
        # The shortcut of a stage's first block is a layer where shape or channels change.
        for stage, stride in enumerate(topology.strides):
            before = features[max(stage - 1, 0)]
            if max(stride) > 1 or features[stage] != before:
                total += encoder[stage]
    else:
        total = in_encoder
    decoder = (decoder_convs + 1) * sum(encoder[:-1])
    return total + decoder + num_labels * voxels[0]


def _stage_sizes(topology: Topology) -> list[tuple[int, ...]]:
    sizes: list[tuple[int, ...]] = []
    size: Sequence[int] = topology.patch_size
    for stride in topology.strides:
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        sizes.append(size)
    return sizes
