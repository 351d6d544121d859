"""Prepared cases on disk: verified and preprocessed once per (data, preprocessing), then reused."""

import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time

import numpy as np
import tensorflow_datasets as tfds

from jaxseg import writers
from jaxseg.data import preprocess
from jaxseg.data.blocks import BlockedArray, RecordCache, block_boxes, block_shape
from jaxseg.data.verify import verify
from jaxseg.data.volumes import read_image, read_instances, read_label

# Blocks that were read are kept in memory up to this size.
CACHE_BYTES = 4 << 30
# Enough places per class to draw training patches from.
LOCATIONS_PER_CLASS = 4096
# Cases of a part, which is made whole or again; more where there would be too many parts to open.
CASES_PER_PART = 4
MAX_PARTS = 64
# Smaller data (as files) is prepared before other processes have started.
POOL_BYTES = 256 << 20
# Each holds some copies of a whole scan.
MAX_WORKERS = 8
# A file this young may change again without a new time of change.
SETTLED_S = 2.0


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """A case as the network sees it.

    The arrays are numpy's, or read on demand: sliced by a tuple of slices, one for each axis.

    Attributes:
      image: [X, Y, Z, C] float32, normalised, RAS+ grid of the plan's spacing.
      label: [X, Y, Z] uint8 class indices.
      locations: for each foreground class present, [N, 3] voxels of that class.
      weight: [X, Y, Z] float32, what each voxel counts in the loss; None means 1.
    """

    image: np.ndarray | BlockedArray
    label: np.ndarray | BlockedArray
    locations: tuple[np.ndarray, ...]
    weight: np.ndarray | BlockedArray | None = None


class CaseBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes preprocessed cases as ArrayRecord, in the order of the dataset.

    Split "cases" holds what is small of each case, split "blocks" the arrays of all cases. TFDS has
    one set of features for both: those of the other split hold a single zero.
    """

    VERSION = tfds.core.Version("2.0.0")

    def __init__(self, *, data_dir, dataset, plan, border_weight, shown_cases):
        self._dataset = dataset
        self._plan = plan
        self._border_weight = border_weight
        self._shown_cases = shown_cases
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        tensor = tfds.features.Tensor
        features = {
            "image": tensor(shape=(None,) * 4, dtype=np.float32, encoding="bytes"),
            "label": tensor(shape=(None,) * 3, dtype=np.uint8, encoding="zlib"),
            "shape": tensor(shape=(4,), dtype=np.int64),
            "block": tensor(shape=(3,), dtype=np.int64),
            "first_block": tensor(shape=(1,), dtype=np.int64),
            "num_locations": tensor(shape=(None,), dtype=np.int64),
            "locations": tensor(shape=(None, 3), dtype=np.int32, encoding="zlib"),
        }
        if self._border_weight:
            features["weight"] = tensor(shape=(None,) * 3, dtype=np.float32, encoding="zlib")
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        headers = []  # filled while the blocks are written, which comes first
        return {"blocks": self._generate_examples(headers), "cases": enumerate(headers)}

    def _log_download_bytes(self):
        """Nothing is downloaded, so TFDS's announcement would be untrue."""

    _log_download_done = _log_download_bytes

    def _generate_examples(self, headers):
        blank = {
            name: np.zeros([n or 1 for n in feature.shape], feature.np_dtype)
            for name, feature in self.info.features.items()
        }
        # TFDS sorts records by the leading bits of 128 in memory: one case at a time.
        keys = itertools.count(0, 2**128 // len(self._dataset.cases))
        num_blocks = 0
        for case, first_key in zip(self._shown_cases, keys, strict=False):
            arrays = self._preprocess(case)
            shape, label = arrays["image"].shape, arrays["label"]
            classes = np.unique(label)
            locations = [_locations(label == c) for c in classes[classes > 0]]
            block = block_shape(shape)
            headers.append(
                blank
                | {
                    "shape": np.array(shape),
                    "block": np.array(block),
                    "first_block": np.array([num_blocks]),
                    "num_locations": np.array([len(voxels) for voxels in locations], np.int64),
                    "locations": np.concatenate([np.empty((0, 3)), *locations]).astype(np.int32),
                }
            )
            for number, box in enumerate(block_boxes(shape[:3], block)):
                blocks = {name: np.ascontiguousarray(a[box]) for name, a in arrays.items()}
                yield first_key + number, blank | blocks
                num_blocks += 1

    def _preprocess(self, case):
        dataset, plan = self._dataset, self._plan
        image, affine = read_image(case.image_path)
        label, label_affine = read_label(case.label_path, dataset.label_values)
        num_classes = len(dataset.class_names)
        arrays = {
            "image": preprocess.preprocess_image(image, affine, plan)[0],
            "label": preprocess.preprocess_label(label, label_affine, plan, num_classes),
        }
        if self._border_weight:
            instances = preprocess.preprocess_instances(
                *read_instances(case.label_path, dataset.label_values), plan
            )
            arrays["weight"] = preprocess.border_weights(instances, **self._border_weight)
        return arrays


class CaseStore:
    """Random access to prepared cases by id, of which only what is asked for is read.

    Args:
      parts: dict from the folder of a part to the ids of its cases, in order.
    """

    def __init__(self, parts):
        self._places = {
            case_id: (folder, index)
            for folder, case_ids in parts.items()
            for index, case_id in enumerate(case_ids)
        }
        self._source = functools.cache(_open_split)
        self._records = RecordCache(self._read, CACHE_BYTES)

    def __getitem__(self, case_id):
        """Returns the PreparedCase of that id; its arrays are read when they are sliced."""
        folder, index = self._places[case_id]
        header = self._records[folder, "cases", index]
        shape, first_block = header["shape"].tolist(), int(header["first_block"][0])

        def array(name, shape, dtype):
            def read_block(number):
                return self._records[folder, "blocks", first_block + number][name]

            return BlockedArray(shape, dtype, header["block"].tolist(), read_block)

        return PreparedCase(
            image=array("image", shape, np.float32),
            label=array("label", shape[:3], np.uint8),
            locations=tuple(np.split(header["locations"], np.cumsum(header["num_locations"]))[:-1]),
            weight=array("weight", shape[:3], np.float32) if "weight" in header else None,
        )

    def _read(self, key):
        folder, split, index = key
        return self._source(folder, split)[index]


def prepare(
    dataset,
    plan_ids,
    *,
    cache_dir,
    border_weight=None,
    progress=lambda items, title: items,
    process_index=0,
    process_count=1,
    barrier=lambda name: None,
    **options,
):
    """Verifies and preprocesses a dataset, or finds that done.

    What was finished before an interruption is not done again. Several processes that share a file
    system share the work: the first verifies and plans, then each makes its share of the parts.

    Args:
      dataset: `jaxseg.data.cases.Dataset`.
      plan_ids: ids of the cases whose statistics make the plan.
      cache_dir: folder that holds one prepared set per fingerprint; local or mounted.
      border_weight: options of `preprocess.border_weights`, to store that map with each case.
      progress: function (iterable, title) -> iterable that shows progress.
      process_index, process_count: which of the processes this is.
      barrier: function (name) that returns when every process has called it.
      **options: `make_plan`'s own: spacing_mm, normalisation, image_order, label_order.
    Returns:
      (store, plan, fingerprint): CaseStore, Plan, and the SHA-256 of the data's bytes and names.
    Raises:
      DatasetProblems: lists every problem of every case; nothing is prepared then.
      OSError: nothing can be kept in `cache_dir`, or a process that prepares was killed.
    """
    cache_dir = local_folder(cache_dir)
    if process_index > 0:
        barrier("plan")  # until the first has read every file and made the plan
    fingerprint = data_fingerprint(dataset, cache_dir)
    wanted = repr((fingerprint, sorted(plan_ids), sorted(options.items()), CaseBuilder.VERSION))
    if border_weight:
        wanted += repr(sorted(border_weight.items()))
    folder = os.path.join(cache_dir, hashlib.sha256(wanted.encode()).hexdigest()[:16])
    plan_path = os.path.join(folder, "plan.json")
    if process_index == 0:
        if not os.path.exists(plan_path):
            verify(dataset, progress=functools.partial(progress, title="verifying"))
            chosen = [case for case in dataset.cases if case.case_id in set(plan_ids)]
            plan = preprocess.make_plan(
                progress(chosen, title="planning"),
                label_values=dataset.label_values,
                modalities=dataset.modalities,
                **options,
            )
            os.makedirs(folder, exist_ok=True)
            writers.write_text(plan_path, plan.to_json())
        barrier("plan")
    _check_shared([plan_path])
    with open(plan_path, encoding="utf-8") as file:
        plan = preprocess.Plan.from_json(file.read())

    parts = _cut(dataset, folder)
    own = [name for name in list(parts)[process_index::process_count] if not os.path.exists(name)]
    _make_parts(
        {name: parts[name] for name in own},
        functools.partial(_make_part, plan=plan, border_weight=border_weight),
        functools.partial(progress, title="preprocessing"),
        max(os.cpu_count() // process_count, 1),
    )
    barrier("parts")
    _check_shared(parts)
    store = CaseStore({name: [c.case_id for c in part.cases] for name, part in parts.items()})
    return store, plan, fingerprint


def local_folder(path):
    """The absolute form of the path of a folder that prepared cases can be kept in.

    ArrayRecord reads and writes through file descriptors, which object stores do not have.

    Raises:
      OSError: it is the address of an object store.
    """
    if "://" in path:
        raise OSError(
            f"{path}: prepared cases are read in small pieces, which needs a file system; set "
            "--config.data.cache_dir to a local folder (or one where the bucket is mounted)"
        )
    return os.path.abspath(os.path.expanduser(path))


def data_fingerprint(dataset, cache_dir):
    """SHA-256 over case ids, file contents, class names, label values and modalities.

    The SHA-256 of each file is kept in `cache_dir`, so that only files that are new or changed are
    read. A file that can not be read counts as such: `verify` is what reports it.
    """
    digests_path = os.path.join(cache_dir, "digests.json")
    known = {}
    if os.path.exists(digests_path):
        with open(digests_path, encoding="utf-8") as file:
            known = json.load(file)
    found = dict(known)
    digest = hashlib.sha256(
        repr((dataset.class_names, dataset.label_values, dataset.modalities)).encode()
    )
    for case in dataset.cases:
        digest.update(case.case_id.encode())
        for path in (case.image_path, case.label_path):
            try:
                digest.update(_file_digest(os.path.abspath(path), found))
            except OSError:
                digest.update(b"unreadable")
    if found != known:
        os.makedirs(cache_dir, exist_ok=True)
        writers.write_text(digests_path, json.dumps(found))
    return digest.hexdigest()


def _file_digest(path, known):
    """SHA-256 of a file's bytes, from `known` or, when it is settled, added to it."""
    status = os.stat(path)
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if path in known and known[path][:-1] == state:
        return bytes.fromhex(known[path][-1])
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S:
        known[path] = [*state, digest.hex()]
    return digest


def _check_shared(paths):
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise OSError(
            f"{missing[0]}: not there ({len(missing)} of {len(paths)} missing), though another "
            "process made it; set --config.data.cache_dir to a folder that all hosts share"
        )


def _cut(dataset, folder):
    """The parts of a dataset: dict from the folder of each to a Dataset of its cases."""
    size = max(CASES_PER_PART, -(-len(dataset.cases) // MAX_PARTS))
    starts = range(0, len(dataset.cases), size)
    return {
        os.path.join(folder, f"part-{index:03d}-of-{len(starts):03d}"): dataclasses.replace(
            dataset, cases=dataset.cases[start : start + size]
        )
        for index, start in enumerate(starts)
    }


def _make_parts(parts, make_part, progress, most_workers):
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
            for ear in multiprocessing.connection.wait(ears):
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


def _make_part(folder, part, shown_cases=None, *, plan, border_weight):
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


def _end_with_parent():
    """Lets this process end when its parent was killed, who can not tell it to."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _open_split(folder, split):
    [version_folder] = (
        os.path.join(folder, "case_builder", name)
        for name in os.listdir(os.path.join(folder, "case_builder"))
    )
    return tfds.builder_from_directory(version_folder).as_data_source(split=split)


def _locations(mask):
    voxels = np.flatnonzero(mask)
    if len(voxels) > LOCATIONS_PER_CLASS:
        # Not at a regular step, which would miss whole slices of a regular shape.
        voxels = np.random.default_rng(0).choice(voxels, LOCATIONS_PER_CLASS, replace=False)
    return np.stack(np.unravel_index(voxels, mask.shape), axis=-1)
