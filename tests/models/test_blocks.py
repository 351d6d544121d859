"""The building blocks against float64 NumPy and against the library's slower forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxseg.models.blocks import (
    AttentionGate,
    Conv,
    ConvBlock,
    Dropout,
    Norm,
    ResidualBlock,
    Style,
    UpConv,
    crop_to,
    he_normal,
    resize_linear,
)
from jaxseg.models.registry import MODELS, create_model

SHAPES = [(5, 4), (3, 2, 4)]


def random_array(*shape, seed=0, scale=1.0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (offset + scale * rng.normal(size=shape)).astype(np.float32)


def random_variables(model, x, **kwargs):
    """Variables of `model` filled with noise; its own initialisers are slow to compile."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **kwargs))
    leaves, tree = jax.tree.flatten(variables)
    arrays = [random_array(*leaf.shape, seed=seed) for seed, leaf in enumerate(leaves, start=1)]
    return jax.tree.unflatten(tree, arrays)


def oracle_normalise(x, axes, eps=1e-5):
    x = x.astype(np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


@pytest.mark.parametrize("layer", [Conv, UpConv])
def test_a_bias_in_bfloat16_has_the_gradient_of_all_voxels(layer):
    """Summed in bfloat16 it would stop growing after some hundred of them."""
    model = layer(2, 1, dtype=jnp.bfloat16)
    x = jnp.ones((1, 24, 24, 24, 1))
    variables = model.init(jax.random.key(0), x)
    gradient = jax.grad(lambda v: model.apply(v, x).astype(jnp.float32).sum())(variables)
    np.testing.assert_allclose(gradient["params"]["bias"], 24**3, rtol=1e-6)


def test_up_conv_starts_with_the_variance_that_keeps_its_inputs_scale():
    kernel = UpConv(64).init(jax.random.key(0), jnp.zeros((1, 2, 2, 128)))["params"]["kernel"]
    # One input voxel reaches one output voxel by one tap: the fan-in is the channels alone.
    np.testing.assert_allclose(np.std(kernel), 128**-0.5, rtol=0.03)


@pytest.mark.parametrize(("shape", "new_shape"), [((4, 3), (7, 6)), ((2, 3, 1), (4, 5, 2))])
def test_resize_linear_interpolates_between_voxel_centres(shape, new_shape):
    expected = x = random_array(2, *shape, 2)
    for axis, (n, m) in enumerate(zip(shape, new_shape, strict=True), start=1):
        centres = (np.arange(m) + 0.5) * n / m - 0.5
        expected = np.apply_along_axis(
            lambda line, at=centres: np.interp(at, np.arange(len(line)), line), axis, expected
        )
    np.testing.assert_allclose(resize_linear(x, new_shape), expected, rtol=1e-5, atol=1e-6)


def test_crop_to_keeps_the_first_voxels_and_all_channels():
    x = random_array(2, 4, 5, 3)
    np.testing.assert_array_equal(crop_to(x, (3, 5), (0, 0)), x[:, :3, :5, :])


def test_crop_to_takes_the_centre_or_starts_at_offsets():
    x = random_array(2, 6, 7, 3)
    np.testing.assert_array_equal(crop_to(x, (2, 4)), x[:, 2:4, 1:5])
    np.testing.assert_array_equal(crop_to(x, (2, 4), (1, 3)), x[:, 1:3, 3:7])


@pytest.mark.parametrize("shape", SHAPES)
def test_instance_norm_is_per_example_and_channel(shape):
    x = random_array(2, *shape, 3, scale=2.0, offset=100.0)
    model = Norm("instance")
    variables = random_variables(model, x, train=True)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    expected = oracle_normalise(x, tuple(range(1, x.ndim - 1))) * scale + bias
    np.testing.assert_allclose(
        model.apply(variables, x, train=True), expected, rtol=1e-4, atol=1e-4
    )


def test_instance_norm_in_bfloat16_has_float32_statistics():
    x = jnp.asarray(random_array(1, 64, 64, 2, scale=2.0, offset=100.0), jnp.bfloat16)
    model = Norm("instance")
    params = model.init(jax.random.key(0), x, train=True)
    result = model.apply(params, x, train=True)
    assert result.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    expected = oracle_normalise(np.asarray(x, np.float32), (1, 2))
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, rtol=2**-8, atol=1e-3)


def test_instance_norm_of_a_constant_channel_is_its_bias_and_has_a_finite_gradient():
    x = jnp.full((1, 4, 4, 1), 7.0)
    params = {"scale": jnp.ones(1), "bias": jnp.full(1, 0.5)}

    def f(x):
        return Norm("instance").apply({"params": params}, x, train=True)

    np.testing.assert_array_equal(f(x), np.full((1, 4, 4, 1), 0.5, np.float32))
    assert np.isfinite(jax.grad(lambda x: jnp.sum(f(x) ** 2))(x)).all()


def test_group_norm_takes_groups_of_eight_channels():
    x = random_array(2, 4, 3, 16, scale=2.0, offset=1.0)
    model = Norm("group")
    variables = random_variables(model, x, train=True)
    params = variables["params"]
    grouped = oracle_normalise(x.reshape(2, 4, 3, 2, 8), (1, 2, 4), eps=1e-5).reshape(x.shape)
    expected = grouped * params["scale"] + params["bias"]
    np.testing.assert_allclose(
        model.apply(variables, x, train=True), expected, rtol=1e-4, atol=1e-4
    )


def test_batch_norm_uses_the_batch_while_training_and_keeps_running_statistics():
    x = random_array(4, 3, 5, 2, scale=2.0, offset=1.0)
    model = Norm("batch")
    variables = random_variables(model, x, train=True)
    params = variables["params"]
    stats = variables["batch_stats"]
    result, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    expected = oracle_normalise(x, (0, 1, 2)) * params["scale"] + params["bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)

    new_stats = updated["batch_stats"]
    x64 = x.astype(np.float64)
    for name, value in (("mean", x64.mean((0, 1, 2))), ("var", x64.var((0, 1, 2)))):
        expected = 0.9 * stats[name] + 0.1 * value
        np.testing.assert_allclose(new_stats[name], expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_uses_the_running_statistics_when_not_training():
    x = random_array(4, 3, 5, 2)
    model = Norm("batch")
    variables = jax.tree.map(np.abs, random_variables(model, x, train=True))
    params = variables["params"]
    stats = variables["batch_stats"]
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(
        model.apply(variables, x, train=False), expected, rtol=1e-4, atol=1e-4
    )


def test_batch_norm_over_a_device_axis_takes_the_statistics_of_the_whole_batch():
    x = random_array(4, 3, 5, 2, offset=1.0)
    whole = Norm("batch")
    variables = random_variables(whole, x, train=True)
    split = Norm("batch", axis_name="batch")

    def apply(model, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    expected, expected_stats = apply(whole, x)
    parts, stats = jax.vmap(lambda x: apply(split, x), axis_name="batch")(x.reshape(2, 2, 3, 5, 2))
    np.testing.assert_allclose(parts.reshape(x.shape), expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(expected_stats), strict=True):
        np.testing.assert_allclose(a, np.stack([b, b]), rtol=1e-5, atol=1e-6)


def test_no_norm_is_the_identity_without_parameters():
    x = random_array(2, 3, 4)
    result, variables = Norm("none").init_with_output(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(result, x)
    assert not variables


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
@pytest.mark.parametrize("shape", SHAPES)
def test_conv_block_is_a_same_sized_correlation_and_an_activation(shape, activation, slope):
    x = random_array(1, *shape, 2)
    model = ConvBlock(3, 1, Style("none", activation))
    variables = random_variables(model, x, train=True)
    kernel, bias = (variables["params"]["conv0"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (3,) * len(shape) + (2, 3)
    expected = np.empty((*shape, 3))
    for f in range(3):
        planes = [
            ndimage.correlate(x[0, ..., c].astype(np.float64), kernel[..., c, f], mode="constant")
            for c in range(2)
        ]
        expected[..., f] = sum(planes) + bias[f]
    assert (expected < -1).any()
    expected = np.where(expected < 0, slope * expected, expected)
    result = model.apply(variables, x, train=True)[0]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_conv_block_strides_its_first_convolution_alone():
    x = jnp.zeros((1, 9, 8, 2))
    model = ConvBlock(3, 3, Style("none", "relu"), strides=2)
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x, train=True)[0])
    assert out.shape == (1, 5, 4, 3)


@pytest.mark.parametrize(
    ("norm", "has_bias"), [("instance", False), ("batch", False), ("group", True), ("none", True)]
)
def test_conv_block_has_a_bias_only_where_the_norm_does_not_remove_it(norm, has_bias):
    x = jnp.zeros((1, 4, 4, 2))
    model = ConvBlock(8, 2, Style(norm, "relu"))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True))["params"]
    assert ["bias" in params[f"conv{i}"] for i in range(2)] == [has_bias] * 2


@pytest.mark.parametrize(("rate", "train"), [(0.7, False), (0.0, True)])
def test_dropout_is_the_identity_unless_training(rate, train):
    x = random_array(2, 3, 4)
    np.testing.assert_array_equal(Dropout(rate).apply({}, x, train=train), x)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_drops_whole_channels_of_each_example_and_keeps_the_mean(rate):
    num_examples, num_channels = 64, 256
    x = random_array(num_examples, 2, 3, num_channels, offset=3.0)
    dropped = Dropout(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(1)})
    keep = np.asarray(dropped[:, 0, 0] != 0)
    expected = np.where(keep[:, None, None], x / (1 - rate), 0)
    np.testing.assert_allclose(dropped, expected, rtol=1e-6)
    # 16,384 draws: three standard deviations of their mean are at most 0.012.
    np.testing.assert_allclose(keep.mean(), 1 - rate, atol=0.012)
    assert len(np.unique(keep, axis=0)) == num_examples


def test_dropout_masks_do_not_depend_on_how_devices_share_the_batch():
    x = np.ones((8, 2, 2, 64), np.float32)
    rngs = {"dropout": jax.random.key(1)}
    whole = Dropout(0.5).apply({}, x, train=True, rngs=rngs)
    apply = jax.vmap(
        lambda x: Dropout(0.5, "batch").apply({}, x, train=True, rngs=rngs), axis_name="batch"
    )
    parts = apply(x.reshape(4, 2, *x.shape[1:]))
    np.testing.assert_array_equal(parts.reshape(x.shape), whole)


def test_models_are_made_by_name():
    model = create_model("unet", 3, features=(4, 8))
    assert isinstance(model, MODELS["unet"])
    assert (model.num_classes, model.features) == (3, (4, 8))
    with pytest.raises(KeyError, match="vnet"):
        create_model("vnet", 3)


def test_he_initialisation_has_its_variance_and_every_tap_of_an_up_convolution_its_own():
    kernel = he_normal(jax.random.key(0), (3, 3, 64, 256))
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.02)
    assert abs(np.mean(kernel)) < 0.001


@pytest.mark.parametrize("shape", [(9, 8), (5, 4, 7)])
@pytest.mark.parametrize("strides", [1, 2, 3])
def test_padding_is_the_same_on_both_sides_also_with_strides(shape, strides):
    x = random_array(1, *shape, 2)
    model = Conv(1, 3, strides)
    variables = random_variables(model, x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    full = sum(
        ndimage.correlate(x[0, ..., c].astype(np.float64), kernel[..., c, 0], mode="constant")
        for c in range(2)
    )
    expected = full[(slice(None, None, strides),) * len(shape)] + bias
    np.testing.assert_allclose(model.apply(variables, x)[0, ..., 0], expected, rtol=1e-4, atol=1e-4)


def test_residual_block_with_silent_convolutions_is_its_shortcut():
    x = random_array(2, 5, 4, 3)
    model = ResidualBlock(8, Style("none", "relu"), strides=2)
    variables = random_variables(model, x, train=True)
    params = jax.tree.map(np.copy, variables["params"])
    for name in ("conv1", "conv2"):
        params[name] = jax.tree.map(np.zeros_like, params[name])
    pooled = np.empty((2, 3, 2, 3))
    for i, j in np.ndindex(3, 2):  # five rows: the last block is one row high
        pooled[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
    expected = np.maximum(pooled @ params["project_conv"]["kernel"][0, 0], 0)
    result = model.apply({"params": params}, x, train=True)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (5, 4), (4, 2, 3)])
def test_attention_weighs_the_skip_by_an_additive_gate(shape):
    strides = (2,) * len(shape)
    skip = random_array(1, *shape, 3)
    coarse = random_array(1, *(-(-n // 2) for n in shape), 4, seed=1)
    model = AttentionGate(2)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), skip, coarse, strides))
    leaves, tree = jax.tree.flatten(shapes)
    arrays = [random_array(*leaf.shape, seed=seed) for seed, leaf in enumerate(leaves)]
    variables = jax.tree.unflatten(tree, arrays)
    params = variables["params"]
    hidden = np.zeros((*coarse.shape[:-1], 2))
    for index in np.ndindex(coarse.shape[1:-1]):
        for tap in np.ndindex(strides):
            voxel = tuple(2 * i + t for i, t in zip(index, tap, strict=True))
            if all(v < n for v, n in zip(voxel, shape, strict=True)):
                hidden[(0, *index)] += skip[(0, *voxel)] @ params["skip"]["kernel"][tap]
    gating, psi = params["gating"], params["psi"]
    one = (0,) * len(shape)
    hidden = np.maximum(hidden + coarse @ gating["kernel"][one] + gating["bias"], 0)
    weight = 1 / (1 + np.exp(-(hidden @ psi["kernel"][one] + psi["bias"])))
    expected = skip * np.asarray(resize_linear(weight.astype(np.float32), shape))
    assert np.std(weight) > 0.05
    result = model.apply(variables, skip, coarse, strides)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_frozen_batch_statistics_are_used_and_kept_while_training():
    x = random_array(4, 3, 5, 2)
    frozen, moving = Norm("batch", frozen=True), Norm("batch")
    variables = jax.tree.map(np.abs, random_variables(moving, x, train=True))
    result, updated = frozen.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(result, moving.apply(variables, x, train=False))
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
