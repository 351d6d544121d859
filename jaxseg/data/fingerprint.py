"""What the data of a run are, by their bytes: a SHA-256 that any change changes."""

import hashlib
import json
import os
import time

from jaxseg.data.cases import Dataset
from jaxseg.run import writers

# A file this young may change again without a new time of change.
SETTLED_S = 2.0


def data_fingerprint(dataset: Dataset, cache_dir: str) -> str:
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
