"""The training batch at step t as a pure function of (seed, t, global batch size)."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from jaxseg.data.augment import Options, augment, region_size
from jaxseg.data.builder import CaseStore, PreparedCase
from jaxseg.geometry import mirrored


def train_batches(
    store: CaseStore | Mapping[str, PreparedCase],
    case_ids: Iterable[str],
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    batch_size: int,
    patch_size: Sequence[int],
    num_channels: int,
    foreground_fraction: float,
    augment_params: Mapping[str, Options],
    foreground_by_place: bool = False,
    masked: Sequence[bool] = (),
    margin: Sequence[int] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's part of the batches `start_step` ... `num_steps - 1`.

    Example i of the run (i = t * batch_size + place in the batch) is drawn from (seed, i) alone:
    its case from a permutation of the cases that is new in every epoch, its patch and its
    augmentation from a generator of its own. Nothing is shuffled or kept between examples, so any
    step can be the first, at no cost.

    Args:
      store: mapping from case id to PreparedCase.
      case_ids: training cases.
      seed: non-negative int.
      start_step, num_steps: first step, and the step to stop before.
      batch_size: global; each process yields batch_size / process_count examples a step.
      patch_size: (X, Y) for slices of the third axis, (X, Y, Z) for volumes.
      num_channels: C of the images.
      foreground_fraction: probability that a patch is drawn around a foreground voxel.
      augment_params: as for `jaxseg.data.augment.augment`.
      foreground_by_place: whether these patches are the last of every batch, as many as
        `num_around_foreground` says, instead.
      masked: as for `jaxseg.data.augment.augment`.
      margin: as for `sample_region`.
      process_index, process_count: which part of each batch.
    Returns:
      Iterator of dicts of numpy arrays: image [b, *P, C] float32, label [b, *P] int32 and valid
      [b, *P] float32: the weight of a voxel, 0 outside the scan.
    Raises:
      OSError: On iteration, a case of the store can not be read.
    """
    local_size = batch_size // process_count
    region = region_size(patch_size, augment_params)
    cut = functools.partial(augment, patch_size=patch_size, params=augment_params, masked=masked)
    case_ids = sorted(case_ids)

    failures: list[Exception] = []

    def chance(example):
        """How likely a patch is drawn around a foreground voxel."""
        if not foreground_by_place:
            return foreground_fraction
        number = num_around_foreground(batch_size, foreground_fraction)
        return float(example % batch_size >= batch_size - number)

    def fetch(example, case_index):
        rng = np.random.Generator(np.random.Philox(key=[seed, example]))
        try:
            case = store[case_ids[case_index]]
            return sample_region(case, rng, region, patch_size, chance(example), margin=margin)
        except Exception as error:
            failures.append(error)
            raise

    @tf.autograph.experimental.do_not_convert  # there is nothing to convert, and it takes a second
    def load(position):
        step, place = position // local_size, position % local_size
        example = step * batch_size + process_index * local_size + place
        epoch, index = example // len(case_ids), example % len(case_ids)
        case_index = tf.random.experimental.index_shuffle(
            tf.cast(index, tf.int32), [seed, tf.cast(epoch, tf.int32)], len(case_ids) - 1
        )
        image, label, valid = tf.numpy_function(
            fetch, [example, case_index], [tf.float32, tf.int32, tf.float32], stateful=False
        )
        image = tf.ensure_shape(image, (*region, num_channels))
        label, valid = tf.ensure_shape(label, region), tf.ensure_shape(valid, region)
        example_seed = tf.stack([seed, tf.cast(example, tf.int32)])
        image, label, valid = cut(image, label, valid, example_seed)
        return {"image": image, "label": label, "valid": valid}

    positions = tf.data.Dataset.range(start_step * local_size, num_steps * local_size)
    batches = (
        positions.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(local_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
        .as_numpy_iterator()
    )
    return _raising(batches, failures)


def num_around_foreground(batch_size: int, fraction: float) -> int:
    """How many patches of a batch are drawn around a foreground voxel, as in nnU-Net v2.

    Half a patch is rounded to the even number of those that are not: of two patches a third is one.
    """
    return batch_size - round(batch_size * (1 - fraction))


def _raising(batches, failures):
    """The batches; where a Python function of theirs failed, its error instead of TensorFlow's."""
    try:
        yield from batches
    except tf.errors.OpError as error:
        if not failures:
            raise
        raise failures[0] from error


def sample_region(
    case: PreparedCase,
    rng: np.random.Generator,
    region: Sequence[int],
    patch_size: Sequence[int],
    foreground_fraction: float,
    *,
    margin: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a patch of a case and cuts the larger region around it that augmentation needs.

    The patch, without its margin, lies inside the scan where the scan is larger, and is centred on
    it where it is not. Beyond the scan are zeros, or with a margin the mirrored image, as
    Ronneberger et al. 2015 feed a network that labels only the centre of what it sees.

    Args:
      case: PreparedCase.
      rng: numpy Generator.
      region: size to cut, 2 or 3 entries.
      patch_size: of the patch in the region's centre, as many entries.
      foreground_fraction: probability that the patch is drawn around a voxel of a foreground class,
        all classes that are present being equally likely.
      margin: voxels at each side of the patch that get no label from the network, one entry per
        axis; () means none.
    Returns:
      (image [*R, C] float32, label [*R] int32, valid [*R] float32): valid is the voxel's weight, 1
      where the case has none; label and valid are 0 outside the scan.
    """
    shape = case.label.shape
    if case.locations and rng.random() < foreground_fraction:
        voxels = case.locations[rng.integers(len(case.locations))]
        voxel = voxels[rng.integers(len(voxels))]
    else:
        voxel = rng.integers(shape)
    # A slice is a box of one voxel across.
    across = (slice(voxel[2], voxel[2] + 1),) if len(patch_size) == 2 else ()

    def read(array, box):
        values = array[*box, *across]
        return values[:, :, 0] if across else values

    inside, target, spans = [], [], []
    for axis, (patch, width) in enumerate(zip(patch_size, region, strict=True)):
        centre, size, edge = voxel[axis], shape[axis], margin[axis] if margin else 0
        window = patch - 2 * edge
        window_start = (
            np.clip(centre - window // 2, 0, size - window)
            if size > window
            else (size - window) // 2
        )
        start = int(window_start) - edge - (width - patch) // 2
        low, high = max(start, 0), min(start + width, size)
        inside.append(slice(low, high))
        target.append(slice(low - start, high - start))
        spans.append((start, start + width, size))

    if any(margin):
        places = [mirrored(np.arange(start, stop), size) for start, stop, size in spans]
        seen = read(case.image, [slice(p.min(), p.max() + 1) for p in places])
        region_image = seen[np.ix_(*(p - p.min() for p in places))]
    else:
        region_image = np.zeros((*region, case.image.shape[-1]), np.float32)
        region_image[*target] = read(case.image, inside)
    region_label = np.zeros(region, np.int32)
    region_valid = np.zeros(region, np.float32)
    region_label[*target] = read(case.label, inside)
    region_valid[*target] = 1 if case.weight is None else read(case.weight, inside)
    return region_image, region_label, region_valid
