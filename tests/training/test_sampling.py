"""Splines against SciPy's, filters against those of the host; sampling: test_graph_sampling."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import interpolate

from jaxseg.data import graph_sampling as host
from jaxseg.training import sampling as device


def test_spline_basis_is_scipys():
    for length, spacing in [(30, 8), (17, 16), (1, 16), (33, 2.5)]:
        basis = device.cubic_spline_basis(length, spacing)
        np.testing.assert_allclose(basis.sum(1), 1, atol=1e-6)
        knots = np.arange(-3, basis.shape[1] + 1) * spacing
        oracle = interpolate.BSpline.design_matrix(np.arange(length), knots, 3).toarray()
        np.testing.assert_allclose(basis, oracle[:, : basis.shape[1]], atol=1e-6)


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
