"""Losses against hand computation and a float64 numpy oracle written from the definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.training.losses import LOSSES, supervise

CLASS_WEIGHTS = (1.0, 0.0, 3.0, 0.7)
SHAPE_2D = (2, 6, 4, 3)
SHAPE_3D = (2, 3, 4, 2, 4)
OPTIONS = [
    ("cross_entropy", {}),
    ("cross_entropy", {"class_weights": CLASS_WEIGHTS}),
    ("soft_dice", {}),
    ("soft_dice", {"include_background": True, "eps": 0.5}),
    ("dice_cross_entropy", {}),
    (
        "dice_cross_entropy",
        {
            "dice_weight": 0.4,
            "ce_weight": 2.5,
            "class_weights": CLASS_WEIGHTS,
            "include_background": True,
            "eps": 0.1,
        },
    ),
    ("focal", {}),
    ("focal", {"gamma": 0.5, "alpha": CLASS_WEIGHTS}),
    ("focal", {"gamma": 3}),
    ("tversky", {}),
    ("tversky", {"alpha": 0.6, "beta": 0.1, "include_background": True, "eps": 0.2}),
]


def oracle_region(probs, label, first, loss_of_counts):
    losses = []
    for c in range(first, probs.shape[-1]):
        g = (label == c).astype(np.float64)
        p = probs[:, c]
        losses.append(loss_of_counts(p, g))
    return np.mean(losses)


def oracle_cross_entropy(probs, label, class_weights=None):
    weights = np.ones(probs.shape[-1]) if class_weights is None else np.asarray(class_weights)
    total = weights[label].sum()
    terms = -weights[label] * np.log(probs[np.arange(len(label)), label])
    return terms.sum() / total if total else 0.0


def oracle_soft_dice(probs, label, include_background=False, eps=1e-5):
    def loss(p, g):
        return 1 - (2 * np.sum(p * g) + eps) / (np.sum(p) + np.sum(g) + eps)

    return oracle_region(probs, label, 0 if include_background else 1, loss)


def oracle_dice_cross_entropy(
    probs, label, dice_weight=1, ce_weight=1, class_weights=None, include_background=False, eps=1e-5
):
    dice = oracle_soft_dice(probs, label, include_background, eps)
    return dice_weight * dice + ce_weight * oracle_cross_entropy(probs, label, class_weights)


def oracle_focal(probs, label, gamma=2, alpha=None):
    alpha = np.ones(probs.shape[-1]) if alpha is None else np.asarray(alpha)
    prob = probs[np.arange(len(label)), label]
    terms = -alpha[label] * (1 - prob) ** gamma * np.log(prob)
    return terms.mean() if len(label) else 0.0


def oracle_tversky(probs, label, alpha=0.3, beta=0.7, include_background=False, eps=1e-5):
    def loss(p, g):
        tp, fp, fn = np.sum(p * g), np.sum(p * (1 - g)), np.sum((1 - p) * g)
        return 1 - (tp + eps) / (tp + alpha * fp + beta * fn + eps)

    return oracle_region(probs, label, 0 if include_background else 1, loss)


ORACLES = {
    "cross_entropy": oracle_cross_entropy,
    "soft_dice": oracle_soft_dice,
    "dice_cross_entropy": oracle_dice_cross_entropy,
    "focal": oracle_focal,
    "tversky": oracle_tversky,
}


def oracle(name, logits, label, valid, options):
    """The loss in float64 on the valid pixels alone, cut out example by example."""
    losses = []
    for x, g, v in zip(np.asarray(logits, np.float64), label, valid, strict=True):
        x, g = x[v > 0], g[v > 0]
        probs = np.exp(x - x.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        losses.append(ORACLES[name](probs, g, **options))
    return np.array(losses)


def random_inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, shape).astype(np.float32)
    label = rng.integers(0, shape[-1], shape[:-1])
    valid = (rng.random(shape[:-1]) < 0.7).astype(np.float32)
    valid.reshape(shape[0], -1)[:, 0] = 1
    return logits, label.astype(np.int32), valid


def gradient_and_losses(name, **options):
    def total(logits, label, valid):
        losses = LOSSES[name](logits, label, valid=valid, **options)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)


@functools.cache
def compiled(name, **options):
    return jax.jit(gradient_and_losses(name, **options))


def value_and_grad(name, logits, label, valid=None, **options):
    """Loss per example and the gradient of its sum."""
    gradient, losses = compiled(name, **options)(logits, label, valid)
    return np.asarray(losses), np.asarray(gradient, np.float32)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [(name, {}, SHAPE_2D) for name in LOSSES]
    + [(name, options, SHAPE_3D) for name, options in OPTIONS],
)
def test_value_and_gradient_match_oracle(name, options, shape):
    logits, label, valid = random_inputs(shape)

    losses, gradient = value_and_grad(name, logits, label, valid, **options)

    assert losses.dtype == np.float32
    expected = oracle(name, logits, label, valid, options)
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=1e-6)

    step = 1e-5
    slopes = np.zeros(shape)
    for index in np.ndindex(*shape):
        shift = np.zeros(shape)
        shift[index] = step
        high = oracle(name, logits + shift, label, valid, options)
        low = oracle(name, logits - shift, label, valid, options)
        slopes[index] = (high - low).sum() / (2 * step)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)
    assert np.all(gradient[valid == 0] == 0)


@pytest.mark.parametrize("name", ["soft_dice", "dice_cross_entropy"])
def test_dice_of_a_batch_is_that_of_its_examples_as_one(name):
    logits, label, valid = random_inputs((3, 6, 4, 3))
    valid[1] = 0  # a filler
    losses, gradient = value_and_grad(name, logits, label, valid, over_batch=True)
    as_one = [array.reshape(1, 18, *array.shape[2:]) for array in (logits, label, valid)]
    dice, dice_gradient = value_and_grad("soft_dice", *as_one)
    cross_entropy = cross_entropy_gradient = 0.0
    if name == "dice_cross_entropy":
        cross_entropy, cross_entropy_gradient = value_and_grad(
            "cross_entropy", logits, label, valid
        )
    np.testing.assert_allclose(losses, dice[0] + np.zeros(3) + cross_entropy, rtol=1e-6)
    # Each of three examples has the loss of the batch.
    expected = 3 * dice_gradient.reshape(logits.shape) + cross_entropy_gradient
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_all_pixels_count_without_valid(name):
    logits, label, _ = random_inputs(SHAPE_2D)
    losses, _ = value_and_grad(name, logits, label)
    expected = oracle(name, logits, label, np.ones(label.shape), {})
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_jit_gives_the_same_value_and_gradient(name):
    logits, label, valid = map(jnp.asarray, random_inputs(SHAPE_2D))
    losses, gradient = value_and_grad(name, logits, label, valid)
    eager_gradient, eager_losses = gradient_and_losses(name)(logits, label, valid)
    np.testing.assert_allclose(losses, eager_losses, rtol=1e-6)
    np.testing.assert_allclose(gradient, eager_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_pixels_are_as_if_cut_out(name):
    logits, label, _ = random_inputs(SHAPE_2D)
    valid = np.zeros(label.shape, np.float32)
    valid[:, :4] = 1
    masked_logits, masked_label = logits.copy(), label.copy()
    masked_logits[:, 4:] = 1e4 * np.sign(logits[:, 4:])
    masked_label[:, 4:] = 255

    masked, gradient = value_and_grad(name, masked_logits, masked_label, valid)
    cut, cut_gradient = value_and_grad(name, logits[:, :4], label[:, :4])

    np.testing.assert_allclose(masked, cut, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :4], cut_gradient, rtol=1e-5, atol=1e-8)
    assert np.all(gradient[:, 4:] == 0)


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_valid_may_be_of_any_dtype(dtype):
    logits, label, valid = random_inputs(SHAPE_2D)
    losses, _ = value_and_grad("dice_cross_entropy", logits, label, valid.astype(dtype))
    expected = oracle("dice_cross_entropy", logits, label, valid, {})
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_valid_costs_nothing(name):
    logits, label, valid = random_inputs(SHAPE_2D)
    valid[0] = 0
    losses, gradient = value_and_grad(name, logits, label, valid)
    assert losses[0] == 0
    assert np.all(gradient[0] == 0)
    np.testing.assert_allclose(losses[1], oracle(name, logits, label, valid, {})[1], rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("only_class", [0, 1])
def test_absent_classes_match_oracle(name, only_class):
    logits, _, valid = random_inputs(SHAPE_2D)
    label = np.full(SHAPE_2D[:-1], only_class, np.int32)
    losses, gradient = value_and_grad(name, logits, label, valid)
    np.testing.assert_allclose(losses, oracle(name, logits, label, valid, {}), rtol=2e-6)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("name", "expected_wrong"),
    [
        ("cross_entropy", 2e4),
        ("soft_dice", 1),
        ("dice_cross_entropy", 2e4 + 1),
        ("focal", 2e4),
        ("tversky", 1),
    ],
)
def test_extreme_logits_right_cost_nothing_and_wrong_cost_their_margin(name, expected_wrong):
    _, label, valid = random_inputs(SHAPE_2D)
    one_hot = np.eye(3, dtype=np.float32)
    for shift, expected in ((0, 0), (1, expected_wrong)):
        logits = 1e4 * (2 * one_hot[(label + shift) % 3] - 1)
        losses, gradient = value_and_grad(name, logits, label, valid)
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-7)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2.0])
def test_focal_gradient_is_finite_where_the_answer_is_already_right(gamma):
    label = np.array([[0, 1]], np.int32)
    logits = np.array([[[50.0, -50.0], [-1e4, 1e4]]], np.float32)
    losses, gradient = value_and_grad("focal", logits, label, gamma=gamma)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_logits_are_computed_in_float32(name):
    logits, label, valid = random_inputs(SHAPE_2D)
    half = jnp.asarray(logits, jnp.bfloat16)
    losses, gradient = value_and_grad(name, half, label, valid)
    assert losses.dtype == np.float32
    # The rounded logits' own loss, to float32 accuracy; near the unrounded one's.
    rounded = oracle(name, np.asarray(half, np.float64), label, valid, {})
    np.testing.assert_allclose(losses, rounded, rtol=2e-6)
    full, full_gradient = value_and_grad(name, logits, label, valid)
    np.testing.assert_allclose(losses, full, rtol=1e-2)
    np.testing.assert_allclose(gradient, full_gradient, atol=0.02 * np.abs(full_gradient).max())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Probabilities of class 1: 0.75 and 0.25 on a foreground pixel each, 0.5 on background.
        ("cross_entropy", {}, (math.log(4 / 3) + math.log(4) + math.log(2)) / 3),
        (
            "cross_entropy",
            {"class_weights": (3, 1)},
            (math.log(4 / 3) + math.log(4) + 3 * math.log(2)) / 5,
        ),
        ("soft_dice", {"eps": 0.5}, 1 - (2 * 1 + 0.5) / (1.5 + 2 + 0.5)),
        (
            "soft_dice",
            {"include_background": True, "eps": 0.5},
            1 - (2.5 / 4 + 1.5 / 3) / 2,
        ),
        (
            "dice_cross_entropy",
            {"eps": 0.5, "dice_weight": 2, "ce_weight": 3},
            2 * 0.375 + math.log(4 / 3) + math.log(4) + math.log(2),
        ),
        (
            "focal",
            {},
            (math.log(4 / 3) / 16 + 9 * math.log(4) / 16 + math.log(2) / 4) / 3,
        ),
        (
            "focal",
            {"gamma": 1, "alpha": (2, 4)},
            (4 * math.log(4 / 3) / 4 + 4 * 3 * math.log(4) / 4 + 2 * math.log(2) / 2) / 3,
        ),
        # TP 1, FP 0.5, FN 1.
        ("tversky", {"eps": 0.5}, 1 - 1.5 / (1 + 0.3 * 0.5 + 0.7 + 0.5)),
    ],
)
def test_hand_computed(name, options, expected):
    probs = jnp.array([[[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]]])
    label = jnp.array([[1, 1, 0]], jnp.uint8)
    losses = LOSSES[name](jnp.log(probs) + 3, label, **options)
    np.testing.assert_allclose(losses, [expected], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_has_no_scatter(name):
    logits, label, valid = random_inputs(SHAPE_2D)
    gradient = jax.grad(lambda x: LOSSES[name](x, label, valid=valid).sum())
    assert "scatter" not in str(jax.make_jaxpr(gradient)(logits))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("logits", "label", "valid", "message"),
    [
        ((2, 4, 4, 3), (2, 4, 3), None, r"label has shape \(2, 4, 3\)"),
        ((2, 4, 4, 3), (2, 4, 4, 1), None, r"label has shape \(2, 4, 4, 1\)"),
        ((2, 4, 4, 3), (2, 4, 4), (2, 4, 4, 1), r"valid has shape \(2, 4, 4, 1\)"),
        ((2, 4, 4, 3), (2, 4, 4), (4, 4), r"valid has shape \(4, 4\)"),
    ],
)
def test_shapes_are_checked_while_tracing(name, logits, label, valid, message):
    shapes = (
        jax.ShapeDtypeStruct(logits, jnp.float32),
        jax.ShapeDtypeStruct(label, jnp.int32),
        None if valid is None else jax.ShapeDtypeStruct(valid, jnp.float32),
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, g, v: LOSSES[name](x, g, valid=v), *shapes)


@pytest.mark.parametrize(
    ("name", "logits_dtype", "label_dtype", "num_classes", "options", "message"),
    [
        ("cross_entropy", jnp.int32, jnp.int32, 3, {}, "logits are int32"),
        ("cross_entropy", jnp.float32, jnp.float32, 3, {}, "label is float32"),
        (
            "cross_entropy",
            jnp.float32,
            jnp.int32,
            3,
            {"class_weights": (1, 2)},
            r"class_weights has shape \(2,\) but there are 3 classes",
        ),
        ("focal", jnp.float32, jnp.int32, 3, {"alpha": 0.25}, r"alpha has shape \(\)"),
        ("focal", jnp.float32, jnp.int32, 3, {"gamma": -1}, "gamma is -1"),
        ("soft_dice", jnp.float32, jnp.int32, 1, {}, r"logits have 1 class"),
        ("tversky", jnp.float32, jnp.int32, 1, {}, r"logits have 1 class"),
    ],
)
def test_other_mistakes_are_named(name, logits_dtype, label_dtype, num_classes, options, message):
    logits = jnp.zeros((1, 4, num_classes), logits_dtype)
    label = jnp.zeros((1, 4), label_dtype)
    with pytest.raises(ValueError, match=message):
        LOSSES[name](logits, label, **options)


def squared_error(logits, label, *, valid):
    """A loss whose value names every voxel it saw."""
    axes = tuple(range(1, label.ndim))
    return jnp.sum((logits[..., 0] - label) ** 2 * valid, axis=axes)


def test_supervise_takes_the_centre_of_the_label_where_logits_are_smaller():
    rng = np.random.default_rng(0)
    label, valid = rng.integers(0, 5, (2, 9, 6)), rng.random((2, 9, 6)).astype(np.float32)
    logits = rng.normal(size=(2, 5, 2, 1)).astype(np.float32)
    expected = np.sum((logits[..., 0] - label[:, 2:7, 2:4]) ** 2 * valid[:, 2:7, 2:4], axis=(1, 2))
    result = supervise(squared_error, logits, jnp.asarray(label), jnp.asarray(valid))
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_supervise_halves_the_weight_of_each_coarser_scale():
    rng = np.random.default_rng(0)
    label, valid = rng.integers(0, 5, (2, 8, 7)), rng.random((2, 8, 7)).astype(np.float32)
    scales = tuple(rng.normal(size=(2, n, m, 1)).astype(np.float32) for n, m in ((8, 7), (4, 4)))
    # Centres of the coarse voxels lie at 1, 3, 5, 7 of eight and at 0, 2, 4, 6 of seven.
    coarse = np.ix_(range(2), (1, 3, 5, 7), (0, 2, 4, 6))
    fine_loss = np.sum((scales[0][..., 0] - label) ** 2 * valid, axis=(1, 2))
    coarse_loss = np.sum((scales[1][..., 0] - label[coarse]) ** 2 * valid[coarse], axis=(1, 2))
    result = supervise(squared_error, scales, jnp.asarray(label), jnp.asarray(valid))
    np.testing.assert_allclose(result, (2 * fine_loss + coarse_loss) / 3, rtol=1e-5)
