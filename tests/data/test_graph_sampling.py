"""Sampling, here and in the training step, and filters against SciPy's and NumPy's."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from jaxseg.data import graph_sampling as S
from jaxseg.training import sampling as on_device


@pytest.mark.parametrize(("form", "given"), [(S, tf.constant), (on_device, np.asarray)])
@pytest.mark.parametrize("region", [(9, 7), (6, 7, 5)])
def test_sampling_is_scipys(region, form, given):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(*region, 2)).astype(np.float32)
    label = rng.integers(0, 4, region).astype(np.uint8)
    coordinates = rng.uniform(-3, np.array(region) + 2, (50, 40, len(region))).astype(np.float32)
    points = np.moveaxis(coordinates, -1, 0).astype(np.float64)
    linear = form.sample_linear(given(image), given(coordinates))
    nearest = form.sample_nearest(given(label), given(coordinates))
    for channel in range(2):
        oracle = ndimage.map_coordinates(
            image[..., channel].astype(np.float64), points, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(linear[..., channel], oracle, atol=1e-5)
    oracle = ndimage.map_coordinates(label, points, order=0, mode="grid-constant")
    np.testing.assert_array_equal(nearest, oracle)


@pytest.mark.parametrize("length", [1, 7, 48, 100])
@pytest.mark.parametrize("zoom", [0.5, 0.61, 0.9])
def test_low_resolution_is_nearest_down_then_linear_up(length, zoom):
    values = np.random.default_rng(3).normal(size=length)
    coarse = max(round(length * zoom), 1)
    taken = values[[int((i + 0.5) * length / coarse) for i in range(coarse)]]
    oracle = np.interp((np.arange(length) + 0.5) * coarse / length, np.arange(coarse) + 0.5, taken)
    got = S.low_resolution_matrix(length, tf.constant(zoom)).numpy() @ values
    np.testing.assert_allclose(got, oracle, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_apply_along_axis_is_a_product_with_every_line(axis):
    x = np.random.default_rng(4).normal(size=(4, 5, 6, 2))
    matrix = np.random.default_rng(5).normal(size=(3, x.shape[axis]))
    oracle = np.apply_along_axis(lambda line: matrix @ line, axis, x)
    np.testing.assert_allclose(S.apply_along_axis(matrix, tf.constant(x), axis), oracle)
