"""The parts in which cases are prepared: each whole or absent, made here or by other processes."""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping

import tensorflow_datasets as tfds

from jaxseg.data import workers
from jaxseg.data.builder import CaseBuilder, open_split
from jaxseg.data.cases import Case, Dataset
from jaxseg.data.digests import files_of, sha256_of
from jaxseg.data.preprocess import Plan
from jaxseg.problem import Problem
from jaxseg.run import writers

# Cases of a part, which is made whole or again; more where there would be too many parts to open.
CASES_PER_PART = 4
MAX_PARTS = 64
# What ArrayRecord writes at once: with less space, that is why it failed.
_LITTLE_SPACE = 1 << 20
# Says of each file of a part what it is to be.
MANIFEST = "files.json"


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
    paths = [path for case in cases for path in files_of(case)]
    num_workers = workers.workers_for(paths, len(parts), most_workers)
    if num_workers == 1:
        for folder, part in parts.items():
            make_part(folder, part, itertools.islice(shown_cases, len(part.cases)))
    else:
        next(shown_cases)  # starts the clock of progress: the first cases are being prepared
        make = functools.partial(_make_one, make_part)
        purpose = f"prepare cases in {os.path.dirname(next(iter(parts)))}"
        items = list(parts.items())
        for _, count in workers.in_processes(make, items, num_workers, purpose=purpose):
            next(itertools.islice(shown_cases, count, None), None)
    next(shown_cases, None)  # so that progress knows it is over


def _make_one(make_part, part):
    return make_part(*part)


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
        if is_whole(folder):
            return len(list(shown_cases))
        for remains in (folder, unfinished):  # damaged; of a process that was killed
            shutil.rmtree(remains, ignore_errors=True)
        tfds.disable_progress_bar()
        builder = CaseBuilder(
            data_dir=unfinished,
            dataset=part,
            plan=plan,
            border_weight=border_weight,
            shown_cases=shown_cases,
        )
        with _blaming(os.path.dirname(folder)):
            builder.download_and_prepare(file_format="array_record")
            writers.write_json(os.path.join(unfinished, MANIFEST), _contents(unfinished))
            os.rename(unfinished, folder)
    return len(part.cases)


def is_whole(folder: str) -> bool:
    """Whether a part is there, every byte as it was written.

    Its files are read only where their size or time differs from what the manifest says. A part of
    version 0.1 has no manifest; it is whole if it can be opened.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.isdir(folder):
        return False
    try:
        if not os.path.exists(path):
            return all(len(open_split(folder, split)) >= 0 for split in ("cases", "blocks"))
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        return bool(manifest) and all(
            _is_as_written(os.path.join(folder, name), entry) for name, entry in manifest.items()
        )
    except Exception:  # whatever a damaged file leads to, the part is made again
        return False


def _contents(folder):
    """For each file below a folder its size, its time and its SHA-256."""
    contents = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            status = os.stat(path)
            contents[os.path.relpath(path, folder)] = [
                status.st_size,
                status.st_mtime_ns,
                sha256_of(path).hex(),
            ]
    return contents


def _is_as_written(path, entry):
    size, time, digest = entry
    status = os.stat(path)
    if status.st_size != size:
        return False
    return status.st_mtime_ns == time or sha256_of(path).hex() == digest


@contextlib.contextmanager
def _blaming(cache_dir):
    """Names the folder where cases can not be kept: TFDS lets through what its libraries raise."""
    try:
        yield
    except (Problem, MemoryError):
        raise
    except Exception as error:
        is_full = shutil.disk_usage(cache_dir).free < _LITTLE_SPACE or "No space" in str(error)
        if not isinstance(error, OSError) and not is_full:
            raise
        raise OSError(
            f"{cache_dir}: prepared cases can not be kept there ({_first_line(error)}); free space "
            "on its disk, or set --config.data.cache_dir to another folder"
        ) from error


def _first_line(error):
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
