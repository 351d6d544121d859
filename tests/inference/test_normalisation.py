import jax
import numpy as np
import pytest

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
