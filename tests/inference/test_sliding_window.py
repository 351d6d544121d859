import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import geometry
from jaxseg.inference import sliding_window
from jaxseg.inference.resampling import box_of, boxed, bucket

KERNEL = np.random.default_rng(3).normal(size=(3, 3, 3, 2, 4)).astype(np.float32)


def convolve(x, padding):
    """3 x 3 x 3 convolution of [B, X, Y, Z, 2] to 4 features."""
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, KERNEL, (1, 1, 1), padding, dimension_numbers=numbers)


def convolve_slices(x):
    """3 x 3 convolution within the slices of [B, Z, X, Y, 2]."""
    slices = x.reshape(-1, *x.shape[2:])
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(slices, KERNEL[1], (1, 1), "SAME", dimension_numbers=numbers)
    return y.reshape(*x.shape[:-1], -1)


def cut(array, shape):
    return np.asarray(array)[tuple(map(slice, shape))]


def predict(
    patch_fn,
    image,
    source,
    tiling,
    parts=1,
    strips=1,
    emit_fn=lambda maps: {"maps": maps},
    coarse=-1,
):
    """`predict_volume` of an unpadded image, its parts put together."""

    @jax.jit
    def run(box, size, target, index):
        return sliding_window.predict_volume(
            patch_fn,
            emit_fn,
            box,
            size,
            target,
            np.arange(3) == coarse,
            (index, parts),
            tiling=tiling,
            source_box=box_of(source),
            num_strips=strips,
        )

    pieces = []
    for index in range(parts):
        depth = source[0] * (index + 1) // parts - source[0] * index // parts
        outputs = run(boxed(image), np.int32(image.shape[:3]), np.int32(source), index)
        pieces.append({n: cut(v, (depth, *source[1:])) for n, v in outputs.items()})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def reference(patch_fn, image, source, tiling, coarse=-1):
    """The same as plain loops in float64: every tile into one array, blended, then resampled."""
    sizes, window = image.shape[:3], tiling.window
    starts = []
    for size, width, step in zip(sizes, window, tiling.step, strict=True):
        num_gaps = int(np.ceil(max(size - width, 0) / step))
        spread = np.floor(np.linspace(0, size - width, num_gaps + 1) + 0.5)
        starts.append(spread if size > width else [-np.ceil((width - size) / 2)])
    weights = np.ones(())
    for width in window:
        place = (np.arange(width) - (width - 1) / 2) / (width / 8)
        weights = weights[..., None] * np.exp(-0.5 * place**2)
    total, total_weight = 0.0, np.zeros(sizes)
    for corner in itertools.product(*starts):
        corner = np.array(corner, int)
        reach = list(zip(corner - tiling.margin, tiling.patch, sizes, strict=True))
        mode = "reflect" if tiling.mirrors else "constant"
        widths = [(max(-a, 0), max(a + p - n, 0)) for a, p, n in reach]
        padded = np.pad(image, [*widths, (0, 0)], mode=mode)
        patch = padded[tuple(slice(max(a, 0), max(a, 0) + p) for a, p, _ in reach)]
        maps = np.asarray(patch_fn(patch[None]), np.float64)[0]
        inside = tuple(
            slice(max(-a, 0), min(w, n - a)) for a, w, n in zip(corner, window, sizes, strict=True)
        )
        place = tuple(
            slice(max(a, 0), min(a + w, n)) for a, w, n in zip(corner, window, sizes, strict=True)
        )
        total = np.zeros((*sizes, maps.shape[-1])) if np.isscalar(total) else total
        total[place] += (weights[..., None] * maps)[inside]
        total_weight[place] += weights[inside]
    blended = total / total_weight[..., None]
    return geometry.resample_to_shape(blended, source, order=1, coarse=coarse)


def test_tile_starts_by_hand():
    def starts(size, window, step):
        values, number = sliding_window.tile_starts(size, window, step, 6)
        return np.asarray(values)[: int(number)].tolist()

    assert starts(16, 16, 8) == [0]
    assert starts(17, 16, 8) == [0, 1]
    assert starts(32, 16, 8) == [0, 8, 16]
    assert starts(31, 16, 8) == [0, 8, 15]
    assert starts(20, 8, 8) == [0, 6, 12]
    assert starts(11, 16, 8) == [-3]
    assert starts(12, 16, 8) == [-2]


@pytest.mark.parametrize(("size", "window", "step"), [(70, 16, 8), (9, 8, 4), (5, 8, 4), (9, 9, 9)])
def test_tile_weights_are_gaussians_that_sum_to_one(size, window, step):
    @jax.jit
    def starts_and_weights():
        starts, number = sliding_window.tile_starts(size, window, step, 20)
        return starts, number, sliding_window.tile_weights(starts, number, window)

    starts, number, weights = map(np.asarray, starts_and_weights())
    total = np.zeros(size)
    for start, row in zip(starts, weights[: int(number)], strict=False):
        for place in range(max(start, 0), min(start + window, size)):
            total[place] += row[place - start]
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert (weights[int(number) :] == 0).all()
    if number > 1:  # between two tiles: the ratio of two Gaussians of sd window / 8
        place = int(starts[1])
        distances = (np.array([place, 0]) - (window - 1) / 2) / (window / 8)
        near = [i for i in range(int(number)) if starts[i] <= place < starts[i] + window]
        if near == [0, 1]:
            first, second = np.exp(-0.5 * distances**2)
            np.testing.assert_allclose(weights[1, 0], second / (first + second), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_mirrored_is_numpy_reflection_for_both_kinds_of_array(size):
    expected = np.pad(np.arange(size), (9, 11), mode="reflect")
    place = np.arange(-9, size + 11)
    np.testing.assert_array_equal(geometry.mirrored(place, size), expected)
    np.testing.assert_array_equal(jax.jit(geometry.mirrored)(place, size), expected)


@pytest.mark.parametrize(
    ("size", "source", "patch", "margin", "batch", "parts", "strips"),
    [
        ((20, 31, 17), (20, 31, 17), (16, 16, 8), (0, 0, 0), 2, 1, 1),
        ((20, 31, 17), (33, 25, 40), (16, 16, 8), (0, 0, 0), 3, 3, 2),
        ((9, 70, 17), (5, 90, 40), (16, 12, 8), (0, 0, 0), 3, 2, 3),
        ((5, 6, 7), (5, 6, 7), (16, 12, 8), (0, 0, 0), 1, 1, 1),
        ((20, 31, 17), (33, 25, 40), (14, 10, 8), (1, 1, 1), 4, 2, 1),
        ((3, 2, 4), (3, 5, 4), (14, 10, 8), (1, 1, 1), 4, 1, 1),
        ((1, 130, 70), (1, 100, 64), (32, 16), (0, 0), 8, 1, 2),
        ((21, 30, 20), (33, 40, 15), (32, 16), (0, 0), 8, 2, 1),
    ],
)
def test_equals_plain_sliding_window(size, source, patch, margin, batch, parts, strips):
    image = np.random.default_rng(0).normal(size=(*size, 2)).astype(np.float32)
    tiling = sliding_window.create_tiling(patch, margin, batch, bucket(size[0]))
    patch_fn = functools.partial(convolve, padding="VALID" if any(margin) else "SAME")
    if len(patch) == 2:
        patch_fn = convolve_slices
    result = predict(patch_fn, image, source, tiling, parts, strips)["maps"]
    expected = reference(patch_fn, image, source, tiling)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("coarse", [0, 1, 2])
def test_along_a_coarse_axis_maps_are_not_interpolated(coarse):
    image = np.random.default_rng(0).normal(size=(20, 31, 17, 2)).astype(np.float32)
    tiling = sliding_window.create_tiling((16, 16, 8), (0, 0, 0), 3, 64)
    patch_fn = functools.partial(convolve, padding="SAME")
    for source in ((33, 25, 40), (7, 44, 13)):
        result = predict(patch_fn, image, source, tiling, parts=3, strips=2, coarse=coarse)["maps"]
        expected = reference(patch_fn, image, source, tiling, coarse)
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)
        apart = reference(patch_fn, image, source, tiling)
        assert np.abs(expected - apart).max() > 0.1


@pytest.mark.parametrize("size", [(40, 33, 26), (9, 11, 7), (17, 70, 5)])
def test_tiling_leaves_no_seam(size):
    """A network that sees one voxel around does not notice that it is tiled."""
    image = np.random.default_rng(0).normal(size=(*size, 2)).astype(np.float32)
    tiling = sliding_window.create_tiling((14, 12, 10), (1, 1, 1), 2, 64)
    tiled = predict(functools.partial(convolve, padding="VALID"), image, size, tiling)["maps"]
    whole = np.pad(image, [(1, 1)] * 3 + [(0, 0)], mode="reflect")
    np.testing.assert_allclose(tiled, convolve(whole[None], "VALID")[0], rtol=0, atol=1e-5)


def test_strips_and_parts_change_nothing_but_memory():
    image = np.random.default_rng(0).normal(size=(20, 70, 17, 2)).astype(np.float32)
    tiling = sliding_window.create_tiling((8, 12, 8), (0, 0, 0), 2, 64)
    patch_fn = functools.partial(convolve, padding="SAME")
    source = (25, 90, 30)
    whole = predict(patch_fn, image, source, tiling)["maps"]
    split = predict(patch_fn, image, source, tiling, parts=4, strips=5)["maps"]
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-5)


def test_what_is_emitted_is_a_function_of_blended_maps():
    image = np.random.default_rng(0).normal(size=(9, 10, 11, 2)).astype(np.float32)
    tiling = sliding_window.create_tiling((8, 8, 8), (0, 0, 0), 2, 64)

    def emit(maps):
        return {"maps": maps, "label": jnp.argmax(maps, -1).astype(jnp.uint8)}

    patch_fn = functools.partial(convolve, padding="SAME")
    outputs = predict(patch_fn, image, (12, 10, 9), tiling, emit_fn=emit)
    assert outputs["label"].dtype == np.uint8
    np.testing.assert_array_equal(outputs["label"], outputs["maps"].argmax(-1))


def test_slices_are_taken_as_many_at_a_time_as_the_batch_holds():
    assert sliding_window.create_tiling((32, 16), (0, 0), 8, 64).patch == (8, 32, 16)
    assert sliding_window.create_tiling((32, 16), (0, 0), 8, 64).batch_size == 1
    picture = sliding_window.create_tiling((32, 16), (4, 4), 8, 1)
    assert (picture.patch, picture.margin, picture.batch_size) == ((1, 32, 16), (0, 4, 4), 8)
    assert (picture.window, picture.step) == ((1, 24, 8), (1, 12, 4))


def test_strips_bound_the_buffer():
    tiling = sliding_window.create_tiling((64, 64, 64), (0, 0, 0), 1, 64)

    def patch_fn(patches):
        return jnp.concatenate([patches] * 20, axis=-1)

    def strips(buffer_bytes):
        box = (640, 512, 512)
        return sliding_window.num_strips_within(
            buffer_bytes, patch_fn, (640, 512, 512, 1), box, tiling
        )

    assert strips(65 * 512 * 512 * 20 * 4) == 1
    few = strips(65 * 512 * 512 * 20 * 4 - 1)
    width = sliding_window.strip_buffer_width(512, 512, 64, few)
    assert few > 1 and width * 65 * 512 * 20 * 4 < 65 * 512 * 512 * 20 * 4
    assert strips(1) == 16  # as little as it can


def test_a_strip_buffer_holds_all_tiles_that_a_strip_needs():
    rng = np.random.default_rng(0)
    for window in (4, 12, 12, 12, 40, 40):
        size, source = (int(n) for n in rng.integers(1, 300, 2))
        num_strips = int(rng.integers(1, 6))
        capacity, source_capacity = bucket(size), bucket(source)
        width = sliding_window.strip_buffer_width(capacity, source_capacity, window, num_strips)

        @jax.jit
        def tiles_over(*rows, size=size, window=window, capacity=capacity, source=source):
            step = max(window // 2, 1)
            axis = sliding_window._Axis(size, source, False, window, step, capacity)
            return axis.starts, axis.tiles_over(rows)

        for strip in range(num_strips):
            rows = source * strip // num_strips, source * (strip + 1) // num_strips
            if rows[0] < rows[1]:
                starts, (first, end) = tiles_over(*rows)
                assert starts[end - 1] + window - starts[first] <= width
