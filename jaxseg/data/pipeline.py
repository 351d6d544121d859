"""The training batch at step t as a pure function of (seed, t, global batch size)."""

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from jaxseg.data.augment import Options, augment
from jaxseg.data.builder import CaseStore
from jaxseg.data.prepared_case import PreparedCase
from jaxseg.data.regions import num_around_foreground, sample_region
from jaxseg.training.augment import region_size

# Batches that are ready before they are asked for.
READY_BATCHES = 2


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
    augments: bool = True,
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
      augments: whether augmented patches are yielded, or the regions that the training step makes
        them of.
      process_index, process_count: which part of each batch.
    Returns:
      Iterator of dicts of numpy arrays: image [b, *P, C] float32, label [b, *P] int32 and valid
      [b, *P] float32: the weight of a voxel, 0 outside the scan. Of regions, the same of [b, *R]
      with labels as they are stored, uint8, and example [b, 1] int32, the number in the run.
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
        number = tf.cast(example, tf.int32)
        if augments:
            image, label, valid = cut(image, label, valid, tf.stack([seed, number]))
            return {"image": image, "label": label, "valid": valid}
        label = tf.cast(label, tf.uint8)
        return {"image": image, "label": label, "valid": valid, "example": number[tf.newaxis]}

    positions = tf.data.Dataset.range(start_step * local_size, num_steps * local_size)
    examples = positions.map(load, num_parallel_calls=os.cpu_count() or 1, deterministic=True)
    batches = examples.batch(local_size, drop_remainder=True).prefetch(READY_BATCHES)
    return _raising(batches.with_options(_untuned()).as_numpy_iterator(), failures)


def _untuned():
    """Options without tf.data's tuning, whose thread may take a minute to notice the end."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def _raising(batches, failures):
    """The batches; where a Python function of theirs failed, its error instead of TensorFlow's."""
    try:
        yield from batches
    except tf.errors.OpError as error:
        if not failures:
            raise
        raise failures[0] from error
