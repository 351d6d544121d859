"""Whether a scan fits into memory, asked of its header before it is read."""

import contextlib
import math
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Arrays of a scan's size that are held at once while it is read, resampled and normalised.
_COPIES = 3


def available_bytes() -> float:
    """Memory that this process can still have; infinite where the system does not say."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                found.append(1024.0 * int(line.split()[1]))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError, IndexError):
            used_pages = int(Path("/proc/self/statm").read_text().split()[0])
            found.append(limit - float(used_pages * os.sysconf("SC_PAGE_SIZE")))
    with contextlib.suppress(OSError, ValueError):
        most = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(most - float(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(min(found), 0.0)


def bytes_to_prepare(shape: Sequence[int], new_shape: Sequence[int], num_channels: int) -> int:
    """Memory that a scan takes while it is brought from one grid to another, as float32."""
    voxels = math.prod(map(int, shape)) + math.prod(map(int, new_shape))
    return _COPIES * 4 * num_channels * voxels


def how_often(num_bytes: float) -> int:
    """How many times so many bytes are there, at most a thousand."""
    return int(min(available_bytes() / max(num_bytes, 1), 1000))


def grid_too_large(
    shape: Sequence[int],
    spacing_mm: Sequence[float] | np.ndarray,
    new_shape: Sequence[int],
    num_channels: int,
) -> str:
    """What is wrong with a scan becoming one on another grid, "" where memory holds both."""
    wrong = too_large(bytes_to_prepare(shape, new_shape, num_channels))
    spacing = " x ".join(f"{mm:.4g}" for mm in spacing_mm)
    became = f"{list(shape)} voxels of {spacing} mm become {list(new_shape)}"
    return f"{became}, which {wrong}" if wrong else ""


def too_large(num_bytes: float) -> str:
    """What is wrong with needing so many bytes, "" if they are there."""
    there = available_bytes()
    if num_bytes <= there:
        return ""
    needed, there = num_bytes / 2**30, there / 2**30
    return f"takes some {needed:.3g} GiB of memory, of which {there:.3g} are there"
