"""Spreads a step over devices. The only file that names `pmap`."""

import collections
import itertools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS_NAME = "batch"


def pmap_train_step(step):
    """Maps (state, batch, key) -> (state, metrics) over all devices; reuses the old state's memory.

    State, key and metrics are replicated; batch leaves are [devices, B per device, ...]. `step`
    must have reduced whatever differs per device: `pmap` does not notice if it has not.
    """
    return jax.pmap(
        step, axis_name=AXIS_NAME, in_axes=(None, 0, None), out_axes=(None, None), donate_argnums=0
    )


def pmap_eval_step(step):
    """Maps (state, batch) -> sums, replicated."""
    return jax.pmap(step, axis_name=AXIS_NAME, in_axes=(None, 0), out_axes=None)


def pmap_parts(function):
    """Maps (variables, volume, size, grid, part) over the local devices, each with its own part.

    `part` and what is returned have a leading axis of devices, the rest goes to all of them.
    """
    return jax.pmap(
        function,
        axis_name=AXIS_NAME,
        in_axes=(None, None, None, None, 0),
        devices=jax.local_devices(),
    )


def replicate(tree):
    """Places a tree of arrays on every device, as the mapped steps return it."""
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def shard(batch):
    """Splits every leaf [B, ...] over the local devices: [devices, B per device, ...].

    The copy to the devices has begun, not necessarily ended, when this returns.

    Raises:
      ValueError: B is not divisible by the number of local devices.
    """
    num_devices = jax.local_device_count()
    sharding = NamedSharding(_mesh(), PartitionSpec(AXIS_NAME))

    def place(x):
        if len(x) % num_devices:
            raise ValueError(
                f"a batch of {len(x)} can not be split over {num_devices} devices: "
                f"set --config.train.batch_size to a multiple of {num_devices}"
            )
        parts = x.reshape(num_devices, -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, parts)

    return jax.tree.map(place, batch)


def prefetch_to_device(batches, size=2):
    """Yields sharded batches; of the next ones, `size - 1` are already under way to the devices."""
    batches = iter(batches)
    queue = collections.deque(shard(batch) for batch in itertools.islice(batches, size))
    while queue:
        yield queue.popleft()
        queue.extend(shard(batch) for batch in itertools.islice(batches, 1))


def _mesh():
    return Mesh(np.asarray(jax.devices()), (AXIS_NAME,))
