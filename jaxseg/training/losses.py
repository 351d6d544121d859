"""Segmentation losses: logits and a label map in, one float32 per example out.

All take `(logits [B, *S, C], label [B, *S], *, valid=None, space_axis=None)`, for any number of
spatial axes, and compute in float32. With `space_axis`, a device axis over which volumes are cut
into parts, sums over voxels are taken over it too: every device returns the loss of whole examples.

Each pixel's share is multiplied by `valid`, so a pixel with `valid` 0 adds nothing to the value or
the gradient, whatever finite logits the network gives there. Labels lie in [0, C) where `valid` is
not 0: checked at ingestion, not here.

The label enters as comparisons and selections, never as an index, so no gradient holds a scatter:
it is fast and deterministic on every device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def cross_entropy_loss(
    logits: jax.Array,
    label: jax.Array,
    *,
    valid: jax.Array | None = None,
    class_weights: Sequence[float] | None = None,
    space_axis: str | None = None,
) -> jax.Array:
    """Cross-entropy per example, averaged over its valid pixels.

    With weights w_c per class: Σ v w_g (-log p_g) / Σ v w_g, where g is the pixel's label.

    Args:
      logits: Unnormalised scores, [B, *S, C], any float; computed in float32.
      label: Class indices in [0, C), [B, *S], integer.
      valid: 1 where a pixel counts, [B, *S]; None means all.
      class_weights: One non-negative weight per class, C numbers; None means equal. Only their
        ratios matter, as in torch.nn.CrossEntropyLoss, here within each example.
      space_axis: Device axis over which volumes are cut; None if these are whole.
    Returns:
      [B] float32, at least 0; 0 where nothing is valid.
    Raises:
      ValueError: shapes or dtypes do not match, or class_weights does not hold C numbers.
    """
    log_probs, one_hot, valid = _per_pixel(logits, label, valid)
    return _cross_entropy(log_probs, one_hot, valid, class_weights, space_axis)


def soft_dice_loss(
    logits: jax.Array,
    label: jax.Array,
    *,
    valid: jax.Array | None = None,
    include_background: bool = False,
    eps: float = 1e-5,
    over_batch: bool = False,
    batch_axis: str | None = None,
    space_axis: str | None = None,
) -> jax.Array:
    """Soft Dice loss per example, averaged over classes.

    For class c: 1 - (2 Σ p g + eps) / (Σ p + Σ g + eps). A class that is in neither the label nor
    the prediction costs 0, as does an example with nothing valid.

    Args:
      logits: Unnormalised scores, [B, *S, C], any float; computed in float32.
      label: Class indices in [0, C), [B, *S], integer.
      valid: 1 where a voxel counts, [B, *S]; None means all.
      include_background: Whether class 0 enters the mean.
      eps: Smoothing added to both terms, in voxels; more than 0.
      over_batch: Whether sums are taken over all examples as of one large one, whose loss each has:
        for patches of which few show a class (nnU-Net's "batch Dice").
      batch_axis: Device axis over which the batch is cut; None if it is whole.
      space_axis: Device axis over which volumes are cut; None if these are whole.
    Returns:
      [B] float32 in [0, 1].
    Raises:
      ValueError: label's shape is not logits' without its class axis, or no class is left to
        average over.
    Reference: Milletari et al. 2016 (V-Net), denominator terms not squared.
    """
    log_probs, one_hot, valid = _per_pixel(logits, label, valid)
    counts = _soft_counts(log_probs, one_hot, valid, include_background, space_axis)
    return _soft_dice(_of_batch(counts, over_batch, batch_axis), eps)


def dice_cross_entropy_loss(
    logits: jax.Array,
    label: jax.Array,
    *,
    valid: jax.Array | None = None,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    class_weights: Sequence[float] | None = None,
    include_background: bool = False,
    eps: float = 1e-5,
    over_batch: bool = False,
    batch_axis: str | None = None,
    space_axis: str | None = None,
) -> jax.Array:
    """Weighted sum of `soft_dice_loss` and `cross_entropy_loss`, sharing one softmax.

    Args:
      logits: Unnormalised scores, [B, *S, C], any float; computed in float32.
      label: Class indices in [0, C), [B, *S], integer.
      valid: 1 where a voxel counts, [B, *S]; None means all.
      dice_weight: Factor of the soft Dice loss.
      ce_weight: Factor of the cross-entropy.
      class_weights: Of the cross-entropy, C numbers; None means equal.
      include_background: Of the soft Dice loss.
      eps: Of the soft Dice loss, in voxels.
      over_batch: Of the soft Dice loss.
      batch_axis: Device axis over which the batch is cut; None if it is whole.
      space_axis: Device axis over which volumes are cut; None if these are whole.
    Returns:
      [B] float32.
    Raises:
      ValueError: as the two losses.
    Reference: Isensee et al. 2021 (nnU-Net).
    """
    log_probs, one_hot, valid = _per_pixel(logits, label, valid)
    counts = _soft_counts(log_probs, one_hot, valid, include_background, space_axis)
    dice = _soft_dice(_of_batch(counts, over_batch, batch_axis), eps)
    cross_entropy = _cross_entropy(log_probs, one_hot, valid, class_weights, space_axis)
    return dice_weight * dice + ce_weight * cross_entropy


def focal_loss(
    logits: jax.Array,
    label: jax.Array,
    *,
    valid: jax.Array | None = None,
    gamma: float = 2.0,
    alpha: Sequence[float] | None = None,
    space_axis: str | None = None,
) -> jax.Array:
    """Multi-class focal loss per example, averaged over its valid pixels.

    Σ v alpha_g (1 - p_g)^gamma (-log p_g) / Σ v, where g is the pixel's label. Unlike the class
    weights of `cross_entropy_loss`, alpha is not in the denominator: its scale matters.

    Args:
      logits: Unnormalised scores, [B, *S, C], any float; computed in float32.
      label: Class indices in [0, C), [B, *S], integer.
      valid: 1 where a pixel counts, [B, *S]; None means all.
      gamma: How strongly pixels already right are played down; 0 gives the cross-entropy.
      alpha: One factor per class, C numbers; None means 1.
      space_axis: Device axis over which volumes are cut; None if these are whole.
    Returns:
      [B] float32, at least 0; 0 where nothing is valid.
    Raises:
      ValueError: shapes or dtypes do not match, alpha does not hold C numbers, or gamma < 0.
    Reference: Lin et al. 2017, with softmax in place of the sigmoid.
    """
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; the focal loss needs 0 or more.")
    log_probs, one_hot, valid = _per_pixel(logits, label, valid)
    log_prob = _at_label(log_probs, one_hot)
    # x^gamma has an infinite slope at 0 for gamma < 1: stay one rounding step away from it.
    prob_wrong = jnp.maximum(-jnp.expm1(log_prob), jnp.finfo(jnp.float32).eps)
    focal = -log_prob * prob_wrong**gamma
    if alpha is not None:
        focal *= _at_label(_class_vector(alpha, "alpha", one_hot), one_hot)
    return _weighted_mean(focal, valid, space_axis)


def tversky_loss(
    logits: jax.Array,
    label: jax.Array,
    *,
    valid: jax.Array | None = None,
    alpha: float = 0.3,
    beta: float = 0.7,
    include_background: bool = False,
    eps: float = 1e-5,
    space_axis: str | None = None,
) -> jax.Array:
    """Tversky loss per example, averaged over classes.

    For class c: 1 - (TP + eps) / (TP + alpha FP + beta FN + eps), with TP = Σ p g,
    FP = Σ p (1 - g), FN = Σ (1 - p) g. alpha = beta = 0.5 is the soft Dice loss with 2 eps.

    Args:
      logits: Unnormalised scores, [B, *S, C], any float; computed in float32.
      label: Class indices in [0, C), [B, *S], integer.
      valid: 1 where a voxel counts, [B, *S]; None means all.
      alpha: Cost of a false positive, at least 0.
      beta: Cost of a false negative, at least 0.
      include_background: Whether class 0 enters the mean.
      eps: Smoothing added to both terms, in voxels; more than 0.
      space_axis: Device axis over which volumes are cut; None if these are whole.
    Returns:
      [B] float32 in [0, 1].
    Raises:
      ValueError: as `soft_dice_loss`.
    Reference: Salehi et al. 2017.
    """
    log_probs, one_hot, valid = _per_pixel(logits, label, valid)
    tp, fp, fn = _soft_counts(log_probs, one_hot, valid, include_background, space_axis)
    wrong = alpha * fp + beta * fn
    return jnp.mean(wrong / (tp + wrong + eps), axis=-1)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": cross_entropy_loss,
    "soft_dice": soft_dice_loss,
    "dice_cross_entropy": dice_cross_entropy_loss,
    "focal": focal_loss,
    "tversky": tversky_loss,
}


def supervise(
    loss_fn: Callable[..., jax.Array],
    logits: jax.Array | tuple[jax.Array, ...],
    label: jax.Array,
    valid: jax.Array,
    space_axis: str | None = None,
) -> jax.Array:
    """Loss of what a network returns: logits of a whole patch, of its centre, or of many scales.

    Logits smaller than the label come from a network without padding: the label's centre counts.
    A tuple comes from deep supervision, finest first: scale i weighs 2**-i, and all weights sum to
    1; its label is the nearest voxel of the full one.

    Args:
      loss_fn: (logits, label, valid=) -> [B]; it takes `space_axis` if that is given here.
      logits: [B, *S', C], or a tuple of such.
      label: [B, *S] integer.
      valid: [B, *S].
      space_axis: Device axis over which volumes are cut; None if these are whole.
    Returns:
      [B] float32.
    Reference: Lee et al. 2015; weights as in nnU-Net (Isensee et al. 2021).
    """
    if space_axis is not None:
        loss_fn = functools.partial(loss_fn, space_axis=space_axis)
    if not isinstance(logits, tuple):
        label, valid = (_centre(x, logits.shape[1:-1]) for x in (label, valid))
        return loss_fn(logits, label, valid=valid)
    weights = [2.0**-scale for scale in range(len(logits))]
    losses = []
    for scale, weight in zip(logits, weights, strict=True):
        coarse_label, coarse_valid = (_nearest(x, scale.shape[1:-1]) for x in (label, valid))
        losses.append(weight / sum(weights) * loss_fn(scale, coarse_label, valid=coarse_valid))
    return cast(jax.Array, sum(losses))  # there is one scale at least


def _centre(x, shape):
    starts = [(n - m) // 2 for n, m in zip(x.shape[1:], shape, strict=True)]
    return x[(slice(None), *(slice(s, s + m) for s, m in zip(starts, shape, strict=True)))]


def _nearest(x, shape):
    """[B, *S] at the voxels nearest to the centres of a grid of `shape`."""
    for axis, (n, m) in enumerate(zip(x.shape[1:], shape, strict=True), start=1):
        x = jnp.take(x, np.floor((np.arange(m) + 0.5) * n / m).astype(int), axis=axis)
    return x


def _per_pixel(logits, label, valid):
    """Checks the inputs; returns log_probs, one_hot [B, N, C] (bool) and valid [B, N], N pixels."""
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits are {logits.dtype}; give unnormalised scores in a float dtype.")
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"label is {label.dtype}; give class indices in an integer dtype.")
    if label.shape != logits.shape[:-1]:
        raise ValueError(
            f"label has shape {label.shape} but logits have {logits.shape}; "
            "give label [B, *S] for logits [B, *S, C]."
        )
    if valid is None:
        valid = jnp.ones(label.shape)
    if valid.shape != label.shape:
        raise ValueError(
            f"valid has shape {valid.shape} but label has {label.shape}; give one value per pixel."
        )
    batch_size, num_classes = label.shape[0], logits.shape[-1]
    logits = logits.reshape(batch_size, -1, num_classes).astype(jnp.float32)
    one_hot = label.reshape(batch_size, -1, 1) == jnp.arange(num_classes)
    valid = valid.reshape(batch_size, -1).astype(jnp.float32)
    return jax.nn.log_softmax(logits), one_hot, valid


def _cross_entropy(log_probs, one_hot, valid, class_weights, space_axis):
    if class_weights is not None:
        valid *= _at_label(_class_vector(class_weights, "class_weights", one_hot), one_hot)
    return _weighted_mean(-_at_label(log_probs, one_hot), valid, space_axis)


def _soft_dice(counts, eps):
    tp, fp, fn = counts
    # 1 - (2 tp + eps) / (2 tp + fp + fn + eps) without the cancellation: never leaves [0, 1].
    wrong = fp + fn
    return jnp.mean(wrong / (2 * tp + wrong + eps), axis=-1)


def _soft_counts(log_probs, one_hot, valid, include_background, space_axis):
    """True positives, false positives and false negatives, [B, classes that count] each."""
    first = 0 if include_background else 1
    if log_probs.shape[-1] <= first:
        raise ValueError(
            f"logits have {log_probs.shape[-1]} class(es), which leaves none to average over; "
            "give background a class of its own or set include_background."
        )
    probs, one_hot = jnp.exp(log_probs[..., first:]), one_hot[..., first:]
    valid = valid[..., None]
    tp = jnp.sum(jnp.where(one_hot, probs, 0) * valid, axis=1)
    fp = jnp.sum(jnp.where(one_hot, 0, probs) * valid, axis=1)
    fn = jnp.sum(jnp.where(one_hot, 1 - probs, 0) * valid, axis=1)
    return _over_parts((tp, fp, fn), space_axis)


def _of_batch(counts, over_batch, batch_axis):
    """Counts [B, K] of each example or, for each the same, of all of them on all devices."""
    if not over_batch:
        return counts
    sums = [jnp.sum(count, axis=0, keepdims=True) for count in counts]
    if batch_axis is not None:
        sums = lax.psum(sums, batch_axis)
    return [jnp.broadcast_to(of, count.shape) for of, count in zip(sums, counts, strict=True)]


def _at_label(values, one_hot):
    """The entry of values [..., C] at each pixel's class: [B, N]."""
    return jnp.sum(jnp.where(one_hot, values, 0), axis=-1)


def _class_vector(values, name, one_hot):
    """values as [C] float32."""
    vector = jnp.asarray(values, jnp.float32)
    if vector.shape != one_hot.shape[-1:]:
        raise ValueError(
            f"{name} has shape {vector.shape} but there are {one_hot.shape[-1]} classes; "
            "give one number per class."
        )
    return vector


def _weighted_mean(values, weight, space_axis):
    """Mean over pixels of values [B, N] with weight [B, N]: [B], 0 where all weights are 0."""
    total = _over_parts(jnp.sum(weight, axis=1), space_axis)
    weighted = _over_parts(jnp.sum(values * weight, axis=1), space_axis)
    return weighted / jnp.where(total > 0, total, 1)


def _over_parts(sums, space_axis):
    """A part's sums, or those of the volume if it is cut over devices."""
    return sums if space_axis is None else lax.psum(sums, space_axis)
