"""U-Net: its size, its alignment, and that 2D and 3D are one network."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.models.blocks import Dropout
from jaxseg.models.summary import count_parameters, training_memory
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
    decoder_convs = 2
    norm_size = 0 if norm == "none" else 2
    bias_size = 1 if norm in ("none", "group") else 0

    def block(before, after, num_convs=decoder_convs):
        first = 3**rank * before * after
        others = (num_convs - 1) * 3**rank * after * after
        return first + others + num_convs * (norm_size + bias_size) * after

    total = block(channels, features[0], num_convs)
    for fine, coarse in itertools.pairwise(features):
        total += block(fine, coarse, num_convs)
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


@pytest.mark.parametrize("encoder", ["plain", "residual"])
@pytest.mark.parametrize("shape", [(17, 13), (1, 5), (9, 7, 5)])
def test_a_network_coarser_than_the_image_labels_all_of_it(encoder, shape):
    model = UNet(3, features=(2, 3, 4), encoder=encoder, num_convs=1, strides=(2, 2, 2))
    image = jax.ShapeDtypeStruct((2, *shape, 1), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert (logits.shape, logits.dtype) == ((2, *shape, 3), jnp.float32)
    assert "head" not in variables["params"]
    assert variables["params"]["upconv_head"]["kernel"].shape == (*(2,) * len(shape), 2, 3)


def test_a_network_without_padding_is_as_fine_as_the_image():
    model = UNet(3, features=(2, 3), num_convs=1, strides=(2, 2), padding="valid")
    with pytest.raises(ValueError, match="no stride before its first resolution"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))


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


PAPER = {
    "features": (64, 128, 256, 512, 1024),
    "norm": "none",
    "activation": "relu",
    "down": "max_pool",
    "padding": "valid",
}


def logits_of(model, *shape, **options):
    """Shapes of what a model returns for an image of that shape; nothing is computed."""
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    logits = jax.eval_shape(functools.partial(model.apply, **options), variables, image)
    return jax.tree.map(lambda leaf: leaf.shape, logits)


def test_published_network_has_the_published_size_and_output():
    # Ronneberger et al. 2015, figure 1, and 23 convolutional layers counted by hand with biases.
    model = UNet(2, **PAPER)
    assert logits_of(model, 1, 572, 572, 1) == (1, 388, 388, 2)
    assert count_parameters(model, (572, 572, 1)) == 31_030_658


@pytest.mark.parametrize("shape", [(576, 572), (572, 571), (180, 188)])
def test_published_network_refuses_maps_that_do_not_halve(shape):
    with pytest.raises(ValueError, match="must halve its maps exactly"):
        logits_of(UNet(2, **PAPER), 1, *shape, 1)


def test_without_padding_the_centre_is_that_of_a_network_that_sees_more():
    model = UNet(2, **PAPER | {"features": (3, 4, 5)})
    image = random_image(1, 76, 60, 1)
    variables = random_variables(model, image)
    apply = jax.jit(model.apply)
    whole = apply(variables, image)
    assert whole.shape == (1, 36, 20, 2)
    part = apply(variables, image[:, 4:68, 4:56])  # shifted by the network's stride
    assert np.std(part) > 0.01
    np.testing.assert_allclose(part, whole[:, 4:28, 4:16], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "encoder_size"),
    # torchvision's published counts (138,357,544, 11,689,512, 21,797,672, 25,557,032) without the
    # fully connected layers.
    [
        ("vgg16", 14_714_688),
        ("resnet18", 11_689_512 - 513_000),
        ("resnet34", 21_797_672 - 513_000),
        ("resnet50", 25_557_032 - 2_049_000),
    ],
)
def test_published_encoders_have_their_published_size(encoder, encoder_size):
    model = UNet(3, features=(), encoder=encoder)
    image = jax.ShapeDtypeStruct((1, 65, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]["encoder"]
    params.pop("full", None)  # at full resolution, of which the published ResNets have nothing
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == encoder_size
    assert logits_of(model, 1, 65, 64, 3) == (1, 65, 64, 3)


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_deep_supervision_returns_all_scales_but_the_two_coarsest_while_training(encoder):
    options = {"features": (2, 3, 4, 5), "encoder": encoder, "num_convs": 1}
    model = UNet(3, deep_supervision=True, **options)
    assert logits_of(model, 1, 17, 16, 1, train=True) == ((1, 17, 16, 3), (1, 9, 8, 3))
    assert logits_of(model, 1, 17, 16, 1) == (1, 17, 16, 3)
    assert logits_of(UNet(3, **options), 1, 17, 16, 1, train=True) == (1, 17, 16, 3)


def test_deep_supervision_trains_the_same_finest_logits():
    model = UNet(3, features=(2, 3, 4, 5), num_convs=1, deep_supervision=True)
    image = random_image(1, 17, 16, 1)
    variables = random_variables(model, image)
    finest, _ = model.apply(variables, image, train=True)
    np.testing.assert_array_equal(finest, model.apply(variables, image))


def test_strides_and_kernels_of_one_are_slices_seen_alone():
    model = UNet(
        2, features=(3, 4), num_convs=1, kernel_sizes=((3, 3, 1),) * 2, strides=((2, 2, 1),)
    )
    model = model.clone(norm="none")
    volume = random_image(1, 7, 6, 3, 1)
    variables = random_variables(model, volume)
    flat = jax.tree.map(lambda leaf: leaf[:, :, 0] if leaf.ndim == 5 else leaf, variables)
    slices = UNet(2, features=(3, 4), num_convs=1, norm="none")
    logits = model.apply(variables, volume)
    assert np.std(logits) > 0.005
    for z in range(3):
        expected = slices.apply(flat, volume[:, :, :, z])
        np.testing.assert_allclose(logits[:, :, :, z], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_remat_changes_neither_parameters_nor_gradient(encoder):
    kept = UNet(2, features=(3, 4, 5), encoder=encoder, num_convs=1, norm="batch")
    again = kept.clone(remat=True)
    image = random_image(2, 9, 8, 1)
    variables = random_variables(kept, image)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    weight = random_image(2, 9, 8, 2, seed=3)

    def gradient(model):
        def loss(params):
            logits, updated = model.apply(
                variables | {"params": params}, image, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(weight * logits), updated

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    for a, b in zip(*(jax.tree.leaves(gradient(m)) for m in (kept, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert training_memory(again, (64, 64, 1)) < 0.5 * training_memory(kept, (64, 64, 1))


def test_residual_encoder_counts_by_hand():
    # Stem, then blocks of two convolutions, with a projection where channels change.
    model = UNet(2, features=(4, 6), encoder="residual", num_convs=(1, 2), decoder_convs=1)
    stem = 9 * 1 * 4 + 8
    stage0 = 2 * (9 * 16 + 8)
    stage1 = 9 * 4 * 6 + 9 * 36 + 4 * 6 + (2 * 9 * 36 + 4 * 6) + (4 * 6 + 12)
    decoder = 4 * 6 * 4 + 4 + (9 * 8 * 4 + 8) + (4 * 2 + 2)
    assert count_parameters(model, (16, 16, 1)) == stem + stage0 + stage1 + decoder


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("encoder", "resnet"),
        ("norm", "layer"),
        ("down", "avg"),
        ("up", "x"),
        ("padding", "reflect"),
    ],
)
def test_an_unknown_word_is_refused_with_the_choices(field, word):
    with pytest.raises(ValueError, match=f"{field} is '{word}', must be one of '"):
        logits_of(UNet(2, features=(2, 3), **{field: word}), 1, 8, 8, 1)


def test_a_map_that_vanishes_without_padding_is_refused():
    with pytest.raises(ValueError, match="too small for an unpadded convolution 3x3"):
        logits_of(UNet(2, **PAPER), 1, 76, 76, 1)
