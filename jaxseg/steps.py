"""One step of training and one of evaluation, as pure functions that a device runs on its part.

A batch is a dict of image [B, *S, C] float32, label [B, *S] int32 and valid [B, *S] float32 (a
voxel's weight in the loss, 0 where it does not count). Sums over examples are taken on every device
and then over `axis_name`, numerator and denominator apart, so that the result does not depend on
how examples were spread. An example with no valid voxel is a filler and counts for nothing.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxseg.losses import supervise


def train_step(state, batch, key, *, model, loss_fn, tx, axis_name=None, accumulate_steps=1):
    """One optimiser update.

    Args:
      state: TrainState, the same on all devices.
      batch: this device's examples; B must be divisible by `accumulate_steps`.
      key: the run's PRNG key; the step is folded in here.
      model: flax.linen module with the same `axis_name`.
      loss_fn: (logits, label, valid=) -> [B].
      tx: optax.GradientTransformation.
      axis_name: device axis, None on a single device.
      accumulate_steps: parts whose gradients are summed one after the other, to save memory.
    Returns:
      (state, metrics): metrics hold scalars "loss" and "grad_norm", the same on all devices.
    """
    key = jax.random.fold_in(key, state.step)

    def summed_loss(params, batch_stats, part, index):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            part["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, index)},
        )
        total, count = _sum_over_examples(loss_fn, logits, part)
        return total, (count, updated.get("batch_stats", batch_stats))

    def accumulate(carry, indexed_part):
        grads, total, count, batch_stats = carry
        index, part = indexed_part
        (part_total, (part_count, batch_stats)), part_grads = jax.value_and_grad(
            summed_loss, has_aux=True
        )(state.params, batch_stats, part, index)
        grads = jax.tree.map(jnp.add, grads, part_grads)
        return (grads, total + part_total, count + part_count, batch_stats), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    carry = (zeros, jnp.zeros(()), jnp.zeros(()), state.batch_stats)
    if accumulate_steps == 1:
        carry, _ = accumulate(carry, (0, batch))
    else:
        # Every n-th example, so that a part holds the same ones however devices share the batch.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch
        )
        carry, _ = lax.scan(accumulate, carry, (jnp.arange(accumulate_steps), parts))
    grads, total, count, batch_stats = carry

    grads, total, count = _psum((grads, total, count), axis_name)
    count = jnp.maximum(count, 1)
    grads = jax.tree.map(lambda grad: grad / count, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return new_state, {"loss": total / count, "grad_norm": optax.tree.norm(grads)}


def eval_step(state, batch, *, model, loss_fn, axis_name=None):
    """The loss of the batch, without dropout and with running statistics.

    Args:
      state, batch, model, loss_fn, axis_name: as for `train_step`.
    Returns:
      Dict of scalars "loss" and "count": the sum over examples of all devices, and their number.
    """
    logits = model.apply({"params": state.params, "batch_stats": state.batch_stats}, batch["image"])
    total, count = _sum_over_examples(loss_fn, logits, batch)
    return dict(zip(("loss", "count"), _psum((total, count), axis_name), strict=True))


def _sum_over_examples(loss_fn, logits, batch):
    spatial_axes = tuple(range(1, batch["valid"].ndim))
    counts = (batch["valid"] > 0).any(spatial_axes).astype(jnp.float32)
    loss = supervise(loss_fn, logits, batch["label"], batch["valid"])
    return jnp.sum(jnp.where(counts > 0, loss, 0.0)), counts.sum()


def _psum(tree, axis_name):
    return tree if axis_name is None else lax.psum(tree, axis_name)
