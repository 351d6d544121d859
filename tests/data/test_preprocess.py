import dataclasses
import itertools
import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg import geometry
from jaxseg.data.border_weights import border_weights
from jaxseg.data.cases import Case, Dataset, DatasetProblems
from jaxseg.data.label_values import IGNORED, LabelCoding
from jaxseg.data.preprocess import (
    Plan,
    kept_box,
    make_plan,
    preprocess_image,
    preprocess_instances,
    preprocess_label,
    slice_axes,
)

# Clips nothing in sight, subtracts 0 and divides by 1.
UNCHANGED = (-1e9, 1e9, 0.0, 1.0)


def make_affine(spacing_mm, axes=(0, 1, 2), signs=(1, 1, 1), turn=0.0):
    """Axes of that spacing along permuted and flipped world axes, then turned about x and z."""
    sin, cos = np.sin(turn), np.cos(turn)
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    about_z = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ (np.eye(3)[:, axes] * signs) * spacing_mm
    affine[:3, 3] = (12.5, -40.0, 7.0)
    return affine


AFFINES = {
    "ras": make_affine((1.0, 1.0, 1.0)),
    "anisotropic": make_affine((0.7, 0.9, 3.1)),
    "left_handed": make_affine((0.7, 0.9, 3.1), signs=(-1, 1, 1)),
    "permuted": make_affine((0.9, 3.1, 0.7), axes=(1, 2, 0), signs=(-1, -1, 1)),
    "oblique": make_affine((0.9, 3.1, 0.7), axes=(2, 0, 1), signs=(1, -1, 1), turn=0.4),
}
each_affine = pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)


def make_plan_of(spacing_mm, kinds=("ct",), intensity=(UNCHANGED,), image_order=1, label_order=1):
    return Plan(tuple(spacing_mm), kinds, intensity, image_order, label_order)


def one_hot(label, num_classes):
    return np.eye(num_classes, dtype=np.float32)[label]


def dice(a, b):
    return 2 * np.sum(a & b) / (np.sum(a) + np.sum(b))


def blob(shape, affine, radius_mm):
    """Ball inside a larger ball, in millimetres: classes 2 and 1."""
    index = np.moveaxis(np.indices(shape), 0, -1)
    offset = (index - (np.array(shape) - 1) / 2) @ affine[:3, :3].T
    distance = np.linalg.norm(offset, axis=-1)
    return ((distance < radius_mm).astype(np.uint8) + (distance < radius_mm / 2)).astype(np.uint8)


def restore(probs, shape, affine):
    """Brings [X', Y', Z', K] from the preprocessed grid back to the file's, as prediction does."""
    canonical, _ = geometry.to_canonical(np.zeros(shape), affine)
    return geometry.from_canonical(
        geometry.resample_to_shape(probs, canonical.shape, order=1), affine
    )


@each_affine
@pytest.mark.parametrize("label_order", [0, 1])
def test_restoring_at_the_same_spacing_is_the_identity(affine, label_order):
    label = np.random.default_rng(0).integers(0, 3, (7, 6, 5)).astype(np.uint8)
    _, canonical_affine = geometry.to_canonical(label, affine)
    spacing_mm = geometry.spacing_mm_from_affine(canonical_affine)
    plan = make_plan_of(spacing_mm, label_order=label_order)
    prepared = preprocess_label(label, affine, plan, 3)
    assert sorted(prepared.shape) == [5, 6, 7]
    probs = restore(one_hot(prepared, 3), label.shape, affine)
    np.testing.assert_array_equal(probs, one_hot(label, 3))


@each_affine
@pytest.mark.parametrize("label_order", [0, 1])
@pytest.mark.parametrize("target_mm", [(1.0, 1.3, 1.1), (0.6, 0.5, 0.8)])
def test_restoring_after_resampling_nearly_gives_the_label_back(affine, label_order, target_mm):
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    shape = tuple(np.round(30 / spacing_mm).astype(int))
    label = blob(shape, affine, radius_mm=13)
    plan = make_plan_of(target_mm, label_order=label_order)
    prepared = preprocess_label(label, affine, plan, 3)
    assert prepared.shape != label.shape
    probs = restore(one_hot(prepared, 3), label.shape, affine)
    assert probs.shape == (*shape, 3) and probs.dtype == np.float32
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
    restored = probs.argmax(-1)
    assert dice(restored > 0, label > 0) > 0.95
    assert dice(restored == 2, label == 2) > 0.9  # half as wide, down to 4 slices thick


@each_affine
def test_every_voxel_stays_where_it_is_in_the_world(affine):
    # A linear function of the world survives linear interpolation between voxel centres.
    slope, shape = np.array([0.3, -0.2, 0.5]), (12, 11, 10)
    index = np.moveaxis(np.indices(shape), 0, -1)
    image = ((index @ affine[:3, :3].T + affine[:3, 3]) @ slope)[..., None].astype(np.float32)
    plan = make_plan_of((1.1, 0.8, 1.7))
    prepared, new_affine = preprocess_image(image, affine, plan)
    assert prepared.dtype == np.float32

    new_index = np.moveaxis(np.indices(prepared.shape[:3]), 0, -1)
    world = new_index @ new_affine[:3, :3].T + new_affine[:3, 3]
    old_index = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    inside = ((old_index >= 0) & (old_index <= np.array(shape) - 1)).all(-1)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(prepared[inside][:, 0], (world @ slope)[inside], atol=1e-4)
    np.testing.assert_allclose(
        geometry.spacing_mm_from_affine(new_affine), (1.1, 0.8, 1.7), rtol=0.1
    )
    assert (np.abs(new_affine[:3, :3]).argmax(0) == range(3)).all()
    assert (np.diag(new_affine)[:3] > 0).all()


@each_affine
def test_image_and_label_stay_aligned(affine):
    spacing_mm = geometry.spacing_mm_from_affine(affine)
    label = blob(np.round(24 / spacing_mm).astype(int), affine, radius_mm=9)
    label = np.minimum(label, 1)
    label[:, 0] = 1  # asymmetric
    plan = make_plan_of((1.2, 0.8, 1.5))
    image, _ = preprocess_image(label[..., None].astype(np.float32), affine, plan)
    prepared = preprocess_label(label, affine, plan, 2)
    image = image[..., 0]
    clear = np.abs(image - 0.5) > 1e-3
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(prepared[clear], image[clear] > 0.5)


def test_slices_are_not_split_when_their_spacing_stays():
    image = np.arange(4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3, 1)
    affine = make_affine((1.0, 1.0, 5.0))
    prepared, _ = preprocess_image(image, affine, make_plan_of((0.5, 0.5, 5.0)))
    assert prepared.shape == (8, 10, 3, 1)
    np.testing.assert_allclose(np.diff(prepared[:, :, :, 0], axis=2), 1, atol=1e-5)


def save_case(folder, case_id, image, label, affine):
    paths = []
    for kind, values in (("image", image.astype(np.float32)), ("label", label.astype(np.uint8))):
        path = folder / f"{case_id}_{kind}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(values, affine), path)
        paths.append(str(path))
    image_path, label_path = paths
    return Case(case_id, (image_path,), label_path)


def plan_of(cases, modalities=("CT",), label_values=(0, 1), **changes):
    dataset = Dataset("", tuple(cases), ("b", "c"), LabelCoding(label_values), modalities)
    options = {
        "axes": (0, 1, 2),
        "spacing_mm": (),
        "normalisation": "auto",
        "crop": False,
        "image_order": 1,
        "label_order": 1,
    }
    return make_plan(dataset, cases, **options | changes)


def test_ct_statistics_by_hand(tmp_path):
    cases = []
    for case_id, value in (("a", 10), ("b", 30)):
        label = np.zeros((4, 4, 4))
        label[1:3, 1:3] = 1
        image = np.where(label, value, 1000)
        cases.append(save_case(tmp_path, case_id, image, label, np.eye(4)))
    plan = plan_of(cases)
    assert plan.normalisation == ("ct",)
    assert plan.intensity == ((10.0, 30.0, 20.0, 10.0),)
    image = np.array([-500.0, 10, 15, 20, 1000], np.float32).reshape(5, 1, 1, 1)
    prepared, _ = preprocess_image(image, np.eye(4), plan)
    np.testing.assert_allclose(prepared.ravel(), [-1, -1, -0.5, 0, 1], atol=1e-6)


def test_ct_without_any_foreground_is_one_clear_problem(tmp_path):
    image = np.arange(64.0).reshape(4, 4, 4)
    case = save_case(tmp_path, "empty", image, np.zeros((4, 4, 4)), np.eye(4))
    with pytest.raises(DatasetProblems, match="no training case has a labelled foreground voxel"):
        plan_of([case])
    assert plan_of([case], normalisation="zscore").normalisation == ("zscore",)


def test_ct_statistics_are_those_of_the_clipped_foreground(tmp_path):
    rng = np.random.default_rng(0)
    cases, foreground = [], []
    for case_id, affine in (("a", AFFINES["oblique"]), ("b", AFFINES["permuted"])):
        label = rng.random((11, 10, 9)) < 0.4
        image = rng.normal(40, 200, label.shape).astype(np.float32)
        foreground.append(image[label])
        cases.append(save_case(tmp_path, case_id, image, label, affine))
    values = np.concatenate(foreground).astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5])
    clipped = np.clip(values, low, high)
    (statistics,) = plan_of(cases).intensity
    np.testing.assert_allclose(statistics, (low, high, clipped.mean(), clipped.std()), rtol=1e-4)


def test_ct_statistics_of_many_voxels_need_only_some_of_them(tmp_path):
    image = np.random.default_rng(0).normal(0, 100, (40, 40, 40))
    case = save_case(tmp_path, "a", image, np.ones(image.shape), np.eye(4))
    (statistics,) = plan_of([case]).intensity
    # Percentiles of a normal distribution, and moments of one clipped there.
    np.testing.assert_allclose(statistics, (-257.6, 257.6, 0, 98.9), atol=12)


def test_spacing_is_the_median_of_canonical_spacings(tmp_path):
    cases = []
    for index, (spacing_mm, axes) in enumerate(
        [((1, 2, 5), (0, 1, 2)), ((6, 1.5, 2), (2, 0, 1)), ((3, 9, 2.5), (1, 2, 0))]
    ):
        rng = np.random.default_rng(index)
        affine = make_affine(spacing_mm, axes)
        label = np.ones((3, 3, 3))
        cases.append(save_case(tmp_path, str(index), rng.normal(size=(3, 3, 3)), label, affine))
    # RAS spacings (1, 2, 5), (1.5, 2, 6) and (2.5, 3, 9).
    np.testing.assert_allclose(plan_of(cases).spacing_mm, (1.5, 2, 6), rtol=1e-6)
    assert plan_of(cases, spacing_mm=(1.0, 1.0, 4.0)).spacing_mm == (1.0, 1.0, 4.0)


def test_normalisation_follows_the_modality_of_each_channel(tmp_path):
    image = np.random.default_rng(0).normal(size=(4, 4, 4, 2)) * (1, 50) + (0, 100)
    label = np.zeros((4, 4, 4))
    label[:2] = 1
    case = save_case(tmp_path, "a", image, label, np.eye(4))
    plan = plan_of([case], modalities=("MRI", "ct "))
    assert plan.normalisation == ("zscore", "ct")
    assert plan.intensity[0] == ()
    assert plan.intensity[1][2] == pytest.approx(image[:2, ..., 1].mean(), abs=2)
    both = plan_of([case], modalities=("MRI", "CT"), normalisation="ct")
    assert both.normalisation == ("ct", "ct") and both.intensity[1] == plan.intensity[1]
    neither = plan_of([case], modalities=("CT", "CT"), normalisation="zscore")
    assert neither.normalisation == ("zscore",) * 2 and neither.intensity == ((), ())


def test_pictures_are_z_scored_channel_by_channel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    case = Case("a", (str(tmp_path / "a.png"),), str(tmp_path / "never_opened.png"))
    plan = plan_of([case], modalities=(), label_values=None)
    assert plan.normalisation == ("zscore",) * 3
    assert plan.spacing_mm == (1.0, 1.0, 1.0)
    image = pixels[:, :, None].astype(np.float32)
    prepared, affine = preprocess_image(image, np.eye(4), plan)
    assert prepared.shape == (6, 5, 1, 3)
    np.testing.assert_array_equal(affine, np.eye(4))
    for channel in range(3):
        values = image[..., channel].astype(np.float64)
        values = np.clip(values, *np.percentile(values, [0.5, 99.5]))
        expected = (values - values.mean()) / values.std()
        np.testing.assert_allclose(prepared[..., channel], expected, atol=1e-5)


def test_each_channel_has_its_own_statistics():
    image = np.zeros((4, 4, 4, 3), np.float32)
    image[..., 0] = np.where(np.indices((4, 4, 4))[0] < 2, 10, 30)
    image[..., 1] = np.where(np.indices((4, 4, 4))[1] < 2, 7, -1)
    image[..., 2] = 55
    plan = make_plan_of((1, 1, 1), ("zscore", "ct", "ct"), ((), (0.0, 5.0, 1.0, 2.0), UNCHANGED))
    prepared, _ = preprocess_image(image, np.eye(4), plan)
    np.testing.assert_allclose(prepared[:2, ..., 0], -1, atol=1e-6)
    np.testing.assert_allclose(prepared[2:, ..., 0], 1, atol=1e-6)
    np.testing.assert_allclose(prepared[:, :2, :, 1], 2, atol=1e-6)
    np.testing.assert_allclose(prepared[:, 2:, :, 1], -0.5, atol=1e-6)
    np.testing.assert_allclose(prepared[..., 2], 55)


def test_one_extreme_voxel_does_not_move_the_others():
    image = np.random.default_rng(0).normal(100, 15, (20, 20, 10, 1)).astype(np.float32)
    plan = make_plan_of((1, 1, 1), ("zscore",), ((),))
    before, _ = preprocess_image(image, np.eye(4), plan)
    assert abs(before.mean()) < 1e-4 and before.std() == pytest.approx(1, abs=1e-4)
    image[3, 4, 5] = 1e6
    after, _ = preprocess_image(image, np.eye(4), plan)
    others = np.ones(image.shape, bool)
    others[3, 4, 5] = False
    np.testing.assert_allclose(after[others], before[others], atol=0.01)
    assert after[3, 4, 5, 0] == after.max() < 5


@pytest.mark.parametrize("kind", ["zscore", "ct"])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e5])
def test_a_constant_channel_becomes_finite(tmp_path, kind, value):
    image = np.full((5, 4, 3, 1), value, np.float32)
    case = save_case(tmp_path, "a", image[..., 0], np.ones((5, 4, 3)), np.eye(4))
    plan = plan_of([case], normalisation=kind)
    prepared, _ = preprocess_image(image, np.eye(4), plan)
    np.testing.assert_array_equal(prepared, np.zeros_like(image))


def test_plan_survives_json():
    for plan in (
        make_plan_of((0.1, 1 / 3, 2.0), ("zscore", "ct"), ((), (-1.5, 2.25, 1e-9, 1 / 7))),
        make_plan_of((1.0, 1.0, 1.0), ("zscore",), ((),), image_order=3, label_order=0),
    ):
        assert Plan.from_json(plan.to_json()) == plan


def test_order_of_resampling_is_the_plans():
    image = np.zeros((9, 1, 1, 1), np.float32)
    image[4] = 1
    results = {}
    for image_order in (1, 3):
        plan = make_plan_of((0.5, 1, 1), image_order=image_order)
        results[image_order] = preprocess_image(image, np.eye(4), plan)[0].ravel()
    assert results[1].min() == 0 and results[1].max() == pytest.approx(0.75)
    assert results[3].min() < -0.01  # cubic splines overshoot
    label = (image[..., 0] > 0).astype(np.uint8)
    for label_order, (first, second) in itertools.product((0, 1), [(0.5, 18), (3.0, 3)]):
        plan = make_plan_of((first, 1, 1), label_order=label_order)
        prepared = preprocess_label(label, np.eye(4), plan, 2)
        assert prepared.shape == (second, 1, 1)
        assert prepared.any()


def test_a_few_bright_voxels_on_an_even_background_survive_normalisation():
    image = np.zeros((10, 10, 10, 1), np.float32)
    image[5, 5, 5] = 7
    prepared, _ = preprocess_image(
        image, np.eye(4), make_plan_of((1.0, 1.0, 1.0), ("zscore",), ((),))
    )
    np.testing.assert_allclose(
        prepared[..., 0], (image[..., 0] - image.mean()) / image.std(dtype=np.float64), rtol=1e-5
    )


def border_weights_by_hand(instances, w0, sigma):
    """Every distance of every voxel to every cell."""
    cells = instances > 0
    share = cells.mean()
    weights = np.where(cells, 0.5 / share, 0.5 / (1 - share))
    for voxel in np.argwhere(~cells):
        distances = sorted(
            np.sqrt(((np.argwhere(instances == cell) - voxel) ** 2).sum(1).min())
            for cell in np.unique(instances[cells])
        )
        if len(distances) > 1:
            total = distances[0] + distances[1]
            weights[tuple(voxel)] += w0 * np.exp(-(total**2) / (2 * sigma**2))
    return weights


@pytest.mark.parametrize("shape", [(17, 14, 1), (9, 8, 7)])
@pytest.mark.parametrize(("w0", "sigma"), [(10.0, 5.0), (3.0, 0.5)])
def test_border_weights_follow_the_paper(shape, w0, sigma):
    rng = np.random.default_rng(0)
    instances = np.zeros(shape, np.int32)
    for cell in (5, 70000, 3, 8):
        corner = [rng.integers(0, max(n - 2, 1)) for n in shape]
        instances[tuple(slice(c, c + 2) for c in corner)] = cell
    assert len(np.unique(instances)) == 5
    expected = border_weights_by_hand(instances, w0, sigma)
    result = border_weights(instances, w0=w0, sigma=sigma)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_border_weights_are_highest_in_the_narrowest_gap():
    instances = np.zeros((9, 20, 1), np.int32)
    instances[:, :6], instances[:, 7:12], instances[:, 15:] = 1, 2, 3
    weights = border_weights(instances)[4, :, 0]
    background = 9 * 20 / (2 * 9 * 4)
    np.testing.assert_allclose(weights[6], background + 10 * np.exp(-4 / 50), rtol=1e-5)
    np.testing.assert_allclose(weights[13], background + 10 * np.exp(-16 / 50), rtol=1e-5)
    np.testing.assert_allclose(weights[:6], 9 * 20 / (2 * 9 * 16), rtol=1e-5)


@pytest.mark.parametrize("cell", [0, 1])
def test_border_weights_of_one_class_are_one(cell):
    np.testing.assert_array_equal(border_weights(np.full((4, 5, 1), cell)), np.ones((4, 5, 1)))


def test_border_weights_of_one_cell_balance_alone():
    instances = np.zeros((4, 5, 1), int)
    instances[1, 1:3] = 6
    expected = np.where(instances > 0, 20 / (2 * 2), 20 / (2 * 18))
    np.testing.assert_allclose(border_weights(instances), expected, rtol=1e-6)


def test_slices_are_cut_across_the_thickest_axis():
    shapes = [(20, 30, 40)] * 3
    assert slice_axes(shapes, [(1, 1, 1)] * 3) == (0, 1, 2)  # of equals the last
    assert slice_axes(shapes, [(1, 1, 4)] * 3) == (0, 1, 2)
    assert slice_axes(shapes, [(4, 1, 1)] * 3) == (1, 2, 0)
    assert slice_axes(shapes, [(1, 4, 1)] * 3) == (0, 2, 1)
    assert slice_axes(shapes, [(4, 1, 1), (4, 1, 1), (1, 1, 9)]) == (1, 2, 0)  # the median
    assert slice_axes(shapes, [(1.005, 1, 1)] * 3) == (0, 1, 2)  # but for rounding
    assert slice_axes([(1, 30, 40), (1, 20, 20)], [(1, 2, 3)] * 2) == (1, 2, 0)
    assert slice_axes([(1, 30, 40), (2, 20, 20)], [(1, 2, 3)] * 2) == (0, 1, 2)


@each_affine
def test_the_prepared_volume_is_laid_down_for_slices(affine):
    shape = (9, 8, 7)
    image = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    label = blob(shape, affine, 3.0)
    plain = make_plan_of((1.3, 1.1, 0.9))
    turned = dataclasses.replace(plain, axes=(1, 2, 0))
    expected, expected_affine = preprocess_image(image, affine, plain)
    found, found_affine = preprocess_image(image, affine, turned)
    np.testing.assert_array_equal(found, expected.transpose(1, 2, 0, 3))
    np.testing.assert_array_equal(found_affine, expected_affine[:, [1, 2, 0, 3]])
    np.testing.assert_array_equal(
        preprocess_label(label, affine, turned, 3),
        preprocess_label(label, affine, plain, 3).transpose(1, 2, 0),
    )


def test_what_does_not_count_stays_so():
    label = np.zeros((12, 12, 12), np.uint8)
    label[2:10, 2:10, 2:10] = 1
    label[2:10, 2:10, 6:] = IGNORED
    plan = dataclasses.replace(make_plan_of((2.0, 2.0, 2.0)), keep_thin=True)
    prepared = preprocess_label(label, np.eye(4), plan, 2)
    np.testing.assert_array_equal(prepared, label[::2, ::2, ::2])
    np.testing.assert_array_equal(
        preprocess_label(label, np.eye(4), make_plan_of((1, 1, 1)), 2), label
    )


def test_a_plan_of_version_0_1_keeps_its_rules():
    fields = json.loads(make_plan_of((1, 1, 1)).to_json())
    for name in ("axes", "spacing_from", "keep_thin", "typical"):
        del fields[name]
    for name in ("crop", "normalise_first", "coarse_apart"):
        del fields[name]
    plan = Plan.from_json(json.dumps(fields))
    assert (plan.crop, plan.normalise_first, plan.coarse_apart) == (False,) * 3
    assert (plan.axes, plan.spacing_from, plan.keep_thin) == ((0, 1, 2), "sform", False)
    lines = np.zeros((8, 8, 4), np.uint8)
    lines[3] = 1  # at half the resolution a tie, which the background had then
    plan = dataclasses.replace(plan, spacing_mm=(2.0, 2.0, 1.0))
    assert not preprocess_label(lines, np.eye(4), plan, 2).any()
    new = dataclasses.replace(plan, keep_thin=True)
    assert preprocess_label(lines, np.eye(4), new, 2).sum() == 16


@each_affine
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0)])
def test_image_label_and_instances_are_cropped_alike(affine, axes):
    rng = np.random.default_rng(0)
    image = np.zeros((13, 12, 11, 2), np.float32)
    image[3:11, 4:9, 2:10] = rng.normal(size=(8, 5, 8, 2))
    label = blob(image.shape[:3], affine, 6.0)
    spacing_mm = geometry.spacing_mm_from_affine(geometry.to_canonical(label, affine)[1])
    plan = dataclasses.replace(
        make_plan_of(spacing_mm, ("none", "none"), ((), ())), crop=True, axes=axes
    )
    box = kept_box(image, affine, plan)
    prepared, prepared_affine = preprocess_image(image, affine, plan)
    inside, inside_affine = geometry.to_canonical(
        image[3:11, 4:9, 2:10],
        geometry.cropped_affine(affine, (slice(3, 11), slice(4, 9), slice(2, 10))),
    )
    np.testing.assert_array_equal(prepared, inside.transpose(*axes, 3))
    np.testing.assert_allclose(prepared_affine, inside_affine[:, [*axes, 3]], atol=1e-9)
    expected = geometry.to_canonical(label[3:11, 4:9, 2:10], affine)[0].transpose(axes)
    np.testing.assert_array_equal(preprocess_label(label, affine, plan, 3, box), expected)
    instances = label.astype(np.int32) * 7
    np.testing.assert_array_equal(preprocess_instances(instances, affine, plan, box), expected * 7)


def test_images_are_normalised_before_they_are_resampled():
    rng = np.random.default_rng(0)
    image = rng.normal(100, 15, (12, 10, 8, 1)).astype(np.float32)
    after = make_plan_of((2.0, 2.0, 2.0), ("zscore",), ((),))
    first = dataclasses.replace(after, normalise_first=True)
    found, _ = preprocess_image(image, np.eye(4), first)
    values = np.clip(image, *np.percentile(image, [0.5, 99.5]))
    scaled = (values - values.mean(dtype=np.float64)) / values.std(dtype=np.float64)
    expected = geometry.resample_to_shape(scaled, (6, 5, 4), 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std() < 0.6  # averages spread less, and are not brought to 1 again
    assert preprocess_image(image, np.eye(4), after)[0].std() == pytest.approx(1, abs=1e-3)


def test_new_plans_have_the_present_rules(tmp_path):
    label = np.zeros((6, 5, 4))
    label[1:3] = 1
    image = np.random.default_rng(0).normal(size=label.shape)
    cases = [save_case(tmp_path, "a", image, label, np.diag([1.0, 2.0, 5.0, 1.0]))]
    plan = plan_of(cases, crop=True)
    assert (plan.crop, plan.normalise_first, plan.coarse_apart) == (True, True, True)
    assert plan.spacing_mm == (1.0, 2.0, 5.0)
    assert plan_of(cases, slices=True).spacing_mm == (1.0, 2.0, 0.0)
    assert plan_of(cases, slices=True, axes=(1, 2, 0)).spacing_mm == (0.0, 2.0, 5.0)
    wanted = (1.0, 1.0, 3.0)
    assert plan_of(cases, slices=True, spacing_mm=wanted).spacing_mm == wanted


def test_each_channel_can_have_a_scheme_of_its_own(tmp_path):
    label = np.zeros((6, 5, 4))
    label[1:3] = 1
    image = np.random.default_rng(0).normal(size=(*label.shape, 2))
    case = save_case(tmp_path, "a", image, label, np.eye(4))
    plan = plan_of([case], ("CT", "x"), normalisation="none, rescale_to_0_1")
    assert plan.normalisation == ("none", "rescale_to_0_1")
    assert plan.intensity == ((), ())
    plan = plan_of([case], ("CT", "x"), normalisation="auto,none")
    assert plan.normalisation == ("ct", "none") and len(plan.intensity[0]) == 4
    assert plan_of([case], ("noNorm", "rgb_to_0_1")).normalisation == ("none", "rgb_to_0_1")
    with pytest.raises(DatasetProblems, match="names 3 schemes, images have 2 channels"):
        plan_of([case], ("CT", "x"), normalisation="none,ct,ct")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spacing_mm", (1, 1)),
        ("spacing_mm", (1, 1, -1)),
        ("spacing_mm", (1, 1, np.nan)),
        ("normalisation", ("zscore", "no")),
        ("normalisation", ()),
        ("intensity", ((), ())),
        ("intensity", ((0.0, 1.0, 0.0),)),
        ("image_order", 2),
        ("label_order", "1"),
        ("axes", (0, 1, 1)),
        ("axes", (0, True, 2)),
        ("spacing_from", "header"),
        ("keep_thin", "yes"),
        ("typical", {"weight_kg/x": {"min": 0, "max": 1, "low": 0, "high": 1}}),
        ("typical", {"spacing_mm/x": {"min": 0, "max": 1}}),
        ("typical", [1]),
    ],
)
def test_a_plan_that_none_can_be_is_not_read(name, value):
    plan = make_plan_of((1, 1, 1))
    assert Plan.from_json(plan.to_json()) == plan
    fields = json.loads(plan.to_json()) | {name: value}
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        Plan.from_json(json.dumps(fields))
