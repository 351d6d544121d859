"""Whole cases through a network that sees patches: tile, predict, blend. Pure functions."""

import itertools

import numpy as np


def tile_starts(size, patch):
    """Starts of patches that cover an axis with at least half overlap, evenly spread.

    Args:
      size: length of the axis, at least `patch`.
      patch: length of a patch.
    Returns:
      Increasing list of ints; the first is 0, the last `size - patch`.
    """
    step = max(patch // 2, 1)
    num_tiles = 1 if size == patch else 1 + -(-(size - patch) // step)
    return [round(start) for start in np.linspace(0, size - patch, num_tiles)]


def blending_weights(patch_size):
    """Gaussian weights that trust a patch's centre more than its border.

    Args:
      patch_size: spatial shape.
    Returns:
      [*patch_size] float32 in (0, 1]; standard deviation one eighth of each side, as in nnU-Net,
      with a floor of 1e-3, so that a voxel that is only ever at a border keeps a weight.
    """
    weights = np.ones(())
    for size in patch_size:
        distance = (np.arange(size) - (size - 1) / 2) / (size / 8)
        weights = weights[..., None] * np.exp(-0.5 * distance**2)
    return np.maximum(weights / weights.max(), 1e-3).astype(np.float32)


def mirrored_indices(start, stop, size):
    """Continues an axis beyond its ends by mirroring it about its outermost voxels.

    The voxel at the edge is not repeated; beyond the length of the axis it is mirrored again.

    Args:
      start, stop: range of positions, which may begin below 0 and end above `size`.
      size: length of the axis.
    Returns:
      [stop - start] int, the voxel in [0, size) to show at each position.
    """
    period = max(2 * (size - 1), 1)
    position = np.arange(start, stop) % period
    return np.minimum(position, period - position)


def predict_case(predict_fn, image, label, *, patch_size, batch_size, margin=()):
    """Class probabilities of one whole preprocessed case.

    Every batch has the same shape, so the network is compiled once. The case is padded with zeros,
    evenly on both sides, where it is smaller than the patch, as in training. A network that labels
    only the centre of its patch gets overlapping patches with `margin` around what it labels, and
    sees the case mirrored instead, in all padding: the overlap-tile strategy of Ronneberger et al.
    2015.

    Args:
      predict_fn: function from a batch (dict of image [B, *P, C] float32, label [B, *P] int32 and
        valid [B, *P] float32, 0 in the padding and in examples that fill up the last batch) to
        probs [B, *(P - 2 margin), K] float32.
      image: [X, Y, Z, C] float32.
      label: [X, Y, Z] class indices; enters the batches (for the loss), never the prediction.
      patch_size: two entries predict slices along Z, three predict blocks.
      batch_size: patches per batch.
      margin: voxels on each side of the patch that get no probabilities, one entry per axis of the
        patch; () means none.
    Returns:
      [X, Y, Z, K] float32.
    """
    flat = len(patch_size) == 2
    patch = np.array((*patch_size, 1)[:3])
    margin = np.array((*(margin or (0,) * len(patch_size)), 0)[:3])
    window = patch - 2 * margin  # what a patch labels
    missing = np.maximum(window - label.shape, 0)
    padding = np.stack([missing - missing // 2, missing // 2], axis=1)
    shape = tuple(label.shape + missing)
    around = [tuple(pair) for pair in padding + margin[:, None]]
    if margin.any():
        ranges = zip(around, label.shape, strict=True)
        image = image[np.ix_(*(mirrored_indices(-low, n + high, n) for (low, high), n in ranges))]
    else:
        image = np.pad(image, [*around, (0, 0)])
    arrays = {
        "image": image,
        "label": np.pad(label.astype(np.int32), around),
        "valid": np.pad(np.ones(label.shape, np.float32), around),
    }
    starts = list(itertools.product(*map(tile_starts, shape, window)))

    def tile(start, size):
        return tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))

    weights = blending_weights(window[: len(patch_size)]).reshape(*window, 1)

    total, total_weight = None, np.zeros((*shape, 1), np.float32)
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        batch = {}
        for name, array in arrays.items():
            parts = np.stack([array[tile(start, patch)] for start in chosen])
            parts = parts[:, :, :, 0] if flat else parts
            filler = np.zeros((batch_size - len(chosen), *parts.shape[1:]), parts.dtype)
            batch[name] = np.concatenate([parts, filler])
        probs = predict_fn(batch)
        if total is None:
            total = np.zeros((*shape, probs.shape[-1]), np.float32)
        for start, patch_probs in zip(chosen, probs, strict=False):
            total[tile(start, window)] += weights * patch_probs.reshape(*window, -1)
            total_weight[tile(start, window)] += weights
    inside = tile(padding[:, 0], label.shape)
    return total[inside] / total_weight[inside]
