"""What a user can mend. Commands show such an error as one message, without a traceback."""

import os
import re
from collections.abc import Iterable
from pathlib import Path


class Problem(Exception):
    """Something is wrong that is no fault of the program; the message says what and how to mend it.

    Every room has its own, which derive from this one.
    """


class FileProblem(Problem, ValueError):
    """One file cannot be used; the message names it, says what is wrong and how to mend it."""


def printable(path: str | os.PathLike[str]) -> str:
    """A path, or what is said of it, with signs of its name that are not UTF-8 replaced."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", os.fspath(path))


def name_problems(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """One sentence for each path that can not be written into a file."""
    return [
        f"{printable(path)}: its name is not UTF-8; rename it"
        for path in paths
        if printable(path) != os.fspath(path)
    ]


def file_problem(path: str | Path, wrong: str, mend: str) -> FileProblem:
    """Words a FileProblem."""
    return FileProblem(f"{path}: {wrong}; {mend}")
