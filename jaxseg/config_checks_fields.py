"""What makes the value of a single field valid, as its name tells."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxseg.config import choices_of
from jaxseg.config_fields import NOT_NEGATIVE, PER_CHANNEL, POSITIVE, WHOLE


def choice_problems(model: str, fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with fields that have but a few values, of a config of that model."""
    return [
        not_a_choice(name, value, choices)
        for name, choices in choices_of(model).items()
        for value in (re.split(", *", fields[name]) if name in PER_CHANNEL else [fields.get(name)])
        if name in fields and value not in choices
    ]


def sign_problems(fields: Mapping[str, Any]) -> list[str]:
    """Which fields are not positive, or negative, that must be so or must not."""
    problems = []
    for name in POSITIVE:
        if not all(is_number(v) and v > 0 for v in entries(fields[name])):
            problems.append(f"{name} must be positive, not {fields[name]!r}")
    for name in NOT_NEGATIVE:
        if not all(is_number(v) and v >= 0 for v in entries(fields[name])):
            problems.append(f"{name} must not be negative, not {fields[name]!r}")
    return problems


def kind_problems(name: str, value: Any) -> list[str]:
    """What is wrong with a field of a kind that its name tells."""
    problems = []
    is_range = name.rpartition(".")[2].startswith("range")
    if name in WHOLE and any(isinstance(v, float) for v in entries(value)):
        problems.append(f"{name} must hold whole numbers, not {value!r}")
    is_probability = not is_range and name.endswith(("prob", "_fraction", ".dropout", ".momentum"))
    if is_probability and not (is_number(value) and 0 <= value <= 1):
        problems.append(f"{name} must lie in [0, 1], not {value!r}")
    if name in ("model.dropout", "optim.momentum") and value == 1:
        problems.append(f"{name} must be below 1")
    if is_range and not (len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]):
        problems.append(f"{name} must be (lowest, highest), not {value!r}")
    if name.endswith("_regex"):
        problems += regex_problems(name, value)
    return problems


def entries(value: Any) -> tuple[Any, ...]:
    """The entries of a list, or the value alone."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which a truth is not."""
    return type(value) in (int, float) and math.isfinite(value)


def not_a_choice(name: str, value: Any, choices: Iterable[Any]) -> str:
    """Says that a value is none of its field's choices, and which it may have been meant to be."""
    nearest = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name} is {value!r}, must be one of {', '.join(map(repr, choices))}{hint}"


def regex_problems(name: str, value: str) -> list[str]:
    """What is wrong with a field that holds a regular expression."""
    try:
        groups = re.compile(value).groups
    except re.error as error:
        return [f"{name} {value!r} is not a regular expression: {error}"]
    if name == "split.subject_regex" and value and groups < 1:
        return [f"{name} {value!r} needs a group (...) that holds the subject"]
    return []
