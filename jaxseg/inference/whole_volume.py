"""From a volume as it was read to its segmentation on the same grid, as one compiled program."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg import geometry, parallel
from jaxseg.inference import maps, normalisation, resampling, sliding_window

# From weights, an image [X, Y, Z, C] and its affine to arrays by the name of the output.
SegmentFn = Callable[[Any, np.ndarray, np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that is fixed about prediction but the weights.

    Attributes:
      model: flax.linen module.
      class_names: of all classes, background first.
      patch_size: of the network; two entries predict slices across the third axis.
      margin: of `sliding_window.Tiling`, one entry per entry of `patch_size`.
      batch_size: patches per call of the network on one device.
      spacing_mm, image_order: grid and spline order that images are resampled to, and with.
      statistics: of `normalisation.normalise`.
      mirror_axes, outputs, temperature: of `maps.patch_maps`.
      buffer_bytes: most memory for the maps of tiles that are being blended.
      axes: which RAS+ axis each axis of the network's grid runs along.
      crop, normalise_first, coarse_apart: of `data.preprocess.Plan`.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    patch_size: tuple[int, ...]
    margin: tuple[int, ...]
    batch_size: int
    spacing_mm: tuple[float, ...]
    image_order: int
    statistics: tuple[normalisation.Statistics, ...]
    mirror_axes: tuple[int, ...] = ()
    outputs: tuple[str, ...] = ("label",)
    temperature: float = 1.0
    buffer_bytes: int = 1 << 30
    axes: tuple[int, ...] = dataclasses.field(default=(0, 1, 2), repr=False)
    crop: bool = dataclasses.field(default=False, repr=False)
    normalise_first: bool = dataclasses.field(default=False, repr=False)
    coarse_apart: bool = dataclasses.field(default=False, repr=False)

    @property
    def axis_order(self) -> tuple[int, int, int]:
        """Which axis of a volume tiles are streamed along, and the other two."""
        order = (2, 0, 1) if len(self.patch_size) == 2 else (0, 1, 2)
        first, second, third = (self.axes[axis] for axis in order)
        return first, second, third


def segment_volume(
    variables: Any,
    volume: jax.Array,
    size: jax.Array,
    grid: jax.Array,
    coarse: int | jax.Array,
    part: int | jax.Array,
    *,
    recipe: Recipe,
    grid_box: Sequence[int],
    num_parts: int,
) -> dict[str, jax.Array]:
    """The whole prediction: normalise, resample, tile, network, blend, resample back, argmax.

    Args:
      variables: of `maps.patch_maps`.
      volume: [X, Y, Z, C] float32 in RAS+ axes.
      size: [3] int32, voxels of the volume that count; the rest must be finite.
      grid: [3] int32, size of the network's grid, from `geometry.resampled_shape`.
      coarse: of `geometry.coarse_axis`.
      part: which of `num_parts` equal parts of the first axis of `recipe.axis_order` to do.
      recipe: Recipe.
      grid_box: array shape that holds the network's grid.
      num_parts: Python int.
    Returns:
      Dict from each of `recipe.outputs` to [ceil(S0 / num_parts), S1, S2, ...] with the axes of
      the volume in `recipe.axis_order`; undefined beyond `size`.
    """
    order = recipe.axis_order
    volume = jnp.transpose(volume, (*order, 3))
    size, grid = (sizes[jnp.array(order)] for sizes in (size, grid))
    is_coarse = jnp.array(order) == coarse
    source_box, grid_box = volume.shape[:3], tuple(grid_box[axis] for axis in order)
    if recipe.normalise_first:
        volume = normalisation.normalise(volume, size, recipe.statistics)
    image = resampling.resample(volume, size, grid, is_coarse, grid_box, recipe.image_order)
    if not recipe.normalise_first:
        image = normalisation.normalise(image, grid, recipe.statistics)
    tiling = sliding_window.create_tiling(
        recipe.patch_size, recipe.margin, recipe.batch_size, grid_box[0]
    )
    patch_fn = functools.partial(_patch_maps, recipe, variables)
    emit_fn = functools.partial(
        maps.voxel_outputs,
        num_classes=len(recipe.class_names),
        outputs=recipe.outputs,
        temperature=recipe.temperature,
    )
    return sliding_window.predict_volume(
        patch_fn,
        emit_fn,
        image,
        grid,
        size,
        is_coarse,
        (part, num_parts),
        tiling=tiling,
        source_box=source_box,
        num_strips=sliding_window.num_strips_within(
            recipe.buffer_bytes, patch_fn, image.shape, source_box, tiling
        ),
    )


def _patch_maps(recipe, variables, patches):
    slices = len(recipe.patch_size) == 2
    images = patches.reshape(-1, *patches.shape[2:]) if slices else patches
    made = maps.patch_maps(
        recipe.model,
        variables,
        images,
        mirror_axes=recipe.mirror_axes,
        outputs=recipe.outputs,
        temperature=recipe.temperature,
        class_names=recipe.class_names,
    )
    return made.reshape(*patches.shape[:2], *made.shape[1:]) if slices else made


def create_segment_fn(recipe: Recipe) -> SegmentFn:
    """Prepares prediction on all devices of this process; each does a part of every volume.

    Args:
      recipe: Recipe.
    Returns:
      Function (variables, image, affine) -> dict. image is [X, Y, Z, C] float32 on any grid and
      affine its [4, 4] (mm); the dict holds each of `recipe.outputs` on that grid, but for "sample"
      (see `sampled`). It compiles once for all volumes of about the same shape and spacing, and
      raises ValueError for an axis of more than some 32,000 voxels.
    """
    num_parts = jax.local_device_count()

    @functools.cache
    def mapped(grid_box):
        return parallel.pmap_parts(
            functools.partial(segment_volume, recipe=recipe, grid_box=grid_box, num_parts=num_parts)
        )

    def segment(variables, image, affine):
        whole, canonical_affine = geometry.to_canonical(image, affine)
        box = _kept_box(whole, recipe)
        canonical = whole[box]
        size = canonical.shape[:3]
        spacing_mm = geometry.spacing_mm_from_affine(canonical_affine)
        grid = geometry.resampled_shape(size, spacing_mm, recipe.spacing_mm)
        if max(2 * n * m for n, m in zip(size, grid, strict=True)) >= 2**31:
            raise ValueError(f"a volume of {size} voxels has too long an axis: cut it into tiles")
        parts = mapped(resampling.box_of(grid))(
            variables,
            resampling.boxed(canonical),
            np.array(size, np.int32),
            np.array(grid, np.int32),
            coarse_axis(spacing_mm, recipe),
            np.arange(num_parts),
        )
        joined = {
            name: np.moveaxis(
                _joined(np.asarray(value), size, recipe), (0, 1, 2), recipe.axis_order
            )
            for name, value in parts.items()
        }
        return {
            name: value
            if name == "sample"
            else geometry.from_canonical(_pasted(name, value, whole.shape[:3], box), affine)
            for name, value in joined.items()
        }

    return segment


def coarse_axis(spacing_mm: Any, recipe: Recipe) -> Any:
    """What `segment_volume` takes for voxels of a spacing, [3] of NumPy or JAX."""
    if not recipe.coarse_apart:
        return np.int32(-1)
    return geometry.coarse_axis(spacing_mm, np.asarray(recipe.spacing_mm, spacing_mm.dtype))


def sampled(label: np.ndarray, image: np.ndarray, affine: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The voxels of a label that the output "sample" has logits of, in the same order.

    Args:
      label: [X, Y, Z].
      image: [X, Y, Z, C] that was segmented.
      affine: [4, 4] of both.
      recipe: Recipe.
    """
    label, _ = geometry.to_canonical(label, affine)
    label = label[_kept_box(geometry.to_canonical(image, affine)[0], recipe)]
    axis = recipe.axis_order[2]
    stride = maps.sample_stride(resampling.bucket(label.shape[axis]))
    return label[(slice(None),) * axis + (slice(None, None, stride),)]


def _kept_box(canonical, recipe):
    """The part of a volume in RAS+ axes that the network sees."""
    return geometry.nonzero_box(canonical) if recipe.crop else (slice(None),) * 3


def _pasted(name, value, shape, box):
    """An output of a part of a volume as one of the whole: all around it is surely background."""
    if value.shape[:3] == shape:
        return value
    whole = np.zeros((*shape, *value.shape[3:]), value.dtype)
    if name == "confidence":
        whole[...] = 1
    elif name == "probs":
        whole[..., 0] = 1
    whole[box] = value
    return whole


def _joined(parts, size, recipe):
    """Puts the devices' parts [D, ceil(S0 / D), S1, S2, ...] together, without what is beyond."""
    first, second, third = (size[axis] for axis in recipe.axis_order)
    stride = -(-resampling.bucket(third) // parts.shape[3])  # of a "sample", else 1
    num_parts = len(parts)
    shares = (sliding_window.share(first, index, num_parts) for index in range(num_parts))
    pieces = [
        part[: end - start, :second, : -(-third // stride)]
        for part, (start, end) in zip(parts, shares, strict=True)
    ]
    return np.concatenate(pieces) if num_parts > 1 else pieces[0]
