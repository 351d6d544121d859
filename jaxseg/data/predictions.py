"""The folders of the predict command: its images, the files of each, and what is done already."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxseg.data.nifti import is_nifti
from jaxseg.problem import Problem
from jaxseg.run.writers import json_ready, write_text

RECORDS_NAME = "predictions.json"

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_KINDS = "NIfTI (.nii, .nii.gz) or picture (.png, .jpg, .jpeg, .tif, .tiff)"


class FolderProblem(Problem, ValueError):
    """Nothing can be predicted from or into a folder; the message says why and how to mend it."""


@dataclasses.dataclass(frozen=True)
class ImageCase:
    """An image to segment.

    Attributes:
      case_id: Its path below the input folder, without suffix.
      path: Absolute.
      files: For the name of each output the path that it is written to.
    """

    case_id: str
    path: str
    files: dict[str, str]


def find_images(
    input_path: str | Path, folder: str | Path, outputs: Sequence[str], recursive: bool
) -> list[ImageCase]:
    """Lists the images to segment and the files to make of them. No file is opened.

    A volume's outputs are CASE.nii.gz (the label) and CASE_OUTPUT.nii.gz, a picture's CASE.png and
    CASE_OUTPUT.tif. Hidden files (macOS copies a "._NAME" beside each NAME) and what is in the
    output folder are no images.

    Args:
      input_path: An image, or a folder of images.
      folder: Where outputs go; need not be there.
      outputs: Names, "label" among them.
      recursive: Whether images in subfolders count; outputs then go to subfolders of the same name.
    Returns:
      List of ImageCase in order of case_id.
    Raises:
      FolderProblem: There is no image, or files would be written twice or over an image.
    """
    root = Path(input_path)
    if root.is_dir():
        paths = _images_below(root, Path(folder), recursive)
        if not paths:
            more = "" if recursive else ", or look into its subfolders with --recursive"
            raise FolderProblem(f"{root} holds no {_KINDS}; give another --input{more}")
    elif root.is_file() and _is_image(root):
        root, paths = root.parent, [root]
    elif root.exists():
        raise FolderProblem(f"{root} is no {_KINDS}; convert it")
    else:
        raise FolderProblem(f"{root}: no such file or folder; correct --input")
    cases = [_case_of(path, root, folder, outputs) for path in paths]
    cases.sort(key=lambda case: (case.case_id, case.path))
    _refuse_clashes(cases)
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
        self.content = _load_records(self._path)
        known = self.content["cases"] if self.content else {}
        _refuse_strange_files([case for case in cases if case.case_id not in known])
        if self.content is None:
            self.content = {
                "identity": identity,
                "workdirs": [os.path.abspath(workdir) for workdir in workdirs],
                "class_names": list(class_names),
                "cases": {},
            }
        if self.content["identity"] != identity:
            raise FolderProblem(
                f"{folder} holds predictions of {', '.join(self.content['workdirs'])} with other "
                "weights or options; give another --output, or delete that folder to start anew"
            )
        self._save()

    def is_done(self, case: ImageCase) -> bool:
        """Whether every file of a case is there and was made of the image as it is now."""
        record = self.content["cases"].get(case.case_id, {"error": "never tried"})
        if "error" in record or not all(map(os.path.exists, case.files.values())):
            return False
        try:
            return all(record.get(name) == value for name, value in state_of(case.path).items())
        except OSError:  # reading it will tell
            return False

    def add(self, case: ImageCase, record: dict[str, Any]) -> None:
        """Writes down what became of a case; the file is whole at any time."""
        self.content["cases"][case.case_id] = json_ready(record)
        self._save()

    def _save(self):
        write_text(self._path, json.dumps(self.content, indent=1) + "\n")


def state_of(path: str) -> dict[str, str | int]:
    """JSON-ready facts that differ when a file is another one or has changed."""
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
        if _is_image(path)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and not (output_inside and path.resolve().is_relative_to(folder))
        and path.is_file()
    ]


def _is_image(path):
    return is_nifti(path) or path.suffix.lower() in _PICTURE_SUFFIXES


def _case_of(path, root, folder, outputs):
    case_id = re.sub(r"(\.nii(\.gz)?|\.\w+)$", "", path.relative_to(root).as_posix(), flags=re.I)
    label_suffix, map_suffix = (".nii.gz", ".nii.gz") if is_nifti(path) else (".png", ".tif")
    files = {name: f"{case_id}_" + re.sub(r"\W+", "_", name) + map_suffix for name in outputs}
    files["label"] = case_id + label_suffix
    files = {name: os.path.join(folder, file) for name, file in files.items()}
    return ImageCase(case_id, os.path.abspath(path), files)


def _refuse_clashes(cases):
    problems: list[str] = []
    image_of: dict[str, str] = {}
    purpose_of = {os.path.realpath(case.path): "an image to segment" for case in cases}
    for case in cases:
        if case.case_id in image_of:
            problems.append(f"{image_of[case.case_id]} and {case.path} have one case name")
            continue
        image_of[case.case_id] = case.path
        for path in map(os.path.realpath, case.files.values()):
            if path in purpose_of:
                problems.append(f"{path}, an output of {case.path}, is {purpose_of[path]} too")
            purpose_of[path] = f"an output of {case.path}"
    if problems:
        raise FolderProblem("\n- ".join(["rename images or give another --output:", *problems]))


def _refuse_strange_files(cases):
    strange = [path for case in cases for path in case.files.values() if os.path.exists(path)]
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
        return {name: content[name] for name in ("identity", "workdirs", "class_names", "cases")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise FolderProblem(
            f"{path} was not written by this command ({error!r}); give another --output"
        ) from error
