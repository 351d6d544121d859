import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxseg.data import preprocess
from jaxseg.inference import normalisation
from jaxseg.inference.resampling import boxed


def boxed_in(rest, volume):
    """`boxed`, with another value beyond the volume."""
    return np.where(boxed(np.ones_like(volume)), boxed(volume), np.float32(rest))


def cut(array, shape):
    return np.asarray(array)[tuple(map(slice, shape))]


def numbers(kind):
    rng = np.random.default_rng(1)
    normal = rng.normal(size=(13, 20, 9)) * 50 + 7
    return {
        "many": normal,
        "heavy tail": np.where(rng.random((9, 9, 9)) < 0.02, 1e6, normal[:9, :9]),
        "negative": -np.abs(normal) - 1e-3,
        "ties": np.round(normal / 20),
        "mostly background": np.where(rng.random((20, 20, 20)) < 0.001, 5.0, 0.0),
        "constant": np.full((5, 5, 5), 3.0),
        "one rank exactly": rng.normal(size=(1, 201, 1)),
        "one voxel": np.full((1, 1, 1), -2.0),
    }[kind].astype(np.float32)


@pytest.mark.parametrize(
    "kind",
    [
        *("many", "heavy tail", "negative", "ties"),
        *("mostly background", "constant", "one rank exactly", "one voxel"),
    ],
)
def test_robust_normalisation_is_that_of_training(kind):
    values = numbers(kind)
    box = boxed_in(-1e9, values)[..., None]
    result = jax.jit(lambda x, size: normalisation.normalise(x, size, ((),)))(box, values.shape)
    expected = preprocess._normalise(values, "zscore", ())
    np.testing.assert_allclose(cut(result, values.shape)[..., 0], expected, rtol=2e-5, atol=2e-6)
    assert np.count_nonzero(result) <= values.size


def test_percentiles_are_numpys():
    values = numbers("many")
    inside = np.ones(values.shape, bool)
    inside[5:] = False
    low, high, mean, std = jax.jit(normalisation._robust_statistics)(values, inside)
    chosen = values[inside].astype(np.float64)
    np.testing.assert_allclose([low, high], np.percentile(chosen, [0.5, 99.5]), rtol=1e-6)
    clipped = np.clip(chosen, *np.percentile(chosen, [0.5, 99.5]))
    np.testing.assert_allclose([mean, std], [clipped.mean(), clipped.std()], rtol=1e-6)


def test_known_statistics_clip_shift_and_scale_each_channel():
    image = np.array([-5.0, 0.0, 2.0, 9.0], np.float32).reshape(1, 1, 4, 1)
    image = np.concatenate([image, image], axis=-1)
    known = ((-1.0, 4.0, 1.0, 2.0), (0.0, 1.0, 0.0, 0.5))
    result = np.asarray(normalisation.normalise(image, np.int32([1, 1, 4]), known))
    np.testing.assert_allclose(result[0, 0, :, 0], [-1, -0.5, 0.5, 1.5])
    np.testing.assert_allclose(result[0, 0, :, 1], [0, 0, 2, 2])


def two_channels():
    """Blobs in a field of zeros, in two channels that are 0 in different places."""
    rng = np.random.default_rng(3)
    fields = ndimage.gaussian_filter(rng.normal(size=(2, 24, 19, 13)), (0, 2, 2, 2))
    image = np.where(fields > 0.03, fields * 500 + 40, 0)
    return np.moveaxis(image, 0, -1).astype(np.float32)


@pytest.mark.parametrize(
    "scheme", ["zscore", "zscore_inside", "rescale_to_0_1", "rgb_to_0_1", "none"]
)
def test_each_scheme_is_that_of_training(scheme):
    image = two_channels()
    image[10:12, 10:12, 5:7] = 0
    image[..., 1] -= 17 * (image[..., 1] > 0)
    box, size = boxed_in(-1e9, image), image.shape[:3]
    statistics = (normalisation.statistics_of(scheme, ()),) * 2
    result = jax.jit(lambda x, size: normalisation.normalise(x, size, statistics))(box, size)
    plan = preprocess.Plan((1.0, 1.0, 1.0), (scheme,) * 2, ((), ()), 1, 1)
    expected = preprocess._normalised(image, plan)
    np.testing.assert_allclose(cut(result, size), expected, rtol=2e-5, atol=2e-6)
    assert np.count_nonzero(result) <= image.size


def test_schemes_by_hand():
    image = np.array([0, 51, 102, 255], np.float32).reshape(1, 1, 4, 1)

    def made(scheme):
        plan = preprocess.Plan((1.0, 1.0, 1.0), (scheme,), ((),), 1, 1)
        return preprocess._normalised(image, plan).ravel()

    np.testing.assert_allclose(made("rgb_to_0_1"), [0, 0.2, 0.4, 1], rtol=1e-6)
    np.testing.assert_array_equal(made("none"), image.ravel())
    np.testing.assert_allclose(made("rescale_to_0_1"), [0, 0.2, 0.4, 1], rtol=1e-6)
    inside = made("zscore_inside")
    assert inside[0] == 0
    values = np.clip([51, 102, 255], *np.percentile([51, 102, 255], [0.5, 99.5]))
    np.testing.assert_allclose(inside[1:], (values - values.mean()) / values.std(), rtol=1e-6)


def walled(kind):
    rng = np.random.default_rng(5)
    there = np.zeros((17, 15, 12), bool)
    if kind == "noise":
        return rng.random(there.shape) < 0.6
    if kind == "cavities":  # one closed, one open through a corner only, one through a face
        there[2:9, 2:9, 2:9] = True
        there[4:6, 4:6, 4:6] = False
        there[2, 2, 2] = False
        there[7, 7, 8] = False
        return there
    if kind == "maze":  # background that winds its way in
        there[1:-1, 1:-1, 1:-1] = True
        there[3:14, 2, 5] = there[13, 2:12, 5] = there[5:14, 11, 5] = there[5, 5:12, 5] = False
        there[3, 2, :5] = False
        return there
    return there if kind == "nothing" else ~there


@pytest.mark.parametrize("kind", ["noise", "cavities", "maze", "nothing", "everything"])
def test_holes_of_the_mask_are_filled_as_scipy_fills_them(kind):
    there = walled(kind)
    expected = ndimage.binary_fill_holes(there)
    for box in (boxed_in(7, there), there.astype(np.float32)):
        found = jax.jit(normalisation.mask_of)(box[..., None], np.int32(there.shape))
        inside = cut(found, there.shape)
        np.testing.assert_array_equal(inside, expected if expected.any() else True)
        assert np.asarray(found).sum() == inside.sum()
