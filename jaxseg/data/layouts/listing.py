"""What a folder holds: JSON files that describe it, the files that they name, and others."""

import codecs
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxseg.data.formats.files import absence
from jaxseg.problem import printable

# Of files that nothing lists, so many are named.
_MAX_NAMED = 5


def load_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file, or None; appends what is wrong to `problems`, as do others."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.append(
            f"{path}: cannot be read ({error.strerror}); give the folder that holds {path.name}"
        )
        return None
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: not valid JSON ({error}); correct it there")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path}: holds a {type(content).__name__}, not an object; correct it")
        return None
    return content


def _object(pairs):
    """The object of these pairs, of which JSON's reader would silently keep the last of a key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return content


def numbered_names(
    path: Path, content: dict[str, Any], key: str, problems: list[str]
) -> dict[int, str]:
    """The object under `key` as a dict from int to name, in order of the ints."""
    names = content.get(key)
    example = '{"0": "name", "1": "name"}'
    if not isinstance(names, dict) or not names:
        problems.append(f'{path}: "{key}" is missing or empty; write {example}')
        return {}
    pairs = list(names.items())
    if _are_numbers(names.values()) and not _are_numbers(names):  # as nnU-Net writes them
        pairs = [(number, name) for name, number in pairs]
    try:
        numbered = dict(sorted((int(number), str(name)) for number, name in pairs))
    except ValueError:
        problems.append(f'{path}: "{key}" has keys {list(names)}, not numbers; write {example}')
        return {}
    if len(numbered) < len(pairs):
        problems.append(f'{path}: "{key}" gives one number to several names; correct it')
    return numbered


def _are_numbers(values):
    return all(str(value).isdecimal() for value in values)


def check_channel_numbers(
    path: Path, key: str, numbers: Sequence[int], problems: list[str]
) -> None:
    """Channels are counted from 0 without gaps."""
    if list(numbers) != list(range(len(numbers))):
        problems.append(
            f'{path}: "{key}" numbers its channels {list(numbers)}; count from 0 without gaps'
        )


def resolved(root: str | Path, name: str) -> str:
    """The path of a file that a list names relative to `root`, or by its whole path.

    Backslashes of Windows are slashes, and a name is found in whichever Unicode form the disk has
    it. Where there is no such file, the path that was looked for.
    """
    path = os.path.normpath(os.path.join(root, name))
    if os.path.exists(path):
        return path
    if "\\" in name:
        return resolved(root, name.replace("\\", "/"))
    folder, wanted = os.path.split(path)
    if os.path.isdir(folder) and not wanted.isascii():
        for there in sorted(os.listdir(folder)):
            if unicodedata.normalize("NFC", there) == unicodedata.normalize("NFC", wanted):
                return os.path.join(folder, there)
    return path


def leaves(root: str | Path, path: str) -> bool:
    """Whether a path leads out of a folder."""
    whole, root = os.path.abspath(path), os.path.abspath(root)
    return os.path.commonpath([whole, root]) != root


def entries(folder: Path) -> list[Path]:
    """What a folder holds but for what is hidden, links to nothing too, in order."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def files_in(folder: Path) -> list[Path]:
    """The `entries` that are no folders."""
    return [path for path in entries(folder) if not path.is_dir()]


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to nothing."""
    return path.is_symlink() and not path.exists()


def broken_links(files: Iterable[Path]) -> list[str]:
    """One sentence for each link to nothing."""
    return [
        f"{file}: is {absence(file)}; mend or remove it" for file in filter(leads_nowhere, files)
    ]


def unused_files(files: Sequence[Path], reason: str) -> list[str]:
    """One sentence about files that are left out, none if there are none."""
    if not files:
        return []
    names = ", ".join(printable(file) for file in files[:_MAX_NAMED])
    more = f" and {len(files) - _MAX_NAMED} more" if len(files) > _MAX_NAMED else ""
    return [f"{names}{more}: {reason}; list or move {'it' if len(files) == 1 else 'them'}"]
