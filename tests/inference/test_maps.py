import itertools

import jax
import numpy as np
import pytest

from jaxseg.inference import explain, maps
from jaxseg.models.unet import UNet

MODEL = UNet(3, features=(4, 8), num_convs=1)
CLASSES = ("background", "left", "right")
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 10, 1)).astype(np.float32)


def stacked_variables(num_sets):
    sets = [MODEL.init(jax.random.key(seed), IMAGES) for seed in range(num_sets)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *sets), sets


def patch_maps(num_sets, mirror_axes, outputs, temperature=1.0):
    variables, sets = stacked_variables(num_sets)
    made = jax.jit(
        lambda v, x: maps.patch_maps(
            MODEL,
            v,
            x,
            mirror_axes=mirror_axes,
            outputs=outputs,
            temperature=temperature,
            class_names=CLASSES,
        )
    )(variables, IMAGES)
    return np.asarray(made), sets


def members(sets, mirror_axes):
    """Logits of each set of weights seeing the images flipped in each way, in float64."""
    axes = [axis + 1 for axis in mirror_axes]
    for variables in sets:
        for number in range(len(axes) + 1):
            for chosen in itertools.combinations(axes, number):
                logits = MODEL.apply(variables, np.flip(IMAGES, chosen))
                yield np.flip(np.asarray(logits, np.float64), chosen)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def entropy(probs):
    return -(probs * np.log(probs)).sum(-1)


@pytest.mark.parametrize(
    ("num_sets", "mirror_axes"), [(1, ()), (1, (0,)), (1, (0, 1)), (3, ()), (2, (1,))]
)
def test_logits_are_averaged_over_weights_and_flips(num_sets, mirror_axes):
    made, sets = patch_maps(num_sets, mirror_axes, ("label",))
    expected = list(members(sets, mirror_axes))
    assert len(expected) == num_sets * 2 ** len(mirror_axes)
    np.testing.assert_allclose(made, np.mean(expected, axis=0), rtol=0, atol=1e-5)


def test_spread_is_the_textbooks():
    outputs = ("label", "entropy", "mutual_information", "confidence", "probs")
    made, sets = patch_maps(2, (0, 1), outputs, temperature=1.7)
    options = {"num_classes": 3, "outputs": outputs, "temperature": 1.7}
    found = maps.voxel_outputs(made[0], **options)

    logits = np.array([member[0] for member in members(sets, (0, 1))])
    probs = softmax(logits / 1.7)
    total = entropy(probs.mean(0))
    calibrated = softmax(logits.mean(0) / 1.7)
    assert list(found) == list(outputs)
    np.testing.assert_allclose(found["entropy"], total, rtol=0, atol=1e-5)
    information = total - entropy(probs).mean(0)
    assert information.max() > 0.01  # there is something to see
    np.testing.assert_allclose(found["mutual_information"], information, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["probs"], calibrated, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["confidence"], calibrated.max(-1), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["label"], logits.mean(0).argmax(-1))


def test_entropy_of_certainty_is_zero_and_has_no_nan():
    np.testing.assert_allclose(maps.entropy(np.float32([[1, 0, 0], [0.5, 0.5, 0]])), [0, np.log(2)])


def test_explanations_follow_the_maps_in_the_order_they_were_asked_for():
    outputs = ("integrated_gradients:right", "label", "grad_cam:left", "entropy")
    made, sets = patch_maps(2, (), outputs)
    found = maps.voxel_outputs(made[0], num_classes=3, outputs=outputs, temperature=1.0)
    assert list(found) == list(outputs)
    cam = np.mean([explain.grad_cam(MODEL, v, IMAGES, 1)[0] for v in sets], axis=0)
    gradients = np.mean(
        [explain.integrated_gradients(MODEL, v, IMAGES, 2)[0] for v in sets], axis=0
    )
    np.testing.assert_allclose(found["grad_cam:left"], cam, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["integrated_gradients:right"], gradients, rtol=1e-3, atol=1e-5)
    assert np.abs(cam).max() > 0 and np.abs(gradients).max() > 0


def test_a_sample_is_every_nth_column():
    logits = np.random.default_rng(0).normal(size=(5, 70, 3)).astype(np.float32)
    found = maps.voxel_outputs(logits, num_classes=3, outputs=("sample",), temperature=2.0)
    np.testing.assert_array_equal(found["sample"], logits[:, ::4])
