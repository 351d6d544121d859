"""What memory a training step takes, asked of its compiler before anything is trained."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxseg import parallel
from jaxseg.config import ConfigProblems
from jaxseg.data.memory import available_bytes
from jaxseg.experiment import build
from jaxseg.experiment.members import members_of

# What is said where a compiler, or a device, finds no room.
_NO_ROOM = "RESOURCE_EXHAUSTED"


def compile_step(
    train_step: Any,
    config: ConfigDict,
    members: tuple[Any, Any, Any],
    num_channels: int,
    layout: parallel.Layout,
    options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles a training step; nothing is computed.

    Args:
      train_step: of `build.create_steps`.
      config: ConfigDict that leaves nothing open.
      members: (state, keys, learning rates), placed or described.
      num_channels: of the images.
      layout: of the devices, which need not be there.
      options: of the compiler.
    Raises:
      ConfigProblems: the compiler itself found no room for it.
    """
    state, keys, rates = members
    batch = _described_batch(config, num_channels, layout)
    try:
        return train_step.lower(state, batch, keys, rates).compile(dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if _NO_ROOM not in str(error):
            raise
        raise ConfigProblems([f"{_of(config)} does not fit into memory: {error}"]) from None


def step_bytes(
    config: ConfigDict,
    num_channels: int,
    num_classes: int,
    layout: parallel.Layout,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Bytes that the training step of a config takes on each device of a layout.

    Args, Raises: as `compile_step`.
    """
    model, tx = build.create_model_for(config, num_classes), build.create_tx(config)
    shape = (*config.data.patch_size, num_channels)
    members = jax.eval_shape(lambda: build.create_members(config, model, tx, shape))
    train_step, _ = build.create_steps(config, model, tx, layout)
    state, keys, rates = (parallel.described(tree, layout) for tree in members)
    members = (state, keys, rates)
    return bytes_of(compile_step(train_step, config, members, num_channels, layout, options))


def bytes_of(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program takes on each device: what it is given, returns and needs besides."""
    of: Any = compiled.memory_analysis()
    given_and_returned = of.argument_size_in_bytes + of.output_size_in_bytes
    reused = of.alias_size_in_bytes
    return given_and_returned - reused + of.temp_size_in_bytes + of.generated_code_size_in_bytes


def bytes_there() -> float:
    """Memory of each device that JAX may use, of all processes the least; infinite if unknown."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(known and "bytes_limit" in known for known in stats):
        here = min(float(known["bytes_limit"]) for known in stats)
    else:
        here = available_bytes() / len(stats)
    return float(parallel.gather_from_processes(np.array([here])).min())


def refuse_too_large(compiled: jax.stages.Compiled, config: ConfigDict) -> str:
    """Refuses a training step that the devices can not hold.

    Returns:
      A line that says what it takes of what is there.
    Raises:
      ConfigProblems: it is such a one.
    """
    taken, there = bytes_of(compiled), bytes_there()
    line = f"takes {taken / 2**30:.3g} GiB of {there / 2**30:.3g} GiB on a device"
    if taken > there:
        raise ConfigProblems(
            [
                f"{_of(config)} {line}: lower train.batch_size or data.patch_size, or set "
                "optim.accumulate_steps, model.remat or model.dtype=bfloat16"
            ]
        )
    return f"a training step {line}"


def _of(config):
    size = " x ".join(map(str, config.data.patch_size))
    return f"a training step with {config.train.batch_size} patches of {size} voxels"


def _described_batch(config, num_channels, layout):
    of_members = (len(members_of(config)),) if layout.has_members else ()
    leaves = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*of_members, *leaf.shape), leaf.dtype),
        build.described_batch(config, num_channels),
    )
    return parallel.described_batch(leaves, layout)
