"""Arrays kept as blocks, so that a part of one is read without the rest."""

import collections
import itertools
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

# A patch should touch few voxels that it does not need, and not too many records. CPU time to read
# a 2D region of 230 x 230, and a 3D one of 100 x 100 x 100, on two cores: 5 and 22 ms; with blocks
# of 64 x 64 x 64 30 and 21, of 128 x 128 x 8 7 and 39, of 128 x 128 x 1 2 and 51.
BLOCK_VOXELS = 1 << 15
BLOCK_DEPTH = 8


def block_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Voxels of a block along each axis of a volume [X, Y, Z].

    Blocks are flat, for a network trained on slices of the third axis reads as little as one that
    is trained on boxes; an image [X, Y, 1] has one layer of blocks.
    """
    depth = min(shape[2], BLOCK_DEPTH)
    side = math.isqrt(BLOCK_VOXELS // depth)
    return side, side, depth


def block_boxes(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yields the tuple of slices of each block of a volume, in the order of their numbers."""
    for place in itertools.product(*map(range, _grid(shape, block))):
        yield tuple(
            slice(i * b, min((i + 1) * b, n)) for i, b, n in zip(place, block, shape, strict=True)
        )


class BlockedArray:
    """An array [X, Y, Z, ...] of which a box is read on demand: `array[2:8, :, 5:6]`.

    Args:
      shape, dtype: of the whole array.
      block: voxels of a block along each of the first three axes.
      read_block: function from the number of a block, in the order of `block_boxes`, to its values.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: DTypeLike,
        block: Sequence[int],
        read_block: Callable[[int], np.ndarray],
    ):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._block, self._read_block = block, read_block

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """The values in a box, a tuple of three slices without steps, as a new array."""
        spans = [s.indices(n)[:2] for s, n in zip(box, self.shape[:3], strict=True)]
        sizes = [max(stop - start, 0) for start, stop in spans]
        values = np.empty((*sizes, *self.shape[3:]), self.dtype)
        if not all(sizes):
            return values
        touched = [
            range(start // b, -(-stop // b))
            for (start, stop), b in zip(spans, self._block, strict=True)
        ]
        for place in itertools.product(*touched):
            source, target = [], []
            for i, b, (start, stop) in zip(place, self._block, spans, strict=True):
                low, high = max(start, i * b), min(stop, (i + 1) * b)
                source.append(slice(low - i * b, high - i * b))
                target.append(slice(low - start, high - start))
            number = np.ravel_multi_index(place, _grid(self.shape, self._block))
            values[tuple(target)] = self._read_block(int(number))[tuple(source)]
        return values


class RecordCache:
    """The records that were read last, up to a number of bytes; any thread may ask for one.

    Args:
      read: function from a key to a record, a dict of arrays.
      max_bytes: of the arrays that are kept.
    """

    def __init__(self, read: Callable[[Any], dict[str, np.ndarray]], max_bytes: int):
        self._read, self._max_bytes = read, max_bytes
        self._records: collections.OrderedDict[Hashable, dict[str, np.ndarray]] = (
            collections.OrderedDict()
        )
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __getitem__(self, key: Hashable) -> dict[str, np.ndarray]:
        with self._lock:
            if key in self._records:
                self._records.move_to_end(key)
                return self._records[key]
        record = self._read(key)  # not under the lock: others need not wait for it
        with self._lock:
            if key not in self._records:
                self._records[key] = record
                self._num_bytes += _num_bytes(record)
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= _num_bytes(self._records.popitem(last=False)[1])
        return record


def _grid(shape, block):
    return tuple(-(-n // b) for n, b in zip(shape[:3], block, strict=True))


def _num_bytes(record):
    return sum(array.nbytes for array in record.values())
