"""Sizes that are printed before a run, against hand counts."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from jaxseg.models import blocks
from jaxseg.models.summary import count_flops, count_parameters, summarise_model, training_memory
from jaxseg.models.unet import UNet


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4)])
def test_pixelwise_layer_by_hand(shape):
    model, num_pixels = nn.Dense(7), 1
    for n in shape:
        num_pixels *= n
    assert count_parameters(model, (*shape, 2)) == 2 * 7 + 7
    # Two inputs: two multiplications and additions per output, the bias among them.
    assert count_flops(model, (*shape, 2)) == num_pixels * 7 * (2 * 2 + 1)


def test_convolution_counts_no_work_on_padding():
    model = nn.Conv(3, (3, 3), use_bias=False)
    # Along an axis of n, three taps reach 3 n - 2 voxels of the image.
    assert count_flops(model, (4, 5, 2)) == 2 * (3 * 4 - 2) * (3 * 5 - 2) * 2 * 3


def test_flops_grow_with_the_image_and_parameters_do_not():
    model = UNet(2, features=(4, 8), num_convs=1)
    small, large = (16, 16, 1), (32, 32, 1)
    assert count_parameters(model, small) == count_parameters(model, large)
    assert 3.9 < count_flops(model, large) / count_flops(model, small) < 4.5


def test_summary_names_model_parameters_operations_and_image():
    class Pixelwise(nn.Module):
        @nn.compact
        def __call__(self, image):
            return nn.Dense(1000, use_bias=False)(image)

    assert summarise_model(Pixelwise(), (100, 200, 2)) == (
        "Pixelwise: 2,000 parameters, 0.08 GFLOP forward per 100x200x2 image"
    )


def test_memory_counts_what_the_gradient_needs():
    class SquaredSum(nn.Module):
        @nn.compact
        def __call__(self, image):
            return jnp.sum(nn.Dense(7, use_bias=False)(image) ** 2)

    # The image for the kernel's gradient and the 7 outputs for the square's; float32.
    assert training_memory(SquaredSum(), (5, 2)) == 4 * (5 * 2 + 5 * 7)


def test_convolutions_of_volumes_are_counted_whole():
    """Not one turn of the loop that they are on CPU."""
    model = blocks.Conv(3, use_bias=False)
    assert count_flops(model, (4, 5, 6, 2)) == 2 * 10 * 13 * 16 * 2 * 3
