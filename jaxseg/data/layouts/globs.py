"""Globs in which {case} stands for the name of a case: what they match, and which case it is of."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from jaxseg.data.cases import DatasetProblems
from jaxseg.data.formats import registry
from jaxseg.data.layouts import listing

_CASE = "{case}"


def matching(root: Path, image_glob: str) -> list[Path]:
    """What a glob matches below a folder, in order, and links to nothing that are on the way.

    Links to folders are folders, unless they lead back up. Nothing hidden is matched by * or ?.

    Raises:
      DatasetProblems: It is no glob.
    """
    parts = PurePosixPath(image_glob.replace(_CASE, "*")).parts
    if not _is_glob(parts, image_glob):
        raise DatasetProblems(
            [
                f"data.image_glob is {image_glob!r}; write it relative to data.dir, for example "
                "images/*.nii.gz or, for folders of any depth, **/*.nii.gz"
            ]
        )
    return sorted(set(_matched(root, parts)))


def case_id_of(root: Path, path: Path, image_glob: str) -> str:
    """What {case} stands for, or the stem of the name; "" if the path does not fit the glob."""
    match = re.fullmatch(_as_regex(image_glob), path.relative_to(root).as_posix())
    if match is None:
        return ""
    return match["case"] if _CASE in image_glob else os.path.basename(registry.stem_of(path))


def _is_glob(parts, image_glob):
    """Whether it matches files below a folder, of which ** is a whole part."""
    if not parts or parts[0] == "/" or parts[-1] == "**":
        return False
    try:
        re.compile(_as_regex(image_glob))
    except re.error:  # a range that ends before it begins
        return False
    return all(part == "**" or "**" not in part for part in parts)


def _matched(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    first, *rest = parts
    if first == "**":
        for below in _folders_below(folder):
            yield from filter(listing.leads_nowhere, listing.entries(below))
            yield from _matched(below, rest)
        return
    for path in _named(folder, first):
        if not rest or listing.leads_nowhere(path):
            yield path
        elif path.is_dir():
            yield from _matched(path, rest)


def _named(folder, pattern):
    if glob.has_magic(pattern):
        there = listing.entries(folder)
        return [path for path in there if fnmatch.fnmatchcase(path.name, pattern)]
    return [folder / pattern] if os.path.lexists(folder / pattern) else []


def _folders_below(folder, above=()):
    """A folder and all below it."""
    whole = os.path.realpath(folder)
    if whole in above:
        return
    yield folder
    for path in filter(Path.is_dir, listing.entries(folder)):
        yield from _folders_below(path, (*above, whole))


# What is special in a glob; in brackets a first ] is one of the characters.
_SPECIAL = re.compile(
    r"(?P<folders>\*\*/)|(?P<any>\*+)|(?P<one>\?)|\[(?P<set>!?\]?[^\]]*)\]|(?P<case>{case})"
)
_REGEX = {"folders": "(?:.*/)?", "any": "[^/]*", "one": "[^/]"}


def _as_regex(image_glob):
    """The regular expression of a glob in which every {case} stands for the same."""
    text = PurePosixPath(image_glob).as_posix()
    parts, place = [], 0
    for match in _SPECIAL.finditer(text):
        parts.append(re.escape(text[place : match.start()]))
        place = match.end()
        if characters := match["set"]:
            negated = characters[0] == "!"
            characters = re.sub(r"([\\^\[\]&~|])", r"\\\1", characters[negated:])
            parts.append(f"[{'^' * negated}{characters}]")
        elif match["case"]:
            parts.append("(?P=case)" if "(?P<case>[^/]+)" in parts else "(?P<case>[^/]+)")
        else:
            parts.append(_REGEX[str(match.lastgroup)])
    return "".join(parts) + re.escape(text[place:])
