import itertools

import numpy as np
import pytest

from jaxseg.inference import blending_weights, predict_case, tile_starts

NUM_CLASSES = 4


def predict_value(batch):
    """Gives each voxel the class that its first channel holds."""
    return np.eye(NUM_CLASSES, dtype=np.float32)[batch["image"][..., 0].astype(int)]


def make_image(shape, seed=0):
    values = np.random.default_rng(seed).integers(0, NUM_CLASSES, shape)
    return values[..., None].astype(np.float32), values


def recording(predict_fn):
    calls = []

    def recorded(batch):
        calls.append({name: array.copy() for name, array in batch.items()})
        return predict_fn(batch)

    return recorded, calls


@pytest.mark.parametrize("patch", [*range(1, 12), 16, 31, 48])
def test_tiles_cover_an_axis_with_at_least_half_overlap(patch):
    for size in range(patch, 5 * patch + 8):
        starts = tile_starts(size, patch)
        assert starts[0] == 0 and starts[-1] == size - patch
        steps = np.diff(starts)
        assert (steps > 0).all()
        assert steps.max(initial=0) <= max(patch // 2, 1)
        # And no more of them than that takes.
        assert len(starts) == 1 + int(np.ceil((size - patch) / max(patch // 2, 1)))


def test_tiles_by_hand():
    assert tile_starts(8, 8) == [0]
    assert tile_starts(9, 8) == [0, 1]
    assert tile_starts(16, 8) == [0, 4, 8]
    assert tile_starts(10, 4) == [0, 2, 4, 6]
    assert tile_starts(4, 1) == [0, 1, 2, 3]


def test_blending_weights_are_gaussian_with_a_floor():
    weights = blending_weights((16,))
    distance = np.arange(16) - 7.5
    expected = np.exp(-0.5 * (distance / 2) ** 2)
    np.testing.assert_allclose(weights, np.maximum(expected / expected.max(), 1e-3), rtol=1e-6)
    assert weights.dtype == np.float32
    plane = blending_weights((16, 9))
    assert plane.shape == (16, 9)
    assert plane.max() == 1 and plane.min() == np.float32(1e-3)
    inner = plane > 1e-3
    outer = weights[:, None] * blending_weights((9,))[None]
    np.testing.assert_allclose(plane[inner], outer[inner], rtol=1e-5)
    np.testing.assert_array_equal(plane, plane[::-1, ::-1])


SHAPES = [(8, 6, 4), (20, 17, 5), (3, 5, 2), (9, 4, 1), (1, 1, 1), (7, 23, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("patch_size", [(8, 6), (7, 5), (8, 6, 4), (5, 3, 7), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_voxel_gets_its_own_prediction(shape, patch_size, batch_size):
    image, values = make_image(shape)
    label = np.zeros(shape, np.uint8)
    probs = predict_case(predict_value, image, label, patch_size=patch_size, batch_size=batch_size)
    assert probs.dtype == np.float32
    np.testing.assert_array_equal(probs, np.eye(NUM_CLASSES)[values])


def test_overlapping_predictions_are_averaged_by_weight():
    # Each patch answers with its own number; tiles start at 0, 2 and 4.
    count = itertools.count()

    def numbered(batch):
        return np.full((*batch["label"].shape, 1), next(count), np.float32)

    image, _ = make_image((8, 1, 1))
    label = np.zeros((8, 1, 1), np.uint8)
    probs = predict_case(numbered, image, label, patch_size=(4, 1), batch_size=1)
    w = blending_weights((4, 1))[:, 0].astype(np.float64)
    expected = [
        0,
        0,
        w[0] * 1 / (w[2] + w[0]),
        w[1] * 1 / (w[3] + w[1]),
        (w[2] * 1 + w[0] * 2) / (w[2] + w[0]),
        (w[3] * 1 + w[1] * 2) / (w[3] + w[1]),
        2,
        2,
    ]
    np.testing.assert_allclose(probs[:, 0, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [(8, 6), (8, 6, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_batches_have_one_shape_and_dtype(shape, patch_size):
    predict_fn, calls = recording(predict_value)
    image, _ = make_image(shape)
    label = np.ones(shape, np.uint8)
    predict_case(predict_fn, image, label, patch_size=patch_size, batch_size=3)
    for batch in calls:
        assert batch["image"].shape == (3, *patch_size, 1)
        assert batch["label"].shape == batch["valid"].shape == (3, *patch_size)
        assert batch["image"].dtype == batch["valid"].dtype == np.float32
        assert batch["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("shape", "patch_size"),
    [
        ((8, 6, 7), (8, 6)),  # as wide as the patch: slices do not overlap
        ((5, 6, 7), (8, 9)),
        ((5, 6, 3), (8, 6, 3)),
        ((1, 3, 2), (4, 6, 5)),
    ],
)
def test_every_voxel_is_valid_exactly_once_where_tiles_do_not_overlap(shape, patch_size):
    predict_fn, calls = recording(predict_value)
    image, values = make_image(shape)
    predict_case(predict_fn, image, values.astype(np.uint8), patch_size=patch_size, batch_size=4)
    valid = np.concatenate([batch["valid"] for batch in calls])
    labels = np.concatenate([batch["label"] for batch in calls])
    images = np.concatenate([batch["image"] for batch in calls])[..., 0]
    assert valid.sum() == np.prod(shape)
    counts = np.bincount(labels[valid == 1], minlength=NUM_CLASSES)
    np.testing.assert_array_equal(counts, np.bincount(values.ravel(), minlength=NUM_CLASSES))
    np.testing.assert_array_equal(images[valid == 1], labels[valid == 1])
    # Padding and the examples that fill up the last batch.
    assert not labels[valid == 0].any() and not images[valid == 0].any()
    num_examples = shape[2] if len(patch_size) == 2 else 1
    assert (valid.any((1, 2) if len(patch_size) == 2 else (1, 2, 3))).sum() == num_examples


def test_all_of_a_larger_case_is_valid_in_every_tile():
    predict_fn, calls = recording(predict_value)
    image, values = make_image((20, 17, 3))
    predict_case(predict_fn, image, values, patch_size=(8, 6), batch_size=4)
    valid = np.concatenate([batch["valid"] for batch in calls])
    num_tiles = len(tile_starts(20, 8)) * len(tile_starts(17, 6)) * 3
    assert len(valid) == -(-num_tiles // 4) * 4
    assert valid[:num_tiles].all() and not valid[num_tiles:].any()


def test_the_label_never_changes_the_prediction():
    def smooth(batch):
        image = batch["image"]
        return np.concatenate([image, 1 - image + np.roll(image, 1, axis=1)], axis=-1)

    image = np.random.default_rng(0).normal(size=(13, 11, 4, 1)).astype(np.float32)
    labels = (np.zeros((13, 11, 4), np.uint8), np.ones((13, 11, 4), np.uint8))
    results = [predict_case(smooth, image, x, patch_size=(8, 6), batch_size=3) for x in labels]
    np.testing.assert_array_equal(*results)
    assert np.ptp(results[0]) > 0


def test_several_channels_reach_the_network():
    image = np.random.default_rng(0).normal(size=(9, 7, 3, 2)).astype(np.float32)

    def passed_on(batch):
        return batch["image"]

    label = np.zeros((9, 7, 3), np.uint8)
    probs = predict_case(passed_on, image, label, patch_size=(5, 4), batch_size=2)
    np.testing.assert_allclose(probs, image, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "patch_size", "margin"),
    [
        ((30, 23, 2), (12, 11), (3, 2)),
        ((5, 2, 1), (12, 11), (3, 2)),
        ((13, 9, 8), (8, 9, 7), (1, 2, 2)),
        ((3, 9, 1), (8, 9, 7), (1, 2, 2)),
    ],
)
def test_unpadded_tiles_give_what_the_whole_mirrored_image_gives(shape, patch_size, margin):
    rank = len(patch_size)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=[2 * m + 1 for m in margin])
    image = rng.normal(size=(*shape, 1)).astype(np.float32)
    label = rng.integers(0, 3, shape)

    def unpadded(x):
        """Correlation of [*S] with the kernel where it fits."""
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape)
        return np.einsum(windows, [..., *range(rank)], kernel, range(rank))

    def predict_fn(batch):
        assert batch["image"].shape == (*batch["label"].shape, 1) == (2, *patch_size, 1)
        return np.stack([unpadded(x) for x in batch["image"][..., 0]])[..., None]

    result = predict_case(
        predict_fn, image, label, patch_size=patch_size, batch_size=2, margin=margin
    )
    pads = [(m, m) for m in margin]
    if rank == 2:
        slices = [
            unpadded(np.pad(image[:, :, z, 0], pads, mode="reflect")) for z in range(shape[2])
        ]
        expected = np.stack(slices, axis=-1)
    else:
        expected = unpadded(np.pad(image[..., 0], pads, mode="reflect"))
    np.testing.assert_allclose(result[..., 0], expected, rtol=1e-4, atol=1e-4)


def test_with_a_margin_a_voxel_is_valid_where_the_scan_is():
    calls = []

    def predict_fn(batch):
        calls.append(batch)
        return np.ones((1, 4, 4, 1), np.float32)

    image = np.ones((3, 4, 1, 1), np.float32)
    label = np.full((3, 4, 1), 2)
    predict_case(predict_fn, image, label, patch_size=(8, 8), batch_size=1, margin=(2, 2))
    (batch,) = calls
    expected = np.zeros((1, 8, 8))
    expected[:, 3:6, 2:6] = 1
    np.testing.assert_array_equal(batch["valid"], expected)
    np.testing.assert_array_equal(batch["label"], 2 * expected)
    assert (batch["image"] == 1).all()
