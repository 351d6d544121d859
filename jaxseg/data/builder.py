"""Prepared cases on disk: verified and preprocessed once per (data, preprocessing), then reused."""

import dataclasses
import functools
import hashlib
import os

import numpy as np
import tensorflow_datasets as tfds

from jaxseg import writers
from jaxseg.data import preprocess
from jaxseg.data.verify import verify
from jaxseg.data.volumes import read_image, read_instances, read_label

# Decoded cases are kept in memory up to this size; beyond it the least recently used is read again.
CACHE_BYTES = 4 << 30
# Enough places per class to draw training patches from.
LOCATIONS_PER_CLASS = 4096


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """A case as the network sees it.

    Attributes:
      image: [X, Y, Z, C] float32, normalised, RAS+ grid of the plan's spacing.
      label: [X, Y, Z] uint8 class indices.
      locations: for each foreground class present, [N, 3] voxels of that class.
      weight: [X, Y, Z] float32, what each voxel counts in the loss; None means 1.
    """

    image: np.ndarray
    label: np.ndarray
    locations: tuple[np.ndarray, ...]
    weight: np.ndarray | None = None


class CaseBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes preprocessed cases as ArrayRecord, in the order of the dataset.

    TFDS writes to a temporary folder and renames it when complete, so an interrupted preparation is
    never mistaken for a finished one.
    """

    VERSION = tfds.core.Version("1.3.0")

    def __init__(self, *, data_dir, border_weight=None, dataset=None, plan=None, progress=iter):
        self._border_weight = border_weight
        self._dataset = dataset
        self._plan = plan
        self._progress = progress
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(None,) * 4, dtype=np.float32, encoding="bytes"),
            "label": tfds.features.Tensor(shape=(None,) * 3, dtype=np.uint8, encoding="zlib"),
        }
        if self._border_weight:
            features["weight"] = tfds.features.Tensor(
                shape=(None,) * 3, dtype=np.float32, encoding="zlib"
            )
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"cases": self._generate_examples()}

    def _log_download_bytes(self):
        """Nothing is downloaded, so TFDS's announcement would be untrue."""

    _log_download_done = _log_download_bytes

    def _generate_examples(self):
        dataset = self._dataset
        for index, case in enumerate(self._progress(dataset.cases)):
            image, affine = read_image(case.image_path)
            label, label_affine = read_label(case.label_path, dataset.label_values)
            prepared, _ = preprocess.preprocess_image(image, affine, self._plan)
            record = {
                "image": prepared,
                "label": preprocess.preprocess_label(
                    label, label_affine, self._plan, len(dataset.class_names)
                ),
            }
            if self._border_weight:
                instances = preprocess.preprocess_instances(
                    *read_instances(case.label_path, dataset.label_values), self._plan
                )
                record["weight"] = preprocess.border_weights(instances, **self._border_weight)
            yield index, record


class CaseStore:
    """Random access to prepared cases by id."""

    def __init__(self, builder, case_ids):
        self._source = builder.as_data_source(split="cases")
        self._index = {case_id: index for index, case_id in enumerate(case_ids)}
        num_cached = CACHE_BYTES * len(case_ids) // max(builder.info.dataset_size, 1)
        self._load = functools.lru_cache(maxsize=max(num_cached, 1))(self._read)

    def __getitem__(self, case_id):
        """Returns the PreparedCase of that id."""
        return self._load(self._index[case_id])

    def _read(self, index):
        record = self._source[index]
        label = record["label"]
        present = np.unique(label)
        return PreparedCase(
            image=record["image"],
            label=label,
            locations=tuple(_locations(label == c) for c in present[present > 0]),
            weight=record.get("weight"),
        )


def prepare(
    dataset,
    train_ids,
    *,
    cache_dir,
    border_weight=None,
    progress=lambda items, title: items,
    **options,
):
    """Verifies and preprocesses a dataset, or finds that done.

    Args:
      dataset: `jaxseg.data.cases.Dataset`.
      train_ids: ids of the training cases, whose statistics make the plan.
      cache_dir: folder that holds one prepared set per fingerprint.
      border_weight: options of `preprocess.border_weights`, to store that map with each case.
      progress: function (iterable, title) -> iterable that shows progress.
      **options: `make_plan`'s own: spacing_mm, normalisation, image_order, label_order.
    Returns:
      (store, plan, fingerprint): CaseStore, Plan, and the SHA-256 of the data's bytes and names.
    Raises:
      DatasetProblems: lists every problem of every case; nothing is stored then.
    """
    fingerprint = data_fingerprint(dataset)
    wanted = repr((fingerprint, sorted(train_ids), sorted(options.items()), CaseBuilder.VERSION))
    if border_weight:
        wanted += repr(sorted(border_weight.items()))
    folder = os.path.join(cache_dir, hashlib.sha256(wanted.encode()).hexdigest()[:16])
    plan_path = os.path.join(folder, "plan.json")
    case_ids = [case.case_id for case in dataset.cases]

    if os.path.exists(plan_path):  # written last: everything before it is complete
        builder = CaseBuilder(data_dir=folder, border_weight=border_weight)
        if "cases" in builder.info.splits:  # unless someone removed the cases since
            with open(plan_path, encoding="utf-8") as file:
                plan = preprocess.Plan.from_json(file.read())
            return CaseStore(builder, case_ids), plan, fingerprint

    verify(dataset, progress=functools.partial(progress, title="verifying"))
    train_cases = [case for case in dataset.cases if case.case_id in set(train_ids)]
    plan = preprocess.make_plan(
        progress(train_cases, title="planning"),
        label_values=dataset.label_values,
        modalities=dataset.modalities,
        **options,
    )
    builder = CaseBuilder(
        data_dir=folder,
        border_weight=border_weight,
        dataset=dataset,
        plan=plan,
        progress=functools.partial(progress, title="preprocessing"),
    )
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format="array_record")
    writers.write_text(plan_path, plan.to_json())
    return CaseStore(builder, case_ids), plan, fingerprint


def data_fingerprint(dataset):
    """SHA-256 over case ids, file contents, class names, label values and modalities.

    A file that can not be read counts as such: `verify` is what reports it.
    """
    digest = hashlib.sha256(
        repr((dataset.class_names, dataset.label_values, dataset.modalities)).encode()
    )
    for case in dataset.cases:
        digest.update(case.case_id.encode())
        for path in (case.image_path, case.label_path):
            try:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError:
                digest.update(b"unreadable")
    return digest.hexdigest()


def _locations(mask):
    voxels = np.flatnonzero(mask)
    if len(voxels) > LOCATIONS_PER_CLASS:
        # Not at a regular step, which would miss whole slices of a regular shape.
        voxels = np.random.default_rng(0).choice(voxels, LOCATIONS_PER_CLASS, replace=False)
    return np.stack(np.unravel_index(voxels, mask.shape), axis=-1)
