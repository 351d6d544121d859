import itertools

import jax
import nibabel
import numpy as np
import pytest
from scipy import ndimage

from jaxseg import geometry


def random_affine(rng):
    """Oblique, often left-handed, permuted and strongly anisotropic, slightly sheared."""
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    shear = np.eye(3) + np.triu(rng.normal(scale=0.1, size=(3, 3)), 1)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ shear @ np.diag(rng.uniform(0.2, 8.0, 3))
    affine[:3, 3] = rng.normal(scale=100, size=3)
    return affine


def signed_permutation_affines():
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = np.eye(3)[:, axes] * signs * np.array([0.5, 1.0, 3.0])
            affine[:3, 3] = (10, -20, 30)
            yield affine


def many_affines():
    rng = np.random.default_rng(0)
    return [*signed_permutation_affines(), *(random_affine(rng) for _ in range(300))]


def trilinear(volume, shape):
    """Float64 voxel-extent-aligned trilinear interpolation, one voxel at a time."""
    volume = np.asarray(volume, np.float64)
    result = np.zeros(shape)
    for target in np.ndindex(*shape):
        weights = []
        for o, n_out, n_in in zip(target, shape, volume.shape, strict=True):
            position = min(max((o + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
            low = min(int(position), max(n_in - 2, 0))
            high = min(low + 1, n_in - 1)
            weights.append(((low, 1 - (position - low)), (high, position - low)))
        for corner in itertools.product(*weights):
            index, share = zip(*corner, strict=True)
            result[target] += volume[index] * np.prod(share)
    return result


def test_spacing_is_the_length_of_the_columns():
    affine = np.array([[3, 0, 0, 7], [4, 0, -2, 8], [0, 0.5, 0, 9], [0, 0, 0, 1]], np.float32)
    spacing = geometry.spacing_mm_from_affine(affine)
    assert spacing.dtype == np.float64
    np.testing.assert_array_equal(spacing, [5, 0.5, 2])


def test_to_canonical_agrees_with_nibabel():
    array = np.arange(2 * 3 * 4 * 2, dtype=np.int16).reshape(2, 3, 4, 2)
    for affine in many_affines():
        expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
        canonical, canonical_affine = geometry.to_canonical(array, affine)
        np.testing.assert_array_equal(canonical, np.asarray(expected.dataobj))
        np.testing.assert_allclose(canonical_affine, expected.affine, rtol=1e-12, atol=1e-11)
        orientation = nibabel.io_orientation(canonical_affine)
        np.testing.assert_array_equal(orientation, [[0, 1], [1, 1], [2, 1]])


@pytest.mark.parametrize("angle_deg", [45, 135, -45, 225])
def test_to_canonical_breaks_ties_as_nibabel_does(angle_deg):
    cos, sin = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    affine = np.eye(4)
    affine[:3, :3] = [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]
    array = np.arange(24).reshape(2, 3, 4)
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(array.astype(np.int16), affine))
    canonical, _ = geometry.to_canonical(array, affine)
    np.testing.assert_array_equal(canonical, np.asarray(expected.dataobj))


def test_to_canonical_by_hand():
    # Voxel axis 0 runs to the head, axis 1 to the left, axis 2 to the front.
    affine = np.array([[0, -2, 0, 10], [0, 0, 3, 0], [1, 0, 0, 5], [0, 0, 0, 1.0]])
    array = np.zeros((4, 5, 6))
    array[1, 0, 2] = 7
    canonical, canonical_affine = geometry.to_canonical(array, affine)
    assert canonical.shape == (5, 6, 4)
    assert canonical[4, 2, 1] == 7
    expected = [[2, 0, 0, 2], [0, 3, 0, 0], [0, 0, 1, 5], [0, 0, 0, 1]]
    np.testing.assert_array_equal(canonical_affine, expected)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2)])
def test_from_canonical_undoes_to_canonical_bit_for_bit(shape):
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    array.flat[0] = np.nan
    for affine in many_affines():
        canonical, _ = geometry.to_canonical(array, affine)
        restored = geometry.from_canonical(canonical, affine)
        assert restored.dtype == array.dtype
        assert np.ascontiguousarray(restored).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1, 0, 1, 1]), "singular"),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "singular"),
        (np.diag([1, np.nan, 1, 1]), "not finite"),
        (np.diag([1, np.inf, 1, 1]), "not finite"),
        (np.eye(3), r"\[3, 3\]"),
    ],
)
def test_check_affine_refuses(affine, message):
    with pytest.raises(ValueError, match=message):
        geometry.check_affine(affine)
    if np.shape(affine) == (4, 4):
        with pytest.raises(ValueError, match=message):
            geometry.to_canonical(np.zeros((2, 2, 2)), np.asarray(affine))


def test_check_affine_accepts_any_scale():
    geometry.check_affine(np.diag([1e-4, 1, 1e4, 1]))


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "target_spacing_mm", "expected"),
    [
        ((10, 10, 10), (1, 1, 1), (1, 2, 0.5), (10, 5, 20)),
        ((512, 512, 37), (0.7, 0.7, 5.0), (1.0, 1.0, 3.0), (358, 358, 62)),
        ((3, 1, 4), (1, 1, 1), (100, 5, 3), (1, 1, 1)),
    ],
)
def test_resampled_shape(shape, spacing_mm, target_spacing_mm, expected):
    assert geometry.resampled_shape(shape, spacing_mm, target_spacing_mm) == expected


@pytest.mark.parametrize("shape", [(9, 4, 7), (3, 5, 2), (5, 6, 1), (1, 1, 1), (5, 6, 8)])
def test_linear_resampling_matches_a_float64_reference(shape):
    array = np.random.default_rng(2).normal(scale=100, size=(5, 6, 4, 2)).astype(np.float32)
    result = geometry.resample_to_shape(array, shape, order=1)
    assert result.dtype == np.float32
    expected = np.stack([trilinear(array[..., c], shape) for c in range(2)], -1)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


def test_a_single_slice_stays_the_same_when_made_thicker():
    array = np.random.default_rng(3).normal(size=(4, 4, 1, 1)).astype(np.float32)
    result = geometry.resample_to_shape(array, (4, 4, 3), order=1)
    np.testing.assert_allclose(result, np.repeat(array, 3, axis=2), atol=1e-6)


def test_nearest_resampling_by_hand():
    array = np.array([10, 20, 30, 40], np.int16)[:, None, None, None]
    upsampled = geometry.resample_to_shape(array, (8, 1, 1), order=0)
    np.testing.assert_array_equal(upsampled.ravel(), [10, 10, 20, 20, 30, 30, 40, 40])
    # Centres at 1/6, 9/6 (a tie, taken upwards) and 17/6.
    downsampled = geometry.resample_to_shape(array, (3, 1, 1), order=0)
    np.testing.assert_array_equal(downsampled.ravel(), [10, 30, 40])


def test_cubic_resampling_follows_a_cubic_away_from_the_border():
    x = np.linspace(-1, 1, 60)
    array = (x**3 - x**2)[:, None, None, None]
    result = geometry.resample_to_shape(array, (90, 1, 1), order=3).ravel()
    position = (np.arange(90) + 0.5) * 60 / 90 - 0.5
    fine = np.interp(position, np.arange(60), x)
    np.testing.assert_allclose(result[25:-25], (fine**3 - fine**2)[25:-25], atol=1e-6)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_resampling_to_the_same_shape_changes_no_value(order):
    array = np.random.default_rng(4).normal(size=(3, 4, 5, 2)).astype(np.float32)
    result = geometry.resample_to_shape(array, (3, 4, 5), order)
    np.testing.assert_array_equal(result, array)
    assert not np.shares_memory(result, array)


@pytest.mark.parametrize(("order", "tolerance"), [(1, 5e-3), (3, 1e-3)])
def test_a_smooth_field_survives_down_and_up(order, tolerance):
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in (40, 36, 32)), indexing="ij")
    field = (np.sin(3 * x) * np.cos(2 * y) + z)[..., None].astype(np.float32)
    small = geometry.resample_to_shape(field, (20, 24, 16), order)
    restored = geometry.resample_to_shape(small, field.shape[:3], order)
    assert np.abs(restored - field).max() < 0.06  # the edge value continues, the field does not
    assert np.abs(restored - field)[6:-6, 6:-6, 6:-6].max() < tolerance


def test_resampled_affine_by_hand():
    result = geometry.resampled_affine(np.diag([1, 2, 3, 1.0]), (10, 10, 10), (5, 20, 10))
    expected = [[2, 0, 0, 0.5], [0, 1, 0, -0.5], [0, 0, 3, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(result, expected)


def test_resampled_affine_keeps_centre_and_outer_corners():
    rng = np.random.default_rng(5)
    for _ in range(20):
        affine, shape, new_shape = (
            random_affine(rng),
            rng.integers(1, 50, 3),
            rng.integers(1, 50, 3),
        )
        resampled = geometry.resampled_affine(affine, shape, new_shape)
        for fraction in [(0.5, 0.5, 0.5), *itertools.product((0, 1), repeat=3)]:
            before = affine @ [*(np.multiply(fraction, shape) - 0.5), 1]
            after = resampled @ [*(np.multiply(fraction, new_shape) - 0.5), 1]
            np.testing.assert_allclose(after, before, atol=1e-9)


def test_resampled_values_lie_where_the_resampled_affine_says():
    affine = random_affine(np.random.default_rng(6))
    shape, new_shape = (12, 9, 10), (7, 13, 10)

    def world(of_affine, grid):
        index = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
        return index @ of_affine[:3, :3].T + of_affine[:3, 3]

    result = geometry.resample_to_shape(world(affine, shape), new_shape, order=1)
    expected = world(geometry.resampled_affine(affine, shape, new_shape), new_shape)
    np.testing.assert_allclose(result[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(9, 4, 7), (3, 5, 2), (5, 6, 8)])
def test_linear_label_resampling_is_the_largest_interpolated_indicator(shape):
    label = np.random.default_rng(7).integers(0, 4, (5, 6, 4))
    label[label == 2] = 0  # an absent class
    shares = np.stack([trilinear(label == c, shape) for c in range(4)], -1)
    largest_two = np.sort(shares, -1)[..., -2:]
    clear = largest_two[..., 1] - largest_two[..., 0] > 1e-5
    result = geometry.resample_label_to_shape(label, shape, num_classes=4, order=1)
    assert result.dtype == np.uint8
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(result[clear], shares.argmax(-1)[clear])


def test_linear_label_resampling_gives_a_tie_to_the_highest_class():
    label = np.array([3, 1])[:, None, None]
    result = geometry.resample_label_to_shape(label, (1, 1, 1), num_classes=4, order=1)
    assert result.ravel() == [3]
    result = geometry.resample_label_to_shape(
        label, (1, 1, 1), num_classes=4, order=1, keep_thin=False
    )
    assert result.ravel() == [1]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("factors", [(2, 2, 1), (3, 3, 1), (2, 2, 2), (4, 4, 4), (2.5, 2.5, 1)])
def test_a_thin_structure_is_there_at_a_coarser_resolution(order, factors):
    label = np.zeros((30, 30, 20), np.uint8)
    label[8:28, 4:26, :] = 1  # an organ ...
    label[13, 5:25, 10] = 2  # ... with a vessel, one voxel wide
    shape = tuple(round(n / f) for n, f in zip(label.shape, factors, strict=True))
    result = geometry.resample_label_to_shape(label, shape, num_classes=3, order=order)
    old = geometry.resample_label_to_shape(
        label, shape, num_classes=3, order=order, keep_thin=False
    )
    volume = np.count_nonzero(label == 2) / np.prod(factors)
    found = np.argwhere(result == 2)
    index = np.argwhere(label == 2)
    touched = {tuple(voxel) for voxel in np.floor((index + 0.5) / factors).astype(int).tolist()}
    assert 0.5 * volume <= len(found) <= max(4 * volume, len(touched))
    centre = (found + 0.5) * factors - 0.5  # none lies where no voxel of the structure is near
    assert np.abs(centre[:, 0] - 13).max() <= factors[0]
    assert np.abs(centre[:, 2] - 10).max() <= factors[2]
    np.testing.assert_array_equal(result[result != 2] == 1, old[result != 2] == 1)


def test_resampling_for_thin_structures_changes_no_thick_one():
    index = np.moveaxis(np.indices((40, 40, 20)), 0, -1)
    ball = (np.linalg.norm((index - (19.3, 20.1, 9.7)) * (1, 1, 2), axis=-1) < 15.2).astype(int)
    shape = (29, 23, 11)  # no ties
    with_thin, without = (
        geometry.resample_label_to_shape(ball, shape, num_classes=2, order=1, keep_thin=keep)
        for keep in (True, False)
    )
    np.testing.assert_array_equal(with_thin, without)


def test_grid_difference_by_hand():
    affine = np.diag([0.7, 1.0, 2.0, 1.0])
    moved = affine.copy()
    moved[2, 3] = 0.5
    assert geometry.grid_difference(affine, moved, (10, 10, 10)) == pytest.approx(0.25)
    finer = np.diag([0.6991, 1.0, 2.0, 1.0])  # 0.0009 mm a voxel, over 700
    expected = 699.5 * 0.0009 / 0.7
    assert geometry.grid_difference(affine, finer, (700, 9, 9)) == pytest.approx(expected)
    turned = np.diag([0.7, 1.0, 2.0, 1.0])[[1, 0, 2, 3]]
    assert geometry.grid_difference(affine, turned, (4, 4, 4)) > 1
    affine[0, 0] = np.nan
    assert geometry.grid_difference(np.eye(4), affine, (4, 4, 4)) == np.inf


def test_nearest_label_resampling_by_hand():
    label = np.array([0, 255, 3], np.int64)[:, None, None]
    result = geometry.resample_label_to_shape(label, (6, 1, 1), num_classes=256, order=0)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result.ravel(), [0, 0, 255, 255, 3, 3])


@pytest.mark.parametrize("order", [0, 1])
def test_label_resampling_to_the_same_shape_changes_no_value(order):
    label = np.random.default_rng(8).integers(0, 3, (3, 4, 5))
    result = geometry.resample_label_to_shape(label, (3, 4, 5), num_classes=3, order=order)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, label)


@pytest.mark.parametrize(
    ("value", "order", "message"),
    [(3, 1, "not all in"), (-1, 0, "not all in"), (1, 3, "order 0 or 1")],
)
def test_label_resampling_refuses(value, order, message):
    label = np.full((2, 2, 2), value)
    with pytest.raises(ValueError, match=message):
        geometry.resample_label_to_shape(label, (4, 4, 4), num_classes=3, order=order)


@pytest.mark.parametrize(
    ("spacing_mm", "target_mm", "expected"),
    [
        ((1, 1, 1), (1, 1, 1), -1),
        ((1, 1, 3), (1, 1, 1), -1),  # not more than three times
        ((1, 1, 3.1), (1, 1, 1), 2),
        ((4, 1.2, 1), (1, 1, 1), 0),
        ((1, 1, 2), (1, 5, 1), 1),  # coarse only after
        ((5, 1, 1), (1, 1, 9), 0),  # before it counts first
        ((5, 5, 1), (1, 1, 9), -1),  # two axes alike before, so none
        ((1, 1, 1), (5, 1, 5), -1),
        ((1, 1, 5), (0.5, 0.5, 0), 2),  # 0 is as it is
        ((1, 1, 2), (0.5, 0.5, 0), 2),
        ((0.9, 0.3, 0.3), (1, 1, 1), -1),  # three times but for rounding
    ],
)
def test_the_coarse_axis_is_that_of_nnunet(spacing_mm, target_mm, expected):
    spacing_mm, target_mm = np.array(spacing_mm, float), np.array(target_mm, float)
    assert geometry.coarse_axis(spacing_mm, target_mm) == expected
    jitted = jax.jit(geometry.coarse_axis)
    assert jitted(np.float32(spacing_mm), np.float32(target_mm)) == expected


def test_along_a_coarse_axis_nothing_is_interpolated():
    array = np.array([1.0, 5.0, 2.0]).reshape(1, 1, 3, 1)
    result = geometry.resample_to_shape(np.tile(array, (4, 6, 1, 1)), (2, 9, 7), 3, coarse=2)
    # Centres at 3/14, 9/14, 15/14 ... of a voxel.
    expected = np.broadcast_to([1, 1, 5, 5, 5, 2, 2], (2, 9, 7))
    np.testing.assert_allclose(result[..., 0], expected, atol=1e-6)
    label = np.zeros((4, 6, 3), np.uint8)
    label[1:3, 2:4, 1] = 1
    found = geometry.resample_label_to_shape(label, (4, 6, 7), 2, 1, coarse=2)
    np.testing.assert_array_equal(found, label[:, :, [0, 0, 1, 1, 1, 2, 2]])


def test_in_plane_of_a_coarse_axis_each_slice_is_interpolated_by_itself():
    volume = np.random.default_rng(0).normal(size=(5, 12, 9, 1)).astype(np.float32)
    found = geometry.resample_to_shape(volume, (5, 20, 7), 3, coarse=0)
    for part, whole in zip(volume, found, strict=True):
        alone = ndimage.zoom(
            part[..., 0], (20 / 12, 7 / 9), order=3, mode="nearest", grid_mode=True
        )
        np.testing.assert_allclose(whole[..., 0], alone, atol=1e-6)


def test_the_box_of_what_is_not_zero_and_its_place():
    image = np.zeros((6, 7, 8, 2))
    assert geometry.nonzero_box(image) == (slice(0, 6), slice(0, 7), slice(0, 8))
    image[2, 3, 1, 0], image[4, 3, 7, 1] = -1, 5
    box = geometry.nonzero_box(image)
    assert box == (slice(2, 5), slice(3, 4), slice(1, 8))
    affine = np.array([[0, 2, 0, 10], [3, 0, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1.0]])
    found = geometry.cropped_affine(affine, box)
    np.testing.assert_array_equal(found @ [1, 0, 2, 1], affine @ [3, 3, 3, 1])


def test_an_axis_without_a_target_stays_as_it_is():
    assert geometry.resampled_shape((10, 20, 7), (1, 2, 3), (2, 1, 0)) == (5, 40, 7)
