"""Surface distances against hand computation and all pairs of voxels in float64."""

import itertools
import math

import numpy as np
import pytest

from jaxseg.evaluation.surfaces import surface_scores

nan, inf = math.nan, math.inf
UNIT = np.eye(4)


def brute_force_surface(mask):
    """Indices of the voxels with a face neighbour outside, along axes of more than one voxel."""
    found = []
    inside = set(map(tuple, np.argwhere(mask)))
    axes = [axis for axis, size in enumerate(mask.shape) if size > 1]
    for index in sorted(inside):
        neighbours = [
            tuple(i + step * (a == axis) for a, i in enumerate(index))
            for axis, step in itertools.product(axes, (-1, 1))
        ]
        if not all(neighbour in inside for neighbour in neighbours):
            found.append(index)
    return np.array(found)


def brute_force(prediction, label, affine, tolerance_mm):
    """Definitions of Metrics Reloaded, from the distances of all pairs."""
    a, b = (
        brute_force_surface(mask) @ affine[:3, :3].T + affine[:3, 3] for mask in (prediction, label)
    )
    pairs = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    of_a, of_b = pairs.min(1), pairs.min(0)
    within = (of_a <= tolerance_mm).sum() + (of_b <= tolerance_mm).sum()
    return {
        "hd": max(of_a.max(), of_b.max()),
        "hd95": max(np.percentile(of_a, 95), np.percentile(of_b, 95)),
        "assd": (of_a.sum() + of_b.sum()) / (len(of_a) + len(of_b)),
        "nsd": within / (len(of_a) + len(of_b)),
    }


def random_affine(rng, kind):
    """Anisotropic, and oblique, left-handed or sheared."""
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    step = rotation * rng.uniform(0.4, 4, 3)
    if kind == "sheared":
        step = step @ np.array([[1, 0.4, -0.2], [0, 1, 0.3], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = step, rng.uniform(-300, 300, 3)
    return affine


def volume_of(shape, *voxels):
    volume = np.zeros(shape, np.uint8)
    for voxel in voxels:
        volume[voxel] = 1
    return volume


@pytest.mark.parametrize("kind", ["oblique", "sheared"])
@pytest.mark.parametrize("shape", [(7, 6, 5), (9, 8, 1), (1, 7, 9)])
def test_scores_match_all_pairs_in_the_world(kind, shape):
    rng = np.random.default_rng(0)
    for _ in range(10):
        affine = random_affine(rng, kind)
        label, prediction = rng.random((2, *shape)) < rng.uniform(0.05, 0.9, (2, 1, 1, 1))
        prediction[0, 0, 0] = label[-1, -1, -1] = True
        tolerance_mm = rng.uniform(0.3, 5)
        scores = surface_scores(
            prediction.astype(np.uint8), label.astype(np.uint8), affine, 2, tolerance_mm
        )
        for name, expected in brute_force(prediction, label, affine, tolerance_mm).items():
            assert scores[name][1] == pytest.approx(expected, rel=1e-9, abs=1e-9), name
            assert np.isnan(scores[name][0])


def test_each_class_is_scored_by_itself():
    rng = np.random.default_rng(1)
    label, prediction = rng.integers(0, 4, (2, 6, 5, 4), dtype=np.uint8)
    affine = np.diag([1.0, 2, 3, 1])
    scores = surface_scores(prediction, label, affine, 4, 1.5)
    for index in (1, 2, 3):
        expected = brute_force(prediction == index, label == index, affine, 1.5)
        for name in expected:
            assert scores[name][index] == pytest.approx(expected[name])


def test_two_voxels_by_hand():
    prediction, label = volume_of((5, 5, 5), (0, 0, 0)), volume_of((5, 5, 5), (3, 4, 0))
    scores = surface_scores(prediction, label, np.diag([1.0, 2, 1, 1]), 2, 1.0)
    assert scores["hd"][1] == scores["hd95"][1] == scores["assd"][1] == math.sqrt(9 + 64)
    assert scores["nsd"][1] == 0


def test_the_larger_direction_and_the_mean_over_both_surfaces_by_hand():
    label = volume_of((1, 1, 30), np.s_[0, 0, :2])
    prediction = volume_of((1, 1, 30), np.s_[0, 0, :2], (0, 0, 21))
    scores = surface_scores(prediction, label, UNIT, 2, 1.0)
    assert scores["hd"][1] == 20
    # Distances 0, 0, 20 in one direction: the 95th percentile is 0.1 · 0 + 0.9 · 20.
    assert scores["hd95"][1] == pytest.approx(18)
    assert scores["assd"][1] == 20 / 5
    assert scores["nsd"][1] == 4 / 5


def test_beyond_the_volume_is_outside():
    whole = np.ones((5, 5, 5), np.uint8)
    centre = volume_of((5, 5, 5), (2, 2, 2))
    # The surface of the whole volume is its 98 outer voxels.
    scores = surface_scores(whole, centre, UNIT, 2, 2.0)
    assert scores["hd"][1] == math.sqrt(12)
    outer = [v for v in itertools.product(range(-2, 3), repeat=3) if 2 in map(abs, v)]
    assert len(outer) == 98
    total = sum(math.hypot(*v) for v in outer) + 2
    assert scores["assd"][1] == pytest.approx(total / 99)


def test_a_slice_has_no_surface_above_and_below():
    label = volume_of((7, 7, 1), np.s_[1:6, 1:6])
    prediction = volume_of((7, 7, 1), (3, 3))
    scores = surface_scores(prediction, label, UNIT, 2, 1.0)
    # Its inner voxels are no surface, so the centre is 2 away from it.
    assert scores["hd"][1] == pytest.approx(math.sqrt(8))
    distances = [math.hypot(x, y) for x, y in itertools.product(range(-2, 3), repeat=2)]
    distances = [d for d in distances if d >= 2]
    assert len(distances) == 16
    assert scores["assd"][1] == pytest.approx((sum(distances) + 2) / 17)


def test_an_equal_prediction_is_at_no_distance():
    label = volume_of((6, 6, 6), np.s_[1:4, 2:6, 0:3])
    scores = surface_scores(label, label, UNIT, 2, 0.0)
    assert [scores[name][1] for name in ("hd", "hd95", "assd", "nsd")] == [0, 0, 0, 1]


def test_a_class_in_one_of_them_alone_is_infinitely_far_and_in_neither_does_not_count():
    label = np.zeros((4, 4, 4), np.uint8)
    prediction = label.copy()
    prediction[1, 1, 1], label[2, 2, 2] = 1, 2
    scores = surface_scores(prediction, label, UNIT, 4, 1.0)
    for name in ("hd", "hd95", "assd"):
        np.testing.assert_array_equal(scores[name], [nan, inf, inf, nan])
    np.testing.assert_array_equal(scores["nsd"], [nan, 0, 0, nan])


@pytest.mark.parametrize("spacing_mm", [1.1, 0.7, 0.9765625])
def test_a_neighbour_is_within_a_tolerance_of_the_spacing(spacing_mm):
    affine = np.diag([spacing_mm, 1, 1, 1]).astype(np.float32)  # as NIfTI stores it
    for x in range(20):
        prediction = volume_of((21, 3, 3), (x, 1, 1))
        label = volume_of((21, 3, 3), (x + 1, 1, 1))
        assert surface_scores(prediction, label, affine, 2, spacing_mm)["nsd"][1] == 1
        assert surface_scores(prediction, label, affine, 2, 0.999 * spacing_mm)["nsd"][1] == 0
