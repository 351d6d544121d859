"""How large a patch and how many of them a network is trained on."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxseg.planning.network import Style, count_activations
from jaxseg.planning.topology import MIN_EDGE, Topology, topology_of, without_finest

# Voxels of the patch that is begun with, before it is made smaller; by the number of axes.
FIRST_VOXELS = {2: 2048**2, 3: 256**3}
# Patches that the reference of a preset is for.
REFERENCE_BATCH = {2: 12, 3: 2}
MIN_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Preset:
    """What may be spent on a network.

    Attributes:
      style: of its networks.
      reference: activations of one patch, by the number of axes, with `gib` of memory.
      gib: memory of the accelerator that the reference is for; None where time is what is short.
      most_of_dataset: part of all voxels that one batch may hold.
      fewest: patches that have to fit, by the number of axes; larger ones shrink.
      is_short: whether its networks are trained for minutes, not for days.
      voxels_across: of the thinnest structure, which a grid shows that may be coarser than the
        cases; None leaves it as fine as them.
    """

    style: Style
    reference: dict[int, float]
    gib: float | None
    most_of_dataset: float = 1.0
    fewest: dict[int, int] = dataclasses.field(default_factory=lambda: REFERENCE_BATCH)
    is_short: bool = False
    voxels_across: float | None = None


PRESETS = {
    "nnunet": Preset(Style(), {2: 85e6, 3: 560e6}, 8, most_of_dataset=0.05, fewest={2: 2, 3: 2}),
    "resenc_m": Preset(Style(residual=True), {2: 135e6, 3: 680e6}, 8),
    "resenc_l": Preset(Style(residual=True), {2: 380e6, 3: 2100e6}, 24),
    "resenc_xl": Preset(Style(residual=True), {2: 560e6, 3: 3600e6}, 40),
    # Ours, for a machine without accelerator: a step takes some 0.3 s on two cores.
    "compact": Preset(
        Style(first_features=16, half_in_3d=True, max_features_2d=128, max_features_3d=128),
        {2: 0.9e6, 3: 6e6},
        gib=None,
        most_of_dataset=0.05,
        fewest={2: 4, 3: 4},
        is_short=True,
        voxels_across=6,
    ),
}


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a user has decided; what is empty or None is planned.

    Attributes:
      spacing_mm: [3] along the axes of a case; there is no 3d_lowres then.
      patch_size: [2] or [3] voxels along the axes of the grid.
      batch_size: patches in a step.
      axes: [3] which axis of a case comes where.
      num_stages: resolutions of the network, at most.
      parts: that devices divide a batch into, so that it is a multiple.
    """

    spacing_mm: tuple[float, ...] = ()
    patch_size: tuple[int, ...] = ()
    batch_size: int | None = None
    axes: tuple[int, ...] = ()
    num_stages: int | None = None
    parts: int = 1


NO_WISHES = Wishes()


@dataclasses.dataclass(frozen=True)
class Batch:
    """Patches of one step.

    Attributes:
      topology: of the network on one of them.
      batch_size: how many.
      activations: of one, see `network.count_activations`.
      limit: why there are no more where the user does not say: "budget" of the preset, part of the
        "dataset" that a step may hold, or "fewest" where either would allow less; "devices" where
        it is more, for each of them to have as many.
    """

    topology: Topology
    batch_size: int
    activations: int
    limit: str


def batch_within(
    preset: Preset,
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    *,
    num_voxels: float,
    num_labels: int,
    scale: float = 1.0,
    wishes: Wishes = NO_WISHES,
) -> Batch:
    """The largest patch, and as many of them, as a preset allows.

    Args:
      preset: of `PRESETS`.
      spacing_mm: [2 or 3] of the grid.
      median_shape: voxels of the median case along the same axes.
      num_voxels: of all training cases.
      num_labels: background and ignored label included.
      scale: of what the preset allows.
      wishes: of the user.
    """
    rank = len(spacing_mm)
    limit = preset.reference[rank] * scale
    most = limit * REFERENCE_BATCH[rank] / preset.fewest[rank]
    patch_size = wishes.patch_size if len(wishes.patch_size) == rank else ()
    topology_for = functools.partial(
        _topology_for, preset.style.half_in_3d and rank == 3, spacing_mm, wishes.num_stages
    )
    topology = topology_for(patch_size or _first_patch(spacing_mm, median_shape))
    count = functools.partial(count_activations, num_labels=num_labels, style=preset.style)
    while not patch_size and count(topology) > most and max(topology.patch_size) > MIN_EDGE:
        topology = _shrunk(topology, topology_for, median_shape)
    activations = count(topology)
    fitting = round(limit / activations * REFERENCE_BATCH[rank])
    covering = round(num_voxels * preset.most_of_dataset / math.prod(topology.patch_size))
    planned, why = (fitting, "budget") if fitting <= covering else (covering, "dataset")
    if planned < MIN_BATCH:
        planned, why = MIN_BATCH, "fewest"
    if planned % wishes.parts:
        planned, why = math.ceil(planned / wishes.parts) * wishes.parts, "devices"
    return Batch(topology, wishes.batch_size or planned, activations, why)


def _topology_for(is_half, spacing_mm, num_stages, patch_size):
    if not is_half:
        return topology_of(spacing_mm, patch_size, num_stages)
    return without_finest(topology_of(spacing_mm, patch_size, num_stages and num_stages + 1))


def _first_patch(spacing_mm, median_shape):
    """A box of `FIRST_VOXELS`, as long in mm along each axis, cut to the median case."""
    rank = len(spacing_mm)
    per_mm = 1 / np.asarray(spacing_mm, np.float64)
    sides = per_mm * (FIRST_VOXELS[rank] / np.prod(per_mm)) ** (1 / rank)
    return [int(min(round(side), n)) for side, n in zip(sides, median_shape, strict=True)]


def _shrunk(topology, topology_for, median_shape):
    """The topology with the axis shortened that shows most of the median case."""
    patch = list(topology.patch_size)
    axis = int(np.argmax([n / m for n, m in zip(patch, median_shape, strict=True)]))
    shorter = [
        n - (i == axis) * d for i, (n, d) in enumerate(zip(patch, topology.divisors, strict=True))
    ]
    patch[axis] -= topology_for(shorter).divisors[axis]
    return topology_for(patch)
