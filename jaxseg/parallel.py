"""Spreads a step over devices and processes. The only file that names `pmap`."""

import collections
import dataclasses
import faulthandler
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxseg.problem import Problem

AXIS_NAME = "batch"
SPACE_AXIS = "space"
MEMBER_AXIS = "member"

# A process that is not heard of for so long has died, and the others stop.
HEARTBEAT_TIMEOUT_S = 30
# The first process evaluates; the others wait for it.
SHUTDOWN_TIMEOUT_S = 7 * 24 * 3600

Tree = Any  # of arrays


class ProcessProblem(Problem, RuntimeError):
    """The processes of a run can not be joined; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which device has which part of batch, members and space.

    Attributes:
      mesh: of all devices, with the axis "batch" and, where they can be used, "member" and "space".
        All members and all parts of an image lie within one process.
      has_members: whether leaves of state and batch have an axis of members.
    """

    mesh: Mesh
    has_members: bool = False

    @property
    def is_pmap(self) -> bool:
        return self.mesh.axis_names == (AXIS_NAME,)

    @property
    def compiles_ahead(self) -> bool:
        """Whether steps compile before there is a batch: not those of pmap over processes."""
        return not self.is_pmap or jax.process_count() == 1

    @property
    def state_spec(self) -> PartitionSpec:
        """Of a leaf of the state: [...], or [M, ...]."""
        split = self.has_members and not self.is_pmap
        return PartitionSpec(MEMBER_AXIS) if split else PartitionSpec()

    @property
    def batch_spec(self) -> PartitionSpec:
        """Of a leaf of a batch: [devices along "batch", (M,) B per device, X, ...]."""
        if self.is_pmap:
            return PartitionSpec(AXIS_NAME)
        members = (MEMBER_AXIS,) if self.has_members else ()
        return PartitionSpec(AXIS_NAME, *members, None, SPACE_AXIS)

    @property
    def num_batch_parts(self) -> int:
        """Into how many parts devices split the batch."""
        return self.mesh.shape[AXIS_NAME]


def create_layout(
    mode: str = "pmap",
    num_members: int = 1,
    space: int = 1,
    devices: Sequence[Any] | None = None,
) -> Layout:
    """Decides who does what.

    Args:
      mode: "pmap", where devices share the batch alone, or "shard_map", where they share the
        members of an ensemble and the images too.
      num_members: as many devices take members of their own as divide that number.
      space: devices that share an image along its first spatial axis.
      devices: None for those of all processes.
    Returns:
      Layout.
    Raises:
      ValueError: `space` does not divide the devices of a process.
    """
    has_members = num_members > 1
    of_all = jax.devices() if devices is None else devices
    order = np.asarray(sorted(of_all, key=lambda d: (d.process_index, d.id)))
    if mode == "pmap":
        return Layout(Mesh(order, (AXIS_NAME,)), has_members)
    num_local = len(order) // len({device.process_index for device in order})
    if num_local % space:
        raise ValueError(
            f"{num_local} device(s) of a process can not share images by {space}: set "
            "--config.parallel.space to a divisor"
        )
    members = math.gcd(num_members, num_local // space)
    shape = (-1, members, space)
    return Layout(Mesh(order.reshape(shape), (AXIS_NAME, MEMBER_AXIS, SPACE_AXIS)), has_members)


def map_train_step(step: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """Maps (state, batch, key, learning_rate) -> (state, metrics) over all devices.

    It reuses the old state's memory. State, key, learning rate and metrics are the same on all
    devices that share a batch. `step` must have reduced whatever differs per device: neither
    `pmap` nor `shard_map` notices if it has not.
    """
    if layout.is_pmap:
        return jax.pmap(
            step,
            axis_name=AXIS_NAME,
            in_axes=(None, 0, None, None),
            out_axes=(None, None),
            donate_argnums=0,
        )
    own = layout.state_spec
    return _shard_mapped(step, layout, (own, layout.batch_spec, own, own), (own, own), donated=0)


def map_eval_step(step: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """Maps (state, batch) -> sums, the same on all devices that share a batch."""
    if layout.is_pmap:
        return jax.pmap(step, axis_name=AXIS_NAME, in_axes=(None, 0), out_axes=None)
    own = layout.state_spec
    return _shard_mapped(step, layout, (own, layout.batch_spec), own)


def _shard_mapped(step, layout, in_specs, out_specs, donated=()):
    def on_device(state, batch, *rest):
        return step(state, jax.tree.map(lambda x: x[0], batch), *rest)

    mapped = jax.shard_map(
        on_device, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donated)


def pmap_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps (variables, volume, size, grid, coarse, part) over the local devices.

    `part` and what is returned have a leading axis of devices, the rest goes to all of them.
    """
    return jax.pmap(
        function,
        axis_name=AXIS_NAME,
        in_axes=(None, None, None, None, None, 0),
        devices=jax.local_devices(),
    )


def described(tree: Tree, layout: Layout) -> Tree:
    """Shapes and dtypes of a state, or of what else each member has, as `place` places it."""
    return _described(tree, NamedSharding(layout.mesh, layout.state_spec))


def described_batch(tree: Tree, layout: Layout) -> Tree:
    """Shapes and dtypes of leaves [B, ...] of the batch of all processes, as `shard` places them.

    With an axis of members, where the layout has them, leaves are [M, B, ...].
    """
    num_parts, axis = layout.num_batch_parts, 1 if layout.has_members else 0

    def spread(x):
        shape = (*x.shape[:axis], x.shape[axis] // num_parts, *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct((num_parts, *shape), x.dtype)

    tree = jax.tree.map(spread, tree)
    return _described(tree, NamedSharding(layout.mesh, layout.batch_spec))


def _described(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def place(tree: Tree, layout: Layout) -> Tree:
    """Places a state, or what else each member has, as the mapped steps return it."""
    # device_put takes no keys to the devices of other processes.
    sharding = NamedSharding(layout.mesh, layout.state_spec)
    return jax.jit(lambda tree: tree, out_shardings=sharding)(tree)


def joined(tree: Tree, layout: Layout) -> Tree:
    """A state that a mapped step has returned, as `place` made it: one array of all processes.

    `pmap` returns to each process what its own devices hold.
    """
    if not layout.is_pmap or jax.process_count() == 1:
        return tree
    return multihost_utils.host_local_array_to_global_array(tree, layout.mesh, layout.state_spec)


def replicate(tree: Tree) -> Tree:
    """Places a tree of arrays on every device of this process."""
    mesh = Mesh(np.asarray(jax.local_devices()), (AXIS_NAME,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Tree, layout: Layout) -> Tree:
    """Splits every leaf, [B, ...] or [M, B, ...], over the devices of this process.

    The copy to the devices has begun, not necessarily ended, when this returns.

    Raises:
      ValueError: B is not divisible by the number of devices that share it.
    """
    num_parts = layout.num_batch_parts // jax.process_count()
    sharding = NamedSharding(layout.mesh, layout.batch_spec)
    axis = 1 if layout.has_members else 0

    def spread(x):
        size = x.shape[axis]
        if size % num_parts:
            raise ValueError(
                f"a batch of {size} can not be split over {num_parts} devices: "
                f"set --config.train.batch_size to a multiple of {num_parts}"
            )
        parts = x.reshape(*x.shape[:axis], num_parts, -1, *x.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, np.moveaxis(parts, axis, 0))

    return jax.tree.map(spread, batch)


def prefetch_to_device(batches: Iterable[Tree], layout: Layout, size: int = 2) -> Iterator[Tree]:
    """Yields sharded batches; of the next ones, `size - 1` are already under way to the devices."""
    batches = iter(batches)
    place_next = functools.partial(shard, layout=layout)
    queue = collections.deque(place_next(batch) for batch in itertools.islice(batches, size))
    while queue:
        yield queue.popleft()
        queue.extend(place_next(batch) for batch in itertools.islice(batches, 1))


def gather_from_processes(array: np.ndarray) -> np.ndarray:
    """Stacks what every process has: [...] becomes [processes, ...] NumPy, in each of them."""
    if jax.process_count() == 1:
        return np.asarray(array)[np.newaxis]
    array = np.ascontiguousarray(array)
    gathered = multihost_utils.process_allgather(array.view(np.uint8))  # JAX rounds float64
    return gathered.view(array.dtype)


def barrier(name: str) -> None:
    """Waits until every process has come here.

    On CPUs gloo gives up after XLA's `xla_cpu_collective_timeout_seconds`, half an hour.
    """
    multihost_utils.sync_global_devices(name)


def join_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Makes this one of several processes, whose devices become one set.

    Args:
      coordinator: "host:port" of the first; None lets JAX ask Slurm, OpenMPI, GKE or the TPU pod.
      num_processes, process_id: how many there are, and which this is; None likewise.
    Raises:
      ProcessProblem: there is no such environment, or the others do not come.
    """
    faulthandler.disable()  # absl's: its stacks of all threads would bury JAX's last words
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessProblem(
            f"the processes could not be joined: {error}; where there is no Slurm, OpenMPI, GKE or "
            "TPU pod, give --coordinator=HOST:PORT --num_processes=N --process_id=I to each"
        ) from error


def has_lost_another(error: Exception) -> bool:
    """Whether a process was lost; what gloo says of it is raised as errors of several types."""
    text = str(error)
    is_lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
    return is_lost or "Gloo" in text
