import json

import numpy as np
import pytest

from jaxseg.planning import measures


def make_case():
    """A label with two boxes of class 1 that touch at a corner, and a far one of class 3."""
    label = np.zeros((12, 10, 6), np.uint8)
    label[2:4, 2:4, 1:3] = 1
    label[4:6, 4:6, 3:5] = 1
    label[9:12, 8:9, 0:1] = 3
    image = np.zeros((12, 10, 6, 2), np.float32)
    image[1:, 2:9, :5, 0] = 5
    image[..., 1][label > 0] = np.arange(1, 20)
    return image, label


def test_a_case_by_hand():
    image, label = make_case()
    case = measures.measure_case(image, label, (1.0, 2.0, 3.0), num_classes=4)
    assert case.shape == (12, 10, 6) and case.spacing_mm == (1.0, 2.0, 3.0)
    assert case.cropped_shape == (11, 7, 5)
    assert case.relative_size == 11 * 7 * 5 / 720
    one, two, three = case.structures
    assert case.background == 720 - 16 - 3
    assert (one.voxels, one.components, one.extent_mm) == (16, 1, (4.0, 8.0, 12.0))
    assert (two.voxels, two.components, two.extent_mm) == (0, 0, (0.0, 0.0, 0.0))
    assert (three.voxels, three.components, three.extent_mm) == (3, 1, (3.0, 2.0, 3.0))
    assert (one.chord_mm, two.chord_mm) == ((2.0, 4.0, 6.0), (0.0, 0.0, 0.0))
    first, second = case.intensities
    assert (first.count, first.mean, first.std) == (19, 5.0, 0.0)
    assert (second.count, second.mean) == (19, 10.0)
    assert second.std == pytest.approx(np.std(np.arange(1, 20)))
    assert second.quantiles[0] == 1 and second.quantiles[-1] == 19
    assert second.quantiles[128] == 10  # the median is the middle of 257


def test_chords_of_a_disc_and_of_a_ring():
    """The mean of lines through a disc is pi / 4 of its diameter; a ring's are cut in two."""
    x, y = np.mgrid[:200, :200] - 99.5
    disc = (np.hypot(x, y) < 80)[..., None].astype(np.uint8)
    ring = disc - (np.hypot(x, y) < 60)[..., None]
    image = np.ones((200, 200, 1, 1), np.float32)
    through_disc, through_ring = (
        measures.measure_case(image, label, (0.5, 0.5, 7), 2).structures[0].chord_mm
        for label in (disc, ring)
    )
    np.testing.assert_allclose(through_disc, (np.pi / 4 * 80, np.pi / 4 * 80, 7), rtol=0.01)
    # Lines: 160 in all, of which 120 enter twice.
    area = np.pi * (80**2 - 60**2)
    np.testing.assert_allclose(through_ring[:2], [0.5 * area / 280] * 2, rtol=0.01)


def test_values_that_no_class_has_are_no_foreground():
    image, label = make_case()
    label[label == 3] = 255
    case = measures.measure_case(image, label, (1, 1, 1), num_classes=3)
    assert case.intensities[0].count == 16 and len(case.structures) == 2
    assert case.background == 720 - 16 - 3


def test_a_case_without_label_and_an_image_of_zeros():
    case = measures.measure_case(np.zeros((4, 5, 6, 1), np.float32), None, (1, 1, 1), 3)
    assert case.cropped_shape == (4, 5, 6) and case.relative_size == 1
    assert case.intensities == case.structures == () and case.background == 0


def test_through_json_and_back():
    image, label = make_case()
    case = measures.measure_case(image, label, (1, 1, 1), num_classes=4)
    read = json.loads(measures.to_json({"a": case}, ["x", "x"]))
    assert measures.CaseMeasures.from_dict(read["cases"]["a"]) == case
    assert read["num_cases"] == 1 and [of["channel"] for of in read["intensities"]] == ["x", "x"]
    assert [of["mean"] for of in read["intensities"]] == [5, 10]
    with pytest.raises(KeyError):
        measures.CaseMeasures.from_dict({"shape": (1, 2, 3)})


def test_pooled_intensities_are_those_of_all_cases_which_count_alike():
    rng = np.random.default_rng(0)
    drawn = [rng.normal(mean, std, 20_000) for mean, std in ((0, 1), (5, 2), (100, 30))]
    cases = []
    for values in drawn:
        image = values.astype(np.float32).reshape(100, 100, 2, 1)
        label = np.ones((100, 100, 2), np.uint8)
        cases.append(measures.measure_case(image, label, (1, 1, 1), num_classes=2))
    # A case of a tenth of the voxels, but the same values, changes nothing.
    small = drawn[2][:2000].astype(np.float32).reshape(100, 10, 2, 1)
    everything = np.concatenate(drawn)
    found = measures.pooled(cases, 0)
    assert found["count"] == 60_000
    assert found["mean"] == pytest.approx(everything.mean(), rel=1e-5)
    assert found["std"] == pytest.approx(everything.std(), rel=1e-5)
    for name, percent in (("median", 50), ("percentile_00_5", 0.5), ("percentile_99_5", 99.5)):
        assert found[name] == pytest.approx(np.percentile(everything, percent), rel=0.02, abs=0.05)
    assert found["max"] == pytest.approx(everything.max(), rel=1e-6)
    cases[2] = measures.measure_case(small, np.ones((100, 10, 2)), (1, 1, 1), num_classes=2)
    assert measures.pooled(cases, 0)["mean"] == pytest.approx(everything.mean(), rel=0.02)


def test_nothing_labelled_pools_to_nothing():
    case = measures.measure_case(np.ones((4, 5, 6, 1), np.float32), None, (1, 1, 1), 3)
    assert measures.pooled([case], 0) == {}
