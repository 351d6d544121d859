"""What the data of a run are, by their bytes: a SHA-256 that any change changes."""

import hashlib
import json
import os
import time

from jaxseg.data.cases import Case, Dataset
from jaxseg.data.formats import registry
from jaxseg.run import writers

# A file this young may change again without a new time of change.
SETTLED_S = 2.0


def digest_of_data(dataset: Dataset, cache_dir: str) -> tuple[str, dict[str, list[str]]]:
    """What the data are, whatever the names of their folders.

    The SHA-256 of each file is kept in `cache_dir`, so that only files that are new or changed are
    read. A file that can not be read counts as such: `verify` is what reports it.

    Returns:
      (sha256, digests): SHA-256 over case ids, file contents, class names, label values and
      modalities; and for each case the SHA-256 of its `files_of`.
    """
    digests_path = os.path.join(cache_dir, "digests.json")
    known = _known_digests(digests_path)
    found = dict(known)
    coding = dataset.coding
    meaning = repr((dataset.class_names, coding.values, dataset.modalities))
    if coding.ignore or (coding.values is None and not coding.objects):
        meaning += repr((coding.ignore, coding.objects))
    digest = hashlib.sha256(meaning.encode())
    digests = {}
    for case in (*dataset.cases, *dataset.unlabelled):
        digest.update(case.case_id.encode())
        of_files = [_file_digest(os.path.abspath(path), found) for path in files_of(case)]
        for of_file in of_files:
            digest.update(of_file)
        digests[case.case_id] = [of_file.hex() for of_file in of_files]
    if found != known:
        os.makedirs(cache_dir, exist_ok=True)
        writers.write_text(digests_path, json.dumps(found))
    return digest.hexdigest(), digests


def files_of(case: Case) -> list[str]:
    """All files that a case consists of, those that its headers name included."""
    return [file for path in case.paths for file in registry.files_of(path)]


def sha256_of(path: str) -> bytes:
    """SHA-256 of a file's bytes; raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _known_digests(path):
    """By file what it was and its SHA-256; nothing where that was lost."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return {
            name: entry
            for name, entry in content.items()
            if len(entry) == 4 and len(bytes.fromhex(entry[-1])) == hashlib.sha256().digest_size
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _file_digest(path, known):
    """SHA-256 of a file's bytes, from `known` or, when it is settled, added to it."""
    try:
        return _digest_of_readable(path, known)
    except OSError:
        return b"unreadable"


def _digest_of_readable(path, known):
    status = os.stat(path)
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if path in known and known[path][:-1] == state:
        return bytes.fromhex(known[path][-1])
    digest = sha256_of(path)
    if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S:
        known[path] = [*state, digest.hex()]
    return digest
