"""One step of training and one of evaluation, as pure functions that a device runs on its part.

A batch is a dict of image [B, *S, C] float32, label [B, *S] int32 and valid [B, *S] float32 (a
voxel's weight in the loss, 0 where it does not count). Sums over examples are taken on every device
and then over `axis_name`, numerator and denominator apart, so that the result does not depend on
how examples were spread. An example with no valid voxel is a filler and counts for nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxseg.training.checksum import checksum
from jaxseg.training.losses import supervise
from jaxseg.training.state import TrainState
from jaxseg.training.strict_sums import compiled_apart, sum_in_one_order

# Folded into the run's key in the place of a step, for what depends on none.
_NO_STEP = 2**32 - 1


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    learning_rate: ArrayLike = 1.0,
    *,
    model: nn.Module,
    loss_fn: Callable[..., jax.Array],
    tx: optax.GradientTransformation,
    axis_name: str | None = None,
    space_axis: str | None = None,
    accumulate_steps: int = 1,
    virtual_shards: int = 0,
    augment_fn: Callable[..., Any] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update.

    Args:
      state: TrainState, the same on all devices.
      batch: this device's examples; B must be divisible by `accumulate_steps`, and by this device's
        share of `virtual_shards`.
      key: the run's PRNG key; the step is folded in here.
      learning_rate: factor of the updates that `tx` makes.
      model: flax.linen module with the same `axis_name` and `space_axis`; with `virtual_shards`,
        without.
      loss_fn: (logits, label, valid=) -> [B].
      tx: optax.GradientTransformation.
      axis_name: axis of the devices that share the batch, None on a single one.
      space_axis: axis of the devices that share each image, along its first spatial axis, or None.
      accumulate_steps: parts whose gradients are summed one after the other, to save memory.
      virtual_shards: parts of the global batch whose gradients are computed one by one and summed
        in one order, so that 1, 2, 4 ... devices give the same bits; a power of two, 0 for none.
      augment_fn: (batch, key) -> batch, where the batch holds the regions that patches are made of.
    Returns:
      (state, metrics): metrics hold scalars, the same on all devices: "loss" and "grad_norm", and
      uint32 sums of bits, "batch_checksum" and "params_checksum" (after the update).
    """
    augment_key = jax.random.fold_in(key, _NO_STEP)
    key = jax.random.fold_in(key, state.step)
    axes = (axis_name, space_axis)

    def sums(batch_stats, part, index):
        """Of one part: gradients, loss, number of examples; and the statistics after it."""
        part = augment_fn(part, augment_key) if augment_fn else part

        def summed_loss(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                part["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, index)},
            )
            total, count = _sum_over_examples(loss_fn, logits, part, space_axis)
            return total, (count, updated.get("batch_stats", batch_stats))

        (total, (count, batch_stats_after)), grads = jax.value_and_grad(summed_loss, has_aux=True)(
            state.params
        )
        return (grads, total, count), batch_stats_after

    if virtual_shards:
        totals = sum_in_one_order(
            lambda part, index: sums(state.batch_stats, part, index)[0],
            batch,
            virtual_shards,
            axis_name,
        )
        batch_stats = state.batch_stats
    else:
        totals, batch_stats = _one_after_the_other(sums, state, batch, accumulate_steps)
        totals = _psum(totals, axes)

    update = functools.partial(_update, state, tx, learning_rate)
    if virtual_shards:
        update = functools.partial(compiled_apart, update)
    new_state, loss, grad_norm = update(totals, batch_stats)
    return new_state, {
        "loss": loss,
        "grad_norm": grad_norm,
        "batch_checksum": _psum(checksum(batch, _start(batch, axis_name, space_axis)), axes),
        "params_checksum": checksum(new_state.params),
    }


def eval_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    loss_fn: Callable[..., jax.Array],
    axis_name: str | None = None,
    space_axis: str | None = None,
) -> dict[str, jax.Array]:
    """The loss of the batch, without dropout and with running statistics.

    Args:
      state, batch, model, loss_fn, axis_name, space_axis: as for `train_step`.
    Returns:
      Dict of scalars "loss" and "count": the sum over examples of all devices, and their number.
    """
    axes = (axis_name, space_axis)
    logits = model.apply({"params": state.params, "batch_stats": state.batch_stats}, batch["image"])
    sums = _sum_over_examples(loss_fn, logits, batch, space_axis)
    return dict(zip(("loss", "count"), _psum(sums, axes), strict=True))


def over_members(step: Callable[..., Any], by: str) -> Callable[..., Any]:
    """A step of every member of an ensemble, from arguments that all have a leading axis of them.

    Args:
      step: as above, of one member.
      by: "map" computes one member after the other, "vmap" all in one sweep.
    """
    if by == "vmap":
        return jax.vmap(step)
    return lambda *arguments: lax.map(lambda one: step(*one), arguments)


def _update(state, tx, learning_rate, totals, batch_stats):
    """The state after an update, from sums over the batch; its loss and its gradient's norm."""
    grads, total, count = totals
    count = jnp.maximum(count, 1)
    grads = jax.tree.map(lambda grad: grad / count, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda update: learning_rate * update, updates)
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return new_state, total / count, optax.tree.norm(grads)


def _one_after_the_other(sums, state, batch, num_parts):
    """Sums over parts of this device's batch, each of which sees the statistics of those before."""
    if num_parts == 1:
        return sums(state.batch_stats, batch, 0)
    # Every n-th example, so that a part holds the same ones however devices share the batch.
    parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry, indexed_part):
        totals, batch_stats = carry
        index, part = indexed_part
        more, batch_stats = sums(batch_stats, part, index)
        return (jax.tree.map(jnp.add, totals, more), batch_stats), None

    zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()), jnp.zeros(()))
    carry, _ = lax.scan(add, (zeros, state.batch_stats), (jnp.arange(num_parts), parts))
    return carry


def _sum_over_examples(loss_fn, logits, batch, space_axis):
    """The loss, and the number of examples; of images that devices share, each has its share."""
    spatial_axes = tuple(range(1, batch["valid"].ndim))
    counts = (batch["valid"] > 0).any(spatial_axes)
    sharers = 1
    if space_axis is not None:
        sharers = lax.axis_size(space_axis)
        counts = lax.pmax(counts.astype(jnp.float32), space_axis) > 0
    loss = supervise(loss_fn, logits, batch["label"], batch["valid"], space_axis)
    total = jnp.sum(jnp.where(counts, loss, 0.0)) / sharers
    return total, counts.astype(jnp.float32).sum() / sharers


def _start(batch, axis_name, space_axis):
    """Where this device's part of the batch begins, along examples and the first spatial axis."""
    return tuple(
        0 if axis is None else lax.axis_index(axis) * size
        for axis, size in zip((axis_name, space_axis), batch["valid"].shape, strict=False)
    )


def _psum(tree, axes):
    axes = tuple(axis for axis in axes if axis is not None)
    return lax.psum(tree, axes) if axes else tree
