"""What a user can mend. Commands show such an error as one message, without a traceback."""

import os
from pathlib import Path


class Problem(Exception):
    """Something is wrong that is no fault of the program; the message says what and how to mend it.

    Every room has its own, which derive from this one.
    """


class FileProblem(Problem, ValueError):
    """One file cannot be used; the message names it, says what is wrong and how to mend it."""


def printable(path: str | os.PathLike[str]) -> str:
    """A path with signs of its name that are not UTF-8 replaced, which can not be written."""
    return os.fsencode(path).decode("utf-8", "replace")


def file_problem(path: str | Path, wrong: str, mend: str) -> FileProblem:
    """Words a FileProblem."""
    return FileProblem(f"{path}: {wrong}; {mend}")
