"""Bytes of image files, plain or gzip: read with one clear error, written whole or not at all."""

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxseg.problem import FileProblem, file_problem, printable
from jaxseg.run.writers import replacing

COPY_AGAIN = "copy it again from the source"
# What `opened` words.
STREAM_ERRORS = (OSError, EOFError, zlib.error)

_GZIP_MARK = b"\x1f\x8b"
_MOST_BYTES_PER_GZIP_BYTE = 1032  # what deflate can reach


def absence(path: str | Path) -> str:
    """What is where a file is not: nothing, a link to nothing, or a folder."""
    path = Path(path)
    if os.path.isdir(path):
        return "a folder"
    for on_the_way in (path, *path.parents):
        if os.path.islink(on_the_way) and not os.path.exists(on_the_way):
            link = f"a link to {printable(os.readlink(on_the_way))}, where nothing is"
            return link if on_the_way == path else f"missing, {printable(on_the_way)} is {link}"
    return "missing"


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[io.BufferedIOBase]:
    """Yields the bytes of a file as a stream, decompressed if they are gzip, whatever its name.

    Raises:
      FileProblem: The file is missing, cannot be read, or is a damaged gzip file; also where that
        shows only while the stream is read.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == _GZIP_MARK
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if packed else file as stream:
                yield stream
    except FileNotFoundError as error:
        raise file_problem(path, f"is {absence(path)}", "restore it or correct its name") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise file_problem(path, f"damaged gzip file ({error})", COPY_AGAIN) from error
    except OSError as error:
        raise file_problem(path, f"cannot be read ({error.strerror})", "check the disk") from error


def check_length(path: str | Path, stream: io.BufferedIOBase, num_expected: int) -> None:
    """Refuses a file that can not hold what its header says, before memory is asked for.

    Raises:
      FileProblem: `num_expected` bytes are more than there can be in the stream, of `opened`.
    """
    packed = isinstance(stream, gzip.GzipFile)
    if num_expected > os.path.getsize(path) * (_MOST_BYTES_PER_GZIP_BYTE if packed else 1):
        raise cut_short(path, stream, num_expected)


def cut_short(path: str | Path, stream: io.BufferedIOBase, num_expected: int) -> FileProblem:
    """Words that a stream ends too early."""
    num_held = stream.seek(0, io.SEEK_END)
    return file_problem(path, f"cut short, it holds {num_held} of {num_expected} bytes", COPY_AGAIN)


def refuse_missing(path: str | Path, others: Sequence[str]) -> None:
    """Raises FileProblem where a file that a header names for its voxels is not there."""
    for other in others:
        if not os.path.isfile(other):
            wrong = f"its data file {other} is missing"
            raise file_problem(path, wrong, "copy both from the source")


@contextlib.contextmanager
def naming_damage(
    path: str | Path, kind: str, *passed: type[Exception], said: Callable[[Exception], str] = str
) -> Iterator[None]:
    """Words whatever a library that decodes a file trips over: a damaged file leads to anything.

    Args:
      path, kind: of the file.
      *passed: what others word.
      said: function from an error to its text.
    Raises:
      FileProblem: The file can not be decoded.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (FileProblem, MemoryError, *passed)):
            raise
        wrong = f"not a readable {kind} file ({said(error)})"
        raise file_problem(path, wrong, COPY_AGAIN) from error


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[io.BufferedIOBase]:
    """Yields a file to write, gzip if named so, that takes the place of `path` once it is whole."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if not os.fspath(path).lower().endswith("gz"):
            yield file
            return
        # Without name and time, equal volumes make equal files.
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            yield packed
