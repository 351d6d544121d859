"""Whole volumes through the whole program, on one device and on three.

The number of CPU devices can not change once JAX has started, so the run on three is a process of
its own: this file as a script.
"""

import dataclasses
import itertools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import geometry
from jaxseg.data import preprocess
from jaxseg.inference import maps, normalisation, whole_volume
from jaxseg.models.unet import UNet

AFFINE = np.array([[1.5, 0, 0, -9], [0, 2, 0, 4], [0, 0, 2.5, 1], [0, 0, 0, 1.0]])
CLASSES = ("background", "left", "right")


def make_image(shape=(21, 18, 14)):
    coarse = np.random.default_rng(0).normal(size=(5, 5, 5, 2))
    return geometry.resample_to_shape(coarse, shape, order=3) * 40 + 100


class Seen(nn.Module):
    """Logits that are the image, its two channels and a constant."""

    num_classes: int

    @nn.compact
    def __call__(self, image, train=False):
        self.param("x", nn.initializers.zeros, (1,))
        return jnp.concatenate([image, jnp.full((*image.shape[:-1], 1), 0.3)], -1)


def make(patch_size, outputs=("label",), **options):
    """A network of noise, its recipe and its weights."""
    model = UNet(3, features=(4, 8), num_convs=1)
    variables = model.init(jax.random.key(0), np.zeros((1, *patch_size, 2), np.float32))
    recipe = whole_volume.Recipe(
        model=model,
        class_names=CLASSES,
        patch_size=patch_size,
        margin=(0,) * len(patch_size),
        batch_size=2,
        spacing_mm=(2.0, 2.0, 2.0),
        image_order=1,
        statistics=((), (80.0, 120.0, 100.0, 10.0)),
        outputs=outputs,
        **options,
    )
    return recipe, jax.tree.map(lambda x: x[None], variables)


def run(patch_size, outputs, image, affine):
    recipe, variables = make(patch_size, outputs)
    return whole_volume.create_segment_fn(recipe)(variables, image, affine), recipe


def save_probs(path):
    results = {}
    for patch_size in ((8, 8), (8, 8, 8)):
        outputs, _ = run(patch_size, ("label", "probs", "sample"), make_image(), AFFINE)
        results |= {f"{len(patch_size)}{name}": value for name, value in outputs.items()}
    np.savez(path, devices=jax.local_device_count(), **results)


@pytest.mark.parametrize("patch_size", [(8, 8), (8, 8, 8)])
def test_equals_the_steps_one_by_one_in_numpy(patch_size):
    image = make_image((9, 9, 6))
    outputs, recipe = run(patch_size, ("label", "probs"), image, AFFINE)
    _, variables = make(patch_size)
    plan = preprocess.Plan((2.0, 2.0, 2.0), ("zscore", "ct"), recipe.statistics, 1, 1)
    prepared, _ = preprocess.preprocess_image(image, AFFINE, plan)
    assert prepared.shape == (7, 9, 8, 2)
    pad = [(1, 0), (0, 0), (0, 0), (0, 0)]
    weights = jax.tree.map(lambda x: x[0], variables)

    def network(x):
        if len(patch_size) == 3:
            return recipe.model.apply(weights, x[None])[0]
        return np.moveaxis(recipe.model.apply(weights, np.moveaxis(x, 2, 0)), 0, 2)

    padded = np.pad(prepared, pad)
    place = (np.arange(8) - 3.5) / 1.0
    gaussian = np.exp(-0.5 * place**2)
    total, weight = np.zeros((8, 9, 8, 3)), np.zeros((8, 9, 8, 1))
    for start in (0, 1):  # 9 voxels along Y need two tiles
        rows = slice(start, start + 8)
        total[:, rows] += gaussian[:, None, None] * np.asarray(network(padded[:, rows]), np.float64)
        weight[:, rows] += gaussian[:, None, None]
    logits = (total / weight)[1:]
    logits = geometry.resample_to_shape(logits, image.shape[:3], order=1)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(outputs["probs"], probs, rtol=0, atol=2e-5)
    sure = np.sort(logits, -1)
    sure = sure[..., -1] - sure[..., -2] > 1e-4
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(outputs["label"][sure], logits.argmax(-1)[sure])


def framed(image, border):
    """The image with air of 0 around it, and a hole in it."""
    image = image.copy()
    image[3:5, 3:5, 2:4] = 0
    return np.pad(image, [*border, (0, 0)])


@pytest.mark.parametrize(
    ("patch_size", "spacing_mm", "target_mm"),
    [
        ((8, 8, 8), (1.0, 1.25, 5.0), (1.5, 1.5, 2.0)),  # coarse before
        ((8, 8, 8), (2.0, 2.0, 3.0), (1.0, 1.0, 3.5)),  # coarse after
        ((8, 8, 8), (2.0, 1.5, 2.5), (1.8, 1.8, 1.8)),  # coarse along no axis
        ((8, 8), (1.0, 1.5, 5.0), (1.5, 1.25, 0.0)),  # slices stay apart as they are
    ],
)
def test_what_the_network_sees_is_what_training_prepares(patch_size, spacing_mm, target_mm):
    """Cropped, normalised inside its mask, resampled; and back on the grid of the file."""
    border = ((4, 2), (0, 3), (1, 2))
    image = framed(make_image((14, 12, 9)), border)
    affine = np.diag([*spacing_mm, 1.0])
    affine[1] *= -1  # so that the file's axes are not those of RAS+
    schemes = ("zscore_inside", "rescale_to_0_1")
    plan = preprocess.Plan(
        target_mm,
        schemes,
        ((), ()),
        image_order=3,
        label_order=1,
        crop=True,
        normalise_first=True,
        coarse_apart=True,
    )
    recipe, _ = make(patch_size, ("label", "probs", "confidence", "sample"))
    recipe = dataclasses.replace(
        recipe,
        model=Seen(3),
        spacing_mm=target_mm,
        image_order=3,
        statistics=tuple(normalisation.statistics_of(scheme, ()) for scheme in schemes),
        crop=True,
        normalise_first=True,
        coarse_apart=True,
    )
    outputs = whole_volume.create_segment_fn(recipe)(
        {"params": {"x": np.zeros((1, 1))}}, image, affine
    )

    prepared, prepared_affine = preprocess.preprocess_image(image, affine, plan)
    assert prepared.shape[:3] == geometry.resampled_shape((14, 12, 9), spacing_mm, target_mm)
    logits = np.concatenate([prepared, np.full((*prepared.shape[:3], 1), 0.3)], -1)
    coarse = geometry.coarse_axis(np.array(spacing_mm), np.array(target_mm))
    logits = geometry.resample_to_shape(logits, (14, 12, 9), 1, coarse)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    box = slice(4, 18), slice(3, 15), slice(1, 10)  # in RAS+ axes, the second turned round
    expected = np.zeros((*image.shape[:3], 3))
    expected[..., 0] = 1
    expected[box] = probs
    expected = expected[:, ::-1]
    np.testing.assert_allclose(outputs["probs"], expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(outputs["confidence"], expected.max(-1), rtol=0, atol=2e-5)
    sure = np.sort(expected, -1)
    sure = sure[..., -1] - sure[..., -2] > 1e-4
    np.testing.assert_array_equal(outputs["label"][sure], expected.argmax(-1)[sure])
    np.testing.assert_array_equal(
        outputs["sample"].argmax(-1),
        whole_volume.sampled(outputs["label"], image, affine, recipe),
    )
    np.testing.assert_allclose(
        geometry.spacing_mm_from_affine(prepared_affine),
        np.multiply(spacing_mm, (14, 12, 9)) / prepared.shape[:3],
    )


def test_an_image_of_zeros_is_segmented_whole():
    recipe, variables = make((8, 8, 8))
    segment = whole_volume.create_segment_fn(dataclasses.replace(recipe, crop=True))
    found = segment(variables, np.zeros((9, 8, 7, 2), np.float32), AFFINE)["label"]
    plain = whole_volume.create_segment_fn(recipe)
    expected = plain(variables, np.zeros((9, 8, 7, 2), np.float32), AFFINE)["label"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("patch_size", [(8, 8), (8, 8, 8)])
def test_the_answer_turns_with_the_volume(patch_size):
    image = make_image()
    recipe, variables = make(patch_size)
    segment = whole_volume.create_segment_fn(recipe)
    upright = segment(variables, image, AFFINE)["label"]
    assert len(np.unique(upright)) == 3
    for permutation in itertools.permutations(range(3)):
        flips = [axis for axis in range(3) if (sum(permutation[:2]) + axis) % 2]
        turned = np.flip(np.transpose(image, (*permutation, 3)), flips)
        affine = AFFINE[:, [*permutation, 3]].copy()
        for axis in flips:
            affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
            affine[:3, axis] *= -1
        expected = np.flip(np.transpose(upright, permutation), flips)
        np.testing.assert_array_equal(segment(variables, turned, affine)["label"], expected)


def test_sample_is_of_the_voxels_that_it_says():
    image = make_image((21, 70, 100))
    for patch_size in ((8, 8), (8, 8, 8)):
        outputs, recipe = run(patch_size, ("label", "sample"), image, np.diag([-2.0, 2, 2, 1]))
        label = whole_volume.sampled(outputs["label"], image, np.diag([-2.0, 2, 2, 1]), recipe)
        assert label.size < outputs["label"].size / 3
        np.testing.assert_array_equal(outputs["sample"].argmax(-1), label)


def test_one_program_serves_volumes_of_about_one_size():
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    recipe, variables = make((8, 8, 8))
    segment = whole_volume.create_segment_fn(recipe)
    segment(variables, make_image((21, 18, 14)), AFFINE)
    before = len(compilations)
    for shape in ((3, 40, 20), (9, 9, 9), (30, 30, 30)):
        assert segment(variables, make_image(shape), AFFINE)["label"].shape == shape
    assert before > 0 and len(compilations) == before


def test_a_buffer_of_any_size_gives_the_same():
    image = make_image((20, 60, 20))
    outputs = []
    for buffer_bytes in (1 << 30, 1):
        recipe, variables = make((8, 8, 8), ("probs",), buffer_bytes=buffer_bytes)
        outputs.append(whole_volume.create_segment_fn(recipe)(variables, image, AFFINE)["probs"])
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-6)


def test_mirroring_a_mirrored_image_mirrors_the_answer():
    image = make_image((16, 8, 8))
    recipe, variables = make((8, 8, 8), ("probs",), mirror_axes=(0,))
    segment = whole_volume.create_segment_fn(recipe)
    probs = segment(variables, image, np.diag([2.0, 2, 2, 1]))["probs"]
    mirrored = segment(variables, image[::-1], np.diag([2.0, 2, 2, 1]))["probs"]
    np.testing.assert_allclose(mirrored[::-1], probs, rtol=0, atol=1e-5)
    recipe, variables = make((8, 8, 8), ("probs",))
    plain = whole_volume.create_segment_fn(recipe)(variables, image, np.diag([2.0, 2, 2, 1]))[
        "probs"
    ]
    assert np.abs(plain - probs).max() > 1e-3


def test_three_devices_share_a_volume(tmp_path, run_script, quick):
    save_probs(tmp_path / "one.npz")
    three_devices = {"jax_num_cpu_devices": 3}
    run_script(__file__, tmp_path / "three.npz", settings=three_devices, **quick)
    one, three = np.load(tmp_path / "one.npz"), np.load(tmp_path / "three.npz")
    assert (one["devices"], three["devices"]) == (1, 3)
    for name in set(one) - {"devices"}:
        np.testing.assert_allclose(three[name], one[name], rtol=0, atol=1e-5)


def test_sampled_columns_are_few():
    assert maps.sample_stride(5) == 1
    assert maps.sample_stride(512) == 32


if __name__ == "__main__":
    save_probs(sys.argv[1])


@pytest.mark.parametrize("axes", [(1, 2, 0), (0, 2, 1)])
def test_slices_of_another_axis_are_those_of_the_volume_laid_down(axes):
    image = make_image((13, 18, 9))
    spacing_mm = np.array([4.0, 2.0, 3.0])
    recipe, variables = make((8, 8), ("label", "probs", "sample"))
    laid_down = np.diag([*spacing_mm[list(axes)], 1.0])
    expected = whole_volume.create_segment_fn(recipe)(
        variables, image.transpose(*axes, 3), laid_down
    )
    recipe, _ = make((8, 8), ("label", "probs", "sample"), axes=axes)
    affine = np.diag([*spacing_mm, 1.0])
    found = whole_volume.create_segment_fn(recipe)(variables, image, affine)
    back = np.argsort(axes)
    np.testing.assert_array_equal(found["label"], expected["label"].transpose(back))
    np.testing.assert_allclose(found["probs"], expected["probs"].transpose(*back, 3), atol=1e-6)
    np.testing.assert_array_equal(
        found["sample"].argmax(-1), whole_volume.sampled(found["label"], image, affine, recipe)
    )
