import concurrent.futures
import itertools

import numpy as np
import pytest

from jaxseg.data import blocked_arrays


def blocked(values, block, read=None):
    """`values` cut into blocks; the numbers of those that are read are appended to `read`."""
    pieces = [values[box].copy() for box in blocked_arrays.block_boxes(values.shape[:3], block)]

    def read_block(number):
        if read is not None:
            read.append(number)
        return pieces[number]

    return blocked_arrays.BlockedArray(values.shape, values.dtype, block, read_block)


@pytest.mark.parametrize("trailing", [(), (2,)])
@pytest.mark.parametrize(
    ("shape", "block"), [((7, 5, 4), (3, 2, 4)), ((6, 4, 1), (3, 4, 1)), ((2, 3, 2), (9, 9, 9))]
)
def test_every_box_is_what_numpy_gives(shape, block, trailing):
    values = np.random.default_rng(0).normal(size=(*shape, *trailing)).astype(np.float32)
    array = blocked(values, block)
    assert array.shape == values.shape and array.dtype == values.dtype
    spans = [list(itertools.combinations_with_replacement(range(n + 1), 2)) for n in shape]
    for starts_stops in itertools.product(*spans):
        box = tuple(slice(*span) for span in starts_stops)
        np.testing.assert_array_equal(array[box], values[box])
    for box in itertools.product([slice(None), slice(-2, None), slice(1, 99)], repeat=3):
        np.testing.assert_array_equal(array[box], values[box])


def test_what_is_read_is_the_callers_own():
    values = np.zeros((4, 4, 4))
    array = blocked(values, (2, 2, 2))
    array[:, :, :][...] = 1
    assert not array[:, :, :].any()


def test_only_blocks_that_a_box_touches_are_read():
    read = []
    array = blocked(np.zeros((6, 6, 6)), (2, 3, 3), read)  # 3 x 2 x 2 blocks
    array[2:4, 2:4, 3:4]
    assert read == [5, 7]
    read.clear()
    array[1:2, 0:0, :]
    assert read == []


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((512, 512, 600), (64, 64, 8)),
        ((512, 512, 2), (128, 128, 2)),
        ((1024, 1024, 1), (181, 181, 1)),
    ],
)
def test_blocks_are_flat_and_of_about_one_size(shape, block):
    assert blocked_arrays.block_shape(shape) == block


def arrays_of(size):
    return {"image": np.zeros(size, np.uint8), "label": np.zeros(0, np.uint8)}


def test_the_records_read_last_are_kept():
    read = []

    def load(key):
        read.append(key)
        return arrays_of(10)

    cache = blocked_arrays.RecordCache(load, 30)
    for key in "abcab":
        cache[key]
    assert read == ["a", "b", "c"]
    cache["d"]  # drops c, which was not asked for since
    cache["a"], cache["b"], cache["d"]
    assert read == ["a", "b", "c", "d"]
    cache["c"]
    assert read == ["a", "b", "c", "d", "c"]


def test_a_record_larger_than_the_cache_is_returned_and_nothing_is_kept():
    cache = blocked_arrays.RecordCache(arrays_of, 30)
    assert cache[31]["image"].size == 31
    assert cache._num_bytes == 0 and not cache._records
    cache[20], cache[15]
    assert list(cache._records) == [15] and cache._num_bytes == 15


def test_many_threads_share_a_cache():
    def load(key):
        return {"image": np.full(100, key, np.int64)}

    cache = blocked_arrays.RecordCache(load, 8 * 100 * 5)

    def use(seed):
        keys = np.random.default_rng(seed).integers(0, 12, 400).tolist()
        return all((cache[key]["image"] == key).all() for key in keys)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))
    kept = sum(record["image"].nbytes for record in cache._records.values())
    assert kept == cache._num_bytes <= 8 * 100 * 5
