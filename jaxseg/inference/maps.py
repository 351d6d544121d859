"""What members of an ensemble say of a patch, and what is made of that in every voxel.

A member is one set of weights that sees the patch mirrored in one way. Maps are channels that can
be blended and interpolated: mean logits first, then what further outputs need.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.inference import explain

EXPLANATIONS: dict[str, Callable[[nn.Module, Any, jax.Array, int], jax.Array]] = {
    "grad_cam": explain.grad_cam,
    "integrated_gradients": explain.integrated_gradients,
}
SPREAD = ("entropy", "mutual_information")
SAMPLED_COLUMNS = 16


def patch_maps(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    *,
    mirror_axes: Sequence[int],
    outputs: Sequence[str],
    temperature: float,
    class_names: Sequence[str],
) -> jax.Array:
    """Maps of a batch of patches.

    Args:
      model: flax.linen module, num_classes K.
      variables: {"params", "batch_stats"}; leaves have a leading axis of E sets of weights.
      images: [B, *P, C] float32.
      mirror_axes: axes of P that are mirrored, in all combinations; () for none.
      outputs: names of what is wanted, as for `voxel_outputs`.
      temperature: what logits are divided by before members are compared.
      class_names: to look up the class of an explanation.
    Returns:
      [B, *P', K + ...] float32: the mean logits; with outputs of `SPREAD` these two; for each
      explanation its map.
    """
    num_flips = 2 ** len(mirror_axes)
    num_sets = len(jax.tree.leaves(variables)[0])
    with_spread = any(name in SPREAD for name in outputs)

    def mirror(x, flip):
        # Bits and not a table, which would be empty without axes: XLA crashes on an empty constant
        # in a loop that several devices share (jax 0.11 on CPU).
        for bit, axis in enumerate(reversed(mirror_axes)):
            x = jnp.where((flip >> bit) & 1, jnp.flip(x, axis + 1), x)
        return x

    def member(index):
        weights = jax.tree.map(lambda x: x[index // num_flips], variables)
        flip = index % num_flips
        logits = mirror(model.apply(weights, mirror(images, flip)), flip).astype(jnp.float32)
        if not with_spread:
            return logits
        probs = jax.nn.softmax(logits / temperature)
        return jnp.concatenate([logits, probs, entropy(probs)[..., None]], axis=-1)

    maps = _mean_over(member, num_sets * num_flips)
    if with_spread:
        # Here and not in `voxel_outputs`: that neighbours differ is no disagreement of members.
        logits, probs, of_members = jnp.split(maps, [model.num_classes, 2 * model.num_classes], -1)
        total = entropy(probs)[..., None]
        # Rounding may leave members that agree with a little less than nothing.
        maps = jnp.concatenate([logits, total, jnp.maximum(total - of_members, 0)], axis=-1)
    names = [name for name in outputs if ":" in name]
    if not names:
        return maps

    def explanations(index):
        weights = jax.tree.map(lambda x: x[index], variables)
        found = []
        for name in names:
            kind, _, class_name = name.partition(":")
            class_index = class_names.index(class_name)
            found.append(EXPLANATIONS[kind](model, weights, images, class_index))
        return jnp.stack(found, axis=-1)

    return jnp.concatenate([maps, _mean_over(explanations, num_sets)], axis=-1)


def _mean_over(function, number):
    """Mean of function(0) ... function(number - 1), computed one after the other."""
    if number == 1:
        return function(0)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, 0))
    total = lax.fori_loop(0, number, lambda i, total: total + function(i), zeros)
    return total / number


def voxel_outputs(
    maps: jax.Array, *, num_classes: int, outputs: Sequence[str], temperature: float
) -> dict[str, jax.Array]:
    """What is written of each voxel.

    Args:
      maps: [X, Y, K + ...] from `patch_maps`, blended and interpolated.
      num_classes: K.
      outputs: names out of "label" (the class of the largest logit, uint8), "probs" (at the
        temperature), "confidence" (the largest of the probs), "entropy" of the members' mean
        probabilities, "mutual_information" between class and member (both in nats, Depeweg et al.
        2018), "grad_cam:NAME" and "integrated_gradients:NAME" for class NAME, and "sample", the
        logits of every `sample_stride`-th column, to measure calibration on.
      temperature: what logits are divided by.
    Returns:
      Dict from name to [X, Y] or [X, Y, K], float32 but for the label.
    """
    logits = maps[..., :num_classes]
    probs = jax.nn.softmax(logits / temperature)
    made = {
        "label": jnp.argmax(logits, -1).astype(jnp.uint8),
        "sample": logits[..., :: sample_stride(maps.shape[-2]), :],
        "probs": probs,
        "confidence": probs.max(-1),
    }
    used = num_classes
    if any(name in SPREAD for name in outputs):
        made |= {name: maps[..., used + index] for index, name in enumerate(SPREAD)}
        used += len(SPREAD)
    for position, name in enumerate(name for name in outputs if ":" in name):
        made[name] = maps[..., used + position]
    return {name: made[name] for name in outputs}


def sample_stride(num_columns: int) -> int:
    """Distance between the columns of a "sample" of an array of so many."""
    return max(num_columns // SAMPLED_COLUMNS, 1)


def entropy(probs: jax.Array) -> jax.Array:
    """Entropy over the last axis, in nats."""
    return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
