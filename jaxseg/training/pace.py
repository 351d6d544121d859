"""A training whose length is a time: how far it is, decided for some steps after the other.

How many steps a time holds is not known before it is over, so that neither is the learning rate as
a function of the step. Decided for a stretch of steps when it begins, and recorded, it is: a replay
follows the record to the bit.
"""

from typing import NamedTuple

import numpy as np

# Of the steps that a stretch should have, those that are few enough to be added to the one before,
# and those that the last has at least, so that the learning rate falls gently even out of time.
_RESTS, _AT_LEAST = 0.5, 0.5


class Stretch(NamedTuple):
    """Steps of a training over which it comes from one share of its schedule to another.

    Attributes:
      first_step: number of updates done before it.
      num_steps: of it.
      begin, end: share of the schedule that is done before and after it, in [0, 1].
    """

    first_step: int
    num_steps: int
    begin: float
    end: float

    @property
    def last_step(self) -> int:
        """Number of updates done after it."""
        return self.first_step + self.num_steps


def next_stretch(
    first_step: int, begin: float, *, num_steps: int, seconds_per_step: float, seconds_left: float
) -> Stretch:
    """The stretch that follows, so that the schedule ends when the time does.

    Args:
      first_step, begin: of the stretch.
      num_steps: that it should have; the last has half of them to half more than them.
      seconds_per_step: as measured.
      seconds_left: of training, negative if it is late.
    """
    steps_left = seconds_left / seconds_per_step
    if steps_left < (1 + _RESTS) * num_steps:
        last = max(round(steps_left), round(_AT_LEAST * num_steps), 1)
        return Stretch(first_step, last, begin, 1.0)
    return Stretch(first_step, num_steps, begin, begin + (1 - begin) * num_steps / steps_left)


def shares(stretch: Stretch) -> np.ndarray:
    """Share of the schedule that is done before each step of a stretch, [num_steps] float64."""
    steps = np.arange(stretch.num_steps) / stretch.num_steps
    return stretch.begin + (stretch.end - stretch.begin) * steps
