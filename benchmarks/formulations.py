"""Time of each operation in each of its formulations, at the shapes of a U-Net in 2D and 3D.

OMP_WAIT_POLICY=passive python benchmarks/formulations.py

"chosen" is what networks use, "native" the library's own form; on CPU torch stands beside them.
Formulations take turns, so that a busy moment of the machine falls on all of them. "gradient" is
forward and backward together, for all arguments; the first convolution needs none for the image.
"""

import functools
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from absl import app, flags
from jax import lax
from report import print_report

from jaxseg.models import formulations

ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed calls of each formulation.")

SHAPES = {"2D": (4, 128, 128), "3D": (1, 48, 64, 48)}
# Channels, features, downsampling of the input, kernel size and stride.
CONVOLUTIONS = (
    (1, 32, 1, 3, 1),
    (32, 32, 1, 3, 1),
    (64, 32, 1, 3, 1),
    (32, 64, 1, 3, 2),
    (64, 64, 2, 3, 1),
    (128, 64, 2, 3, 1),
    (64, 128, 2, 3, 2),
    (128, 128, 4, 3, 1),
    (256, 128, 4, 3, 1),
    (128, 256, 4, 3, 2),
    (256, 256, 8, 3, 1),
    (32, 4, 1, 1, 1),
)
EPS = 1e-5


def main(_):
    torch.set_num_threads(os.cpu_count())
    figures = {"rounds": ROUNDS.value, "load_before": os.getloadavg()[0], "unit": "ms"}
    for name, (batch, *shape) in SHAPES.items():
        for label, operation in operations(batch, shape):
            figures[f"{name} {label}"] = compare(*operation)
    figures["load_after"] = os.getloadavg()[0]
    print_report("formulations", figures, str(jax.devices()[0].device_kind))


def operations(batch, shape):
    """(label, (functions by formulation, torch's function, arguments, first differentiated))."""

    def array(channels, down):
        return normal(batch, *(n // down for n in shape), channels)

    yield from convolutions(array, len(shape))
    yield from transposed_convolutions(array, len(shape))
    yield from pools_and_norms(array, len(shape))


def convolutions(array, rank):
    for channels, features, down, size, stride in CONVOLUTIONS:
        options = {"strides": (stride,) * rank, "padding": (((size - 1) // 2, size // 2),) * rank}
        functions = {
            "chosen": functools.partial(formulations.convolve, **options),
            "native": functools.partial(formulations.convolve_native, **options),
        }
        theirs = functools.partial(
            (F.conv1d, F.conv2d, F.conv3d)[rank - 1], stride=stride, padding=size // 2
        )
        arguments = (array(channels, down), normal(*(size,) * rank, channels, features))
        label = f"convolve {channels}->{features} size {size} stride {stride} at 1/{down}"
        yield label, (functions, theirs, arguments, int(channels == 1))


def transposed_convolutions(array, rank):
    transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    for channels, down in ((64, 2), (128, 4), (256, 8)):
        arguments = (array(channels, down), normal(*(2,) * rank, channels, channels // 2))
        functions = {
            "chosen": formulations.upconvolve,
            "native": functools.partial(transposed_native, factor=2),
        }
        label = f"upconvolve {channels}->{channels // 2} at 1/{down}"
        yield label, (functions, functools.partial(transpose, stride=2), arguments, 0)
    functions = {
        "chosen": functools.partial(formulations.transposed_convolve, factor=4),
        "native": functools.partial(transposed_native, factor=4),
    }
    arguments = (array(4, 4), normal(*(8,) * rank, 4, 4))
    yield (
        "transposed_convolve 4->4 factor 4 at 1/4",
        (functions, functools.partial(transpose, stride=4), arguments, 0),
    )


def pools_and_norms(array, rank):
    window = (2,) * rank
    library = {"window_shape": window, "strides": window, "padding": "SAME"}
    for pool, theirs in (
        ("max_pool", (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]),
        ("avg_pool", (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]),
    ):
        functions = {
            "chosen": functools.partial(getattr(formulations, pool), window=window),
            "native": functools.partial(getattr(nn, pool), **library),
        }
        theirs = functools.partial(theirs, kernel_size=2)
        yield f"{pool} 32 at 1/1", (functions, theirs, (array(32, 1),), 0)
    functions = {
        "chosen": functools.partial(formulations.instance_norm, eps=EPS),
        "native": instance_norm_native,
    }
    for channels, down in ((32, 1), (64, 2)):
        arguments = (array(channels, down), normal(channels), normal(channels))
        label = f"instance_norm {channels} at 1/{down}"
        yield label, (functions, instance_norm_torch, arguments, 0)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def transposed_native(x, kernel, factor):
    """XLA's own transposed convolution, which correlates: hence the mirrored kernel."""
    rank = x.ndim - 2
    return lax.conv_transpose(x, jnp.flip(kernel, range(rank)), (factor,) * rank, "VALID")


def instance_norm_native(x, scale, bias):
    """As it is defined; the gradient is left to JAX."""
    axes = tuple(range(1, x.ndim - 1))
    x = x - x.mean(axes, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + EPS) * scale + bias


def instance_norm_torch(x, scale, bias):
    return F.instance_norm(x, weight=scale, bias=bias, eps=EPS)


def compare(functions, theirs, arguments, first):
    """Median milliseconds by formulation: {"forward", "gradient"}."""
    calls = {name: jax_calls(function, arguments, first) for name, function in functions.items()}
    if jax.default_backend() == "cpu":
        calls["torch"] = torch_calls(theirs, arguments, first)
    times = {name: [] for name in calls}
    for _ in range(1 + ROUNDS.value):
        for name, pair in calls.items():
            times[name].append([seconds(call) for call in pair])
    medians = {name: 1e3 * np.median(values[1:], axis=0) for name, values in times.items()}
    return {
        name: {"forward": round(float(forward), 2), "gradient": round(float(gradient), 2)}
        for name, (forward, gradient) in medians.items()
    }


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def jax_calls(function, arguments, first):
    """(forward, forward and gradient), each returning once its result is there."""
    arguments = jax.device_put(arguments)
    forward = jax.jit(function)
    weight = jnp.ones(jax.eval_shape(function, *arguments).shape)

    @jax.jit
    def gradient(weight, *arguments):
        fixed, rest = arguments[:first], arguments[first:]
        y, pull = jax.vjp(lambda *rest: function(*fixed, *rest), *rest)
        return y, pull(weight)

    return (
        lambda: jax.block_until_ready(forward(*arguments)),
        lambda: jax.block_until_ready(gradient(weight, *arguments)),
    )


def torch_calls(function, arguments, first):
    """As `jax_calls`, in torch and its layout: channels after the batch, kernels [F, C, *K]."""
    is_transposed = "transpose" in getattr(getattr(function, "func", None), "__name__", "")
    x, *rest = arguments
    tensors = [torch.tensor(np.moveaxis(x, -1, 1).copy())]
    for parameter in rest:
        if parameter.ndim > 1:
            order = (0, 1) if is_transposed else (1, 0)
            parameter = np.moveaxis(parameter, (-2, -1), order)
        tensors.append(torch.tensor(parameter.copy()))
    for tensor in tensors[first:]:
        tensor.requires_grad_()

    def forward():
        with torch.no_grad():
            function(*tensors)

    weight = torch.ones_like(function(*tensors).detach())
    return forward, lambda: torch.autograd.grad(function(*tensors), tensors[first:], weight)


if __name__ == "__main__":
    app.run(main)
