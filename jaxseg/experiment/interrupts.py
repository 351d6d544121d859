"""SIGTERM and Ctrl-C as a request to stop after the current step, heard by all processes alike."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Set by the first SIGTERM or Ctrl-C; calling it with a step gives the signal's number or 0."""

    signal = 0

    def __call__(self, step: int) -> int:
        return self.signal

    def set(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.default_int_handler)  # a second one does not wait


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], int]]:
    """Turns SIGTERM and Ctrl-C into a request to stop after the current step.

    Yields:
      Function from a step to the number of the signal because of which to stop there, or 0. Of
      several processes, which must agree on the step, it is JAX that hears SIGTERM.
    """
    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of no use to JAX after the last step
        return
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread alone
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, stop.set) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
