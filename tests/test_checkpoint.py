import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxseg import checkpoint, parallel
from jaxseg.config import base_config, to_json
from jaxseg.data.preprocess import Plan
from jaxseg.train_state import TrainState

PLAN = Plan((1.0, 1 / 3, 2.0), ("ct", "zscore"), ((-1.5, 2.0, 0.1, 1 / 7), ()), 1, 0)
DATA = {"class_names": ["background", "é"], "label_values": None, "num_channels": 2, "split": {}}
TX = optax.adamw(1e-3)


def make_state(step):
    key = jax.random.key(step)
    params = {
        "head": {"kernel": jax.random.normal(key, (3, 3, 2)), "bias": jnp.full((2,), 1e-30)},
    }
    stats = {"norm": {"mean": jax.random.normal(jax.random.fold_in(key, 1), (4,))}}
    opt_state = TX.update(params, TX.init(params), params)[1]
    return TrainState(jnp.int32(step), params, stats, opt_state)


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path / "checkpoints")


@pytest.fixture
def reopen(directory):
    """Function that closes the open manager and opens the folder again."""
    managers = []

    def reopen(keep=2):
        for manager in managers:
            checkpoint.close_checkpoints(manager)
        managers[:] = [checkpoint.open_checkpoints(directory, keep=keep)]
        return managers[0]

    yield reopen
    for manager in managers:
        checkpoint.close_checkpoints(manager)


def save(manager, step, val_dice=None):
    checkpoint.save(
        manager,
        step,
        make_state(step),
        config_json=to_json(base_config()),
        plan_json=PLAN.to_json(),
        data=DATA,
        metrics=None if val_dice is None else {"val_dice": val_dice, "val_loss": 1.0},
    )
    manager.wait_until_finished()


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def test_a_restored_state_is_the_saved_one_to_the_bit(reopen):
    manager = reopen()
    save(manager, 3, 0.5)
    save(manager, 7)
    manager = reopen()
    template = parallel.replicate(make_state(0))
    for step in (3, 7):
        restored = checkpoint.restore(manager, step, template)
        assert_equal(restored, make_state(step))
        for leaf, placed in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
            assert leaf.sharding == placed.sharding


def test_saving_goes_on_while_the_state_changes(reopen):
    # The state that was handed over is saved, though its buffers are given away right after.
    manager = reopen()
    state = make_state(1)
    checkpoint.save(
        manager, 1, state, config_json="{}", plan_json="{}", data={}, metrics={"val_dice": 0.0}
    )
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    manager.wait_until_finished()
    assert_equal(checkpoint.restore(manager, 1, make_state(0)), make_state(1))


def test_the_latest_and_the_best_are_kept(reopen):
    manager = reopen(keep=2)
    kept = []
    for step, val_dice in enumerate([0.3, 0.9, 0.5, 0.6, 0.2], start=1):
        save(manager, step, val_dice)
        kept.append(sorted(manager.all_steps()))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    assert manager.best_step() == 2 and manager.latest_step() == 5
    manager = reopen(keep=2)
    assert manager.best_step() == 2 and sorted(manager.all_steps()) == [2, 4, 5]
    save(manager, 6, 0.95)
    assert manager.best_step() == 6 and sorted(manager.all_steps()) == [5, 6]
    assert_equal(checkpoint.restore(manager, 5, make_state(0)), make_state(5))


def test_a_step_that_was_not_evaluated_is_saved_but_never_the_best(reopen):
    manager = reopen(keep=2)
    save(manager, 1)
    assert manager.best_step() is None and manager.latest_step() == 1
    save(manager, 2, 0.4)
    for step in (3, 4, 5):
        save(manager, step)
    assert manager.best_step() == 2
    assert sorted(manager.all_steps()) == [2, 4, 5]
    assert reopen().best_step() == 2


def test_an_undefined_dice_is_never_better_than_a_number(reopen):
    manager = reopen(keep=1)
    save(manager, 1, float("nan"))
    assert manager.best_step() == 1  # there is no other
    save(manager, 2, 0.1)
    save(manager, 3, float("nan"))
    save(manager, 4, 0.05)
    assert manager.best_step() == 2 and sorted(manager.all_steps()) == [2, 4]
    assert reopen(keep=1).best_step() == 2


def test_config_plan_and_data_are_read_back(reopen):
    save(reopen(), 4, 0.5)
    names = ("config", "plan", "data")
    items = ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in names})
    saved = reopen().restore(4, args=items)
    assert json.dumps(saved.config, indent=2, sort_keys=True) == to_json(base_config())
    assert Plan.from_json(json.dumps(saved.plan)) == PLAN
    assert saved.data == DATA


def test_a_new_folder_has_no_checkpoint(reopen):
    manager = reopen()
    assert manager.latest_step() is None and manager.best_step() is None


def test_a_half_written_checkpoint_is_not_seen(reopen, directory, tmp_path):
    save(reopen(), 4, 0.5)
    half = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp-123"
    half.mkdir()
    (half / "state").mkdir()
    manager = reopen()
    assert manager.latest_step() == 4
    save(manager, 8, 0.6)
    assert_equal(checkpoint.restore(manager, 8, make_state(0)), make_state(8))
    assert not half.exists()


def test_another_architecture_is_not_restored(reopen):
    manager = reopen()
    save(manager, 1, 0.5)
    other = make_state(0)
    params = {**other.params, "extra": jnp.zeros(3)}
    with pytest.raises(ValueError, match="extra"):
        checkpoint.restore(manager, 1, other.replace(params=params))
