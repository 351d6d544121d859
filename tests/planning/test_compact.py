"""Plans for a machine without accelerator, and for several devices, by hand."""

import pytest

from jaxseg.planning.budget import NO_WISHES, Wishes
from jaxseg.planning.choice import choose
from jaxseg.planning.configurations import DatasetFacts, configurations_of
from jaxseg.planning.reasons import reasons_of
from jaxseg.planning.recipe import recipe_of


def made_compact(shape, chords_mm, wishes=NO_WISHES):
    facts = DatasetFacts([[1.5, 1.5, 10]] * 50, [shape] * 50, ["MRI"], 4, 50, 1.0, chords_mm)
    made = configurations_of(facts, "compact", wishes=wishes)
    return made, facts


def test_a_compact_grid_is_as_coarse_as_thin_structures_allow():
    chords_mm = [[30, 36, 24], [14.4, 15, 4]]
    made, facts = made_compact([240, 240, 10], chords_mm)
    # Six voxels through 14.4 mm; 4 mm across slices do not count.
    assert made["2d"].spacing_mm == pytest.approx((2.4, 2.4))
    assert made["3d_fullres"].spacing_mm == pytest.approx((2.4, 2.4, 10))
    assert made["2d"].median_shape == (150, 150)
    why = {what: why for what, _, why in reasons_of("2d", made["2d"], facts, "compact", {})}
    assert why["spacing"] == (
        "coarser than the median, 1.5 x 1.5 mm: the thinnest structure, 14.4 mm through, keeps 6 "
        "voxels"
    )
    # Slices are 4.2 times as thick now, but of the cases it is 6.7 times.
    assert choose(made, "auto", "compact", NO_WISHES, facts) == (
        "2d",
        "since slices are 6.67 times as thick as their voxels are wide",
    )


@pytest.mark.parametrize(
    ("shape", "chords_mm", "wishes"),
    [
        ([240, 240, 10], [[8, 9, 30]], NO_WISHES),  # too thin
        ([240, 240, 10], [], NO_WISHES),  # not known
        ([60, 60, 10], [[30, 30, 30]], NO_WISHES),  # a patch shows everything
        ([240, 240, 10], [[30, 30, 30]], Wishes(spacing_mm=(1.5, 1.5, 0))),
        ([240, 240, 1], [[30, 30, 10]], NO_WISHES),  # pictures
    ],
)
def test_a_compact_grid_is_no_coarser_without_need(shape, chords_mm, wishes):
    made, _ = made_compact(shape, chords_mm, wishes)
    assert made["2d"].spacing_mm == (1.5, 1.5)


def test_presets_of_an_accelerator_keep_the_grid():
    facts = DatasetFacts([[1, 1, 1]] * 9, [[512] * 3] * 9, ["CT"], 2, 9, 1.0, [[90, 90, 90]])
    assert configurations_of(facts, "nnunet")["3d_fullres"].spacing_mm == (1, 1, 1)


def test_compact_patches_shrink_until_there_are_four_slices():
    made, _ = made_compact([240, 240, 10], [])
    assert made["2d"].patch_size == (128, 128) and made["2d"].batch_size == 4
    assert 12 * 0.9e6 / 5 < made["2d"].activations <= 12 * 0.9e6 / 4


def test_compact_networks_of_volumes_begin_at_half_the_resolution():
    facts = DatasetFacts([[1, 1, 1]] * 99, [[256] * 3] * 99, ["CT"], 5, 99, 1.0)
    full = configurations_of(facts, "compact")["3d_fullres"]
    assert full.strides == ((2, 2, 2),) * len(full.features) and full.features[0] == 16
    made = configurations_of(facts, "compact", wishes=Wishes(num_stages=3))["3d_fullres"]
    assert made.features == (16, 32, 64) and made.strides == ((2, 2, 2),) * 3
    tiny = [[1, 1, 1]] * 99, [[8] * 3] * 99  # of two stages none can be left out
    made = configurations_of(DatasetFacts(*tiny, ["CT"], 5, 99, 1.0), "compact")["3d_fullres"]
    assert made.strides == ((1, 1, 1), (2, 2, 2)) and made.features == (16, 32)
    why = {what: why for what, _, why in reasons_of("3d_fullres", full, facts, "compact", {})}
    assert why["strides"].endswith("coarser than the image, at a fraction of the cost")


def test_few_steps_are_taken_around_structures_and_together():
    facts = DatasetFacts([[1, 1, 1]] * 99, [[256] * 3] * 99, ["CT"], 5, 99, 1.0)
    full = configurations_of(facts, "compact")["3d_fullres"]
    assert full.batch_dice and full.batch_size >= 4
    small = DatasetFacts([[1, 1, 1]] * 99, [[32] * 3] * 99, ["CT"], 5, 99, 1.0)
    assert not configurations_of(small, "compact")["3d_fullres"].batch_dice  # it shows everything

    def fraction(made, preset):
        values = recipe_of(made, preset, left_right=None, is_scan=True)
        return values["data.foreground_fraction"]

    assert fraction(full, "compact") == 0.67 and fraction(full, "nnunet") == 0.33
    assert fraction(configurations_of(facts, "compact")["2d"], "compact") == 0.33


def test_a_network_that_is_trained_for_minutes_is_not_shown_scans_from_every_side():
    made = made_compact([240, 240, 10], [])[0]["2d"]

    def recipe(preset, *, is_scan):
        values = recipe_of(made, preset, left_right=None, is_scan=is_scan)
        return values["augment.rotation.range_deg"], values["augment.flip.axes"]

    assert recipe("compact", is_scan=True) == ((-30.0, 30.0), ())
    assert recipe("compact", is_scan=False) == ((-180.0, 180.0), (0, 1))
    assert recipe("nnunet", is_scan=True) == ((-180.0, 180.0), (0, 1))


def test_batches_are_multiples_of_the_devices():
    facts = DatasetFacts([[1, 1, 1]] * 99, [[256] * 3] * 99, ["CT"], 2, 99, 1.0)
    made = configurations_of(facts, "nnunet", wishes=Wishes(parts=8))
    assert made["3d_fullres"].batch_size == 8 and made["3d_fullres"].batch_limit == "devices"
    assert made["2d"].batch_size % 8 == 0
    alone = configurations_of(facts, "nnunet")
    assert made["2d"].batch_size - 8 < alone["2d"].batch_size <= made["2d"].batch_size
