"""Work on many files that several processes share."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Fewer bytes (as files) are read before other processes have started.
POOL_BYTES = 256 << 20
# Each holds some copies of a whole scan.
MAX_WORKERS = 8


def workers_for(paths: Iterable[str], num_items: int, most_workers: int) -> int:
    """How many processes are worth it.

    Args:
      paths: files that are read.
      num_items: that they can share.
      most_workers: that there may be.
    """
    num_workers = max(min(most_workers, num_items, MAX_WORKERS), 1)
    if num_workers > 1 and sum(map(os.path.getsize, paths)) < POOL_BYTES:
        return 1
    return num_workers


def in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    *,
    purpose: str,
) -> Iterator[tuple[int, Result]]:
    """Lets processes do a share of the items each; yields (index, result), whichever is done.

    Each has a pipe of its own, so that one that is killed holds no lock that others wait for.

    Args:
      function: that can be pickled.
      items: to call it with, likewise.
      num_workers: how many processes.
      purpose: what they do, for the message if one is killed.
    Raises:
      OSError: one was killed.
      Exception: what `function` raised.
    """
    context = multiprocessing.get_context("spawn")
    workers, ears = [], []
    try:
        for first in range(num_workers):
            ear, mouth = context.Pipe(duplex=False)
            share = list(enumerate(items))[first::num_workers]
            worker = context.Process(target=_do_share, args=(share, function, mouth))
            worker.start()
            mouth.close()
            workers.append(worker)
            ears.append(ear)
        while ears:
            ready = multiprocessing.connection.wait(ears)
            for ear in [ear for ear in ears if ear in ready]:
                try:
                    told = ear.recv()
                except (EOFError, ConnectionResetError):
                    raise OSError(
                        f"one of {num_workers} processes that {purpose} was killed, most likely "
                        "for want of memory; run the same command to go on with what is left, "
                        "with fewer CPU cores if it happens again"
                    ) from None
                if isinstance(told, Exception):
                    raise told
                if told is None:
                    ears.remove(ear)
                else:
                    yield told
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _do_share(share: Sequence[tuple[int, Any]], function: Callable[[Any], Any], mouth: Any) -> None:
    """What a worker does: tells each result, then None, or what went wrong."""
    _end_with_parent()
    try:
        for index, item in share:
            mouth.send((index, function(item)))
        mouth.send(None)
    except Exception as error:
        mouth.send(error)


def _end_with_parent():
    """Lets this process end when its parent was killed, who can not tell it to."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # it was spawned

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
