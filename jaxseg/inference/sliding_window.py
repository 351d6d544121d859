"""Whole volumes through a network that sees patches, as one program; pure functions.

Tiles are laid along the first axis, plane by plane, into a buffer that is one tile deep; what no
later tile touches leaves it slice by slice, resampled to the source grid and reduced to a label
there. So logits never exist for the whole volume. All sizes are data, as in `resampling`: one
compiled program serves every volume that fits its arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.geometry import mirrored
from jaxseg.inference.resampling import BUCKET, neighbours

# From patches to their maps, and from a slice of maps to outputs by name: see `predict_volume`.
PatchFn = Callable[[jax.Array], jax.Array]
EmitFn = Callable[[jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How patches cover a volume; one entry per axis, the first is the one that is streamed.

    Attributes:
      patch: what the network sees.
      margin: voxels at each side of it that get no logits.
      step: most voxels from one tile to the next.
      batch_size: tiles per call of the network.
    """

    patch: tuple[int, ...]
    margin: tuple[int, ...]
    step: tuple[int, ...]
    batch_size: int

    @property
    def window(self) -> tuple[int, ...]:
        """What a tile labels."""
        return tuple(p - 2 * m for p, m in zip(self.patch, self.margin, strict=True))

    @property
    def mirrors(self) -> bool:
        """Whether tiles see the volume continued by mirroring, not by zeros."""
        return any(self.margin)


def create_tiling(
    patch_size: Sequence[int], margin: Sequence[int], batch_size: int, num_slices: int
) -> Tiling:
    """Tiles that overlap by half, as in nnU-Net.

    Args:
      patch_size: three entries tile the volume; two tile slices across the first axis, several
        slices at a time.
      margin: as in `Tiling`, one entry per entry of `patch_size`.
      batch_size: patches per call of the network.
      num_slices: most slices there are, when `patch_size` has two entries.
    """
    if len(patch_size) == 3:
        window = (p - 2 * m for p, m in zip(patch_size, margin, strict=True))
        step = tuple(max(w // 2, 1) for w in window)
        return Tiling(tuple(patch_size), tuple(margin), step, batch_size)
    depth = min(batch_size, num_slices)
    plane = create_tiling((1, *patch_size), (0, *margin), max(batch_size // depth, 1), 1)
    return dataclasses.replace(plane, patch=(depth, *patch_size), step=(depth, *plane.step[1:]))


def tile_starts(
    size: jax.Array, window: int, step: int, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Starts of tiles that cover an axis, evenly spread.

    Args:
      size: of the axis, int32 scalar.
      window, step: of a tile, in voxels.
      capacity: length of the result.
    Returns:
      (starts, num_tiles): [capacity] int32, of which the first `num_tiles` count; from 0 to `size -
      window`, or one tile that stands out evenly at both ends.
    """
    span = size - window
    num_tiles = 1 + -(-jnp.maximum(span, 0) // step)
    gaps = jnp.maximum(num_tiles - 1, 1)
    spread = (2 * jnp.arange(capacity) * span + gaps) // (2 * gaps)
    return jnp.where(span > 0, spread, -((1 - span) // 2)), num_tiles


def tile_weights(starts: jax.Array, num_tiles: jax.Array, window: int) -> jax.Array:
    """Gaussian weights along one axis that trust a tile's centre, and sum to 1 in every voxel.

    Args:
      starts, num_tiles: as from `tile_starts`.
      window: length of a tile; the standard deviation is an eighth of it, as in nnU-Net.
    Returns:
      [capacity, window] float32.
    """

    def gaussian(place):
        inside = (place >= 0) & (place < window)
        distance = (place - (window - 1) / 2) / (window / 8)
        return jnp.where(inside, jnp.exp(-0.5 * distance**2), 0.0)

    counted = (jnp.arange(len(starts)) < num_tiles).astype(jnp.float32)
    place = starts[:, None] + jnp.arange(window)
    total = (gaussian(place[..., None] - starts) * counted).sum(-1)
    weights = gaussian(jnp.arange(window)) / jnp.where(total > 0, total, 1)
    return weights * counted[:, None]


def predict_volume(
    patch_fn: PatchFn,
    emit_fn: EmitFn,
    image: jax.Array,
    size: jax.Array,
    source_size: jax.Array,
    coarse: jax.Array,
    part: tuple[int | jax.Array, int],
    *,
    tiling: Tiling,
    source_box: tuple[int, ...],
    num_strips: int,
) -> dict[str, jax.Array]:
    """Tiles, network, blending, resampling to the source grid, and what is made of it there.

    Args:
      patch_fn: function from patches [B, *tiling.patch, C] to logits, or any maps, [B,
        *tiling.window, K] float32.
      emit_fn: function from one slice of blended and resampled maps [S1', S2, K] to a dict of
        arrays [S1', S2, ...].
      image: [*N, C] float32, normalised.
      size, source_size: [3] int32.
      coarse: [3] bool, of `resampling.neighbours`.
      part: (index, number): which of `number` equal parts of the source slices to do.
      tiling: Tiling.
      source_box: spatial shape of the result; a part gets ceil(S0 / number) slices, of which the
        first are its own. `number` must be a Python int.
      num_strips: parts of the second axis, done one after the other with a buffer that is smaller
        by that factor, but for overlap.
    Returns:
      Dict of arrays [ceil(S0 / number), S1, S2, ...]; what lies beyond `source_size` is undefined.
    """
    index, number = part
    part_depth = -(-source_box[0] // number)
    strip_width = -(-source_box[1] // num_strips)
    num_maps = _num_maps(patch_fn, tiling, image.shape[-1])
    work = _Work(
        patch_fn=patch_fn,
        emit_fn=emit_fn,
        image=image,
        axes=tuple(
            map(_Axis, size, source_size, coarse, tiling.window, tiling.step, image.shape[:3])
        ),
        source_size=source_size,
        tiling=tiling,
        buffer_shape=(
            tiling.window[0] + 1,  # one slice from before a tile, to interpolate
            strip_buffer_width(image.shape[1], source_box[1], tiling.window[1], num_strips),
            max(image.shape[2], tiling.window[2]),
            num_maps,
        ),
        source_box=source_box,
    )

    def add_strip(strip, outputs):
        rows = share(source_size[1], strip, num_strips)
        slices = share(source_size[0], index, number)
        return _predict_strip(work, slices, rows, strip_width, outputs)

    maps = jax.ShapeDtypeStruct((strip_width, source_box[2], num_maps), jnp.float32)
    # Strips write their whole width, each over what the last one left beyond its rows; that never
    # reaches over the end, since floor(box (n - 1) / n) + ceil(box / n) is the box.
    outputs = {
        name: jnp.zeros((part_depth, source_box[1], *value.shape[1:]), value.dtype)
        for name, value in jax.eval_shape(emit_fn, maps).items()
    }
    return lax.fori_loop(0, num_strips, add_strip, outputs)


def share(
    size: int | jax.Array, index: int | jax.Array, number: int
) -> tuple[int | jax.Array, int | jax.Array]:
    """First and one past the last of the voxels that part `index` of `number` has."""
    return size * index // number, size * (index + 1) // number


class _Axis:
    """Tiles along one axis, and where the source grid lies on it."""

    def __init__(
        self,
        size: jax.Array,
        source_size: jax.Array,
        coarse: jax.Array,
        window: int,
        step: int,
        capacity: int,
    ):
        self.size, self.window = size, window
        self.neighbours = lambda source: neighbours(source, size, source_size, coarse)
        num = 1 + -(-max(capacity - window, 0) // step)
        self.starts, self.num_tiles = tile_starts(size, window, step, num)
        self.weights = tile_weights(self.starts, self.num_tiles, window)

    def tiles_over(self, source_range: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """First and one past the last tile that touch what a range of source voxels needs."""
        first, _, _ = self.neighbours(source_range[0])
        _, last, _ = self.neighbours(source_range[1] - 1)
        counted = jnp.arange(len(self.starts)) < self.num_tiles
        before = (counted & (self.starts + self.window <= first)).sum()
        up_to = (counted & (self.starts <= last)).sum()
        return before, jnp.where(source_range[1] > source_range[0], up_to, before)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What all tiles of a volume share; fields as in `predict_volume`, and their axes."""

    patch_fn: PatchFn
    emit_fn: EmitFn
    image: jax.Array
    axes: tuple[_Axis, ...]
    source_size: jax.Array
    tiling: Tiling
    buffer_shape: tuple[int, ...]
    source_box: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Strip:
    """Where a buffer lies: tiles along the second axis, and its corner on the network's grid."""

    first_tile: jax.Array
    end_tile: jax.Array
    row: jax.Array
    column: jax.Array


def _predict_strip(work, slices, rows, width, outputs):
    """Does a range of source slices by a range of source rows, plane by plane."""
    depth = work.axes[0]
    first_plane, end_plane = depth.tiles_over(slices)
    first_tile, end_tile = work.axes[1].tiles_over(rows)
    row, column = work.axes[1].starts[first_tile], work.axes[2].starts[0]
    strip = _Strip(first_tile, end_tile, row, column)
    all_slices = jnp.arange(work.source_box[0])
    _, needed, _ = depth.neighbours(all_slices)

    def do_plane(plane, carry):
        buffer, outputs, done = carry
        shift = depth.starts[plane] - depth.starts[jnp.maximum(plane - 1, 0)]
        buffer = _shifted(buffer, jnp.where(plane > first_plane, shift, 0))
        buffer = _add_plane(work, strip, plane, buffer)
        is_last = plane + 1 == depth.num_tiles
        final = jnp.where(is_last, depth.size, depth.starts[plane + 1])
        finished = ((needed < final) & (all_slices < slices[1])).sum()

        def emit(index, outputs):
            place = (index - slices[0], rows[0])
            emitted = work.emit_fn(_source_slice(work, strip, plane, index, rows, width, buffer))
            return {name: _put(outputs[name], value, place) for name, value in emitted.items()}

        outputs = lax.fori_loop(done, finished, emit, outputs)
        return buffer, outputs, jnp.maximum(done, finished)

    carry = jnp.zeros(work.buffer_shape, jnp.float32), outputs, slices[0]
    return lax.fori_loop(first_plane, end_plane, do_plane, carry)[1]


def _add_plane(work, strip, plane, buffer):
    """Adds the weighted maps of all tiles of a plane to the buffer, a batch at a time."""
    _, rows, columns = work.axes
    batch_size = work.tiling.batch_size
    num_tiles = (strip.end_tile - strip.first_tile) * columns.num_tiles

    def add_batch(batch, buffer):
        tile = batch * batch_size + jnp.arange(batch_size)
        row = strip.first_tile + tile // columns.num_tiles
        chosen = (
            jnp.full_like(tile, plane),
            jnp.minimum(row, strip.end_tile - 1),
            tile % columns.num_tiles,
        )
        maps = work.patch_fn(_patches(work, chosen))
        for t in range(batch_size):
            i, j, k = (index[t] for index in chosen)
            first, second, third = (a.weights[n] for a, n in zip(work.axes, (i, j, k), strict=True))
            weight = first[:, None, None] * second[:, None] * third
            weight = jnp.where(tile[t] < num_tiles, weight, 0)[..., None]  # fillers count nothing
            corner = (1, rows.starts[j] - strip.row, columns.starts[k] - strip.column, 0)
            there = lax.dynamic_slice(buffer, corner, maps.shape[1:])
            buffer = lax.dynamic_update_slice(buffer, there + weight * maps[t], corner)
        return buffer

    return lax.fori_loop(0, -(-num_tiles // batch_size), add_batch, buffer)


def _source_slice(work, strip, plane, index, rows, width, buffer):
    """Interpolates one slice of the source grid from the buffer: [width, S2, K]."""
    offset = work.axes[0].starts[plane] - 1
    lower, upper, fraction = work.axes[0].neighbours(index)
    maps = _between(buffer[lower - offset], buffer[upper - offset], fraction)
    row = jnp.minimum(rows[0] + jnp.arange(width), work.source_size[1] - 1)
    lower, upper, fraction = work.axes[1].neighbours(row)
    maps = _between(maps[lower - strip.row], maps[upper - strip.row], fraction[:, None, None])
    column = jnp.arange(work.source_box[2])
    lower, upper, fraction = work.axes[2].neighbours(column)
    lower, upper = lower - strip.column, upper - strip.column
    return _between(maps[:, lower], maps[:, upper], fraction[:, None])


def _between(lower, upper, fraction):
    return lower * (1 - fraction) + upper * fraction


def _put(array, value, place):
    """Writes a slice [S1', ...] into an array [S0, S1, ...] from `place` on."""
    corner = (*place, *[0] * (value.ndim - 1))
    return lax.dynamic_update_slice(array, value[None], corner)


def _shifted(buffer, shift):
    """Moves slices towards the front, in place; the last ones become 0."""
    depth = len(buffer)

    def move(index, buffer):
        source = index + shift
        moved = lax.dynamic_index_in_dim(buffer, jnp.minimum(source, depth - 1), keepdims=False)
        moved = jnp.where(source < depth, moved, 0)
        return lax.dynamic_update_index_in_dim(buffer, moved, index, 0)

    return lax.fori_loop(0, depth, move, buffer)


def _patches(work, tiles):
    """Cuts patches out of the image: [B, *patch, C]."""
    places, inside = [], []
    tiling = work.tiling
    for axis, tile, patch, margin in zip(
        work.axes, tiles, tiling.patch, tiling.margin, strict=True
    ):
        place = axis.starts[tile][:, None] - margin + jnp.arange(patch)
        inside.append((place >= 0) & (place < axis.size))
        clipped = jnp.clip(place, 0, axis.size - 1)
        places.append(mirrored(place, axis.size) if tiling.mirrors else clipped)
    i, j, k = places
    patches = work.image[i[:, :, None, None], j[:, None, :, None], k[:, None, None, :]]
    if tiling.mirrors:
        return patches
    i, j, k = inside
    inside = i[:, :, None, None] & j[:, None, :, None] & k[:, None, None, :]
    return jnp.where(inside[..., None], patches, 0)


def strip_buffer_width(capacity: int, source_capacity: int, window: int, num_strips: int) -> int:
    """Voxels of the second axis that the tiles of one strip reach, at most.

    Args:
      capacity, source_capacity: array sizes along the axis on the network's and the source grid.
      window: of a tile.
      num_strips: as in `predict_volume`.
    """
    whole = max(capacity, window)
    # Arrays are less than a bucket larger than what they hold: see `bucket`.
    per_source_voxel = capacity // max(source_capacity - BUCKET + 1, 1) + 1
    return min(whole, capacity // num_strips + per_source_voxel + 2 * window + 4)


def num_strips_within(
    buffer_bytes: int,
    patch_fn: PatchFn,
    image_shape: Sequence[int],
    source_box: Sequence[int],
    tiling: Tiling,
) -> int:
    """Fewest strips whose buffer takes no more than `buffer_bytes`, or as little as it can.

    Args:
      buffer_bytes: int.
      patch_fn, source_box, tiling: as for `predict_volume`.
      image_shape: [*N, C] of the image.
    """
    num_maps = _num_maps(patch_fn, tiling, image_shape[-1])
    row_bytes = 4 * num_maps * (tiling.window[0] + 1) * max(image_shape[2], tiling.window[2])

    def fits(num_strips):
        width = strip_buffer_width(image_shape[1], source_box[1], tiling.window[1], num_strips)
        return width * row_bytes <= buffer_bytes

    most = max(source_box[1] // max(tiling.window[1] // 2, 1), 1)
    return next(filter(fits, range(1, most)), most)


def _num_maps(patch_fn, tiling, num_channels):
    patch = jax.ShapeDtypeStruct((tiling.batch_size, *tiling.patch, num_channels), jnp.float32)
    return jax.eval_shape(patch_fn, patch).shape[-1]
