import functools

import jax
import numpy as np
import pytest

from jaxseg import geometry
from jaxseg.inference import resampling
from jaxseg.inference.resampling import box_of, boxed


def boxed_in(rest, volume):
    """`boxed`, with another value beyond the volume."""
    return np.where(boxed(np.ones_like(volume)), boxed(volume), np.float32(rest))


def cut(array, shape):
    return np.asarray(array)[tuple(map(slice, shape))]


@pytest.mark.parametrize("coarse", [-1, 0, 1, 2])
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((7, 9, 5), (11, 6, 5)),
        ((20, 31, 17), (9, 40, 33)),
        ((1, 30, 80), (1, 20, 65)),
        ((4, 4, 4), (4, 4, 4)),
        ((2, 1, 90), (5, 3, 7)),
    ],
)
def test_resampling_is_scipys(source, target, order, coarse):
    volume = np.random.default_rng(0).normal(size=(*source, 2)).astype(np.float32)
    box = box_of(target)
    resample = jax.jit(functools.partial(resampling.resample, box=box, order=order))
    along = np.arange(3) == coarse
    result = resample(boxed_in(1e6, volume), np.int32(source), np.int32(target), along)
    expected = geometry.resample_to_shape(volume, target, order, coarse)
    np.testing.assert_allclose(cut(result, target), expected, rtol=0, atol=3e-6)
    result = np.array(result)
    result[tuple(map(slice, target))] = 0
    assert (result == 0).all()


def test_along_a_coarse_axis_a_voxel_is_the_one_that_its_centre_lies_in():
    size, source = np.int32(5), np.int32(2)
    lower, upper, fraction = resampling.neighbours(np.arange(2), size, source, True)
    # Centres at a quarter and three quarters of five voxels: 1.25 and 3.75.
    np.testing.assert_array_equal(lower, [1, 3])
    np.testing.assert_array_equal(upper, [1, 3])
    np.testing.assert_array_equal(fraction, [0, 0])
    lower, upper, fraction = resampling.neighbours(np.arange(2), size, source, False)
    np.testing.assert_array_equal((lower, upper), [[0, 3], [1, 4]])
    np.testing.assert_allclose(fraction, [0.75, 0.25])
