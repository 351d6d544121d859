import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxseg.config import base_config, transforms_of
from jaxseg.data import blocked_arrays
from jaxseg.data.builder import CaseStore
from jaxseg.data.layouts import decathlon
from jaxseg.data.pipeline import train_batches
from jaxseg.data.prepared import prepare
from jaxseg.data.prepared_case import PreparedCase
from jaxseg.data.regions import num_around_foreground, sample_region
from jaxseg.data.surveyed import survey_once
from jaxseg.inference import sliding_window
from jaxseg.training.augment import region_size

OFF = transforms_of(base_config())
for options in OFF.values():
    options["prob"] = 0.0
ON = {name: dict(options) for name, options in OFF.items()}
for name in ("rotation", "flip", "noise"):
    ON[name]["prob"] = 0.5


def make_case(label, image=None):
    """A case whose image holds, in its channels, the coordinates of each voxel counted from 1."""
    label = np.asarray(label, np.uint8)
    if image is None:
        image = np.moveaxis(np.indices(label.shape), 0, -1) + 1
    return PreparedCase(
        image=np.asarray(image, np.float32),
        label=label,
        locations=tuple(np.argwhere(label == c) for c in np.unique(label[label > 0])),
    )


def random_case(shape, seed=0, num_classes=3):
    return make_case(np.random.default_rng(seed).integers(0, num_classes, shape))


def make_store(num_cases=5, shape=(14, 13, 4)):
    """Cases of noise, each about its own number."""
    store = {}
    for index in range(num_cases):
        rng = np.random.default_rng(index)
        image = index + rng.uniform(-0.2, 0.2, (*shape, 1))
        label = rng.integers(0, 3, shape)
        store[f"case_{index}"] = make_case(label, image)
    return store


def batches(store, **changes):
    options = {
        "seed": 0,
        "start_step": 0,
        "num_steps": 4,
        "batch_size": 4,
        "patch_size": (8, 8),
        "num_channels": 1,
        "foreground_fraction": 0.5,
        "augment_params": ON,
    }
    case_ids = changes.pop("case_ids", None) or list(store)
    return list(train_batches(store, case_ids, **options | changes))


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "valid"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def concatenated(batches_of):
    return {name: np.concatenate([batch[name] for batch in batches_of]) for name in batches_of[0]}


@pytest.mark.parametrize("patch_size", [(8, 8), (8, 6, 4)])
def test_a_batch_does_not_depend_on_the_step_one_starts_at(patch_size):
    store = make_store()
    params = ON
    if len(patch_size) == 2:  # everything, once
        params = transforms_of(base_config())
        params["elastic"]["prob"] = 0.3
    options = {"patch_size": patch_size, "augment_params": params}
    every = batches(store, **options)
    assert len(every) == 4
    assert_equal(batches(store, start_step=3, **options), every[3:])
    assert batches(store, start_step=4, **options) == []
    assert_equal(batches(store, **options), every)
    for batch in every:
        assert batch["image"].shape == (4, *patch_size, 1) and batch["image"].dtype == np.float32
        assert batch["label"].shape == (4, *patch_size) and batch["label"].dtype == np.int32
        assert batch["valid"].shape == (4, *patch_size) and batch["valid"].dtype == np.float32
    images = concatenated(every)["image"]
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.parametrize(
    ("batch_size", "fraction", "expected"),
    [(2, 0.33, 1), (3, 0.33, 1), (5, 0.33, 2), (12, 0.33, 4), (4, 0.0, 0), (4, 1.0, 4)],
)
def test_as_many_patches_show_foreground_as_in_nnunet(batch_size, fraction, expected):
    # Those at places of at least round(batch_size * (1 - fraction)).
    assert num_around_foreground(batch_size, fraction) == expected


def test_the_last_patches_of_a_batch_show_foreground():
    label = np.zeros((40, 40, 1), np.uint8)
    label[31, 7] = 1
    store = {"a": make_case(label, np.zeros((*label.shape, 1)))}
    options = {"foreground_by_place": True, "augment_params": OFF, "patch_size": (4, 4)}
    shown = [batch["label"].any((1, 2)) for batch in batches(store, num_steps=9, **options)]
    assert np.mean([places[2:] for places in shown]) == 1
    assert np.mean([places[:2] for places in shown]) < 0.2
    halves = [
        batches(store, num_steps=9, process_index=i, process_count=2, **options) for i in range(2)
    ]
    joined = [concatenated(pair) for pair in zip(*halves, strict=True)]
    assert_equal(joined, batches(store, num_steps=9, **options))


def test_parts_of_two_processes_are_the_batch_of_one():
    store = make_store()
    parts = [batches(store, process_index=i, process_count=2) for i in range(2)]
    assert_equal([concatenated(pair) for pair in zip(*parts, strict=True)], batches(store))


def test_an_example_does_not_depend_on_the_batch_size():
    store = make_store()
    small, large = batches(store, num_steps=4), batches(store, num_steps=2, batch_size=8)
    assert_equal([concatenated(small)], [concatenated(large)])


def test_the_order_in_which_cases_are_named_does_not_matter():
    store = make_store()
    assert_equal(batches(store, case_ids=sorted(store, reverse=True)), batches(store))


def test_another_seed_is_another_run():
    store = make_store()
    images = [batches(store, seed=seed)[0]["image"] for seed in (0, 1, 2**31 - 1)]
    for a, b in itertools.combinations(images, 2):
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("num_cases", [1, 2, 7])
def test_every_case_is_seen_once_per_epoch(num_cases):
    store = make_store(num_cases)
    options = {"patch_size": (6, 6), "augment_params": OFF, "num_steps": 7}
    images = concatenated(batches(store, **options))["image"]
    epochs = np.rint(images.mean((1, 2, 3))).astype(int).reshape(-1, num_cases)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(num_cases)] * len(epochs))
    if num_cases == 7:
        assert len(np.unique(epochs, axis=0)) > 1  # in an order of its own


def test_cases_named_are_the_only_ones_read():
    store = make_store(4)
    del store["case_2"]
    options = {"augment_params": OFF, "patch_size": (6, 6)}
    images = concatenated(batches(store, case_ids=["case_1", "case_3"], **options))["image"]
    assert set(np.rint(images.mean((1, 2, 3)))) == {1, 3}


def test_without_augmentation_patches_are_pieces_of_slices():
    store = {"a": random_case((12, 11, 5))}
    options = {"patch_size": (5, 4), "augment_params": OFF, "num_channels": 3}
    batch = concatenated(batches(store, **options))
    assert (batch["valid"] == 1).all()
    slices = set()
    for image, label in zip(batch["image"], batch["label"], strict=True):
        x, y, z = (image - 1).astype(int).transpose(2, 0, 1)
        np.testing.assert_array_equal(x, x[0, 0] + np.arange(5)[:, None] + np.zeros((1, 4)))
        np.testing.assert_array_equal(y, y[0, 0] + np.arange(4)[None] + np.zeros((5, 1)))
        assert np.ptp(z) == 0
        np.testing.assert_array_equal(label, store["a"].label[x, y, z])
        slices.add(z[0, 0])
    assert len(slices) > 2


def centre(region, patch_size):
    crop = [slice((r - p) // 2, (r - p) // 2 + p) for r, p in zip(region, patch_size, strict=True)]
    return tuple(crop)


@pytest.mark.parametrize(
    ("shape", "patch_size", "region"),
    [
        ((20, 17, 6), (8, 7), (14, 11)),
        ((20, 17, 9), (8, 7, 4), (12, 13, 8)),
        ((5, 17, 6), (8, 7), (12, 9)),  # narrower than the patch
        ((5, 6, 3), (8, 9, 4), (10, 11, 8)),  # smaller all round
        ((10, 9, 3), (8, 7), (30, 31)),  # the region is larger than the scan
        ((8, 7, 3), (8, 7), (8, 7)),
    ],
)
@pytest.mark.parametrize("foreground_fraction", [0.0, 1.0])
def test_a_region_shows_the_scan_where_it_is_valid_and_zeros_elsewhere(
    shape, patch_size, region, foreground_fraction
):
    case = random_case(shape)
    rank = len(patch_size)
    rng = np.random.default_rng(1)
    for _ in range(30):
        image, label, valid = sample_region(case, rng, region, patch_size, foreground_fraction)
        assert image.shape == (*region, 3) and label.shape == valid.shape == region
        assert (image.dtype, label.dtype, valid.dtype) == (np.float32, np.int32, np.float32)
        assert not image[valid == 0].any() and not label[valid == 0].any()

        voxels = (image[valid == 1] - 1).astype(int)
        np.testing.assert_array_equal(label[valid == 1], case.label[tuple(voxels.T)])
        start = voxels[:, :rank] - np.argwhere(valid == 1)
        assert (start == start[0]).all()
        start = start[0]
        # Whatever of the scan lies within the region is there.
        shown = [
            min(s + r, n) - max(s, 0) for s, r, n in zip(start, region, shape[:rank], strict=True)
        ]
        assert valid.sum() == np.prod(shown)

        patch_start = start + (np.array(region) - patch_size) // 2
        for position, size, patch in zip(patch_start, shape, patch_size, strict=False):
            if size > patch:
                assert 0 <= position <= size - patch
            else:
                before = -position
                assert before - (patch - size - before) in (0, 1)  # centred


@pytest.mark.parametrize("patch_size", [(6, 5), (6, 5, 3)])
def test_a_foreground_patch_holds_foreground(patch_size):
    label = np.zeros((21, 19, 9))
    for voxel in [(0, 0, 0), (20, 18, 8), (10, 18, 4), (0, 7, 8)]:
        label[voxel] = 1
    case = make_case(label)
    region = tuple(p + 6 for p in patch_size)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        image, label, valid = sample_region(case, rng, region, patch_size, 1.0)
        crop = centre(region, patch_size)
        assert valid[crop].all()
        found = image[crop][label[crop] == 1]
        assert len(found) == 1
        seen.add(tuple(found[0]))
    assert len(seen) == 4


def test_all_classes_that_are_present_are_equally_likely():
    label = np.zeros((30, 30, 5))
    label[:20] = 1  # 3000 voxels
    label[25:27, 3] = 4  # 10 voxels
    label[29, 29, 4] = 2  # a single one
    case = make_case(label)
    rng = np.random.default_rng(0)
    drawn = [int(sample_region(case, rng, (1, 1), (1, 1), 1.0)[1].item()) for _ in range(3000)]
    counts = np.bincount(drawn, minlength=5)
    assert counts[0] == counts[3] == 0
    # Standard deviation of each count: sqrt(3000 * 1/3 * 2/3) = 26.
    np.testing.assert_allclose(counts[[1, 2, 4]], 1000, atol=5 * 26)


@pytest.mark.parametrize("foreground_fraction, expected", [(0.0, 0.2), (0.25, 0.4), (1.0, 1.0)])
def test_foreground_is_oversampled_as_often_as_asked(foreground_fraction, expected):
    label = np.zeros((10, 10, 10))
    label[:, :, :2] = 1
    case = make_case(label)
    rng = np.random.default_rng(0)
    draws = [sample_region(case, rng, (1, 1), (1, 1), foreground_fraction) for _ in range(2000)]
    share = np.mean([label.item() for _, label, _ in draws])
    # f + (1 - f) * 0.2; standard deviation at most sqrt(0.25 / 2000) = 0.011.
    assert share == pytest.approx(expected, abs=5 * 0.011)


def test_every_voxel_of_a_slice_and_every_slice_can_be_seen():
    case = random_case((9, 8, 4))
    rng = np.random.default_rng(0)
    seen = np.zeros((9, 8, 4), int)
    for _ in range(300):
        image, _, _ = sample_region(case, rng, (4, 4), (4, 4), 0.0)
        np.add.at(seen, tuple((image.reshape(-1, 3) - 1).astype(int).T), 1)
    assert seen.min() > 0


def test_a_case_without_foreground_is_drawn_anywhere():
    case = make_case(np.zeros((6, 6, 3)))
    image, label, valid = sample_region(case, np.random.default_rng(0), (8, 8), (4, 4), 1.0)
    assert image.any() and not label.any() and valid[2:6, 2:6].all()


def seen_in_inference(image, patch_size, margin):
    """The one patch that whole-volume prediction makes of a small case."""
    order = (2, 0, 1) if len(patch_size) == 2 else (0, 1, 2)
    image = image.transpose(*order, 3)
    tiling = sliding_window.create_tiling(patch_size, margin, 1, image.shape[0])
    captured = []

    def patch_fn(patches):
        jax.debug.callback(lambda seen: captured.append(np.asarray(seen)), patches)
        return jnp.zeros((1, *tiling.window, 2))

    size = np.int32(image.shape[:3])

    @jax.jit
    def predict(image):
        return sliding_window.predict_volume(
            patch_fn,
            lambda maps: {"maps": maps},
            image,
            size,
            size,
            np.zeros(3, bool),
            (0, 1),
            tiling=tiling,
            source_box=image.shape[:3],
            num_strips=1,
        )

    jax.block_until_ready(predict(image))
    jax.effects_barrier()
    (patches,) = captured
    return patches[0, 0] if len(patch_size) == 2 else patches[0]


@pytest.mark.parametrize("margin", [(0, 0, 0), (2, 1, 1), (0, 3, 0)])
@pytest.mark.parametrize("patch_size", [(9, 8), (8, 9), (9, 8, 7), (8, 9, 6)])
@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 1), (1, 1, 1)])
def test_a_small_case_is_padded_in_training_as_in_inference(shape, patch_size, margin):
    margin = margin[: len(patch_size)]
    case = random_case(shape)
    expected = seen_in_inference(case.image, patch_size, margin)
    inside = np.zeros(patch_size, np.float32)
    start = [-(-(p - n) // 2) for p, n in zip(patch_size, shape, strict=False)]
    inside[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=False))] = 1
    params = transforms_of(base_config(rank=len(patch_size)))
    for region in (patch_size, region_size(patch_size, params)):
        rng = np.random.default_rng(0)
        image, _, valid = sample_region(case, rng, region, patch_size, 0.5, margin=margin)
        np.testing.assert_array_equal(image[centre(region, patch_size)], expected)
        np.testing.assert_array_equal(valid[centre(region, patch_size)], inside)

    options = {"patch_size": patch_size, "batch_size": 1, "margin": margin}
    off = {"augment_params": OFF, "num_channels": 3} | options
    (batch,) = batches({"a": case}, num_steps=1, **off)
    np.testing.assert_array_equal(batch["image"][0], expected)


@pytest.mark.parametrize(
    ("shape", "patch_size", "margin"),
    [
        ((20, 17, 3), (12, 10), (3, 2)),
        ((9, 1, 3), (20, 10), (3, 2)),
        ((12, 9, 7), (8, 6, 6), (2,) * 3),
    ],
)
def test_with_a_margin_the_labelled_window_stays_inside_and_the_image_is_mirrored(
    shape, patch_size, margin
):
    case = random_case(shape)
    region = tuple(p + 6 for p in patch_size)
    rank = len(patch_size)
    rng = np.random.default_rng(0)
    for _ in range(20):
        image, label, valid = sample_region(case, rng, region, patch_size, 0.5, margin=margin)
        # Channels name voxels: one that is valid tells where the region starts in the scan.
        voxels = (image[valid == 1] - 1).astype(int)
        start = (voxels[:, :rank] - np.argwhere(valid == 1))[0]
        positions = [s + np.arange(r) for s, r in zip(start, region, strict=True)]
        mirrored = [
            ndimage.map_coordinates(np.arange(n), [at], order=0, mode="mirror")
            for at, n in zip(positions, shape, strict=False)
        ]
        z = voxels[0, 2] if rank == 2 else slice(None)
        np.testing.assert_array_equal(image, case.image[:, :, z][np.ix_(*mirrored)])
        inside = [(at >= 0) & (at < n) for at, n in zip(positions, shape, strict=False)]
        np.testing.assert_array_equal(valid, functools.reduce(np.multiply.outer, inside))
        known = case.label[:, :, z][np.ix_(*mirrored)]
        np.testing.assert_array_equal(label, np.where(valid == 1, known, 0))
        for axis, (patch, edge) in enumerate(zip(patch_size, margin, strict=True)):
            window = inside[axis][3 + edge : 3 + patch - edge]
            assert window.sum() == min(shape[axis], patch - 2 * edge)
            before, after = window.argmax(), window[::-1].argmax()
            assert before - after in (0, 1)  # centred where the scan is smaller


def test_all_of_the_scan_can_be_in_the_labelled_window():
    case = make_case(np.ones((9, 5, 1)))
    seen = np.zeros((9, 5), bool)
    for seed in range(200):
        image, _, valid = sample_region(
            case, np.random.default_rng(seed), (7, 7), (7, 7), 0, margin=(2, 2)
        )
        window = image[2:5, 2:5][valid[2:5, 2:5] > 0].astype(int) - 1
        seen[window[:, 0], window[:, 1]] = True
    assert seen.all()


def test_the_weight_of_a_case_becomes_valid():
    case = make_case(np.ones((6, 5, 2)))
    weight = np.random.default_rng(0).uniform(1, 9, (6, 5, 2)).astype(np.float32)
    case = dataclasses.replace(case, weight=weight)
    image, _, valid = sample_region(case, np.random.default_rng(0), (8, 9), (8, 9), 0.5)
    z = int(image[..., 2].max()) - 1
    expected = np.zeros((8, 9), np.float32)
    expected[1:7, 2:7] = weight[:, :, z]
    np.testing.assert_array_equal(valid, expected)


def test_weights_pass_augmentation_unchanged_in_value():
    store = make_store(1)
    weight = np.random.default_rng(0).choice([1.5, 2.5, 9.5], (14, 13, 4)).astype(np.float32)
    store = {name: dataclasses.replace(case, weight=weight) for name, case in store.items()}
    (batch, *_) = batches(store)
    assert {1.5, 2.5, 9.5} <= set(np.unique(batch["valid"])) <= {0, 1.5, 2.5, 9.5}


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def stores(request, tmp_path, make_msd_folder, monkeypatch):
    """The same cases as blocks on disk and as arrays in memory."""
    monkeypatch.setattr(blocked_arrays, "BLOCK_VOXELS", 5 * 5 * 3)
    monkeypatch.setattr(blocked_arrays, "BLOCK_DEPTH", 3)  # of cases [20, 18, 8]: 4 x 4 x 3 blocks
    dataset = decathlon.find(make_msd_folder(num_cases=3))
    survey, sha256, _ = survey_once(dataset, cache_dir=str(tmp_path))
    on_disk, _ = prepare(
        dataset,
        ["case_00"],
        survey=survey,
        sha256=sha256,
        cache_dir=str(tmp_path),
        border_weight={"w0": 10.0, "sigma": 5.0} if request.param else None,
        spacing_mm=(),
        normalisation="zscore",
        crop=False,
        image_order=1,
        label_order=1,
    )

    def read_whole(case):
        label = case.label[:, :, :]
        return PreparedCase(
            image=case.image[:, :, :],
            label=label,
            locations=tuple(np.argwhere(label == c) for c in (1, 2)),
            weight=case.weight[:, :, :] if request.param else None,
        )

    return on_disk, {case.case_id: read_whole(on_disk[case.case_id]) for case in dataset.cases}


@pytest.mark.parametrize(
    ("patch_size", "margin"),
    [((8, 8), ()), ((8, 6, 4), ()), ((12, 10), (3, 2)), ((12, 10, 8), (2, 3, 2)), ((30, 24), ())],
)
def test_a_region_of_blocks_on_disk_is_that_of_arrays_in_memory(stores, patch_size, margin):
    region = tuple(size + 6 for size in patch_size)
    for seed, case_id in itertools.product(range(10), stores[1]):
        on_disk, in_memory = (
            sample_region(
                store[case_id],
                np.random.default_rng(seed),
                region,
                patch_size,
                0.5,
                margin=margin,
            )
            for store in stores
        )
        for a, b in zip(on_disk, in_memory, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_a_block_that_can_not_be_read_ends_in_the_name_of_its_part(stores, tmp_path):
    (part,) = (path for path in tmp_path.rglob("part-*") if path.is_dir())
    unread = CaseStore({str(part): list(stores[1])})  # which keeps nothing in memory yet
    for path in part.rglob("*blocks*array_record*"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(OSError, match=r"part-000-of-001: a prepared case can not be read .*delete"):
        batches(unread, case_ids=list(stores[1]))


def test_batches_of_blocks_on_disk_are_those_of_arrays_in_memory(stores):
    on_disk, in_memory = (batches(store, case_ids=list(stores[1])) for store in stores)
    assert_equal(on_disk, in_memory)


def test_regions_are_those_that_the_host_would_augment():
    store = make_store()
    cut = batches(store, augment_params=OFF)
    regions = batches(store, augment_params=OFF, augments=False, start_step=2)
    for step, (region, batch) in enumerate(zip(regions, cut[2:], strict=True), start=2):
        assert region["label"].dtype == np.uint8
        assert region["example"].dtype == np.int32
        assert region["example"].tolist() == [[4 * step + place] for place in range(4)]
        for name in ("image", "label", "valid"):
            np.testing.assert_array_equal(region[name], batch[name])
    larger = next(iter(batches(store, augments=False)))
    assert larger["image"].shape == (4, *region_size((8, 8), ON), 1)
