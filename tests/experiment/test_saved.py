import json

import pytest

from jaxseg.config import base_config, to_json
from jaxseg.experiment.saved import saved_config, saved_data
from jaxseg.problem import FileProblem

DATA = {"class_names": ["background", "a"], "label_values": None, "num_channels": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_names", "ab"),
        ("class_names", ["background"]),
        ("class_names", ["background", 2]),
        ("label_values", [0]),
        ("label_values", [0, "1"]),
        ("num_channels", 0),
        ("num_channels", "1"),
        ("files", [1, 2]),
        ("files", {"a": 1}),
        ("files", {"a": [None]}),
    ],
)
def test_data_of_a_wrong_shape_are_named(tmp_path, name, value):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(DATA | {"files": {"a": ["00"]}, "label_values": [0, 7]}))
    assert saved_data(tmp_path)["label_values"] == [0, 7]
    path.write_text(json.dumps(DATA))
    assert saved_data(tmp_path) == DATA
    path.write_text(json.dumps(DATA | {name: value}))
    with pytest.raises(FileProblem, match=rf"data\.json: can not be read \(its '{name}' is "):
        saved_data(tmp_path)


def test_what_else_must_be_known_is_asked_for(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    with pytest.raises(FileProblem, match="it has no 'split'"):
        saved_data(tmp_path, ("split",))


def test_settings_that_no_run_can_have_are_named(tmp_path):
    content = json.loads(to_json(base_config()))
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert to_json(saved_config(tmp_path)) == to_json(base_config())
    content["model"]["features"] = [8, -16]
    (tmp_path / "config.json").write_text(json.dumps(content))
    words = r"config\.json: can not be read \([^)]*problem\(s\):\n  - model\.features must be pos"
    with pytest.raises(FileProblem, match=words):
        saved_config(tmp_path)
