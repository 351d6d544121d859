"""Why a network segments what it does: maps of what it looked at, for patches. Pure functions.

Both explain one class: the sum of its logits over the voxels that the network gives to it. Where it
gives none there is nothing to explain and the map is 0. They run inside jit, in 2D and 3D.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseg.models.blocks import Norm, crop_to

# Strides divide it, so that an image that much larger shows what they are.
_GROWTH = 960


def grad_cam(
    model: nn.Module, variables: Any, image: jax.Array, class_index: int, layer: str = "encoder"
) -> jax.Array:
    """Regions whose features speak for a class (Seg-Grad-CAM).

    relu(Σ_k a_k A_k) over the channels A_k of a layer's map, where a_k is the mean over the map of
    the gradient of the explained sum. Not scaled, so that patches of one image compare.

    Args:
      model: flax.linen module that maps an image to logits; called with train=False.
      variables: its parameters and statistics.
      image: [B, *P, C], any float.
      class_index: class to explain, integer.
      layer: path of the module that makes the map, such as "encoder/stage2"; of one that returns
        several maps, as the whole encoder does, the last counts, which is the coarsest.
    Returns:
      [B, *P'] float32, at least 0, on the grid of the logits, interpolated linearly.
    Raises:
      ValueError: no layer has that name; lists those there are.
    Reference: Vinogradova et al. 2020, after Selvaraju et al. 2017.
    """
    maps = _maps_of_layers(model, variables, image.shape)
    if layer not in maps:
        raise ValueError(f"the network has no layer {layer!r}; it has {', '.join(sorted(maps))}")

    def explained(perturbation):
        found = []

        def perturb(module, args, output):
            if "/".join(module.path) != layer:
                return output
            *finer, features = output if isinstance(output, list) else [output]
            found.append(features)
            features = features + perturbation
            return [*finer, features] if isinstance(output, list) else features

        logits = _apply(model, variables, image, perturb)
        return _sum_over(_voxels_of(logits, class_index), logits, class_index), (found[0], logits)

    zeros = jnp.zeros(maps[layer].shape, maps[layer].dtype)
    gradient, (features, logits) = jax.grad(explained, has_aux=True)(zeros)
    weights = gradient.astype(jnp.float32).mean(range(1, image.ndim - 1), keepdims=True)
    heat = jax.nn.relu(jnp.sum(weights * features, axis=-1))
    batch_size, *spatial, num_channels = image.shape
    larger = (batch_size, *(n + _GROWTH for n in spatial), num_channels)
    larger_map = _maps_of_layers(model, variables, larger)[layer]
    return _place(heat, larger_map.shape[1:-1], spatial, logits.shape[1:-1])


def integrated_gradients(
    model: nn.Module, variables: Any, image: jax.Array, class_index: int, num_steps: int = 16
) -> jax.Array:
    """How much each voxel adds to a class, compared with an image of zeros, the mean.

    x ∫ dF(a x)/dx da for a from 0 to 1, summed over channels. F is the sum explained for x itself,
    over those voxels, with every normalisation held at its statistics for x. Left to itself,
    instance normalisation undoes the scaling by a until next to nothing is left of the image, and
    the integral would be about that.

    Complete: the sum over voxels is F(x) - F(0) up to the quadrature's error, but for the voxels
    around the logits of a network without padding, which are left out.

    Args:
      model, variables, image, class_index: as for `grad_cam`.
      num_steps: gradients that are summed, one after the other (Gauss-Legendre quadrature).
    Returns:
      [B, *P'] float32, positive where a voxel speaks for the class.
    Reference: Sundararajan et al. 2017.
    """
    image = image.astype(jnp.float32)
    voxels, held = _chosen_and_held(model, variables, image, class_index)

    def explained(scaled):
        return _sum_over(voxels, _apply_held(model, variables, scaled, held), class_index)

    nodes, weights = np.polynomial.legendre.leggauss(num_steps)
    scales, weights = jnp.asarray([(nodes + 1) / 2, weights / 2], jnp.float32)

    def add(step, total):
        return total + weights[step] * jax.grad(explained)(scales[step] * image)

    average = lax.fori_loop(0, num_steps, add, jnp.zeros_like(image))
    return crop_to(image * average, voxels.shape[1:]).sum(axis=-1)


def _chosen_and_held(model, variables, image, class_index):
    """Voxels given to the class, and each normalisation as slope and offset of its channels."""
    held = {}

    def hold(module, args, output):
        if isinstance(module, Norm):
            x, y = args[0].astype(jnp.float32), output.astype(jnp.float32)
            axes = range(1, x.ndim - 1)
            mean_x, mean_y = x.mean(axes, keepdims=True), y.mean(axes, keepdims=True)
            variance = jnp.square(x - mean_x).mean(axes, keepdims=True)
            covariance = ((x - mean_x) * (y - mean_y)).mean(axes, keepdims=True)
            slope = covariance / jnp.maximum(variance, jnp.finfo(jnp.float32).tiny)
            held[module.path] = slope, mean_y - slope * mean_x
        return output

    return _voxels_of(_apply(model, variables, image, hold), class_index), held


def _apply_held(model, variables, image, held):
    """Logits with every normalisation as in `held`."""

    def replay(module, args, output):
        if isinstance(module, Norm):
            slope, offset = held[module.path]
            return (slope * args[0] + offset).astype(output.dtype)
        return output

    return _apply(model, variables, image, replay)


def _apply(model, variables, image, edit):
    """Logits of a network in which each module returns `edit(module, args, output)`."""
    if getattr(model, "remat", False):
        model = model.clone(remat=False)  # nothing gets out of a block that is computed again

    def intercept(next_fn, args, kwargs, context):
        output = next_fn(*args, **kwargs)
        return edit(context.module, args, output) if context.method_name == "__call__" else output

    with nn.intercept_methods(intercept):
        return model.apply(variables, image, train=False)


def _maps_of_layers(model, variables, shape):
    """Shape and dtype of the (coarsest) map of each layer, by path; nothing is computed."""

    def maps_of(image):
        maps = {}

        def record(module, args, output):
            last = output[-1] if isinstance(output, list) else output
            if module.path and getattr(last, "ndim", None) == image.ndim:
                maps["/".join(module.path)] = last
            return output

        _apply(model, variables, image, record)
        return maps

    return jax.eval_shape(maps_of, jax.ShapeDtypeStruct(shape, jnp.float32))


def _voxels_of(logits, class_index):
    """1 where the network chooses the class, [B, *P'] float32."""
    return (jnp.argmax(logits, axis=-1) == class_index).astype(jnp.float32)


def _sum_over(voxels, logits, class_index):
    return jnp.sum(voxels * logits[..., class_index])


def _place(heat, larger_map, image_shape, logits_shape):
    """Resizes the map of a layer to the grid of the logits, both where they lie in the image.

    With padding the map starts where the image does and may overhang its end by less than a stride;
    without, or with the FCN's padding by 100, it has the image's centre.
    """
    scales, shifts = [], []
    sizes = (heat.shape[1:], larger_map, image_shape, logits_shape)
    for cells, more_cells, voxels, labelled in zip(*sizes, strict=True):
        stride = round(_GROWTH / (more_cells - cells))
        overhang = cells * stride - voxels
        start = 0 if 0 <= overhang < stride else -overhang / 2
        scales.append(stride)
        shifts.append(start - (voxels - labelled) / 2)
    scale, translation = jnp.array(scales, jnp.float32), jnp.array(shifts, jnp.float32)
    shape, axes = (heat.shape[0], *logits_shape), range(1, heat.ndim)
    return jax.image.scale_and_translate(
        heat, shape, axes, scale, translation, "linear", antialias=False
    )
