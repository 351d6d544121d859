"""The decisions of a plan in a file, as `jaxseg.plan` wrote them and its user changed them."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxseg import config_checks
from jaxseg.config import ConfigProblems, base_config, flatten, with_tuples
from jaxseg.config_planned import PLANNED, decided, undecided

_KINDS: dict[type, str] = {tuple: "a list", bool: "true or false", int: "a whole number"}
_KINDS |= {str: "text", float: "a number"}


def completed_by_file(config: ConfigDict) -> ConfigDict:
    """The config with its open fields as `plan.file` decides them; what is set is obeyed.

    Raises:
      ConfigProblems: all that is wrong with the file or with what it makes of the config.
    """
    if not undecided(config):
        raise ConfigProblems(["it decides what a config leaves open, here nothing: take auto.py"])
    complete = decided(config, _decisions_in(os.path.expanduser(config.plan.file), config))
    if missing := undecided(complete):
        raise ConfigProblems(f"{name} is decided neither by it nor by you" for name in missing)
    config_checks.validate(complete)
    return complete


@contextlib.contextmanager
def naming_file(config: ConfigDict) -> Iterator[None]:
    """Says of the problems of a config that it was completed by its `plan.file`."""
    try:
        yield
    except ConfigProblems as problems:
        own = [name for name in PLANNED if flatten(config)[name] is not None]
        beside = f", beside what you set ({', '.join(own)})" if own else ""
        raise ConfigProblems(
            f"plan.file {config.plan.file!r}{beside}: {problem}" for problem in problems.problems
        ) from None


def _decisions_in(path, config):
    """The decisions by the full name of their field; raises ConfigProblems, as above."""
    again = "write one with jaxseg.plan --output"
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise ConfigProblems([f"can not be read ({error.strerror}); {again}"]) from None
    except (RecursionError, ValueError) as error:
        raise ConfigProblems([f"no JSON ({error}); {again}"]) from None
    if not isinstance(content, dict) or not isinstance(content.get("decisions"), dict):
        raise ConfigProblems([f"holds no object of decisions; {again}"])
    decisions: dict[str, Any] = with_tuples(content["decisions"])
    if problems := [*_other_plans(content, config), *_foreign(decisions)]:
        raise ConfigProblems(problems)
    return decisions


def _other_plans(content, config):
    for name in ("preset", "configuration"):
        wanted, made = config.plan[name], content.get(name)
        if wanted not in ("", "auto") and made is not None and made != wanted:
            yield f"is of {name} {made!r}, but plan.{name} is {wanted!r}; leave that at 'auto'"


def _foreign(decisions):
    kinds = {name: type(value) for name, value in flatten(base_config("unet")).items()}
    for name, value in decisions.items():
        if name not in PLANNED:
            yield f"{name} is nothing that a plan decides; set it with --config.{name}"
        elif value is not None and not _is_of(kinds[name], value):
            yield f"{name} must be {_KINDS[kinds[name]]}, not {value!r}"


def _is_of(kind, value):
    return type(value) is kind or (kind is float and type(value) is int)
