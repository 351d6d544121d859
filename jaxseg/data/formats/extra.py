"""Readers that are not installed with jaxseg, and how to get them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxseg.problem import file_problem


@contextlib.contextmanager
def needing_extra(path: str | Path) -> Iterator[None]:
    """Names the extra that reads a file where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        wrong = f"{error.name} is needed for this format and is not installed"
        raise file_problem(path, wrong, "pip install 'jaxseg[formats]'") from error
