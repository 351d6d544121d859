"""Who is trained on, who chooses the checkpoint, who is tested: by subject, seeded, saved."""

import collections
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxseg.problem import Problem
from jaxseg.run import writers

SETS = ("train", "val", "test")
UNUSED = "unused"
# Of nnU-Net v2's folds.
_RANDOM_STATE = 12345


class SplitProblem(Problem, ValueError):
    """The wanted split can not be made; the message says why and how to mend it."""


def split_from_file(
    path: str | Path,
    case_ids: Sequence[str],
    *,
    subject_of: Callable[[str], str] = str,
    twins: Sequence[Sequence[str]] = (),
    fold: int = 0,
    also_test: Sequence[str] = (),
    excluded: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Reads a split from JSON.

    Args:
      path: {"train": [...], "val": [...], "test": [...]} ("test" may be missing; cases under
        "unused" are left out; other keys are ignored) or nnU-Net's list of such dicts, one per
        fold, which leaves out what it does not list.
      case_ids: all cases of the dataset.
      subject_of: function from case id to subject.
      twins: lists of the ids of cases that have the same image, and so count as of one subject.
      fold: which entry of a list.
      also_test: cases of the test set that the file does not list.
      excluded: cases that it may list though they are not in the dataset.
    Returns:
      Dict with sorted lists of case ids under "train", "val" and "test".
    Raises:
      SplitProblem: unreadable file, missing fold, unknown or unassigned cases, a subject in two
        sets, no training or no validation case.
    """
    subject_of = with_twins(subject_of, twins, case_ids)
    content = _content(path)
    if is_list := isinstance(content, list):
        if fold not in range(len(content)):
            raise SplitProblem(
                f"{path}: fold {fold} is missing, the file has {len(content)} folds, from 0; "
                "mend --config.split.fold or --config.ensemble.folds"
            )
        content = content[fold]
    elif fold:
        raise SplitProblem(
            f"{path}: fold {fold} is missing, the file holds a single split; set "
            "--config.split.fold=0 and --config.ensemble.folds=0, or write a list of splits"
        )
    if not isinstance(content, dict) or not content.get("train"):
        raise SplitProblem(f'{path}: has no list "train"; write {{"train": [...], "val": [...]}}')
    for name in (*SETS, UNUSED):
        listed = content.get(name, [])
        if not isinstance(listed, list) or not all(isinstance(case, str) for case in listed):
            raise SplitProblem(f'{path}: "{name}" is not a list of case ids')
    split = {name: sorted(set(content.get(name, [])) - set(excluded)) for name in SETS}
    split["test"] = sorted({*split["test"], *also_test})
    used = set(case_ids) - set(content.get(UNUSED, []))
    if is_list:
        used &= set().union(*split.values())
    return _checked(split, used, subject_of, twins, source=path)


def lists_folds(path: str | Path) -> bool:
    """Whether a file that `split_from_file` reads lists folds."""
    return isinstance(_content(path), list)


def _content(path):
    """What the JSON file of a split holds."""
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SplitProblem(
            f"{path}: not a readable JSON split ({error}); mend it, or give another with "
            "--config.split.file"
        ) from error


def check_folds(folds: Sequence[Mapping[str, Sequence[str]]]) -> None:
    """Raises SplitProblem unless folds share their test set, and validate each case once at most.

    Otherwise the average of their members would be tested on cases that some were trained on.
    """
    if any(fold["test"] != folds[0]["test"] for fold in folds):
        raise SplitProblem(
            "the folds have different test sets, so their members can not be averaged on one: give "
            "them one in --config.split.file, or train each by itself with --config.split.fold"
        )
    validated = collections.Counter(case for fold in folds for case in fold["val"])
    if twice := sorted(case for case, count in validated.items() if count > 1):
        raise SplitProblem(
            f"several folds validate {', '.join(twice)}: put each case into the val set of one "
            "fold in --config.split.file"
        )


def split_by_subject(
    case_ids: Sequence[str],
    *,
    seed: int,
    subject_of: Callable[[str], str] = str,
    twins: Sequence[Sequence[str]] = (),
    test_regex: str = "",
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    num_folds: int = 0,
    fold: int = 0,
    test: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Splits subjects at random.

    Args:
      case_ids: all cases of the dataset.
      seed: of the permutation of the subjects; the same subjects in any order split alike. Folds
        for seed 0 are those of nnU-Net v2 where there is no test set.
      subject_of, twins: as `split_from_file`.
      test_regex: cases that match are the test set, instead of a random `test_fraction`.
      val_fraction: share of all subjects, at least one, when `num_folds` is 0.
      test_fraction: share of all subjects, rounded.
      num_folds: the subjects outside the test set form that many folds; 0 means none.
      fold: the one that validates.
      test: cases that are the test set, instead of a random `test_fraction`.
    Returns, Raises: as `split_from_file`.
    """
    subject_of = with_twins(subject_of, twins, case_ids)
    subjects = sorted(set(map(subject_of, case_ids)))
    shuffled = list(np.random.default_rng(seed).permutation(subjects))
    tested = set(map(subject_of, test))
    if test_regex:
        tested = {subject_of(case) for case in case_ids if re.search(test_regex, case)}
        if not tested:
            raise SplitProblem(f"split.test_regex {test_regex!r} matches none of the cases")
    elif not tested:
        tested = set(shuffled[: round(test_fraction * len(subjects))])
    rest = [subject for subject in shuffled if subject not in tested]
    if num_folds:
        if num_folds > len(rest):
            raise SplitProblem(
                f"split.num_folds is {num_folds} but only {len(rest)} subjects are left to fold"
            )
        if fold not in range(num_folds):
            raise SplitProblem(f"split.fold {fold} is missing: there are {num_folds}, from 0")
        val = _fold_of(sorted(rest), num_folds, fold, seed)
    elif fold:
        raise SplitProblem(
            f"split.fold {fold} is missing: the data say nothing of folds; set "
            "--config.split.num_folds or --config.split.file too"
        )
    else:
        val = set(rest[: max(1, round(val_fraction * len(subjects)))])

    split: dict[str, list[str]] = {name: [] for name in SETS}
    for case in sorted(case_ids):
        subject = subject_of(case)
        split["test" if subject in tested else "val" if subject in val else "train"].append(case)
    return _checked(split, case_ids, subject_of, twins, source="the split")


def _fold_of(subjects, num_folds, fold, seed):
    """As scikit-learn's KFold with shuffle=True and, for seed 0, nnU-Net's random state."""
    order = np.arange(len(subjects))
    np.random.RandomState(_RANDOM_STATE + seed).shuffle(order)
    return {subjects[i] for i in np.array_split(order, num_folds)[fold]}


def split_as_told(
    told: Mapping[str, tuple[str, int | None]],
    *,
    subject_of: Callable[[str], str] = str,
    twins: Sequence[Sequence[str]] = (),
    fold: int = 0,
) -> dict[str, list[str]]:
    """The split that a table gives, case by case.

    Args:
      told: for each case its set ("train", "val", "test", "unused", or "" for training and
        validation) and the fold whose validation set it is in, or None.
      subject_of, twins: as `split_from_file`.
      fold: the one that validates.
    Returns, Raises: as `split_from_file`.
    """
    subject_of = with_twins(subject_of, twins, list(told))
    folds = {case_fold for _, case_fold in told.values() if case_fold is not None}
    if fold not in (folds or {0}):
        raise SplitProblem(
            f"split.fold {fold} is missing: the table has the folds {sorted(folds)}; mend "
            "--config.split.fold or --config.ensemble.folds"
        )
    split: dict[str, list[str]] = {name: [] for name in SETS}
    for case, (set_name, case_fold) in sorted(told.items()):
        if set_name == UNUSED:
            continue
        if set_name == "test" or (set_name and case_fold is None):
            split[set_name].append(case)
        else:
            split["val" if case_fold == fold and case_fold is not None else "train"].append(case)
    used = [case for case, (set_name, _) in told.items() if set_name != UNUSED]
    return _checked(split, used, subject_of, twins, source="the table")


def with_twins(
    subject_of: Callable[[str], str], twins: Sequence[Sequence[str]], case_ids: Sequence[str]
) -> Callable[[str], str]:
    """`subject_of`, where the subjects of cases that have the same image are one.

    Args:
      subject_of: function from case id to subject.
      twins: lists of the ids of such cases.
      case_ids: of the dataset; twins that are not there do not count.
    """
    one_of: dict[str, str] = {}

    def first_of(subject):
        while subject in one_of:
            subject = one_of[subject]
        return subject

    for group in twins:
        subjects = [first_of(subject_of(case)) for case in group if case in set(case_ids)]
        for subject in subjects[1:]:
            if first_of(subject) != first_of(subjects[0]):
                one_of[first_of(subject)] = first_of(subjects[0])
    return lambda case_id: first_of(subject_of(case_id))


def subject_from_regex(regex: str) -> Callable[[str], str]:
    """Returns the function from case id to subject: the first group of `regex`; "" keeps the id."""

    def subject_of(case_id):
        match = re.search(regex, case_id)
        if match is None:
            raise SplitProblem(f"split.subject_regex {regex!r} does not match case {case_id!r}")
        return match.group(1)

    return subject_of if regex else str


def save_split(
    path: str | Path, split: dict[str, list[str]] | Sequence[dict[str, list[str]]]
) -> None:
    """Writes a split as JSON that `split_from_file` reads, whole or not at all."""
    writers.write_text(path, json.dumps(split, indent=1))


def _in_two_sets(split, key_of):
    """{key: [(case, set)]} of the keys whose cases are in several sets; None is no key."""
    found = collections.defaultdict(list)
    for name, cases in split.items():
        for case in cases:
            found[key_of(case)].append((case, name))
    found.pop(None, None)
    return {
        key: sorted(of) for key, of in sorted(found.items()) if len({name for _, name in of}) > 1
    }


def _checked(split, case_ids, subject_of, twins, source):
    assigned = [case for cases in split.values() for case in cases]
    problems = []
    if unknown := sorted(set(assigned) - set(case_ids)):
        problems.append(
            f"names cases that the dataset lacks or the split leaves unused: {', '.join(unknown)}"
        )
    if missing := sorted(set(case_ids) - set(assigned)):
        problems.append(f"leaves cases out: {', '.join(missing)}")
    image_of = {case: group[0] for group in twins for case in group}
    images = _in_two_sets(split, image_of.get)
    if images:
        pairs = (" and ".join(f"{case} ({name})" for case, name in of) for of in images.values())
        mend = "give them one set, or leave one out with --config.data.exclude"
        problems.append(f"divides cases that are one image: {', '.join(pairs)}; {mend}")
    subjects = [
        f"{subject} ({', '.join(f'{case} in {name}' for case, name in of)})"
        for subject, of in _in_two_sets(split, subject_of).items()
        if not any(image_of.get(case) in images for case, _ in of)
    ]
    if subjects:
        shown = ", ".join(subjects)
        problems.append(f"puts a subject into two sets: {shown}; give its cases one set")
    problems += [f'has no case in "{name}"' for name in ("train", "val") if not split[name]]
    if problems:
        raise SplitProblem(f"{source} " + "; ".join(problems))
    return split
