"""How big a network is, before it runs."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def count_parameters(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Number of parameters of a model for one image of shape (*S, C); nothing is computed."""
    _, variables = _abstract(model, image_shape)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def count_flops(model: nn.Module, image_shape: Sequence[int]) -> int | None:
    """Floating-point operations of a forward pass over one image of shape (*S, C).

    XLA's own count before optimisation: a multiplication and an addition are two operations. It is
    that of a program for TPU, since in one for CPU 3D convolutions are loops, of which XLA counts
    one turn. None where a setting such as JAX_PLATFORMS=cuda leaves no CPU to JAX.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    image, variables = _abstract(model, image_shape)
    with jax.default_device(cpu):
        traced = jax.jit(model.apply).trace(variables, image)
        analysis: Any = traced.lower(lowering_platforms=("tpu",)).cost_analysis()
    return int(analysis["flops"])


def training_memory(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Bytes kept from the forward pass over one image (*S, C) for the backward pass.

    Activations and what of the parameters the gradient needs, as JAX keeps them whatever the
    backend; the compiler may keep less. (XLA merges what `remat` computes again on CPU, so that
    there it saves nothing.)
    """
    image, variables = _abstract(model, image_shape)

    def backward(params, rest, image):
        return jax.vjp(lambda params: model.apply({"params": params, **rest}, image), params)[1]

    params = variables.pop("params")
    kept = jax.tree.leaves(jax.eval_shape(backward, params, variables, image))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def summarise_model(model: nn.Module, image_shape: Sequence[int]) -> str:
    """One line: name, parameters, operations per image."""
    size, flops = "x".join(map(str, image_shape)), count_flops(model, image_shape)
    return (
        f"{type(model).__name__}: {count_parameters(model, image_shape):,} parameters, "
        f"{'unknown' if flops is None else f'{flops / 1e9:.2f}'} GFLOP forward per {size} image"
    )


def _abstract(model, image_shape):
    """Shapes and dtypes of one image (*S, C) in a batch and of the model's variables for it."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return image, jax.eval_shape(model.init, jax.random.key(0), image)
