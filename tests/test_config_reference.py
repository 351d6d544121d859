from jaxseg import config_fields, config_reference


def lines_by_field():
    """The lines of the fields of all models, without what volumes change."""
    text = config_reference.reference().partition("\nWith ")[0]
    return {line.split()[0]: line for line in text.splitlines()}


def test_every_field_stands_there_with_its_default():
    lines = lines_by_field()
    for name, value in _flattened(config_fields.FIELDS):
        assert lines[name].startswith(f"{name:<36} {value!r}"), name
    text = config_reference.reference()
    for model, defaults in config_fields.MODEL_DEFAULTS.items():
        part = text.partition(f"With model.name '{model}'")[2].partition("\nWith ")[0]
        for name, value in _flattened(defaults, "model."):
            assert f"\n{name:<36} {value!r}" in part, name
    for name, value in config_fields.FIELDS_OF_VOLUMES.items():
        assert f"{name:<36} {value!r}" in text.partition("With three numbers")[2]


def test_comments_and_choices_stand_beside_the_field():
    lines = lines_by_field()
    choices = ", ".join(config_fields.CHOICES["optim.schedule"])
    assert f"one of {choices}" in lines["optim.schedule"]
    assert lines["compile.cache_dir"].endswith('where the next start finds programs; "": none')


def test_a_comment_above_or_beside_a_field_is_its_own():
    source = 'FIELDS: dict = {\n    # above\n    "a": 1,\n    "b": 2,  # beside\n    "c": 3,\n}\n'
    comments = config_reference._comments(source)
    assert comments == {2: (True, "above"), 4: (False, "beside")}
    assert config_reference._above(3, comments) == "above"
    assert config_reference._above(5, comments) == ""  # what stands beside is of its own line


def _flattened(fields, prefix=""):
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
