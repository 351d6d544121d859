"""Learning-rate schedules and optimisers, as optax transformations."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxseg.problem import Problem

# Root mean square of AdamW's updates, for a learning rate of 1 (Liu et al. 2025).
_ADAMW_RMS = 0.2


class GroupProblem(Problem, ValueError):
    """A parameter group decides about nothing."""


def create_schedule(
    name: str, *, learning_rate: float, num_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """Learning rate as a function of the step.

    Args:
      name: "constant", "polynomial" (power 0.9, Chen et al. 2017; nnU-Net's choice) or "cosine"
        (Loshchilov and Hutter 2017); the last two reach 0 at `num_steps`.
      learning_rate: the highest value.
      num_steps: steps of the whole run, warm-up included.
      warmup_steps: steps of linear increase from 0.
    Returns:
      A function from step to learning rate.
    """
    decay_steps = num_steps - warmup_steps
    decay = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "polynomial": lambda: optax.polynomial_schedule(learning_rate, 0.0, 0.9, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
    }[name]()
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def create_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.99,
    clip_norm: float = 0.0,
    groups: Sequence[tuple[str, float, int]] = (),
) -> optax.GradientTransformation:
    """Gradient transformation: clip, decay weights, step.

    Args:
      name: "sgd" (Nesterov momentum; decay is added to the gradient), "adamw" (decoupled decay,
        Loshchilov and Hutter 2019) or "muon" (the same, but kernels move by their momentum made
        orthogonal, as matrices of all inputs of a channel by channels; Jordan et al. 2024).
      schedule: function from step to learning rate.
      weight_decay: of convolution kernels alone; biases and normalisation are never decayed.
      momentum: of "sgd".
      clip_norm: largest global norm of the gradient; 0 means no clipping.
      groups: tuple of (pattern, factor, first_step). The first pattern that matches the beginning
        of a parameter's path, as "encoder/stage0/conv0/kernel" (`re.match`), multiplies its
        learning rate by the factor, and the parameter is frozen before `first_step`, or for ever if
        the factor is 0: it stays to the bit, and neither its gradient nor its size counts for
        clipping, moments or decay. Other parameters are (1, 0).
    Returns:
      An optax.GradientTransformation. Its `init` raises GroupProblem if a pattern decides about no
      parameter.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, mask=_is_kernel)
    if name in ("adamw", "muon"):
        moments = optax.scale_by_adam() if name == "adamw" else _muon_or_adam()
        if groups:
            moments = _from_first_steps(moments, groups)
        moved = optax.chain(moments, decay, optax.scale_by_learning_rate(schedule))
        tx = optax.chain(clip, moved)
    else:
        tx = optax.chain(clip, decay, optax.sgd(schedule, momentum=momentum, nesterov=True))
    return _in_groups(tx, groups) if groups else tx


def _is_kernel(params):
    return jax.tree.map(lambda param: param.ndim > 1, params)


def _muon_or_adam():
    """Muon for kernels, with updates as large as Adam's, which is for biases and normalisation."""

    def as_matrices(kernels):
        return jax.tree.map(
            lambda x: contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,)), kernels
        )

    def as_large(update, kernel):
        longer_side = max(math.prod(update.shape[:-1]), update.shape[-1])
        return _ADAMW_RMS * math.sqrt(longer_side) * update

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=as_matrices),
        optax.stateless_with_tree_map(as_large),
    )
    return optax.partition({True: muon, False: optax.scale_by_adam()}, _is_kernel)


# Not annotated in the body: `count`, whose name is in checkpoints, is a method of tuples too.
class GroupsState(NamedTuple("GroupsState", [("count", jax.Array), ("inner", Any)])):
    """Number of updates done, and the state of the transformation inside."""


def _in_groups(tx, groups):
    """Shows `tx` zeros for what is frozen, and scales its updates."""

    def init(params):
        deciding = set(jax.tree.leaves(_decided(groups, params)))
        for index, (pattern, *_) in enumerate(groups):
            if index not in deciding:
                raise GroupProblem(
                    f"optim.groups: {pattern!r} decides about no parameter: none begins so, or "
                    f"an earlier pattern takes all that do; paths are like {_paths(params)[0]}"
                )
        return GroupsState(jnp.zeros((), jnp.int32), tx.init(params))

    def update(grads, state, params):
        rules = jax.tree.map(lambda index: (*groups, ("", 1.0, 0))[index], _decided(groups, grads))

        def where_moving(values, otherwise):
            def choose(value, rule):
                _, factor, first_step = rule
                moves = (state.count >= first_step) & (factor != 0)
                return jnp.where(moves, value, otherwise)

            return jax.tree.map(choose, values, rules)

        updates, inner = tx.update(where_moving(grads, 0.0), state.inner, where_moving(params, 0.0))
        updates = jax.tree.map(lambda value, rule: value * rule[1], updates, rules)
        # x + -0.0 is x to the bit, also where x is -0.0.
        return where_moving(updates, -0.0), GroupsState(state.count + 1, inner)

    return optax.GradientTransformation(init, update)


def _from_first_steps(moments, groups):
    """Lets each parameter's moments begin with its first step, so that their bias is corrected."""
    first_steps = (*(first_step for *_, first_step in groups), 0)

    def starting_at(first_step):
        return optax.transforms.conditionally_transform(moments, lambda step: step >= first_step)

    transforms = {str(first_step): starting_at(first_step) for first_step in first_steps}

    def labels(params):
        return jax.tree.map(lambda index: str(first_steps[index]), _decided(groups, params))

    return optax.partition(transforms, labels)


def _decided(groups, params):
    """Tree of the index of the group that decides about each parameter; len(groups) if none."""
    patterns = [pattern for pattern, *_ in groups]

    def decide(path):
        matching = (index for index, pattern in enumerate(patterns) if re.match(pattern, path))
        return next(matching, len(groups))

    return jax.tree.unflatten(jax.tree.structure(params), [decide(p) for p in _paths(params)])


def _paths(params):
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
