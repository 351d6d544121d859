"""The ways to train on a dataset: slices, volumes at full and at low resolution."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxseg.planning.budget import NO_WISHES, PRESETS, Batch, Preset, Wishes, batch_within
from jaxseg.planning.measures import CaseMeasures
from jaxseg.planning.network import convs_of, features_of
from jaxseg.planning.normalisation import masked_normalisation, schemes_of
from jaxseg.planning.target import Target, target_of

# A patch that shows less of the median case calls for a coarser grid ...
LOW_RESOLUTION_BELOW = 0.25
# ... which is made coarser in such steps, axes first that are finer than the coarsest by ...
COARSER_BY = 1.03
FINER_BY = 2.0
# ... and dropped unless it has as many times fewer voxels.
WORTH_IT = 2.0


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What plans are made of.

    Attributes:
      spacings_mm: [N, 3] of the training cases.
      shapes: [N, 3] voxels of each, cropped to what is not background.
      channel_names: of the images.
      num_labels: background and ignored label included.
      num_training: cases.
      relative_size: median of the voxels that cropping leaves, as a part of all.
      chords_mm: [classes, 3] how far it is through a structure, medians of the cases that have it;
        () where that is not known.
    """

    spacings_mm: Sequence[Sequence[float]]
    shapes: Sequence[Sequence[int]]
    channel_names: Sequence[str]
    num_labels: int
    num_training: int
    relative_size: float
    chords_mm: Sequence[Sequence[float]] = ()


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to train.

    Attributes:
      axes: which axis of a case [X, Y, Z] comes where.
      spacing_mm: of the grid, in that order; [2] for slices.
      median_shape: voxels of the median case on it.
      patch_size: voxels.
      batch_size: patches in a step.
      strides, kernels: of `topology.Topology`.
      features: channels of each stage.
      residual: whether the encoder is residual.
      convs: convolutions, or residual blocks, of each stage of the encoder.
      decoder_convs: convolutions of each stage of the decoder.
      batch_dice: whether Dice is of the whole batch, not of each patch.
      normalisation: scheme of each channel.
      inside_mask: for each channel whether it is normalised by what is not background alone.
      activations: of one patch, see `network.count_activations`.
      batch_limit: `budget.Batch.limit`.
    """

    axes: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    residual: bool
    convs: tuple[int, ...]
    decoder_convs: int
    batch_dice: bool
    normalisation: tuple[str, ...]
    inside_mask: tuple[bool, ...]
    activations: int
    batch_limit: str


def facts_from(
    measures: Sequence[CaseMeasures], *, channel_names: Sequence[str], num_labels: int
) -> DatasetFacts:
    """The facts of cases that were measured.

    Args:
      measures: of the training cases.
      channel_names: of the images.
      num_labels: background and ignored label included.
    """
    return DatasetFacts(
        spacings_mm=[case.spacing_mm for case in measures],
        shapes=[case.cropped_shape for case in measures],
        channel_names=channel_names,
        num_labels=num_labels,
        num_training=len(measures),
        relative_size=float(np.median([case.relative_size for case in measures])),
        chords_mm=_median_chords(measures),
    )


def configurations_of(
    facts: DatasetFacts,
    preset_name: str,
    *,
    scale: float = 1.0,
    wishes: Wishes = NO_WISHES,
) -> dict[str, Configuration]:
    """The configurations that a preset has for a dataset, by name.

    "2d" always; "3d_fullres" unless cases are one slice; "3d_lowres" where a patch shows little of
    a case at full resolution, and the spacing is not the user's.

    Args:
      facts: of the training cases.
      preset_name: of `budget.PRESETS`.
      scale: of what the preset allows.
      wishes: of the user.
    """
    preset = PRESETS[preset_name]
    on_grid = functools.partial(_on_grid, facts, preset, scale, wishes)
    made = on_grid(wishes.spacing_mm)
    # Pictures keep their pixels: their structures are branches and heaps, thinner than lines say.
    full = made.get("3d_fullres")
    is_free = bool(facts.chords_mm) and not wishes.spacing_mm
    if preset.voxels_across and is_free and full and not _shows_all(full):
        return on_grid(coarsest_that_shows(facts, preset.voxels_across))
    return made


def _shows_all(made):
    return all(n >= size for n, size in zip(made.patch_size, made.median_shape, strict=True))


def _on_grid(facts, preset, scale, wishes, wanted_mm):
    """All configurations, for a spacing that is wanted, or () for that of the cases."""
    target = target_of(facts.spacings_mm, facts.shapes, wanted_mm, wishes.axes)
    size = math.prod(target.median_shape)
    plan = functools.partial(_planned, facts, preset, scale, target, wishes)
    made: dict[str, Configuration] = {}
    if target.median_shape[-1] != 1:
        full = plan(target.spacing_mm, target.median_shape, size)
        low = _low_resolution(plan, full)
        if low and not wishes.spacing_mm:
            made["3d_lowres"] = low
        # Of a class that few patches show, few steps teach little unless they are taken together.
        together = bool(low) or (preset.is_short and not _shows_all(full))
        made["3d_fullres"] = dataclasses.replace(full, batch_dice=together)
    flat = plan(target.spacing_mm[:2], target.median_shape[:2], size)
    return made | {"2d": dataclasses.replace(flat, batch_dice=True)}


def coarsest_that_shows(facts: DatasetFacts, voxels_across: float) -> tuple[float, ...]:
    """The spacing [3] of the coarsest grid on which even thin structures are voxels across.

    It is as fine as that of the cases where that is coarser, along an axis.

    Args:
      facts: with `chords_mm`.
      voxels_across: of the mean line through the structure where it is thinnest.
    """
    target = target_of(facts.spacings_mm, facts.shapes)
    spacing = np.empty(3)
    spacing[list(target.axes)] = target.spacing_mm
    most = np.asarray(facts.chords_mm)[:, list(target.axes[:2])].min() / voxels_across
    return tuple(np.maximum(spacing, most).tolist())


def _median_chords(measures):
    """Of each class the median over the cases that have it; classes that none has are left out."""
    by_class = zip(*(case.structures for case in measures if case.structures), strict=True)
    found = [[of.chord_mm for of in cases if of.voxels] for cases in by_class]
    return [np.median(chords, axis=0).tolist() for chords in found if chords]


def _planned(facts, preset, scale, target, wishes, spacing_mm, median_shape, size):
    batch = batch_within(
        preset,
        spacing_mm,
        median_shape,
        num_voxels=size * facts.num_training,
        num_labels=facts.num_labels,
        scale=scale,
        wishes=wishes,
    )
    return _configuration(facts, preset, target, spacing_mm, median_shape, batch)


def _configuration(
    facts: DatasetFacts,
    preset: Preset,
    target: Target,
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    batch: Batch,
) -> Configuration:
    schemes = schemes_of(facts.channel_names)
    convs, decoder_convs = convs_of(len(batch.topology.strides), preset.style)
    return Configuration(
        axes=target.axes,
        spacing_mm=tuple(spacing_mm),
        median_shape=tuple(median_shape),
        patch_size=batch.topology.patch_size,
        batch_size=batch.batch_size,
        strides=batch.topology.strides,
        kernels=batch.topology.kernels,
        features=features_of(batch.topology, preset.style),
        residual=preset.style.residual,
        convs=convs,
        decoder_convs=decoder_convs,
        batch_dice=False,
        normalisation=schemes,
        inside_mask=masked_normalisation(schemes, facts.relative_size),
        activations=batch.activations,
        batch_limit=batch.limit,
    )


def _low_resolution(plan, full):
    """On a grid so coarse that a patch shows enough; None if that is not worth it."""
    spacing = np.array(full.spacing_mm)
    size, low = math.prod(full.median_shape), None
    shown = math.prod(full.patch_size)
    while shown / size < LOW_RESOLUTION_BELOW:
        finer = spacing.max() / spacing > FINER_BY
        spacing[finer if finer.any() else slice(None)] *= COARSER_BY
        shape = np.array(full.spacing_mm) / spacing * np.array(full.median_shape)
        size = float(np.prod(shape))
        rounded = tuple(round(n) for n in shape.tolist())
        low = plan(spacing.tolist(), rounded, size)
        shown = math.prod(low.patch_size)
    worth_it = low is not None and math.prod(full.median_shape) / size >= WORTH_IT
    return low if worth_it else None
