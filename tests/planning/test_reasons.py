"""A reason is true of the plan that it is given for, whoever decided it."""

import pytest

from jaxseg.planning.budget import NO_WISHES, Wishes
from jaxseg.planning.configurations import DatasetFacts, configurations_of
from jaxseg.planning.reasons import reasons_of


def reasons(name="3d_fullres", *, spacing_mm=(1, 1, 1), shape=(300, 300, 300), num=100, own=(),
            preset="nnunet", wishes=NO_WISHES):  # fmt: skip
    """By decision (value, reason)."""
    facts = DatasetFacts([spacing_mm] * num, [shape] * num, ["MRI"], 2, num, 1.0)
    made = configurations_of(facts, preset, wishes=wishes)[name]
    found = reasons_of(name, made, facts, preset, dict(own))
    return {what: (value, why) for what, value, why in found}


def test_the_batch_is_limited_by_what_limits_it():
    assert reasons(num=1000)["batch"][1].startswith("fills the budget of nnunet")
    small = {"shape": (64, 64, 64), "num": 50}
    value, why = reasons(**small)["batch"]
    assert (value, why) == ("2", "more than 5 % of all voxels in a step teach little")
    value, why = reasons(shape=(64, 64, 64), num=2)["batch"]  # of whose voxels 5 % are no patch
    assert (value, why) == ("2", "no step has fewer")
    large = Wishes(patch_size=(320, 320, 320))
    value, why = reasons(num=1000, wishes=large)["batch"]  # of which the budget holds not one
    assert (value, why) == ("2", "no step has fewer")


@pytest.mark.parametrize(
    ("decision", "field", "value"),
    [
        ("spacing", "preprocess.spacing_mm", (1.0, 1.0, 3.0)),
        ("axes", "preprocess.axes", (2, 0, 1)),
        ("patch", "data.patch_size", (96, 64, 32)),
        ("batch", "train.batch_size", 7),
        ("strides", "model.strides", ((2, 2, 1),)),
        ("kernels", "model.kernel_sizes", (5, 3)),
        ("features", "model.features", (4, 8)),
        ("dice", "loss.over_batch", True),
        ("channel MRI", "preprocess.normalisation", "ct"),
    ],
)
def test_what_the_user_has_set_is_said_to_be_and_nothing_else(decision, field, value):
    planned, obeyed = reasons(), reasons(own={field: value})
    assert obeyed[decision] == (str(value), "set by you")
    assert {what for what in planned if planned[what] != obeyed[what]} <= {decision, "strides"}
    assert not any(why == "set by you" for _, why in planned.values())


def test_a_patch_of_volumes_is_not_that_of_slices():
    own = {"data.patch_size": (96, 64, 32)}
    wishes = Wishes(patch_size=(96, 64, 32))
    assert reasons("2d", own=own, wishes=wishes) == reasons("2d")


def test_a_patch_shows_no_more_of_a_case_than_there_is():
    _, why = reasons(shape=(20, 18, 80), wishes=Wishes(patch_size=(40, 40, 40)))["patch"]
    assert why.endswith("50 % of the median case")
    assert reasons(shape=(20, 18, 8))["patch"][1] == "shows the whole median case"


def test_the_axis_that_kernels_do_not_look_along_is_named():
    value, why = reasons(spacing_mm=(5, 1, 1), shape=(20, 200, 150))["kernels"]
    assert value.startswith("331 331 333")
    assert why == "5 x coarser along x, where the first 2 stage(s) do not look"
    first = Wishes(axes=(0, 1, 2))
    value, why = reasons(spacing_mm=(5, 1, 1), shape=(20, 200, 150), wishes=first)["kernels"]
    assert value.startswith("133 133 333") and "along x, where the first 2" in why


def test_a_spacing_that_is_set_leaves_no_coarser_one():
    facts = DatasetFacts([[1, 1, 1]] * 9, [[512] * 3] * 9, ["MRI"], 2, 9, 1.0)
    assert "3d_lowres" in configurations_of(facts, "nnunet")
    made = configurations_of(facts, "nnunet", wishes=Wishes(spacing_mm=(1.0, 1.0, 1.0)))
    assert list(made) == ["3d_fullres", "2d"]
    assert made["3d_fullres"].batch_dice  # a patch still shows little of a case
