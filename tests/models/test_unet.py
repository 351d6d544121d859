"""U-Net: its size, its alignment, and that 2D and 3D are one network."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.models.blocks import Dropout
from jaxseg.models.summary import count_parameters
from jaxseg.models.unet import UNet


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(model, image, seed=1):
    """Variables of `model` filled with noise that keeps the scale of what passes through."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(fill, jax.eval_shape(model.init, jax.random.key(0), image))


def count_by_hand(
    rank, channels, num_classes, features, num_convs=2, norm="instance", up="conv", **_
):
    norm_size = 0 if norm == "none" else 2
    bias_size = 1 if norm in ("none", "group") else 0

    def block(before, after):
        first = 3**rank * before * after
        others = (num_convs - 1) * 3**rank * after * after
        return first + others + num_convs * (norm_size + bias_size) * after

    total = block(channels, features[0])
    for fine, coarse in itertools.pairwise(features):
        total += block(fine, coarse)
        if up == "conv":
            total += 2**rank * coarse * fine + fine + block(2 * fine, fine)
        else:
            total += block(coarse + fine, fine)
    return total + features[0] * num_classes + num_classes


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"features": (8,)},
        {"features": (8, 16)},
        {"features": (4, 12, 20), "num_convs": 1, "up": "resize"},
        {"features": (4, 12, 20), "num_convs": 3, "norm": "none", "down": "max_pool"},
        {"features": (8, 16, 16), "norm": "group"},
        {"features": (4, 6), "norm": "batch", "up": "resize"},
    ],
)
def test_parameters_are_counted_by_hand(rank, options):
    image_shape = (16,) * rank + (2,)
    expected = count_by_hand(rank, 2, 5, **options)
    assert count_parameters(UNet(5, **options), image_shape) == expected


def test_default_size():
    # 3x3 blocks down: 1-32-32, 64, 128, 256 -> 9 * (32 + 1024 + 2048 + 4096 + 8192 + 16384 + 32768
    # + 65536); up: 2x2 256-128, 128-64, 64-32 and 3x3 256-128-128, 128-64-64, 64-32-32; plus
    # scales and shifts, the biases of the up-convolutions and the head.
    assert count_parameters(UNet(4), (128, 128, 1)) == (
        9 * (32 + 32**2 + 32 * 64 + 64**2 + 64 * 128 + 128**2 + 128 * 256 + 256**2)
        + 4 * (256 * 128 + 128 * 64 + 64 * 32)
        + 9 * (256 * 128 + 128**2 + 128 * 64 + 64**2 + 64 * 32 + 32**2)
        + 4 * (32 + 64 + 128 + 256)
        + 4 * (128 + 64 + 32)
        + (128 + 64 + 32)
        + (32 + 1) * 4
    )


@pytest.mark.parametrize(("down", "up"), [("conv", "conv"), ("max_pool", "resize")])
@pytest.mark.parametrize("shape", [(16, 16), (17, 13), (1, 5), (3, 64), (9, 7, 5), (1, 1, 2)])
def test_logits_have_the_size_of_the_image_whatever_it_is(down, up, shape):
    model = UNet(3, features=(2, 3, 4), num_convs=1, down=down, up=up)
    image = jax.ShapeDtypeStruct((2, *shape, 1), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert (logits.shape, logits.dtype) == ((2, *shape, 3), jnp.float32)


@pytest.mark.parametrize("options", [{}, {"down": "max_pool", "up": "resize"}])
def test_volume_one_slice_thick_is_the_slice_under_the_middle_weights(options):
    model = UNet(3, features=(4, 6, 8), num_convs=1, **options)
    image = random_image(2, 13, 10, 2)
    variables = random_variables(model, image[:, :, :, None])

    def middle(path, leaf):
        if leaf.ndim == 1:
            return leaf
        return leaf[:, :, 0 if "upconv" in jax.tree_util.keystr(path) else leaf.shape[2] // 2]

    flat_variables = jax.tree_util.tree_map_with_path(middle, variables)
    apply = jax.jit(model.apply)
    volume_logits = apply(variables, image[:, :, :, None])
    logits = apply(flat_variables, image)
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(volume_logits[:, :, :, 0], logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("down", "up"), [("conv", "conv"), ("max_pool", "resize")])
def test_shifting_the_image_by_the_stride_shifts_the_logits(down, up):
    model = UNet(2, features=(3, 4, 5), num_convs=1, norm="none", down=down, up=up)
    image = random_image(1, 80, 80, 1)
    variables = random_variables(model, image)
    apply = jax.jit(model.apply)
    logits = np.asarray(apply(variables, image))
    # No further than 16 voxels are seen, and at most 8 more come round the edge.
    inside = (slice(None), slice(24, 56), slice(24, 56))
    assert np.std(logits[inside]) > 0.01

    def error(shift):
        rolled = np.roll(logits, shift, axis=(1, 2))
        shifted = np.asarray(apply(variables, np.roll(image, shift, axis=(1, 2))))
        return np.abs(shifted - rolled)[inside].max()

    assert error((4, 8)) < 1e-5
    assert error((2, 0)) > 1e-3  # half a stride does move the result


def test_every_weight_has_a_gradient():
    model = UNet(2, features=(4, 8), num_convs=1)
    image = random_image(2, 9, 7, 1)
    params = random_variables(model, image)["params"]
    weight = random_image(2, 9, 7, 2, seed=3)
    grads = jax.jit(
        jax.grad(lambda params: jnp.sum(weight * model.apply({"params": params}, image)))
    )(params)
    without = [jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(grads) if not g.all()]
    assert not without


def test_activation_is_the_one_asked_for():
    image = random_image(1, 8, 8, 1)
    leaky = UNet(2, features=(4, 8), num_convs=1, norm="none")
    variables = random_variables(leaky, image)
    relu = leaky.clone(activation="relu")
    assert not np.allclose(leaky.apply(variables, image), relu.apply(variables, image))


def test_bfloat16_keeps_float32_parameters_and_logits_and_stays_close():
    image = random_image(2, 16, 16, 1)
    exact = UNet(3, features=(4, 8), num_convs=1)
    coarse = exact.clone(dtype="bfloat16")
    variables = random_variables(coarse, image)
    shapes = jax.eval_shape(coarse.init, jax.random.key(0), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    logits = jax.jit(coarse.apply)(variables, image)
    expected = jax.jit(exact.apply)(variables, image)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected)
    assert 0 < error.max() < 0.1 * np.std(expected)
    assert error.mean() < 0.02 * np.std(expected)


def test_dropout_only_while_training_and_at_the_two_coarsest_resolutions():
    model = UNet(2, features=(4, 6, 8, 10), num_convs=1, dropout=0.5)
    image = random_image(2, 16, 16, 1)
    variables = random_variables(model, image)
    plain = jax.jit(model.clone(dropout=0.0).apply)(variables, image)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, image), plain)

    channels = []

    def note(next_fn, args, kwargs, context):
        if isinstance(context.module, Dropout):
            channels.append(args[0].shape[-1])
        return next_fn(*args, **kwargs)

    train = jax.jit(lambda key: model.apply(variables, image, train=True, rngs={"dropout": key}))
    with nn.intercept_methods(note):
        first = train(jax.random.key(1))
    assert channels == [8, 10]
    np.testing.assert_array_equal(first, train(jax.random.key(1)))
    assert not np.allclose(first, train(jax.random.key(2)))
