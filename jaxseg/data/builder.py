"""Preprocessed cases as ArrayRecord, through TFDS: written once, read block by block."""

import functools
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

from jaxseg.data import preprocess
from jaxseg.data.blocked_arrays import BlockedArray, RecordCache, block_boxes, block_shape
from jaxseg.data.border_weights import border_weights
from jaxseg.data.cases import Case, Dataset
from jaxseg.data.label_values import IGNORED
from jaxseg.data.prepared_case import PreparedCase
from jaxseg.data.reading import read_case_image, read_case_instances, read_case_label
from jaxseg.problem import file_problem

# Enough places per class to draw training patches from.
LOCATIONS_PER_CLASS = 4096


# Blocks that were read are kept in memory up to this size.
CACHE_BYTES = 4 << 30


class CaseStore:
    """Random access to prepared cases by id, of which only what is asked for is read.

    Args:
      parts: dict from the folder of a part to the ids of its cases, in order.
    Raises:
      OSError: On reading, a part is damaged since it was found whole; the message names it.
    """

    def __init__(self, parts: Mapping[str, Sequence[str]]):
        self._places = {
            case_id: (folder, index)
            for folder, case_ids in parts.items()
            for index, case_id in enumerate(case_ids)
        }
        self._source = functools.cache(open_split)
        self._records = RecordCache(self._read, CACHE_BYTES)

    def __getitem__(self, case_id: str) -> PreparedCase:
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
        try:
            return self._source(folder, split)[index]
        except Exception as error:  # TFDS lets through whatever a damaged file leads to
            raise OSError(
                f"{folder}: a prepared case can not be read ({type(error).__name__}); delete that "
                "folder and run the same command again, it is made from the scans"
            ) from error


class CaseBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes preprocessed cases in the order of the dataset.

    Split "cases" holds what is small of each case, split "blocks" the arrays of all cases. TFDS has
    one set of features for both: those of the other split hold a single zero.
    """

    VERSION = tfds.core.Version("2.0.0")

    def __init__(
        self,
        *,
        data_dir: str,
        dataset: Dataset,
        plan: preprocess.Plan,
        border_weight: Mapping[str, float] | None,
        shown_cases: Iterable[Case],
    ):
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
        if self._border_weight or self._dataset.coding.ignore:
            features["weight"] = tensor(shape=(None,) * 3, dtype=np.float32, encoding="zlib")
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        # Filled while the blocks are written, which comes first.
        headers: list[dict[str, np.ndarray]] = []
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
            try:
                arrays = self._preprocess(case)
            except MemoryError as error:
                wrong = f"takes more memory than there is ({error})"
                mend = "prepare with fewer CPU cores, or leave it out with --config.data.exclude"
                raise file_problem(case.image_path, wrong, mend) from error
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
        image, affine = read_case_image(dataset, case)
        label = read_case_label(dataset, case)
        num_classes = len(dataset.class_names)
        box = preprocess.kept_box(image, affine, plan)
        label = preprocess.preprocess_label(label, affine, plan, num_classes, box)
        arrays = {
            "image": preprocess.preprocess_image(image, affine, plan)[0],
            "label": label,
        }
        if self._border_weight:
            instances = read_case_instances(dataset, case)
            instances = preprocess.preprocess_instances(instances, affine, plan, box)
            arrays["weight"] = border_weights(instances, **self._border_weight)
        if dataset.coding.ignore:
            weight = arrays.get("weight", np.ones(label.shape, np.float32))
            arrays["weight"] = np.where(label == IGNORED, np.float32(0), weight)
            arrays["label"] = np.where(label == IGNORED, np.uint8(0), label)
        return arrays


def open_split(folder: str, split: str) -> Sequence[dict[str, np.ndarray]]:
    """The records of a split, "cases" or "blocks", in the folder that a CaseBuilder wrote to."""
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
