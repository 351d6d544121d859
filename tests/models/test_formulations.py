"""Every formulation against the library's own form or float64 NumPy: forward and all gradients."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxseg.models import formulations


def random_array(*shape, seed=0, scale=1.0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (offset + scale * rng.normal(size=shape)).astype(np.float32)


def assert_same_function(function, reference, *arguments, rtol=1e-4, atol=1e-4):
    """Values and the gradient for every argument, under jit."""
    shape = jax.eval_shape(reference, *arguments).shape
    weight = random_array(*shape, seed=99)

    def both(function):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(jnp.asarray(weight))

    result, expected = jax.jit(lambda: both(function))(), jax.jit(lambda: both(reference))()
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, result, expected)


CONVOLUTIONS = [
    # shape, kernel, strides, padding
    ((7, 6), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((7, 6), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((8, 6), (3, 1), (2, 1), ((0, 0), (0, 0))),
    ((9, 8), (2, 3), (3, 2), ((1, 0), (2, 3))),
    ((6, 5), (3, 3), (1, 1), ((3, 4), (5, 5))),
    ((7, 6), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((7, 6), (1, 1), (2, 3), ((0, 0), (0, 0))),
    ((4, 5, 6), (3, 3, 3), (1, 1, 1), ((1, 1),) * 3),
    ((5, 4, 7), (3, 3, 3), (2, 2, 2), ((1, 1),) * 3),
    ((5, 6, 7), (3, 3, 3), (1, 1, 1), ((0, 0),) * 3),
    ((4, 6, 5), (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1))),
    ((6, 4, 5), (3, 1, 3), (2, 1, 1), ((1, 1), (0, 0), (1, 1))),
    ((7, 4, 5), (2, 3, 3), (3, 1, 1), ((0, 1), (1, 1), (1, 1))),
    ((5, 4, 3), (1, 1, 1), (1, 1, 1), ((0, 0),) * 3),
    # Depths that blocks of slices do not divide; padding wider than the kernel.
    ((9, 4, 5), (3, 3, 3), (1, 1, 1), ((1, 1),) * 3),
    ((26, 3, 4), (3, 3, 3), (2, 1, 1), ((1, 1),) * 3),
    ((6, 4, 5), (1, 3, 3), (1, 1, 1), ((1, 2), (2, 3), (0, 1))),
]


@pytest.mark.parametrize(("shape", "kernel_size", "strides", "padding"), CONVOLUTIONS)
@pytest.mark.parametrize("channels", [2, 9])
def test_convolve_is_the_library_convolution(shape, kernel_size, strides, padding, channels):
    x = random_array(2, *shape, channels)
    kernel = random_array(*kernel_size, channels, 4, seed=1)
    options = {"strides": strides, "padding": padding}
    reference = functools.partial(formulations.convolve_native, **options)
    assert_same_function(functools.partial(formulations.convolve, **options), reference, x, kernel)
    if len(shape) == 3 and jax.default_backend() != "cpu":  # there it has just been compared
        by_slices = functools.partial(formulations.convolve_by_slices, **options)
        assert_same_function(by_slices, reference, x, kernel)


def test_convolve_native_is_a_correlation():
    x, kernel = random_array(1, 4, 5, 2), random_array(3, 2, 2, 3, seed=1)
    expected = np.zeros((1, 2, 5, 3))
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 0), (0, 1), (0, 0)))
    for i, j in np.ndindex(2, 5):
        window = padded[0, 2 * i : 2 * i + 3, j : j + 2]
        expected[0, i, j] = np.einsum("abc,abcf->f", window, kernel)
    result = formulations.convolve_native(x, kernel, (2, 1), ((1, 0), (0, 1)))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_convolve_keeps_bfloat16_and_maps_over_members(rank):
    x = random_array(3, 2, *(5,) * rank, 2)
    kernel = random_array(3, *(3,) * rank, 2, 4, seed=1)
    options = {"strides": (1,) * rank, "padding": ((1, 1),) * rank}
    convolve = functools.partial(formulations.convolve, **options)
    mapped = jax.vmap(convolve)(x, kernel)
    for member in range(3):
        expected = convolve(x[member], kernel[member])
        np.testing.assert_allclose(mapped[member], expected, rtol=1e-4, atol=1e-4)
    assert convolve(jnp.bfloat16(x[0]), jnp.bfloat16(kernel[0])).dtype == jnp.bfloat16


def test_convolve_in_3d_is_the_native_one_on_other_platforms():
    x, kernel = jnp.zeros((1, 4, 5, 6, 2)), jnp.zeros((3, 3, 3, 2, 4))
    convolve = functools.partial(formulations.convolve, strides=(1, 1, 1), padding=((1, 1),) * 3)
    text = {
        platform: jax.export.export(jax.jit(convolve), platforms=(platform,))(
            x, kernel
        ).mlir_module()
        for platform in ("cpu", "cuda", "tpu")
    }
    for platform in ("cuda", "tpu"):
        assert "[b, 0, 1, 2, f]x[0, 1, 2, i, o]" in text[platform]
    assert "[b, 0, 1, 2, f]" not in text["cpu"] and "[b, 0, 1, f]" in text["cpu"]


@pytest.mark.parametrize("rank", [2, 3])
def test_convolve_and_its_gradient_export_for_all_platforms_and_any_batch(rank):
    options = {"strides": (1,) * rank, "padding": ((1, 1),) * rank}

    def loss(convolve, x, kernel):
        return jnp.sum(convolve(x, kernel, **options) ** 2)

    kernel = random_array(*(3,) * rank, 9, 4, seed=1)
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *(5,) * rank, 9), jnp.float32)
    grad = jax.jit(jax.grad(functools.partial(loss, formulations.convolve), argnums=(0, 1)))
    exported = jax.export.export(grad, platforms=("cpu", "cuda", "tpu"))(shape, kernel)
    x = random_array(3, *(5,) * rank, 9)
    reference = jax.grad(functools.partial(loss, formulations.convolve_native), argnums=(0, 1))
    for result, expected in zip(exported.call(x, kernel), reference(x, kernel), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: formulations.upconvolve(x, jnp.ones((*(2,) * (x.ndim - 2), 2, 3), x.dtype)),
        lambda x: formulations.transposed_convolve(
            x, jnp.ones((*(4,) * (x.ndim - 2), 2, 3), x.dtype), 2
        ),
        lambda x: formulations.max_pool(x, (2,) * (x.ndim - 2)),
        lambda x: formulations.avg_pool(x, (2,) * (x.ndim - 2)),
        lambda x: formulations.instance_norm(x, jnp.ones(2), jnp.zeros(2), 1e-5),
    ],
    ids=["upconvolve", "transposed_convolve", "max_pool", "avg_pool", "instance_norm"],
)
def test_the_others_keep_bfloat16_and_map_over_members(function, rank):
    x = random_array(2, 1, *(5,) * rank, 2)
    one_by_one = jax.jit(lambda x: jnp.stack([function(member) for member in x]))
    mapped = jax.jit(jax.vmap(function))(x)
    np.testing.assert_allclose(mapped, one_by_one(x), rtol=1e-5, atol=1e-5)
    assert jax.eval_shape(function, jnp.bfloat16(x[0])).dtype == jnp.bfloat16


def oracle_up_conv(x, kernel):
    """Every input voxel is spread over a block, in float64."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    factors = kernel.shape[:-2]
    shape = (n * f for n, f in zip(x.shape[1:-1], factors, strict=True))
    out = np.zeros((x.shape[0], *shape, kernel.shape[-1]))
    for tap in itertools.product(*map(range, factors)):
        steps = (slice(t, None, f) for t, f in zip(tap, factors, strict=True))
        out[(slice(None), *steps)] = x @ kernel[tap]
    return out


@pytest.mark.parametrize(
    ("shape", "factors"), [((5, 4), (2, 2)), ((3, 2, 4), (2, 2, 2)), ((3, 2, 4), (1, 3, 2))]
)
def test_upconvolve_is_a_transposed_convolution(shape, factors):
    x, kernel = random_array(2, *shape, 3), random_array(*factors, 3, 5, seed=1)
    expected = oracle_up_conv(x, kernel)
    np.testing.assert_allclose(formulations.upconvolve(x, kernel), expected, rtol=1e-5, atol=1e-5)

    def strided(x, kernel):  # lax correlates instead of convolving
        return lax.conv_transpose(x, jnp.flip(kernel, range(len(factors))), factors, "VALID")

    assert_same_function(formulations.upconvolve, strided, x, kernel)


def test_depth_to_space_unfolds_row_then_column():
    x = np.arange(8).reshape(1, 1, 2, 4)  # one feature, four positions per voxel
    expected = [[0, 1, 4, 5], [2, 3, 6, 7]]
    np.testing.assert_array_equal(formulations.depth_to_space(x, (2, 2))[0, ..., 0], expected)
    expected = [[0, 4], [1, 5], [2, 6], [3, 7]]
    np.testing.assert_array_equal(formulations.depth_to_space(x, (4, 1))[0, ..., 0], expected)


@pytest.mark.parametrize(("shape", "factor"), [((3, 4), 2), ((3, 2), 4), ((2, 1, 3), 2), ((3,), 8)])
def test_transposed_convolve_adds_overlapping_blocks(shape, factor):
    x = random_array(2, *shape, 3)
    kernel = random_array(*(2 * factor,) * len(shape), 3, 2, seed=1)
    expected = np.zeros((2, *(factor * (n + 1) for n in shape), 2))
    for index in np.ndindex(shape):
        block = np.einsum("bc,...cf->b...f", x[(slice(None), *index)], kernel)
        expected[(slice(None), *(slice(factor * i, factor * (i + 2)) for i in index))] += block
    transposed = functools.partial(formulations.transposed_convolve, factor=factor)
    np.testing.assert_allclose(transposed(x, kernel), expected, rtol=1e-4, atol=1e-4)

    def strided(x, kernel):
        flipped = jnp.flip(kernel, range(len(shape)))
        return lax.conv_transpose(
            x, flipped, (factor,) * len(shape), "VALID", dimension_numbers=None
        )

    if len(shape) > 1:
        assert_same_function(transposed, strided, x, kernel)


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((6, 4), (2, 2)),
        ((5, 7), (2, 2)),
        ((1, 3), (2, 3)),
        ((3, 4, 5), (2, 2, 2)),
        ((3, 4, 5), (1, 2, 2)),
    ],
)
def test_pools_take_blocks_and_a_smaller_one_at_an_odd_end(shape, window):
    x = random_array(2, *shape, 3, offset=-5)  # negative: a padding with 0 would win
    options = {"window_shape": window, "strides": window, "padding": "SAME"}
    max_pool = functools.partial(formulations.max_pool, window=window)
    avg_pool = functools.partial(formulations.avg_pool, window=window)
    assert_same_function(max_pool, functools.partial(nn.max_pool, **options), x)
    reference = functools.partial(nn.avg_pool, count_include_pad=False, **options)
    assert_same_function(avg_pool, reference, x)
    blocks = np.empty((2, *(-(-n // w) for n, w in zip(shape, window, strict=True)), 3))
    for index in np.ndindex(blocks.shape[1:-1]):
        block = tuple(slice(w * i, w * (i + 1)) for i, w in zip(index, window, strict=True))
        blocks[(slice(None), *index)] = x[(slice(None), *block)].max(tuple(range(1, x.ndim - 1)))
    np.testing.assert_array_equal(max_pool(x), blocks.astype(np.float32))


def test_max_pool_sends_the_gradient_to_the_first_of_equal_values():
    x = jnp.asarray([[3.0, 3.0, 1.0, 0.0], [3.0, 3.0, 0.0, 1.0]])[None, ..., None]
    grad = jax.grad(lambda x: formulations.max_pool(x, (2, 2)).sum())(x)
    np.testing.assert_array_equal(grad[0, ..., 0], [[1, 0, 1, 0], [0, 0, 0, 0]])


def test_max_pool_shares_out_ties_and_nan_as_torch_does():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(3, size=(2, 5, 4, 7, 3)).astype(np.float32)
    x[0, 1, 1, 3, 0] = np.nan  # not the first of its block
    x[1, 0, 0, 0, 1] = np.nan  # the first
    theirs = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
    pooled = torch.nn.functional.max_pool3d(theirs, (2, 2, 3), ceil_mode=True)
    weight = random_array(*pooled.shape, seed=1)
    pooled.backward(torch.tensor(weight))
    result, pull = jax.vjp(lambda x: formulations.max_pool(x, (2, 2, 3)), x)
    (grad,) = pull(jnp.asarray(np.moveaxis(weight, 1, -1)))
    expected = np.moveaxis(pooled.detach().numpy(), 1, -1)
    assert np.isnan(expected).sum() == 2
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(grad, np.moveaxis(theirs.grad.numpy(), 1, -1))


def test_instance_norm_of_many_voxels_far_from_zero_is_right_in_float32():
    x = random_array(1, 48, 64, 48, 2, scale=2.0, offset=100.0)
    exact = x.astype(np.float64) - x.mean((1, 2, 3), dtype=np.float64, keepdims=True)
    exact /= np.sqrt((exact**2).mean((1, 2, 3), keepdims=True) + 1e-5)
    instance_norm = jax.jit(functools.partial(formulations.instance_norm, eps=1e-5))
    np.testing.assert_allclose(instance_norm(x, jnp.ones(2), jnp.zeros(2)), exact, atol=2e-5)


@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 4)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_instance_norm_has_the_values_and_gradients_of_its_definition(shape, offset):
    x = random_array(2, *shape, 3, scale=2.0, offset=offset)
    scale, bias = random_array(3, seed=1), random_array(3, seed=2)

    def definition(x, scale, bias):
        axes = tuple(range(1, x.ndim - 1))
        x = x - x.mean(axes, keepdims=True)
        return x / jnp.sqrt((x**2).mean(axes, keepdims=True) + 1e-5) * scale + bias

    function = functools.partial(formulations.instance_norm, eps=1e-5)
    assert_same_function(function, definition, x, scale, bias, atol=1e-3)


def test_instance_norm_of_bfloat16_keeps_its_dtype_in_the_gradient_too():
    x = jnp.bfloat16(random_array(1, 6, 6, 2))
    scale, bias = jnp.ones(2), jnp.zeros(2)

    def loss(x, scale, bias):
        return jnp.sum(formulations.instance_norm(x, scale, bias, 1e-5).astype(jnp.float32) ** 3)

    grads = jax.grad(loss, argnums=(0, 1, 2))(x, scale, bias)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
    exact = jax.grad(loss, argnums=(0, 1, 2))(x.astype(jnp.float32), scale, bias)
    for grad, expected in zip(grads, exact, strict=True):
        np.testing.assert_allclose(np.float32(grad), expected, rtol=0.05, atol=0.6)
