"""Augmentation in the training step against that on the host, and against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from jaxseg.config import base_config, transforms_of
from jaxseg.data import augment as host
from jaxseg.training import augment as device

SEED = (3, 14)
PATCHES = [(9, 7), (6, 7, 5)]


def grid_of(patch):
    return np.random.default_rng(0).normal(size=(*patch, len(patch))).astype(np.float32) * 5


def image_of(patch, channels=2):
    return np.random.default_rng(1).normal(size=(*patch, channels)).astype(np.float32)


def drawn(shape, bounds, seed=SEED):
    """What the host draws from a seed."""
    return tf.random.stateless_uniform(shape, seed, *map(float, bounds)).numpy()


def split(seed=SEED):
    return tf.unstack(tf.random.experimental.stateless_split(tf.constant(seed)))


def on_host(transform, array, options, seed=SEED):
    return transform(tf.constant(array), tf.constant(seed), options).numpy()


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


# Every transform, given the draws of the host


@pytest.mark.parametrize("patch", PATCHES)
def test_mirrors_as_the_host(patch):
    options = {"prob": 0.8, "axes": (0, len(patch) - 1)}
    grid, rank = grid_of(patch), len(patch)
    axes = (drawn([rank], (0, 1)) < 0.8) & np.isin(range(rank), options["axes"])
    assert axes.any()
    close(device.mirror(grid, axes), on_host(host.flip, grid, options))


@pytest.mark.parametrize("patch", PATCHES)
def test_displaces_as_the_host(patch):
    options = {"spacing_voxels": 3, "range_magnitude_voxels": (1.0, 2.0)}
    grid, rank = grid_of(patch), len(patch)
    magnitude_seed, control_seed = split()
    shape = [device.cubic_spline_basis(n, 3).shape[1] for n in patch]
    controls = drawn([], (1, 2), magnitude_seed) * drawn([*shape, rank], (-1, 1), control_seed)
    moved = device.displace(grid, controls, 3)
    assert np.abs(moved - grid).max() > 0.3
    close(moved, on_host(host.displace, grid, options))


@pytest.mark.parametrize("in_plane", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_scales_and_turns_as_the_host(patch, in_plane):
    grid, rank = grid_of(patch), len(patch)
    options = {"range": (0.5, 0.8), "in_plane": in_plane}
    factor = drawn([], options["range"])
    close(device.scale(grid, factor, in_plane), on_host(host.scale, grid, options))

    options = {"range_deg": (20.0, 90.0), "in_plane": in_plane}
    angles = drawn([1 if in_plane or rank == 2 else 3], options["range_deg"]) * np.pi / 180
    close(device.rotate(grid, angles), on_host(host.rotate, grid, options))


@pytest.mark.parametrize("patch", PATCHES)
def test_shifts_as_the_host(patch):
    options, grid = {"range_fraction": (-0.3, 0.3)}, grid_of(patch)
    fractions = drawn([len(patch)], options["range_fraction"])
    close(device.translate(grid, fractions), on_host(host.translate, grid, options))


@pytest.mark.parametrize("patch", PATCHES)
def test_blurs_and_coarsens_as_the_host(patch):
    image = image_of(patch)
    options = {"channel_prob": 0.0, "range_sigma_voxels": (0.5, 1.0)}
    sigmas = drawn([len(patch)], options["range_sigma_voxels"])
    close(device.blur(image, sigmas), on_host(host.blur, image, options))

    options = {"channel_prob": 0.0, "range_zoom": (0.5, 1.0)}
    zoom = drawn([], options["range_zoom"])
    coarse = device.simulate_low_resolution(image, zoom)
    close(coarse, on_host(host.simulate_low_resolution, image, options))


@pytest.mark.parametrize("patch", PATCHES)
def test_contrast_and_gamma_are_the_hosts(patch):
    image, options = image_of(patch), {"range": (0.4, 1.6)}
    image[..., 1] *= 3
    factors = drawn([2], options["range"])
    close(device.scale_contrast(image, factors), on_host(host.scale_contrast, image, options))
    close(device.apply_gamma(image, factors), on_host(host.apply_gamma, image, options))
    inverted = -device.apply_gamma(-image, factors)
    close(inverted, on_host(host.apply_inverted_gamma, image, options))
    assert not device.apply_gamma(np.zeros_like(image), factors).any()


# The whole


def test_nothing_drawn_is_the_centre_of_the_region():
    nothing = {name: o | {"prob": 0.0} for name, o in transforms_of(base_config()).items()}
    image, label = image_of((9, 8)), np.arange(72, dtype=np.uint8).reshape(9, 8)
    valid = np.ones((9, 8), np.float32)
    key = jax.random.key(0)
    got = device.augment(image, label, valid, key, patch_size=(5, 4), params=nothing)
    expected = host.crop_centre(*map(tf.constant, (image, label, valid)), patch_size=(5, 4))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rank", [2, 3])
def test_what_comes_out_is_distributed_as_on_the_host(rank):
    """Where voxels come from, and what intensities become, over many examples."""
    patch = (12, 10, 8)[:rank]
    params = transforms_of(base_config(rank=rank))
    options = {"spacing_voxels": 4, "range_magnitude_voxels": (0.0, 1.5)}
    params["elastic"] = {"prob": 0.5} | options
    for name in ("blur", "low_resolution"):
        params[name] = params[name] | {"channel_prob": 0.5}
    spatial = {
        n: o if n in (*host.SPATIAL, "flip") else o | {"prob": 0.0} for n, o in params.items()
    }
    still = {n: o | {"prob": 0.0} if n in (*host.SPATIAL, "flip") else o for n, o in params.items()}

    region = device.region_size(patch, params)
    ramp = np.stack(np.indices(region), axis=-1).astype(np.float32)
    corners = sample_of(ramp, patch, spatial, lambda x: [*x[(0,) * rank], *x[(-1,) * rank]])
    picture = image_of(patch, channels=2)

    def of_intensities(x):
        rough = np.abs(np.diff(x[..., 0], axis=0)).mean()
        return [x[..., 0].mean(), x[..., 0].std(), x.min(), x.max(), rough]

    intensities = sample_of(picture, patch, still, of_intensities)
    for ours, theirs in (corners, intensities):
        for column in range(ours.shape[1]):
            # What is drawn with others is; a thousandth of such tests would fail by chance.
            assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert np.ptp(corners[0], axis=0).min() > 3


def sample_of(image, patch, params, measure, number=300):
    """Measures of as many augmented patches, [number, M]: of the device's, and of the host's."""
    label, valid = np.zeros(image.shape[:-1], np.int32), np.ones(image.shape[:-1], np.float32)
    options = {"patch_size": patch, "params": params}
    stacked = {
        "image": np.broadcast_to(image, (number, *image.shape)),
        "label": np.broadcast_to(label, (number, *label.shape)),
        "valid": np.broadcast_to(valid, (number, *valid.shape)),
        "example": np.arange(number)[:, np.newaxis],
    }
    augmented = device.augment_batch(stacked, jax.random.key(1), **options)["image"]
    cut = tf.function(lambda seed: host.augment(image_t, label_t, valid_t, seed, **options)[0])
    image_t, label_t, valid_t = map(tf.constant, (image, label, valid))
    theirs = [cut(tf.constant([5, n])).numpy() for n in range(number)]
    return tuple(np.array([measure(x) for x in some]) for some in (np.asarray(augmented), theirs))


def regions(number, rank=2):
    rng = np.random.default_rng(2)
    params = transforms_of(base_config(rank=rank))
    patch = (12, 10, 8)[:rank]
    region = device.region_size(patch, params)
    batch = {
        "image": rng.normal(size=(number, *region, 2)).astype(np.float32),
        "label": rng.integers(0, 4, (number, *region), dtype=np.uint8),
        "valid": rng.uniform(size=(number, *region)).astype(np.float32),
        "example": np.arange(number, dtype=np.int32)[:, np.newaxis] + 40,
    }
    return batch, {"patch_size": patch, "params": params}


def test_an_example_depends_on_the_key_and_its_number_alone():
    batch, options = regions(8)
    key = jax.random.key(7)
    whole = device.augment_batch(batch, key, **options)
    backwards = device.augment_batch({n: x[::-1] for n, x in batch.items()}, key, **options)
    for name, array in whole.items():
        np.testing.assert_allclose(backwards[name][::-1], array, rtol=1e-5, atol=1e-5)
    later = device.augment_batch(batch | {"example": batch["example"] + 8}, key, **options)
    other = device.augment_batch(batch, jax.random.key(8), **options)
    for changed in (later, other):
        assert not np.allclose(changed["image"], whole["image"])
    assert whole["label"].dtype == jnp.int32


def test_label_and_weight_come_from_where_the_image_does():
    batch, options = regions(20, rank=3)
    moves = {"flip", *device.SPATIAL}
    params = {n: o if n in moves else o | {"prob": 0.0} for n, o in options["params"].items()}
    region = batch["label"].shape[1:]
    places = np.stack(np.indices(region), axis=-1).astype(np.float32)
    image = np.broadcast_to(places, (20, *places.shape))
    moved = device.augment_batch(
        batch | {"image": image}, jax.random.key(3), patch_size=options["patch_size"], params=params
    )
    nearest = np.round(np.asarray(moved["image"])).astype(int)
    inside = np.asarray(moved["valid"]) > 0
    index = (np.arange(20)[:, None, None, None], *np.moveaxis(nearest, -1, 0))
    # Half-way between two voxels rounding decides.
    agree = (batch["label"][index] == moved["label"]) & (batch["valid"][index] == moved["valid"])
    assert agree[inside].mean() > 0.995


def test_a_masked_channel_stays_0_where_it_is():
    batch, options = regions(10)
    batch["image"][:, :8] = 0.0
    always = {n: o | {"prob": 1.0} for n, o in options["params"].items() if n in device.INTENSITY}
    params = {n: o | {"prob": 0.0} for n, o in options["params"].items()} | always
    options = {"patch_size": options["patch_size"], "params": params}
    got = device.augment_batch(batch, jax.random.key(0), masked=(True, False), **options)["image"]
    crop = device.augment_batch(
        batch,
        jax.random.key(0),
        **options | {"params": {n: o | {"prob": 0.0} for n, o in params.items()}},
    )["image"]
    outside = np.asarray(crop)[..., 0] == 0
    assert outside.mean() > 0.1
    assert (np.asarray(got)[..., 0][outside] == 0).all()
    assert (np.asarray(got)[..., 1][outside] != 0).all()
