"""The folders of the predict command: its images, the files of each, and what is done already."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxseg.data.formats import registry
from jaxseg.data.formats.files import absence
from jaxseg.problem import Problem, name_problems, printable
from jaxseg.run.writers import json_ready, write_text

RECORDS_NAME = "predictions.json"

# nnU-Net's names for the channels of an image.
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_MAX_NAMED = 10


class FolderProblem(Problem, ValueError):
    """Nothing can be predicted from or into a folder; the message says why and how to mend it."""


@dataclasses.dataclass(frozen=True)
class ImageCase:
    """An image to segment.

    Attributes:
      case_id: Its path below the input folder, without suffix.
      path: Absolute, of the image or of its first channel.
      files: For the name of each output the path that it is written to.
      channels: Absolute paths of further channels.
      written: All paths that its outputs are written to: a stack's spacing is beside it.
      lacks: Names of channels that are not there, if it is a channel.
    """

    case_id: str
    path: str
    files: dict[str, str]
    channels: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the image."""
        return (self.path, *self.channels)


def find_images(
    input_path: str | Path,
    folder: str | Path,
    outputs: Sequence[str],
    recursive: bool,
    num_channels: int = 1,
) -> list[ImageCase]:
    """Lists the images to segment and the files to make of them. No file is opened.

    A volume's outputs are CASE (the label) and CASE_OUTPUT with its own suffix, a picture's
    CASE.png and CASE_OUTPUT.tif. Files named CASE_0000, CASE_0001 ..., as many as there are
    channels, are the channels of CASE, as in nnU-Net; of one channel if all files are. Hidden files
    (macOS copies a "._NAME" beside each NAME) and what is in the output folder are no images.

    Args:
      input_path: An image, or a folder of images.
      folder: Where outputs go; need not be there.
      outputs: Names, "label" among them.
      recursive: Whether images in subfolders count; outputs then go to subfolders of the same name.
      num_channels: Of the images that the network takes.
    Returns:
      List of ImageCase in order of case_id.
    Raises:
      FolderProblem: There is no image, the name of one can not be written down, or files would be
        written twice or over an image.
    """
    root = Path(input_path)
    if root.is_dir():
        paths = _images_below(root, Path(folder), recursive)
        if not paths:
            others = left_out(root, folder, recursive)
            but = f" but {', '.join(others)}" if others else ""
            more = "" if recursive else ", or look into its subfolders with --recursive"
            wrong = f"{root} holds no {registry.KINDS}{but}"
            raise FolderProblem(f"{wrong}; give another --input{more}")
    elif root.is_file() and registry.is_image(root):
        root, paths = root.parent, [root]
    elif root.exists():
        raise FolderProblem(f"{root} is no {registry.KINDS}; convert it")
    else:
        raise FolderProblem(f"{root}: is {absence(root)}; correct --input")
    if problems := name_problems(paths):
        raise FolderProblem("\n- ".join(problems[:_MAX_NAMED]))
    groups = _channel_groups(paths, num_channels)
    cases = [_case_of(stem, files, lacks, root, folder, outputs) for stem, files, lacks in groups]
    cases.sort(key=lambda case: (case.case_id, case.path))
    _refuse_clashes(cases, folder)
    return cases


class Records:
    """What an output folder holds, made by which predictor of which files.

    Attributes:
      content: of predictions.json: "identity", "workdirs" and "class_names" of the predictor, and
        "cases", a dict from case id to what `add` was given.
    """

    def __init__(
        self,
        folder: str | Path,
        cases: Sequence[ImageCase],
        *,
        identity: str,
        workdirs: Sequence[str | Path],
        class_names: Sequence[str],
    ):
        """Goes on with the records in a folder, or starts them.

        Args:
          folder: Existing output folder.
          cases: ImageCases to be written there.
          identity: Of the predictor: what it predicts is the same where this is.
          workdirs, class_names: Of the predictor, for the reader.
        Raises:
          FolderProblem: The folder holds predictions of another predictor, or files of unknown
            origin where outputs are to go.
          OSError: The records cannot be written.
        """
        self._path = os.path.join(folder, RECORDS_NAME)
        self.content: dict[str, Any] = {}
        self._fresh: dict[str, Any] = {
            "identity": identity,
            "workdirs": [os.path.abspath(workdir) for workdir in workdirs],
            "class_names": list(class_names),
            "cases": {},
        }
        with self._updating():
            known = self.content["cases"]
            _refuse_strange_files([case for case in cases if case.case_id not in known])

    def is_done(self, case: ImageCase) -> bool:
        """Whether every file of a case is there and was made of the image as it is now."""
        record = self.content["cases"].get(case.case_id, {"error": "never tried"})
        try:
            return (
                "error" not in record
                and all(map(os.path.getsize, case.written))
                and all(record.get(name) == value for name, value in state_of(case).items())
            )
        except OSError:  # no such output; of an image, reading it will tell
            return False

    def altered(self, case: ImageCase) -> list[str]:
        """The outputs of a case that is done whose size is not the one they were written with."""
        sizes = self.content["cases"][case.case_id].get("written_bytes", {})
        return [path for path, size in written_bytes(case).items() if sizes.get(path, size) != size]

    def add(self, case: ImageCase, record: dict[str, Any]) -> None:
        """Writes down what became of a case; the file is whole at any time."""
        with self._updating():
            self.content["cases"][case.case_id] = json_ready(record)

    @contextlib.contextmanager
    def _updating(self):
        """Reads what the file holds, since other processes write to it too, and writes it again."""
        lock = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the folder: another process waits here
            self.content = _load_records(self._path) or self._fresh
            if self.content["identity"] != self._fresh["identity"]:
                raise FolderProblem(
                    f"{os.path.dirname(self._path)} holds predictions of "
                    f"{', '.join(self.content['workdirs'])} with other weights or options; give "
                    "another --output, or delete that folder to start anew"
                )
            yield
            write_text(self._path, json.dumps(self.content, indent=1) + "\n")
        finally:
            os.close(lock)


def written_bytes(case: ImageCase) -> dict[str, int]:
    """The size of each output of a case; raises OSError."""
    return {path: os.path.getsize(path) for path in case.written}


def left_out(input_path: str | Path, folder: str | Path, recursive: bool) -> list[str]:
    """The files of an input folder, but for hidden ones, that are no images; of many the first.

    Among them are links that lead to nothing, and to folders where subfolders are looked into.
    """
    root, output = Path(input_path), Path(folder).resolve()
    if not root.is_dir():
        return []
    there = list(root.glob("**/*" if recursive else "*"))
    files = [path for path in there if path.is_file() or (path.is_symlink() and not path.exists())]
    files += [path for path in there if recursive and path.is_symlink() and path.is_dir()]
    images = [path for path in files if registry.is_image(path) and path.is_file()]
    of_images = {file for path in images for file in _real_files(path)}
    others = sorted(
        printable(path.relative_to(root)) + _where_to(path)
        for path in files
        if os.path.realpath(path) not in of_images
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and not path.resolve().is_relative_to(output)
    )
    more = [f"and {len(others) - _MAX_NAMED} more"] if len(others) > _MAX_NAMED else []
    return others[:_MAX_NAMED] + more


def _where_to(path):
    """What a link leads to that is not followed."""
    if path.is_file():
        return ""
    return " (a link to a folder)" if path.is_dir() else " (a link to nothing)"


def _real_files(image):
    return map(os.path.realpath, registry.files_of(image))


def state_of(case: ImageCase) -> dict[str, Any]:
    """JSON-ready facts that differ when a file is another one or has changed."""
    beside = [file for path in case.paths for file in registry.files_of(path)[1:]]
    more = {"channels": case.channels, "beside": beside}
    return _file_state(case.path) | {
        name: [_file_state(path) for path in paths] for name, paths in more.items() if paths
    }


def _file_state(path):
    status = os.stat(path)
    return {"file": path, "file_bytes": status.st_size, "file_modified_ns": status.st_mtime_ns}


def _images_below(root, folder, recursive):
    folder, root_resolved = folder.resolve(), root.resolve()
    if folder == root_resolved:
        raise FolderProblem(f"{root} is --input and --output at once; give another --output")
    output_inside = folder.is_relative_to(root_resolved)
    return [
        path
        for path in root.glob("**/*" if recursive else "*")
        if registry.is_image(path)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and not (output_inside and path.resolve().is_relative_to(folder))
        and path.is_file()
    ]


def _channel_groups(paths, num_channels):
    """(stem, files, names of channels that are missing) of each image."""
    groups: dict[str, list[tuple[int, Path]]] = {}
    alone = []
    for path in paths:
        stem = registry.stem_of(path)
        if match := _CHANNEL.fullmatch(stem):
            groups.setdefault(match[1], []).append((int(match[2]), path))
        else:
            alone.append((stem, [path], ()))
    whole, rest = [], []
    for stem, group in groups.items():
        numbers, files = zip(*sorted(group), strict=True)
        # A picture holds all of its colours.
        if numbers == tuple(range(num_channels)) or (
            numbers == (0,) and not registry.is_volume(files[0])
        ):
            whole.append((stem, list(files), ()))
            continue
        lacks = [number for number in range(num_channels) if number not in numbers]
        names = tuple(f"{os.path.basename(stem)}_{number:04d}" for number in lacks)
        rest += [(registry.stem_of(file), [file], names) for file in files]
    if num_channels == 1 and (alone or rest):
        # A number in the name of some files means something else.
        return [(registry.stem_of(path), [path], ()) for path in paths]
    return [*whole, *alone, *rest]


def _case_of(stem, paths, lacks, root, folder, outputs):
    case_id = Path(stem).relative_to(root).as_posix()
    label_suffix, map_suffix = registry.output_suffixes(paths[0])
    files = {name: f"{case_id}_" + re.sub(r"\W+", "_", name) + map_suffix for name in outputs}
    files["label"] = case_id + label_suffix
    files = {name: os.path.join(folder, file) for name, file in files.items()}
    first, *channels = (os.path.abspath(path) for path in paths)
    written = [file for path in files.values() for file in registry.files_written(path, first)]
    return ImageCase(case_id, first, files, tuple(channels), tuple(written), lacks)


def _refuse_clashes(cases, folder):
    problems: list[str] = []
    image_of: dict[str, str] = {}
    purpose_of = {
        file: "a file of an image to segment"
        for case in cases
        for path in case.paths
        for file in _real_files(path)
    }
    purpose_of[os.path.realpath(os.path.join(folder, RECORDS_NAME))] = "the file of the records"
    for case in cases:
        if case.case_id in image_of:
            problems.append(f"{image_of[case.case_id]} and {case.path} have one case name")
            continue
        image_of[case.case_id] = case.path
        for path in map(os.path.realpath, case.written):
            if path in purpose_of:
                problems.append(f"{path}, an output of {case.path}, is {purpose_of[path]} too")
            purpose_of[path] = f"an output of {case.path}"
    if problems:
        raise FolderProblem("\n- ".join(["rename images or give another --output:", *problems]))


def _refuse_strange_files(cases):
    strange = [path for case in cases for path in case.written if os.path.exists(path)]
    if strange:
        raise FolderProblem(
            f"{len(strange)} file(s) would be replaced, first {strange[0]}, and no {RECORDS_NAME} "
            "calls them predictions; give another --output"
        )


def _load_records(path):
    """The records in a file, None if there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        content = {name: content[name] for name in ("identity", "workdirs", "class_names", "cases")}
        if not all(map(_is_record, content["cases"].values())):
            raise ValueError("its cases are no records")
        return content
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderProblem(
            f"{path} was not written by this command, or is damaged ({error!r}); give another "
            "--output, or delete that file and the predictions beside it"
        ) from error


def _is_record(record):
    return isinstance(record, dict) and (isinstance(record.get("error", ""), str))
