"""Explanations: Grad-CAM by hand, integrated gradients with known integrals, every network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxseg.inference import explain
from jaxseg.models.registry import create_model

NETWORKS = {
    "plain": ("unet", {"features": (4, 8)}, (12, 14)),
    "volume": ("unet", {"features": (2, 4), "remat": True}, (6, 8, 7)),
    "valid": ("unet", {"features": (4, 8), "padding": "valid", "down": "max_pool"}, (24, 28)),
    "residual": (
        "unet",
        {"features": (4, 8), "encoder": "residual", "norm": "batch", "deep_supervision": True},
        (12, 12),
    ),
}
PUBLISHED = [
    ("unet", {"features": (), "encoder": "vgg16"}),
    ("unet", {"features": (), "encoder": "resnet50", "norm": "batch"}),
    ("fcn", {"features": (4, 4, 8, 8, 8)}),
    ("fcn", {"features": (), "encoder": "vgg16", "padding": "paper"}),
]


class Halved(nn.Module):
    """Features at half the resolution."""

    @nn.compact
    def __call__(self, x, train):
        return [x, nn.relu(nn.Conv(5, (2, 2), (2, 2), name="conv")(x))]


class Toy(nn.Module):
    """An encoder, nearest up-sampling and a linear head: its gradients can be written down."""

    @nn.compact
    def __call__(self, image, train=False):
        features = Halved(name="encoder")(image, train)[-1]
        features = jnp.repeat(jnp.repeat(features, 2, axis=1), 2, axis=2)
        return nn.Dense(3, name="head")(features)


class Voxelwise(nn.Module):
    """The same function of every voxel."""

    function: object
    num_classes: int = 3

    @nn.compact
    def __call__(self, image, train=False):
        return self.function(nn.Dense(self.num_classes, name="head")(image))


def random_array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def network(name):
    """A random network, its variables, an image of [2, *S, 2], its logits and a common class."""
    kind, options, shape = NETWORKS[name]
    model = create_model(kind, 3, **options)
    image = random_array(2, *shape, 2)
    variables = jax.jit(model.init)(jax.random.key(1), image)
    logits = np.asarray(jax.jit(model.apply)(variables, image))
    return model, variables, image, logits, int(np.bincount(logits.argmax(-1).ravel()).argmax())


def cam_of(model, variables, image, index, layer="encoder"):
    return np.asarray(
        jax.jit(lambda image: explain.grad_cam(model, variables, image, index, layer))(image)
    )


def interpolated(cells, size):
    """Doubles the last axis of [..., N] by linear interpolation between centres of cells."""
    position = np.clip((np.arange(size) + 0.5) / 2 - 0.5, 0, cells.shape[-1] - 1)
    return np.stack(
        [np.interp(position, range(len(row)), row) for row in cells.reshape(-1, cells.shape[-1])]
    ).reshape(*cells.shape[:-1], size)


def test_grad_cam_by_hand():
    image = random_array(2, 8, 12, 2)
    variables = jax.jit(Toy().init)(jax.random.key(0), image)
    conv, head = variables["params"]["encoder"]["conv"], variables["params"]["head"]
    blocks = image.reshape(2, 4, 2, 6, 2, 2)
    features = np.einsum("bixjyc,xyck->bijk", blocks, np.float64(conv["kernel"])) + conv["bias"]
    features = np.maximum(features, 0)
    winner = np.argmax(features @ np.float64(head["kernel"]) + head["bias"], axis=-1)
    for index in range(3):
        # A cell stands for four voxels, each with the head's weights as gradient.
        gradient = 4 * (winner == index)[..., None] * head["kernel"][:, index]
        cells = np.maximum((gradient.mean(axis=(1, 2), keepdims=True) * features).sum(-1), 0)
        heat = interpolated(np.swapaxes(interpolated(cells, 12), 1, 2), 8).swapaxes(1, 2)
        found = cam_of(Toy(), variables, image, index)
        np.testing.assert_allclose(found, heat, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_inside_jit_and_map(name):
    model, variables, image, logits, index = network(name)

    def both(image):
        cam = explain.grad_cam(model, variables, image[None], index)
        gradients = explain.integrated_gradients(model, variables, image[None], index, 2)
        return cam[0], gradients[0]

    cam, gradients = jax.jit(lambda image: lax.map(both, image))(image)
    assert cam.shape == gradients.shape == logits.shape[:-1]
    assert cam.min() >= 0 and cam.max() > 0
    assert gradients.any() and np.isfinite(gradients).all()


@pytest.mark.parametrize(("kind", "options"), PUBLISHED)
def test_published_encoders_are_explained_on_the_grid_of_their_logits(kind, options):
    model = create_model(kind, 3, **options)
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)

    def explain_fresh_network(image):
        variables = model.init(jax.random.key(0), image)
        cam = explain.grad_cam(model, variables, image, 1)
        return cam, explain.integrated_gradients(model, variables, image, 1)

    shapes = [each.shape for each in jax.eval_shape(explain_fresh_network, image)]
    assert shapes == [(1, 64, 96)] * 2


def test_a_network_that_computes_blocks_again_gives_the_same_map():
    model, variables, image, _, index = network("plain")
    layer = "encoder/stage0/norm0"
    expected = cam_of(model, variables, image, index, layer)
    found = cam_of(model.clone(remat=True), variables, image, index, layer)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.max() > 0


def test_default_layer_is_the_coarsest_stage():
    model, variables, image, _, index = network("plain")
    default = cam_of(model, variables, image, index)
    np.testing.assert_allclose(
        default, cam_of(model, variables, image, index, "encoder/stage1"), rtol=1e-5, atol=1e-7
    )
    finer = cam_of(model, variables, image, index, "encoder/stage0")
    assert np.abs(finer - default).max() > 0.01 * default.max()


def test_unknown_layer_lists_those_there_are():
    model, variables, image, _, _ = network("plain")
    with pytest.raises(ValueError, match=r"no layer 'stage9'; it has .*encoder/stage0, .*head"):
        explain.grad_cam(model, variables, image, 0, "stage9")


@pytest.mark.parametrize(("padding", "size"), [("valid", 60), ("same", 48), ("same", 50)])
def test_maps_lie_where_their_receptive_fields_are(padding, size):
    options = {"features": (1, 1, 1), "padding": padding, "down": "max_pool"}
    model = create_model("unet", 2, norm="none", activation="relu", **options)
    images = np.random.default_rng(0).random((20, size, 44, 1)).astype(np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)

    def encode(images):
        maps = {}

        def keep(module, args, output):
            maps["/".join(module.path)] = output
            return output

        logits = explain._apply(model, variables, images, keep)
        return maps["encoder"][-1], logits

    cells, logits = jax.eval_shape(encode, images)
    num_cells, num_labelled = cells.shape[1], logits.shape[1]
    # With weights of 1 the gradient of a cell says how often it looks at a row.
    field_of = jax.jit(jax.grad(lambda x, cell: encode(x)[0][:, cell].sum()))
    profiles = [np.float64(field_of(images, cell)).sum((0, 2, 3)) for cell in range(num_cells)]
    centres = [np.average(np.arange(size), weights=profile) for profile in profiles]
    ramp = jnp.broadcast_to(jnp.arange(num_cells, dtype=jnp.float32)[:, None], (num_cells, 4))
    larger = (num_cells + explain._GROWTH // 4, 4 + explain._GROWTH // 4)
    found = explain._place(ramp[None], larger, (size, 16), (num_labelled, 16))[0, :, 0]
    position = np.arange(num_labelled) + (size - num_labelled) / 2
    expected = np.interp(position, centres, np.arange(num_cells))
    # Fields of cells near a padded border are cut off there, so their centres do not count.
    inner = slice(None) if padding == "valid" else slice(18, 30)
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.15)


def test_integrated_gradients_of_a_linear_network_are_its_terms():
    model = Voxelwise(lambda x: x)
    image = random_array(2, 5, 4, 3, 2)
    variables = model.init(jax.random.key(0), image)
    weights = variables["params"]["head"]["kernel"]
    chosen = np.argmax(model.apply(variables, image), axis=-1) == 1
    assert 0 < chosen.sum() < chosen.size
    found = explain.integrated_gradients(model, variables, image, 1)
    np.testing.assert_allclose(found, chosen * (image @ weights[:, 1]), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_of_one_channel_are_the_change_of_the_logit():
    model = Voxelwise(jnp.tanh)
    image = 2 * random_array(1, 30, 30, 1)
    variables = model.init(jax.random.key(0), image)
    logits = model.apply(variables, image)
    change = np.where(np.argmax(logits, -1) == 2, logits[..., 2], 0)  # tanh(0) is 0
    found = explain.integrated_gradients(model, variables, image, 2)
    np.testing.assert_allclose(found, change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_integrated_gradients_are_complete(norm):
    model = create_model("unet", 3, features=(4, 8), norm=norm)
    image = random_array(2, 12, 14, 2)
    variables = jax.jit(model.init)(jax.random.key(1), image)
    apply = jax.jit(model.apply)
    logits = apply(variables, image)
    index = int(np.bincount(logits.argmax(-1).ravel()).argmax())
    voxels, held = jax.jit(explain._chosen_and_held, static_argnums=0)(
        model, variables, image, index
    )
    held_apply = jax.jit(lambda image: explain._apply_held(model, variables, image, held))
    np.testing.assert_allclose(held_apply(image), logits, rtol=1e-3, atol=1e-4)
    baseline = held_apply(0 * image)
    if norm == "none":
        np.testing.assert_allclose(baseline, apply(variables, 0 * image), atol=1e-5)
    change = (voxels * (logits - baseline)[..., index]).sum(axis=(1, 2))
    found = jax.jit(lambda x: explain.integrated_gradients(model, variables, x, index, 32))(image)
    assert np.abs(change).min() > 1
    np.testing.assert_allclose(found.sum(axis=(1, 2)), change, rtol=0.03)


def test_a_class_that_is_nowhere_has_no_explanation():
    image = random_array(1, 8, 8, 2)
    variables = jax.jit(Toy().init)(jax.random.key(0), image)
    variables["params"]["head"]["bias"] = jnp.array([0.0, 0.0, -1e3])
    for function in (explain.grad_cam, explain.integrated_gradients):
        explained = jax.jit(functools.partial(function, Toy(), variables))
        assert not explained(image, 2).any()
        assert explained(image, 0).any() or explained(image, 1).any()
