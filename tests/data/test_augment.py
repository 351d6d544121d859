"""Augmentation against exact array operations and float64 oracles."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from jaxseg.data import augment as A
from jaxseg.training.augment import region_size

OFF = {
    "flip": {"prob": 0.0, "axes": (0, 1, 2)},
    "elastic": {"prob": 0.0, "spacing_voxels": 8, "range_magnitude_voxels": (3.0, 3.0)},
    "scaling": {"prob": 0.0, "range": (0.7, 1.4), "in_plane": False},
    "rotation": {"prob": 0.0, "range_deg": (-180.0, 180.0), "in_plane": False},
    "translation": {"prob": 0.0, "range_fraction": (-0.1, 0.1)},
    "noise": {"prob": 0.0, "range_variance": (0.0, 0.1)},
    "blur": {"prob": 0.0, "channel_prob": 0.0, "range_sigma_voxels": (0.5, 1.0)},
    "brightness": {"prob": 0.0, "range": (0.75, 1.25)},
    "contrast": {"prob": 0.0, "range": (0.75, 1.25)},
    "low_resolution": {"prob": 0.0, "channel_prob": 0.0, "range_zoom": (0.5, 1.0)},
    "gamma": {"prob": 0.0, "range": (0.7, 1.5)},
    "inverted_gamma": {"prob": 0.0, "range": (0.7, 1.5)},
}
SPATIAL = ("flip", "elastic", "scaling", "rotation", "translation")
SEED = (3, 14)


def with_options(*names, **options):
    """The params OFF with the transforms named always on, and some options replaced."""
    options = {name: {} for name in names} | options
    return OFF | {name: OFF[name] | {"prob": 1.0} | new for name, new in options.items()}


def example(region, channels=2):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(*region, channels)).astype(np.float32)
    label = rng.integers(1, 4, region, dtype=np.int32)
    return image, label, np.ones(region, np.float32)


def augment(image, label, valid, seed=SEED, **kwargs):
    arrays = map(tf.constant, (image, label, valid))
    return [x.numpy() for x in A.augment(*arrays, tf.constant(seed), **kwargs)]


def warp(image, patch, **options):
    """The image alone, and its label and valid ignored."""
    return augment(
        image,
        np.zeros(image.shape[:-1], np.int32),
        np.ones(image.shape[:-1], np.float32),
        patch_size=patch,
        params=with_options(**options),
    )[0]


def intensity(image, seed=SEED, **options):
    label, valid = np.zeros(image.shape[:-1], np.int32), np.ones(image.shape[:-1], np.float32)
    patch = image.shape[:-1]
    return augment(image, label, valid, seed, patch_size=patch, params=with_options(**options))[0]


def source_coordinates(region, patch, **options):
    """Where each voxel of the patch comes from: linear sampling reproduces a linear image."""
    ramp = np.stack(np.indices(region), axis=-1).astype(np.float32)
    return warp(ramp, patch, **options).astype(np.float64)


# The whole


def test_a_masked_channel_stays_0_where_it_is_and_the_others_are_as_without():
    image, label, valid = example((12, 10))
    image[:5] = 0.0
    options = {"patch_size": (8, 8), "params": with_options("noise", "brightness", "rotation")}
    plain, *_ = augment(image, label, valid, **options)
    masked, *_ = augment(image, label, valid, masked=(True, False), **options)
    warped = warp(image, (8, 8), rotation={})
    outside = warped[..., 0] == 0
    assert 5 < outside.sum() < 60 and (plain[outside] != 0).all()
    np.testing.assert_array_equal(masked[..., 0], np.where(outside, 0.0, plain[..., 0]))
    np.testing.assert_array_equal(masked[..., 1], plain[..., 1])


@pytest.mark.parametrize(
    ("region", "patch", "start"),
    [
        ((9, 10), (5, 4), (2, 3)),
        ((9, 10), (4, 7), (2, 1)),
        ((5, 6), (5, 6), (0, 0)),
        ((8, 7, 6), (3, 4, 5), (2, 1, 0)),
    ],
)
def test_without_a_draw_the_patch_is_the_centre_crop_bit_for_bit(region, patch, start):
    arrays = example(region)
    crop = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
    rare = {name: OFF[name] | {"prob": 1e-9} for name in OFF}
    for params in (OFF, rare):
        for got, whole in zip(
            augment(*arrays, patch_size=patch, params=params), arrays, strict=True
        ):
            np.testing.assert_array_equal(got, whole[crop], strict=True)


def test_with_all_probs_0_no_random_op_is_built():
    def op_types(params):
        @tf.function
        def f(image, label, valid, seed):
            return A.augment(image, label, valid, seed, patch_size=(4, 4), params=params)

        graph = f.get_concrete_function(*example((6, 6)), tf.constant(SEED)).graph
        return {op.type for op in graph.get_operations()}

    assert not {t for t in op_types(OFF) if "Stateless" in t or "If" in t or "Gather" in t}
    assert any("Stateless" in t for t in op_types(with_options(noise={})))


def test_the_result_is_a_function_of_the_seed_in_graph_and_eager_mode():
    arrays = [tf.constant(x) for x in example((20, 20))]
    params = OFF | {name: OFF[name] | {"prob": 0.7} for name in OFF}

    def of_seed(seed):
        return A.augment(*arrays, seed, patch_size=(12, 12), params=params)

    seeds = [(i, 5) for i in range(6)]
    eager = [of_seed(tf.constant(seed)) for seed in seeds]
    mapped = tf.data.Dataset.from_tensor_slices(tf.constant(seeds)).map(of_seed)
    for from_eager, from_map in zip(eager, mapped, strict=True):
        for a, b in zip(from_eager, from_map, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    again = of_seed(tf.constant(seeds[0]))
    np.testing.assert_array_equal(again[0], eager[0][0])
    images = np.stack([image for image, _, _ in eager])
    assert len({image.tobytes() for image in images}) == len(seeds)


@pytest.mark.parametrize("off", ["flip", "elastic", "scaling", "rotation", "noise", "brightness"])
def test_turning_a_transform_off_leaves_the_draws_of_the_others(off):
    nothing = {
        "flip": {"axes": ()},
        "elastic": {"range_magnitude_voxels": (0.0, 0.0)},
        "scaling": {"range": (1.0, 1.0)},
        "rotation": {"range_deg": (0.0, 0.0)},
        "noise": {"range_variance": (0.0, 0.0)},
        "brightness": {"range": (1.0, 1.0)},
    }
    everything_on = OFF | {name: OFF[name] | {"prob": 0.8} for name in OFF}
    without = everything_on | {off: OFF[off]}
    idle = everything_on | {off: everything_on[off] | nothing[off]}
    arrays = example((20, 20))
    for seed in [(0, 1), (0, 2)]:
        a = augment(*arrays, seed, patch_size=(12, 12), params=without)
        b = augment(*arrays, seed, patch_size=(12, 12), params=idle)
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)
        np.testing.assert_array_equal(a[1], b[1])


def test_draws_are_independent_and_as_frequent_as_their_prob():
    image, label, valid = tf.ones((2, 2, 1)), tf.constant([[1, 2], [1, 2]]), tf.ones((2, 2))
    params = with_options(
        flip={"prob": 0.25, "axes": (1,)},
        translation={"prob": 0.4, "range_fraction": (0.5, 0.5)},  # one voxel: only one is left
        brightness={"prob": 0.3, "range": (2.0, 4.0)},
    )

    def draws(i):
        seed = tf.stack([tf.cast(i, tf.int32), 0])
        new, new_label, new_valid = A.augment(
            image, label, valid, seed, patch_size=(2, 2), params=params
        )
        moved = new_valid[0, 0] * new_valid[1, 1] == 0
        flipped = tf.where(moved, new_valid[1, 0] == 1, new_label[0, 0] == 2)
        return flipped, moved, tf.reduce_max(new)

    flipped, moved, brightness = zip(
        *tf.data.Dataset.range(2000).map(draws).as_numpy_iterator(), strict=True
    )
    brightness = np.array(brightness)
    drawn = np.stack([flipped, moved, brightness > 1.5])
    # standard errors: 0.011 of a frequency, 0.022 of a correlation, 0.024 of the mean factor
    np.testing.assert_allclose(drawn.mean(1), (0.25, 0.4, 0.3), atol=0.045)
    np.testing.assert_allclose(np.corrcoef(drawn), np.eye(3), atol=0.09)
    assert brightness[brightness > 1.5].mean() == pytest.approx(3, abs=0.1)


def test_no_two_transforms_share_a_seed():
    numbers = [0, *(number for number, _ in [*A.SPATIAL.values(), *A.INTENSITY.values()])]
    assert len(set(numbers)) == len(OFF) == len(numbers)


@pytest.mark.parametrize(
    ("shapes", "patch", "message"),
    [
        (((8, 8, 1), (8, 8), (8, 8)), (4, 4, 4), "3 spatial axes"),
        (((8, 8, 8, 1), (8, 8, 8), (8, 8, 8)), (4, 4), "2 spatial axes"),
        (((8, 8, 1), (8, 7), (8, 8)), (4, 4), r"label \(8, 7\)"),
        (((8, 8, 1), (8, 8), (8, 8, 1)), (4, 4), r"valid \(8, 8, 1\)"),
        (((8, 3, 1), (8, 3), (8, 3)), (4, 4), "smaller than the patch"),
        (((None, 8, 1), (None, 8), (None, 8)), (4, 4), "static"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_when_traced(shapes, patch, message):
    specs = [
        tf.TensorSpec(shape, dtype)
        for shape, dtype in zip(shapes, (tf.float32, tf.int32, tf.float32), strict=True)
    ]

    @tf.function(input_signature=specs)
    def f(image, label, valid):
        return A.augment(image, label, valid, SEED, patch_size=patch, params=OFF)

    with pytest.raises(ValueError, match=message):
        f.get_concrete_function()


# Spatial transforms


@pytest.mark.parametrize("patch", [(40, 36), (22, 20, 18)])
@pytest.mark.parametrize("names", [*((name,) for name in SPATIAL), SPATIAL])
def test_image_and_label_stay_aligned(patch, names):
    rank = len(patch)
    params = with_options(*names)
    region = region_size(patch, params)
    position = np.stack(np.indices(region), axis=-1) - (np.array(region) - 1) / 2
    radii, offset = np.array((11, 7, 8))[:rank], np.array((3, -4, 2))[:rank]
    big = np.sum(((position - offset) / radii) ** 2, axis=-1) < 1
    small = np.sum((position + 2 * offset) ** 2, axis=-1) < 16
    label = np.where(small, 2, np.where(big, 1, 0)).astype(np.int32)
    one_hot = np.eye(3, dtype=np.float32)[label]
    valid = np.ones(region, np.float32)
    centre = tuple((r - p) // 2 for r, p in zip(region, patch, strict=True))
    unchanged = label[tuple(slice(s, s + p) for s, p in zip(centre, patch, strict=True))]
    changed = []
    for seed in [(1, 1), (1, 2), (1, 3)]:
        image, got, _ = augment(one_hot, label, valid, seed, patch_size=patch, params=params)
        certain = image.max(-1) > 0.999  # all corners of the cell agree
        assert certain.mean() > 0.6
        np.testing.assert_array_equal(got[certain], image.argmax(-1)[certain])
        assert {1, 2} <= set(got[certain])
        changed.append(np.mean(got != unchanged))
    assert max(changed) > 0.02


@pytest.mark.parametrize("shape", [(6, 5), (5, 4, 3)])
def test_flip_is_numpys(shape):
    arrays = example(shape)
    for axes in [(0,), (1,), tuple(range(len(shape)))]:
        params = with_options(flip={"axes": axes})
        for got, whole in zip(
            augment(*arrays, patch_size=shape, params=params), arrays, strict=True
        ):
            np.testing.assert_array_equal(got, np.flip(whole, axes))


@pytest.mark.parametrize(("angle", "turns"), [(90, 1), (180, 2), (-90, -1)])
def test_right_angles_are_numpys_rot90(angle, turns):
    image, label, valid = example((7, 7))
    params = with_options(rotation={"range_deg": (angle, angle)})
    got = augment(image, label, valid, patch_size=(7, 7), params=params)
    np.testing.assert_allclose(got[0], np.rot90(image, turns), atol=1e-5)
    np.testing.assert_array_equal(got[1], np.rot90(label, turns))
    np.testing.assert_array_equal(got[2], valid)


def test_right_angles_about_the_three_axes_are_three_rot90():
    image, label, valid = example((5, 5, 5))
    params = with_options(rotation={"range_deg": (90.0, 90.0)})
    got = augment(image, label, valid, patch_size=(5, 5, 5), params=params)
    expected = label
    for plane in [(0, 1), (0, 2), (1, 2)]:
        expected = np.rot90(expected, axes=plane)
    np.testing.assert_array_equal(got[1], expected)


def test_the_axes_of_a_volume_turn_by_angles_of_their_own():
    coordinates = source_coordinates((41,) * 3, (9,) * 3, rotation={"range_deg": (-40.0, 40.0)})
    centred = (coordinates - 20).reshape(-1, 3)
    grid = (np.stack(np.indices((9,) * 3), -1) - 4).reshape(-1, 3)
    rotation, *_ = np.linalg.lstsq(grid, centred, rcond=None)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-5)
    # entries of the product (turn in plane 12) (turn in plane 02) (turn in plane 01)
    angles = np.rad2deg(
        [
            np.arctan2(-rotation[0, 1], rotation[0, 0]),
            np.arcsin(-rotation[0, 2]),
            np.arctan2(-rotation[1, 2], rotation[2, 2]),
        ]
    )
    assert np.all(np.abs(angles) <= 40)
    assert np.min(np.abs(np.diff(np.sort(angles)))) > 1
    assert np.all(np.abs(angles) > 1)


def test_whole_voxel_translation_moves_values_and_marks_what_lies_outside():
    image, label, valid = example((10, 20))
    params = with_options(translation={"range_fraction": (0.2, 0.2)})
    moved, moved_label, moved_valid = augment(
        image, label, valid, patch_size=(10, 20), params=params
    )
    inside = np.zeros((10, 20), bool)
    inside[2:, 4:] = True
    np.testing.assert_allclose(moved[2:, 4:], image[:-2, :-4], atol=1e-5)
    np.testing.assert_array_equal(moved_label[2:, 4:], label[:-2, :-4])
    np.testing.assert_array_equal(moved_valid, inside)
    assert not moved_label[~inside].any()
    np.testing.assert_allclose(moved[~inside], 0, atol=1e-5)


def test_valid_of_the_region_travels_with_it():
    image, label, valid = example((9, 9))
    valid[:3] = 0
    params = with_options(flip={"axes": (0,)})
    *_, got = augment(image, label, valid, patch_size=(9, 9), params=params)
    np.testing.assert_array_equal(got, np.flip(valid, 0))


@pytest.mark.parametrize("patch", [(8, 7), (6, 5, 4)])
def test_weights_are_never_mixed(patch):
    region = tuple(p + 4 for p in patch)
    image, label, _ = example(region)
    valid = np.random.default_rng(1).permutation(np.arange(1.0, label.size + 1, dtype=np.float32))
    valid = valid.reshape(region)
    # Each label names its voxel, so that it says which weight belongs to it.
    label = np.arange(1, label.size + 1, dtype=np.int32).reshape(region)
    params = with_options("rotation", "elastic", "scaling", "translation")
    _, label, got = augment(image, label, valid, patch_size=patch, params=params)
    assert len(np.unique(got)) > label.size / 4
    np.testing.assert_array_equal(got, np.append(0, valid.ravel())[label])


@pytest.mark.parametrize(("factor", "rank"), [(2.0, 2), (0.7, 2), (1.4, 3)])
def test_scaling_multiplies_the_size_of_a_ball(factor, rank):
    size = (61, 61, 41)[:rank]
    centred = np.stack(np.indices(size), axis=-1) - (np.array(size) - 1) / 2
    label = (np.sum(centred**2, axis=-1) < 12.3**2).astype(np.int32)
    params = with_options(scaling={"range": (factor, factor)})
    image, valid = label[..., None].astype(np.float32), np.ones(size, np.float32)
    _, got, _ = augment(image, label, valid, patch_size=size, params=params)
    assert got.sum() / label.sum() == pytest.approx(factor**rank, rel=0.03)


@pytest.mark.parametrize(("region", "patch"), [((60, 50), (32, 28)), ((40, 36, 30), (20, 18, 10))])
def test_elastic_shifts_are_smooth_and_bounded(region, patch):
    still = source_coordinates(region, patch, flip={"axes": ()})
    shift = source_coordinates(region, patch, elastic={}) - still
    assert np.max(np.abs(shift)) <= 3.0 + 1e-4
    assert np.all(np.std(shift, axis=tuple(range(len(patch)))) > 0.2)
    for axis in range(len(patch)):
        # |f'| of a uniform cubic spline <= (largest step of its coefficients) / spacing
        assert np.max(np.abs(np.diff(shift, axis=axis))) <= 2 * 3.0 / 8 + 1e-4


def test_all_spatial_transforms_together_are_one_sampling_of_the_image():
    region, patch = (60, 54), (21, 17)
    options = {name: {} for name in SPATIAL}
    image = np.random.default_rng(2).normal(size=(*region, 1)).astype(np.float32)
    coordinates = source_coordinates(region, patch, **options)
    assert coordinates.min() > 0  # nothing comes from outside
    oracle = ndimage.map_coordinates(
        image[..., 0].astype(np.float64), np.moveaxis(coordinates, -1, 0), order=1
    )
    np.testing.assert_allclose(warp(image, patch, **options)[..., 0], oracle, atol=1e-3)


@pytest.mark.parametrize(
    ("patch", "options", "expected"),
    [
        ((128, 128), {}, (128, 128)),
        # 127 sqrt 2 = 179.6: 26.3 voxels more on each side
        ((128, 128), {"rotation": {}}, (182, 182)),
        # a quarter turn puts the long axis across: the diagonal of 64 x 32 is 71.6
        ((65, 33), {"rotation": {"range_deg": (-90, 90)}}, (73, 73)),
        # 64 cos 10 + 32 sin 10 = 68.6 and 32 cos 10 + 64 sin 10 = 42.6
        ((65, 33), {"rotation": {"range_deg": (-5, 10)}}, (71, 45)),
        # 63 / 0.7 = 90
        ((64, 64), {"scaling": {}}, (92, 92)),
        ((64, 64), {"scaling": {"range": (1.2, 1.4)}}, (64, 64)),
        # 6.4 and 3.2 voxels on each side
        ((64, 32), {"translation": {}}, (78, 40)),
        ((64, 32), {"elastic": {}}, (70, 38)),
        ((64, 32), {"flip": {}, "noise": {}}, (64, 32)),
        # 127 sqrt 2 / 0.7 + 2 * 12.8 = 282.2: 77.6 on each side
        ((128, 128), {"rotation": {}, "scaling": {}, "translation": {}}, (284, 284)),
        # the diagonal of 40 x 30 x 20 is 53.9
        ((41, 31, 21), {"rotation": {}}, (55, 55, 55)),
        # in plane the diagonal of 40 x 30, which is 50; then 50 / 0.7 = 71.4
        ((41, 31, 21), {"rotation": {"in_plane": True}}, (51, 51, 21)),
        (
            (41, 31, 21),
            {"rotation": {"in_plane": True}, "scaling": {"in_plane": True}},
            (73, 73, 21),
        ),
    ],
)
def test_region_size_by_hand(patch, options, expected):
    assert region_size(patch, with_options(**options)) == expected


def test_in_plane_a_volume_turns_and_zooms_as_its_slices_do():
    image = np.random.default_rng(0).normal(size=(21, 21, 5, 1)).astype(np.float32)
    for options in (
        {"rotation": {"range_deg": (30, 30), "in_plane": True}},
        {"scaling": {"range": (1.3, 1.3), "in_plane": True}},
    ):
        whole = warp(image, (13, 13, 5), **options)
        for z in range(5):
            alone = warp(image[:, :, z], (13, 13), **options)
            np.testing.assert_allclose(whole[:, :, z], alone, atol=1e-5)


@pytest.mark.parametrize("angle", [20.0, 45.0, 180.0])
def test_the_region_covers_every_warp_in_the_plane(angle):
    params = with_options(*SPATIAL, rotation={"range_deg": (-angle, angle)})
    patch = (24, 15)
    region = region_size(patch, params)
    arrays = example(region, 1)
    for i in range(20):
        *_, valid = augment(*arrays, (i, 0), patch_size=patch, params=params)
        assert valid.all()


# Intensity transforms


def test_noise_has_the_variance_asked_for():
    image, *_ = example((80, 80))
    noise = intensity(image, noise={"range_variance": (0.09, 0.09)}) - image
    # 12,800 samples: standard errors 0.0027 of the mean, 0.0011 of the variance
    assert noise.mean() == pytest.approx(0, abs=0.011)
    assert noise.var() == pytest.approx(0.09, abs=0.0045)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("shape", [(40, 30), (26, 24, 22)])
def test_blur_is_scipys_away_from_the_border(shape):
    image, *_ = example(shape)
    blurred = intensity(image, blur={"range_sigma_voxels": (0.8, 0.8)})
    rank = len(shape)
    oracle = ndimage.gaussian_filter(
        image.astype(np.float64), 0.8, truncate=10, axes=tuple(range(rank))
    )
    inside = (slice(7, -7),) * rank
    np.testing.assert_allclose(blurred[inside], oracle[inside], atol=1e-5)


def test_blur_keeps_a_constant_image_up_to_its_border():
    image = np.full((9, 9, 1), 5.0, np.float32)
    np.testing.assert_allclose(intensity(image, blur={}), image, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blur", {"range_sigma_voxels": (0.8, 0.8)}),
        ("low_resolution", {"range_zoom": (0.5, 0.5)}),
    ],
)
def test_each_channel_can_be_drawn_by_itself(name, options):
    image, *_ = example((12, 10), channels=40)
    both = intensity(image, **{name: options})
    changed = []
    for seed in range(20):
        alone = intensity(image, (seed, 5), **{name: options | {"channel_prob": 0.5}})
        is_changed = (alone != image).any((0, 1))
        # The same strength for all, so that a channel is as it was or as if all were drawn.
        np.testing.assert_allclose(alone, np.where(is_changed, both, image), atol=1e-6)
        changed.append(is_changed)
    share = np.mean(changed)
    assert 0.4 < share < 0.6  # 800 draws: standard error 0.018
    assert (np.std(changed, 0) > 0).all() and (np.std(changed, 1) > 0).all()
    always = intensity(image, **{name: options | {"channel_prob": 1.0}})
    np.testing.assert_allclose(always, both, atol=1e-6)


def test_brightness_multiplies_each_channel_by_a_factor_of_its_own():
    image, *_ = example((12, 12))
    got = intensity(image, brightness={"range": (1.5, 1.5)})
    np.testing.assert_allclose(got, image.astype(np.float64) * 1.5, rtol=1e-6)
    factors = (intensity(image, brightness={}) / image).reshape(-1, 2)
    np.testing.assert_allclose(np.ptp(factors, axis=0), 0, atol=1e-6)
    assert abs(factors[0, 0] - factors[0, 1]) > 1e-3
    assert np.all((factors >= 0.75) & (factors <= 1.25))


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_contrast_scales_about_the_mean_within_the_extremes(factor):
    image, *_ = example((12, 10))
    x = image.astype(np.float64)
    mean = x.mean((0, 1))
    oracle = np.clip((x - mean) * factor + mean, x.min((0, 1)), x.max((0, 1)))
    got = intensity(image, contrast={"range": (factor, factor)})
    np.testing.assert_allclose(got, oracle, atol=1e-5)


def gamma_oracle(x, gamma):
    axes = tuple(range(x.ndim - 1))
    lowest, spread = x.min(axes), np.ptp(x, axis=axes)
    powered = ((x - lowest) / spread) ** gamma * spread + lowest
    return (powered - powered.mean(axes)) / powered.std(axes) * x.std(axes) + x.mean(axes)


@pytest.mark.parametrize("shape", [(12, 10), (6, 7, 8)])
def test_gamma_and_its_inverse_keep_mean_and_deviation(shape):
    image, *_ = example(shape)
    image = image * 3 + 7
    x = image.astype(np.float64)
    got = intensity(image, gamma={"range": (1.4, 1.4)})
    np.testing.assert_allclose(got, gamma_oracle(x, 1.4), atol=1e-4)
    got = intensity(image, inverted_gamma={"range": (0.7, 0.7)})
    np.testing.assert_allclose(got, -gamma_oracle(-x, 0.7), atol=1e-4)
    assert np.abs(got - x).max() > 0.1


@pytest.mark.parametrize("name", ["gamma", "inverted_gamma", "contrast"])
def test_a_constant_channel_stays_as_it_is(name):
    image = np.full((8, 8, 1), 0.3, np.float32)
    np.testing.assert_allclose(intensity(image, **{name: {}}), image, atol=1e-6)


@pytest.mark.parametrize("shape", [(13, 10), (6, 7, 8)])
def test_low_resolution_at_zoom_1_is_the_identity(shape):
    image, *_ = example(shape)
    np.testing.assert_allclose(
        intensity(image, low_resolution={"range_zoom": (1.0, 1.0)}), image, atol=1e-6
    )


def test_intensities_change_in_the_order_of_nnunet():
    image, *_ = example((10, 10), 1)
    factors = {"range": (1.3, 1.3)}
    got = intensity(
        image, brightness=factors, contrast=factors, gamma=factors, inverted_gamma=factors
    )
    x = image.astype(np.float64) * 1.3
    x = np.clip((x - x.mean()) * 1.3 + x.mean(), x.min(), x.max())
    np.testing.assert_allclose(got, gamma_oracle(-gamma_oracle(-x, 1.3), 1.3), atol=1e-4)
