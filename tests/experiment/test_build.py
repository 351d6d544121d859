"""What a config says about the members of a run, and about its splits."""

import jax
import numpy as np
import pytest

from jaxseg.config import base_config, from_json, to_json
from jaxseg.config_checks import validate
from jaxseg.data import cases
from jaxseg.data.label_values import LabelCoding
from jaxseg.experiment import build, gather
from jaxseg.experiment.members import Member, kind_of_members, members_of


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("single", {}, (Member(4, 0, 1e-3),)),
        (
            "seeds",
            {"ensemble.size": 3},
            (Member(4, 0, 1e-3), Member(5, 0, 1e-3), Member(6, 0, 1e-3)),
        ),
        ("folds", {"ensemble.folds": 2}, (Member(4, 0, 1e-3), Member(4, 1, 1e-3))),
        (
            "rates",
            {"optim.learning_rate": [1e-2, 1e-4]},
            (Member(4, 0, 1e-2), Member(4, 0, 1e-4)),
        ),
    ],
)
def test_members_are_what_single_runs_would_train(kind, fields, expected):
    config = base_config()
    config.seed, config.optim.learning_rate = 4, 1e-3
    config.update_from_flattened_dict(fields)
    validate(config)
    for same in (config, from_json(to_json(config))):
        assert kind_of_members(same) == kind
        assert members_of(same) == expected


def test_members_begin_as_runs_with_their_seeds():
    config = base_config()
    config.model.features = (4, 8)
    config.ensemble.size = 2
    model, tx = build.create_model_for(config, 2), build.create_tx(config)
    state, keys, rates = build.create_members(config, model, tx, (8, 8, 1))
    for seed in range(2):
        alone = base_config()
        alone.model.features = (4, 8)
        alone.seed = seed
        one, key, rate = build.create_members(alone, model, tx, (8, 8, 1))
        jax.tree.map(lambda x, y, i=seed: np.testing.assert_array_equal(x[i], y), state, one)
        assert keys[seed] == key and rates[seed] == rate
    kernels = state.params["head"]["kernel"]
    assert (kernels[0] != kernels[1]).any()


def some_cases(num_cases):
    found = tuple(cases.Case(f"case_{i}", (f"{i}.nii",), f"{i}_seg.nii") for i in range(num_cases))
    return cases.Dataset("", found, ("b", "c"), LabelCoding((0, 1)))


def test_the_seed_of_a_run_does_not_decide_who_is_tested():
    config = base_config()
    splits = []
    for seed, split_seed in ((0, 0), (1, 0), (0, 1)):
        config.seed, config.split.seed = seed, split_seed
        splits.append(gather.make_split(config, some_cases(20), 0))
    assert splits[0] == splits[1] != splits[2]


def test_folds_of_an_ensemble_are_those_of_single_runs():
    config, alone = base_config(), base_config()
    config.ensemble.folds = 4
    alone.split.num_folds = 4
    validated = []
    for fold in range(4):
        split = gather.make_split(config, some_cases(20), fold)
        alone.split.fold = fold
        assert split == gather.make_split(alone, some_cases(20), fold)
        validated += split["val"]
    assert len(validated) == len(set(validated)) == 20 - len(split["test"])
