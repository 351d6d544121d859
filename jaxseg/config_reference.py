"""The settings as a text for people, from `config_fields` and the comments beside them."""

import ast
import inspect
import io
import tokenize

from jaxseg import config_fields
from jaxseg.config import choices_of

_NAME_WIDTH, _VALUE_WIDTH = 36, 26


def reference() -> str:
    """Every field with its default, its choices and its comment, a line each or a few."""
    source = inspect.getsource(config_fields)
    comments = _comments(source)
    dicts = {
        statement.target.id: statement.value
        for statement in ast.parse(source).body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(statement.value, ast.Dict)
    }
    lines = list(_lines(dicts["FIELDS"], "", comments, config_fields.CHOICES))
    models = dicts["MODEL_DEFAULTS"]
    for model, fields in zip(config_fields.MODEL_DEFAULTS, models.values, strict=True):
        lines += ["", f"With model.name {model!r}, from base_config({model!r}):"]
        lines += _lines(fields, "model.", comments, choices_of(model))
    lines += ["", "With three numbers in data.patch_size, from base_config(..., rank=3):"]
    lines += [
        _aligned(name, repr(value)) for name, value in config_fields.FIELDS_OF_VOLUMES.items()
    ]
    return "\n".join(lines)


def _lines(fields, prefix, comments, choices):
    """Lines of the fields of a dict display, deeper ones included."""
    for key, value in zip(fields.keys, fields.values, strict=True):
        name = prefix + ast.literal_eval(key)
        above = _above(key.lineno, comments) if key.lineno > fields.lineno else ""
        if isinstance(value, ast.Dict):
            if above:
                yield f"{name}.*: {above}"
            yield from _lines(value, f"{name}.", comments, choices)
            continue
        own_line, beside = comments.get(value.end_lineno, (True, ""))
        said = [above, "" if own_line else beside]
        if name in choices:
            said.append("one of " + ", ".join(map(str, choices[name])))
        default = repr(ast.literal_eval(value))
        yield _aligned(name, default, "; ".join(filter(None, said)))


def _aligned(name, default, comment=""):
    return f"{name:<{_NAME_WIDTH}} {default:<{_VALUE_WIDTH}} {comment}".rstrip()


def _above(line, comments):
    """The comment on the lines right above one."""
    said = []
    while comments.get(line - 1, (False, ""))[0]:
        line -= 1
        said.append(comments[line][1])
    return " ".join(reversed(said))


def _comments(source):
    """By line (whether it holds nothing else, text) of each comment."""
    return {
        token.start[0]: (token.line.lstrip().startswith("#"), token.string.lstrip("# "))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
