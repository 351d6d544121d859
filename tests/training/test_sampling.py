"""Sampling, splines and filters against SciPy's, and against those of the host."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import interpolate, ndimage

from jaxseg.data import graph_sampling as host
from jaxseg.training import sampling as device


def test_spline_basis_is_scipys():
    for length, spacing in [(30, 8), (17, 16), (1, 16), (33, 2.5)]:
        basis = device.cubic_spline_basis(length, spacing)
        np.testing.assert_allclose(basis.sum(1), 1, atol=1e-6)
        knots = np.arange(-3, basis.shape[1] + 1) * spacing
        oracle = interpolate.BSpline.design_matrix(np.arange(length), knots, 3).toarray()
        np.testing.assert_allclose(basis, oracle[:, : basis.shape[1]], atol=1e-6)


@pytest.mark.parametrize("region", [(9, 7), (6, 7, 5)])
def test_sampling_is_scipys(region):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(*region, 2)).astype(np.float32)
    label = rng.integers(0, 4, region).astype(np.uint8)
    coordinates = rng.uniform(-3, np.array(region) + 2, (50, 40, len(region))).astype(np.float32)
    points = np.moveaxis(coordinates, -1, 0).astype(np.float64)
    linear = device.sample_linear(image, coordinates)
    nearest = device.sample_nearest(label, coordinates)
    for channel in range(2):
        oracle = ndimage.map_coordinates(
            np.pad(image[..., channel].astype(np.float64), 1), points + 1, order=1, mode="constant"
        )
        np.testing.assert_allclose(linear[..., channel], oracle, atol=1e-5)
    index = tuple(np.round(points).astype(int) + 4)
    np.testing.assert_array_equal(nearest, np.pad(label, 4)[index])


@pytest.mark.parametrize("length", [1, 2, 17])
def test_filters_are_those_of_the_host(length):
    for sigma in (0.3, 1.0, 4.0):
        ours = device.gaussian_matrix(length, sigma)
        np.testing.assert_allclose(ours, host.gaussian_matrix(length, sigma), atol=1e-6)
    for zoom in (0.3, 0.5, 0.77, 1.0):
        ours = device.low_resolution_matrix(length, zoom)
        theirs = host.low_resolution_matrix(length, tf.constant(zoom))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_array_equal(device.low_resolution_matrix(length, 1.0), np.eye(length))
