"""Plans against those that nnU-Net's own planners made, and by hand where those say nothing."""

import json
import pathlib

import pytest

from jaxseg.planning.configurations import DatasetFacts, configurations_of

ORACLE = pathlib.Path(__file__).resolve().parents[3] / "shared" / "planner" / "oracle.json"
SCHEMES = {"ZScoreNormalization": "zscore", "CTNormalization": "ct"}
PRESETS = {"default": "nnunet", "resenc_m": "resenc_m", "resenc_l": "resenc_l"}


def cases():
    if not ORACLE.exists():
        return []
    datasets = json.loads(ORACLE.read_text())["datasets"]
    return [
        pytest.param(dataset, plans, name, id=f"{dataset_name}-{plans}-{name}")
        for dataset_name, dataset in datasets.items()
        for plans, configurations in dataset["plans"].items()
        for name in configurations
    ]


def facts_of(dataset):
    """The oracle counts axes as the file does, z y x."""
    return DatasetFacts(
        spacings_mm=[spacing[::-1] for spacing in dataset["spacings"]],
        shapes=[shape[::-1] for shape in dataset["shapes_after_crop"]],
        channel_names=dataset["channel_names"],
        num_labels=len(dataset["labels"]),
        num_training=dataset["num_training"],
        relative_size=dataset["median_relative_size_after_cropping"],
    )


@pytest.mark.skipif(not ORACLE.exists(), reason=f"nnU-Net's plans not found: {ORACLE}")
def test_the_oracle_has_74_configurations():
    assert len(cases()) == 74


@pytest.mark.parametrize(("dataset", "plans", "name"), cases())
def test_as_nnunet_plans(dataset, plans, name):
    made = configurations_of(facts_of(dataset), PRESETS[plans])
    assert set(made) == set(dataset["plans"][plans])
    expected, found = dataset["plans"][plans][name], made[name]
    assert found.axes == (0, 1, 2)
    assert list(found.patch_size[::-1]) == expected["patch_size"]
    assert found.batch_size == expected["batch_size"]
    assert found.spacing_mm[::-1] == pytest.approx(expected["spacing"], rel=1e-7)  # of float32
    assert list(found.median_shape[::-1]) == expected["median_image_size"]
    assert [list(stride[::-1]) for stride in found.strides] == expected["strides"]
    assert [list(kernel[::-1]) for kernel in found.kernels] == expected["kernel_sizes"]
    assert list(found.features) == expected["features"]
    assert found.batch_dice == expected["batch_dice"]
    assert [SCHEMES[scheme] for scheme in expected["normalization"]] == list(found.normalisation)
    assert list(found.inside_mask) == expected["use_mask_for_norm"]


def made_of(spacings_mm, shapes, preset="nnunet", **changes):
    facts = {
        "spacings_mm": spacings_mm,
        "shapes": shapes,
        "channel_names": ["MRI"],
        "num_labels": 2,
        "num_training": len(shapes),
        "relative_size": 1.0,
    }
    return configurations_of(DatasetFacts(**(facts | changes)), preset)


def test_the_largest_preset_by_hand():
    """256^3 are 4,443,181,056 activations, 224 x 256 x 256 still some 3.89e9, then it fits."""
    found = made_of([[1, 1, 1]] * 9, [[512] * 3] * 9, "resenc_xl")["3d_fullres"]
    assert found.patch_size == (224, 224, 256)
    # At 7 x 7 x 8 voxels one axis alone could be halved, and is too short for that.
    assert found.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)
    # 256^3 has a seventh stage of 4^3 voxels with 320 channels, thirteen times, above which the
    # sixth is decoded, twice; the rest is 7/8 * 7/8 of it.
    rest = 4_443_181_056 - 13 * 320 * 4**3 - 2 * 320 * 8**3
    assert found.activations == rest * 49 // 64
    assert found.batch_size == 2
    assert found.features == (32, 64, 128, 256, 320, 320)


def test_more_memory_is_a_larger_patch():
    facts = DatasetFacts([[1, 1, 1]] * 9, [[512] * 3] * 9, ["CT"], 2, 9, 1.0)
    small, same, large = (
        configurations_of(facts, "resenc_m", scale=scale)["3d_fullres"].activations
        for scale in (0.5, 1, 3)
    )
    assert small <= 340e6 < same <= 680e6 < large <= 3 * 680e6


def test_a_coarse_axis_is_never_made_finer_than_the_others():
    spacings = [[1.0, 1.0, 0.5]] * 2 + [[1.0, 1.0, 5.0]] * 8
    found = made_of(spacings, [[200, 200, 20]] * 10)["3d_fullres"]
    assert found.spacing_mm == (1.0, 1.0, 1.00001)
    assert found.median_shape == (200, 200, 100)  # 20 * 5 / 1.00001
    assert found.axes == (0, 1, 2)


def test_a_coarse_axis_comes_last_whichever_it_is():
    found = made_of([[5, 1, 1]] * 100, [[20, 200, 150]] * 100)["3d_fullres"]
    assert found.axes == (1, 2, 0)
    assert found.spacing_mm == (1, 1, 5)
    assert found.median_shape == (200, 150, 20)
    # 5 mm are coarser than 1 and 2 mm by twice or more, than 4 mm by less.
    assert found.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1))
    assert found.kernels == ((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.patch_size == (224, 160, 20)
    assert found.batch_size == 4  # 5 % of 60 million voxels, in patches of 716,800
    flat = made_of([[5, 1, 1]] * 100, [[20, 200, 150]] * 100)["2d"]
    assert flat.spacing_mm == (1, 1) and flat.median_shape == (200, 150)


def test_pictures_are_planned_as_slices_alone():
    made = made_of(
        [[1, 1, 1]] * 5, [[300, 400, 1]] * 5, channel_names=["R", "rgb_to_0_1", "noNorm"]
    )
    assert list(made) == ["2d"]
    assert made["2d"].patch_size == (320, 448)
    assert made["2d"].normalisation == ("zscore", "rgb_to_0_1", "none")


@pytest.mark.parametrize(
    ("names", "relative_size", "inside_mask"),
    [(["T1", "ct"], 0.7, (True, False)), (["T1", "ct"], 0.75, (False, False))],
)
def test_mostly_empty_images_are_normalised_inside_their_mask(names, relative_size, inside_mask):
    made = made_of([[1, 1, 1]], [[64, 64, 64]], channel_names=names, relative_size=relative_size)
    assert made["3d_fullres"].inside_mask == inside_mask
