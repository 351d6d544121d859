"""What a training run carries from one step to the next."""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that changes while training, and nothing else.

    Attributes:
      step: number of optimiser updates done, int32 scalar.
      params: float32 parameters.
      batch_stats: running statistics of batch normalisation; {} without it.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def create_train_states(
    model: nn.Module,
    tx: optax.GradientTransformation,
    keys: Iterable[jax.Array],
    image_shape: Sequence[int],
) -> list[TrainState]:
    """Initial states, each a pure function of its key.

    Args:
      model: flax.linen module.
      tx: optax.GradientTransformation.
      keys: typed PRNG keys.
      image_shape: shape of one training image, (*S, C).
    Returns:
      List of TrainState.
    """
    init = jax.jit(model.init)

    def create(key):
        variables = init(key, jnp.zeros((1, *image_shape)))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(params),
        )

    return [create(key) for key in keys]
