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
def test_resampling_is_scipys(source, target, order):
    volume = np.random.default_rng(0).normal(size=(*source, 2)).astype(np.float32)
    box = box_of(target)
    resample = jax.jit(functools.partial(resampling.resample, box=box, order=order))
    result = resample(boxed_in(1e6, volume), np.int32(source), np.int32(target))
    expected = geometry.resample_to_shape(volume, target, order)
    np.testing.assert_allclose(cut(result, target), expected, rtol=0, atol=3e-6)
    result = np.array(result)
    result[tuple(map(slice, target))] = 0
    assert (result == 0).all()
