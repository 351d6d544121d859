"""The parts in which cases are prepared: each whole or absent, made here or by other processes."""

import dataclasses
import fcntl
import itertools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping

import tensorflow_datasets as tfds

from jaxseg.data.builder import CaseBuilder
from jaxseg.data.cases import Case, Dataset
from jaxseg.data.preprocess import Plan

# Cases of a part, which is made whole or again; more where there would be too many parts to open.
CASES_PER_PART = 4
MAX_PARTS = 64
# Smaller data (as files) is prepared before other processes have started.
POOL_BYTES = 256 << 20
# Each holds some copies of a whole scan.
MAX_WORKERS = 8


def cut(dataset: Dataset, folder: str) -> dict[str, Dataset]:
    """The parts of a dataset: dict from the folder of each to a Dataset of its cases."""
    size = max(CASES_PER_PART, -(-len(dataset.cases) // MAX_PARTS))
    starts = range(0, len(dataset.cases), size)
    return {
        os.path.join(folder, f"part-{index:03d}-of-{len(starts):03d}"): dataclasses.replace(
            dataset, cases=dataset.cases[start : start + size]
        )
        for index, start in enumerate(starts)
    }


def make_parts(
    parts: Mapping[str, Dataset],
    make_part: Callable[..., int],
    progress: Callable[[Iterable[Case]], Iterable[Case]],
    most_workers: int,
) -> None:
    """Makes parts, one after the other or, where that is worth it, in several processes."""
    if not parts:
        return
    cases = [case for part in parts.values() for case in part.cases]
    shown_cases = iter(progress(cases))
    num_workers = min(most_workers, len(parts), MAX_WORKERS)
    paths = [path for case in cases for path in (case.image_path, case.label_path)]
    if num_workers == 1 or sum(map(os.path.getsize, paths)) < POOL_BYTES:
        for folder, part in parts.items():
            make_part(folder, part, itertools.islice(shown_cases, len(part.cases)))
    else:
        next(shown_cases)  # starts the clock of progress: the first cases are being prepared
        for count in _made_by_workers(parts, make_part, num_workers):
            next(itertools.islice(shown_cases, count, None), None)
    next(shown_cases, None)  # so that progress knows it is over


def make_part(
    folder: str,
    part: Dataset,
    shown_cases: Iterable[Case] | None = None,
    *,
    plan: Plan,
    border_weight: Mapping[str, float] | None,
) -> int:
    """Makes a part, complete when its folder is there; returns its number of cases."""
    shown_cases = part.cases if shown_cases is None else shown_cases
    unfinished = folder + ".unfinished"
    with open(folder + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # while another run makes the same part
        if os.path.exists(folder):
            return len(list(shown_cases))
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        tfds.disable_progress_bar()
        builder = CaseBuilder(
            data_dir=unfinished,
            dataset=part,
            plan=plan,
            border_weight=border_weight,
            shown_cases=shown_cases,
        )
        builder.download_and_prepare(file_format="array_record")
        os.rename(unfinished, folder)
    return len(part.cases)


def _made_by_workers(parts, make_part, num_workers):
    """Lets processes make a share of the parts each; yields the number of cases of every part.

    Each has a pipe of its own, so that one that is killed holds no lock that others wait for.
    """
    context = multiprocessing.get_context("spawn")
    workers, ears = [], []
    try:
        for index in range(num_workers):
            ear, mouth = context.Pipe(duplex=False)
            share = dict(list(parts.items())[index::num_workers])
            worker = context.Process(target=_make_share, args=(share, make_part, mouth))
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
                        f"{os.path.dirname(next(iter(parts)))}: one of {num_workers} processes "
                        "that prepare cases was killed, most likely for want of memory; run the "
                        "same command to go on with the parts that are left, with fewer CPU cores "
                        "if it happens again"
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


def _make_share(share, make_part, mouth):
    """What a worker does: tells the number of cases of each part, then None, or what went wrong."""
    _end_with_parent()
    try:
        for folder, part in share.items():
            mouth.send(make_part(folder, part))
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
