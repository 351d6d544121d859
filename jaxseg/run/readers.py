"""What a run has written in its folder, read again: right, or refused by name with the mend."""

import glob
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from jaxseg.problem import file_problem

Content = TypeVar("Content")

# Of files without which a run can do.
_MENDS = {
    "identity.json": "delete it, which forgets what earlier starts were computed with",
    "metrics.jsonl": "delete it, which forgets the learning curves so far",
    "trace.jsonl": "delete it, after which the steps so far can not be reproduced",
    "split.json": "delete it, data.json says the same",
    "predictor.json": "run the command of its training again, which makes it anew",
}


def read_file(workdir: str | Path, name: str, parse: Callable[[str], Content]) -> Content:
    """What a file of a run says.

    Args:
      workdir: the run's folder.
      name: of the file in it.
      parse: function of its text; whatever it raises is the damage.
    Raises:
      FileProblem: the file is missing or damaged.
    """
    path = os.path.join(workdir, name)
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read())
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise _problem(workdir, name, error) from error


def read_rows(
    workdir: str | Path, name: str, check: Callable[[dict[str, Any]], object]
) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without a last line that a crash cut.

    Args:
      workdir, name: as for `read_file`.
      check: function of a row; whatever it raises is the damage.
    Raises:
      FileProblem: the file is missing, or one of its lines is damaged.
    """

    def parse(text):
        return [_row(n, line, check) for n, line in enumerate(text.split("\n")[:-1], start=1)]

    return read_file(workdir, name, parse)


def json_object(text: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The object in a JSON text, which has these keys; raises ValueError or RecursionError."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    if missing := sorted(set(keys) - set(content)):
        raise ValueError(f"it has no {missing[0]!r}")
    return content


def _row(number, line, check):
    try:
        row = json_object(line, ("step",))
        if not isinstance(row["step"], int):
            raise ValueError(f"its step is {row['step']!r}")
        check(row)
    except Exception as error:
        raise ValueError(f"line {number}: {_worded(error)}") from error
    return row


def _worded(error):
    if isinstance(error, OSError):
        return error.strerror
    return str(error) if isinstance(error, ValueError) else repr(error)


def _problem(workdir, name, error):
    path = os.path.join(workdir, name)
    copies = glob.glob(os.path.join(glob.escape(workdir), "checkpoints/[0-9]*", Path(name).stem))
    if name in _MENDS and os.path.exists(path):
        mend = f"bring back a copy, or {_MENDS[name]}"
    elif copies:
        newest = max(copies, key=lambda copy: (len(copy), copy))
        mend = f"{newest}/metadata is a copy, put it there"
    else:
        mend = "bring back a copy, or give the folder of a run that has it"
    return file_problem(path, f"can not be read ({_worded(error)})", mend)
