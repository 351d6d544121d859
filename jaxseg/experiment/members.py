"""The networks that one run trains together: what tells them apart, and one of them alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxseg.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Member:
    """What tells the networks apart that one run trains.

    Attributes:
      seed: of its initial weights and its batches.
      fold: of its split.
      learning_rate: the highest.
    """

    seed: int
    fold: int
    learning_rate: float


def kind_of_members(config: ConfigDict) -> str:
    """Why a run has several members: "seeds", "folds" or "rates"; "single" if it has one."""
    if config.ensemble.size > 1:
        return "seeds"
    if config.ensemble.folds:
        return "folds"
    return "rates" if isinstance(config.optim.learning_rate, list | tuple) else "single"


def members_of(config: ConfigDict) -> tuple[Member, ...]:
    """The members that one run trains, as a tuple; each is what that run alone would train."""
    seed, fold, rate = config.seed, config.split.fold, config.optim.learning_rate
    if config.ensemble.folds:
        return tuple(Member(seed, fold, rate) for fold in range(config.ensemble.folds))
    rates = rate if isinstance(rate, list | tuple) else (rate,)
    return tuple(
        Member(seed + index, fold, rate) for rate in rates for index in range(config.ensemble.size)
    )


def learning_rates_of(members: Sequence[Member]) -> np.ndarray:
    """The highest learning rate of each member, [M] float32; [] of a single one."""
    rates = np.array([member.learning_rate for member in members], np.float32)
    return rates if len(members) > 1 else rates[0]


def member_weights(state: TrainState, num_members: int) -> dict[str, Any]:
    """The weights of a TrainState as `program` takes them.

    Args:
      state: TrainState; its leaves have a leading axis of members if there are several.
      num_members: of the run.
    Returns:
      {"params", "batch_stats"}: leaves [num_members, ...].
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return variables if num_members > 1 else jax.tree.map(lambda x: x[None], variables)


def member_alone(variables: Any, index: int) -> Any:
    """One of several sets of weights, leaves [M, ...], as an ensemble of one."""
    return jax.tree.map(lambda x: x[index : index + 1], variables)
