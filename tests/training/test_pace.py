"""Stretches of a timed training, against trainings of known speed."""

import itertools

import numpy as np
import pytest

from jaxseg.training.pace import Stretch, next_stretch, shares


def trained(seconds, step_s_at, num_steps=20):
    """Stretches of a training of so many seconds, and how long it took at the speeds given."""
    stretches, used, step_s = [Stretch(0, 5, 0.0, 0.005)], 0.0, None
    while True:
        before = used
        for _ in range(stretches[-1].num_steps):
            used += step_s_at(used)
        step_s = (used - before) / stretches[-1].num_steps
        last = stretches[-1]
        if last.end == 1.0:
            return stretches, used
        stretches.append(
            next_stretch(
                last.last_step,
                last.end,
                num_steps=num_steps,
                seconds_per_step=step_s,
                seconds_left=seconds - used,
            )
        )


@pytest.mark.parametrize(
    "step_s_at",
    [
        lambda used: 1.0,
        lambda used: 0.3,
        lambda used: 1.0 if used < 300 else 2.0,  # another job begins
        lambda used: 2.0 if used < 300 else 0.7,  # or ends
        lambda used: 1.0 + 0.5 * np.sin(used / 10),
    ],
)
def test_the_schedule_ends_with_the_time_whatever_happens_on_the_way(step_s_at):
    stretches, used = trained(600, step_s_at)
    assert used == pytest.approx(600, rel=0.05)
    for before, after in itertools.pairwise(stretches):
        assert after.first_step == before.last_step and after.begin == before.end < after.end


def test_at_constant_speed_the_share_of_the_schedule_is_that_of_the_time():
    stretches, _ = trained(1000, lambda used: 1.0)
    for stretch in stretches[1:]:
        assert stretch.end == pytest.approx(stretch.last_step / 1000, abs=0.006)


def test_the_last_stretch_by_hand():
    options = {"num_steps": 20, "seconds_per_step": 2.0}
    assert next_stretch(100, 0.5, seconds_left=100, **options) == Stretch(100, 20, 0.5, 0.7)
    assert next_stretch(100, 0.9, seconds_left=58, **options) == Stretch(100, 29, 0.9, 1.0)
    assert next_stretch(100, 0.9, seconds_left=22, **options) == Stretch(100, 11, 0.9, 1.0)
    assert next_stretch(100, 0.9, seconds_left=-7, **options) == Stretch(100, 10, 0.9, 1.0)


def test_shares_grow_evenly_from_the_begin_and_stay_before_the_end():
    np.testing.assert_allclose(shares(Stretch(40, 4, 0.2, 0.6)), [0.2, 0.3, 0.4, 0.5], rtol=1e-15)
