"""What was found when a dataset was read, kept so that it is read once."""

import hashlib
import os
from collections.abc import Callable, Iterable

from jaxseg.data import verify
from jaxseg.data.cases import Case, Dataset
from jaxseg.data.digests import digest_of_data
from jaxseg.run import writers


def survey_once(
    dataset: Dataset,
    *,
    cache_dir: str,
    strict: bool = False,
    progress: Callable[..., Iterable[Case]] = lambda items, title: items,
    process_index: int = 0,
    barrier: Callable[[str], None] = lambda name: None,
) -> tuple[verify.Survey, str, dict[str, list[str]]]:
    """Verifies a dataset, or finds that done; of several processes the first does it.

    Args:
      dataset: as it was found.
      cache_dir: folder that keeps what is known of data by its digest.
      strict: of `verify`.
      progress: function (iterable, title) -> iterable that shows progress.
      process_index: which of the processes this is.
      barrier: function (name) that returns when every process has called it.
    Returns:
      (survey, sha256, digests): of `verify` and `digest_of_data`.
    Raises:
      DatasetProblems: of `verify`.
      OSError: nothing can be kept in `cache_dir`.
    """
    if process_index > 0:
        barrier("survey")
    sha256, digests = digest_of_data(dataset, cache_dir)
    known_by = hashlib.sha256(repr((sha256, dataset.spacing_from, strict)).encode())
    path = os.path.join(cache_dir, "verified", f"{known_by.hexdigest()[:16]}.json")
    survey = _read(path, dataset)
    if survey is None:
        survey = verify.verify(dataset, lambda cases: progress(cases, title="verifying"), strict)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        writers.write_text(path, verify.to_json(survey))
    if process_index == 0:
        barrier("survey")
    return survey, sha256, digests


def _read(path, dataset):
    """The survey that was kept, None where it is missing or damaged."""
    everyone = {case.case_id for case in (*dataset.cases, *dataset.unlabelled)}
    try:
        with open(path, encoding="utf-8") as file:
            survey = verify.from_json(file.read())
        return survey if survey.keys() == everyone else None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # missing or damaged
        return None
