"""Files that are whole or absent, whatever happens while they are written: text, JSON, CSV."""

import contextlib
import csv
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError the name of the file where it has none, as when a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its text would be shown no more
            error.filename = error.filename or path
        raise


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yields a temporary name beside `path` that takes its place if nothing fails.

    No two processes share that name. It ends as `path` does, since a suffix can choose the format.
    An OSError that names the temporary file, or none, gets the name of `path`.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{socket.gethostname()}.{os.getpid()}.{name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, temporary):
            error.filename = os.fspath(path)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `json_ready` content, whole or not at all."""
    write_text(path, json.dumps(json_ready(content), indent=1))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a non-empty list of dicts with the same keys as CSV, whole or not at all."""
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def json_ready(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON can not hold, by None; numpy values by Python's."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
