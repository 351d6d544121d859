"""One run on one device and on four: the same parameters, and the same bits on every device.

The number of CPU devices can not change once JAX has started, so each run is a process of its own:
this file as a script, which writes what it saw as an .npz file.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import parallel
from jaxseg.losses import dice_cross_entropy_loss
from jaxseg.models.unet import UNet
from jaxseg.optim import create_optimizer
from jaxseg.steps import eval_step, train_step
from jaxseg.train_state import TrainState

NUM_STEPS = 5
BATCH_SIZE = 8
MODEL = UNet(3, features=(4, 8), num_convs=1, norm="batch", dropout=0.5)
TX = create_optimizer("adamw", lambda _: 0.01, weight_decay=0.1, clip_norm=1.0)


def make_batch(seed):
    """Noise in an odd size; the valid part differs per example, and one example has none."""
    rng = np.random.default_rng(seed)
    valid = np.zeros((BATCH_SIZE, 9, 7), np.float32)
    for i in range(BATCH_SIZE):
        valid[i, : i + 2, : 7 - i // 2] = i != 5
    return {
        "image": rng.normal(size=(BATCH_SIZE, 9, 7, 2)).astype(np.float32),
        "label": rng.integers(0, 3, (BATCH_SIZE, 9, 7)).astype(np.int32),
        "valid": valid,
    }


def make_state(model):
    """A state of noise that keeps the scale of what passes through."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), make_batch(0)["image"])
    variables = jax.tree.map(fill, shapes)
    params, stats = variables["params"], jax.tree.map(np.abs, variables.get("batch_stats", {}))
    return TrainState(jnp.zeros((), jnp.int32), params, stats, TX.init(params))


def unshard(x):
    """Brings [devices, B per device, ...] back as [B, ...]."""
    x = np.asarray(x)
    return x.reshape(-1, *x.shape[2:])


def differing_leaves(tree):
    """Names of the leaves that are not the same bits on every device."""
    names = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        if len(copies) != jax.device_count() or len(set(copies)) > 1:
            names.append(jax.tree_util.keystr(path))
    return names


def flatten(tree, prefix):
    return {
        prefix + jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def train_and_look(facts):
    """Trains for a few steps, and evaluates."""
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    options = {
        "model": MODEL.clone(axis_name=parallel.AXIS_NAME),
        "loss_fn": dice_cross_entropy_loss,
        "axis_name": parallel.AXIS_NAME,
    }
    step = parallel.pmap_train_step(functools.partial(train_step, tx=TX, **options))
    state = parallel.replicate(make_state(MODEL))
    key = parallel.replicate(jax.random.key(3))
    undeleted, metrics, counts = [], [], []
    for batch in parallel.prefetch_to_device(make_batch(seed) for seed in range(NUM_STEPS)):
        old = state
        state, step_metrics = step(state, batch, key)
        counts.append(len(compilations))
        metrics.append(step_metrics)
        undeleted += [leaf for leaf in jax.tree.leaves(old) if not leaf.is_deleted()]
    facts["differing"] = differing_leaves((state, metrics))
    facts["num_undeleted"] = len(undeleted)
    facts["batch_and_key_live"] = not batch["image"].is_deleted() and not key.is_deleted()
    facts["compilations"] = counts
    facts["loss"] = [float(m["loss"]) for m in metrics]
    facts["grad_norm"] = [float(m["grad_norm"]) for m in metrics]
    facts["step"] = int(state.step)
    facts |= flatten(state.params, "params") | flatten(state.batch_stats, "batch_stats")

    evaluate = parallel.pmap_eval_step(functools.partial(eval_step, **options))
    sums = evaluate(state, parallel.shard(make_batch(99)))
    facts["eval_loss"], facts["eval_count"] = float(sums["loss"]), float(sums["count"])
    return facts


def forget_the_sum(facts):
    """A step that is told of no device axis: every device goes its own way, and nothing is said."""
    model = UNet(3, features=(4,), num_convs=1)
    forgetful = functools.partial(train_step, model=model, loss_fn=dice_cross_entropy_loss, tx=TX)
    state, _ = parallel.pmap_train_step(forgetful)(
        parallel.replicate(make_state(model)), parallel.shard(make_batch(0)), jax.random.key(0)
    )
    facts["differing_when_forgetful"] = differing_leaves(state.params)
    return facts


def spread_a_batch(facts):
    batch = make_batch(0)
    placed = parallel.shard(batch)
    facts["round_trip"] = all(
        np.array_equal(unshard(placed[name]), batch[name])
        and placed[name].dtype == batch[name].dtype
        for name in batch
    )
    shards = placed["image"].addressable_shards
    facts["devices_used"] = len({shard.device for shard in shards})
    facts["part_shapes"] = [shard.data.shape for shard in shards]
    try:
        parallel.shard({"image": np.zeros((6, 2))})
    except ValueError as error:
        facts["error"] = str(error)
    return facts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the runs on 1 and on 4 devices saw."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = {
        n: subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(n), folder / f"{n}.npz"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in (1, 4)
    }
    errors = {n: process.communicate()[1] for n, process in processes.items()}
    assert not any(process.returncode for process in processes.values()), errors
    return {n: dict(np.load(folder / f"{n}.npz")) for n in processes}


def test_four_devices_give_the_parameters_and_statistics_of_one(runs):
    one, four = runs[1], runs[4]
    names = [name for name in one if name.startswith(("params", "batch_stats"))]
    assert len(names) > 10
    for name in names:
        np.testing.assert_allclose(four[name], one[name], rtol=0, atol=1e-5, err_msg=name)


def test_four_devices_give_the_loss_and_gradient_norm_of_one(runs):
    for name in ("loss", "grad_norm"):
        assert len(set(runs[1][name])) == NUM_STEPS
        np.testing.assert_allclose(runs[4][name], runs[1][name], rtol=1e-4)
    assert runs[1]["step"] == runs[4]["step"] == NUM_STEPS


def test_four_devices_give_the_predictions_and_sums_of_one(runs):
    np.testing.assert_allclose(runs[4]["eval_loss"], runs[1]["eval_loss"], rtol=1e-4)
    assert runs[1]["eval_count"] == runs[4]["eval_count"] == BATCH_SIZE - 1


@pytest.mark.parametrize("num_devices", [1, 4])
def test_state_and_metrics_are_the_same_bits_on_every_device(runs, num_devices):
    assert list(runs[num_devices]["differing"]) == []


def test_step_that_forgets_its_sum_is_caught_by_the_same_check(runs):
    assert len(runs[4]["differing_when_forgetful"]) > 0


@pytest.mark.parametrize("num_devices", [1, 4])
def test_old_state_is_given_back_and_batch_and_key_are_not(runs, num_devices):
    assert runs[num_devices]["num_undeleted"] == 0
    assert runs[num_devices]["batch_and_key_live"]


@pytest.mark.parametrize("num_devices", [1, 4])
def test_only_the_first_step_compiles(runs, num_devices):
    counts = runs[num_devices]["compilations"]
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


@pytest.mark.parametrize("num_devices", [1, 4])
def test_batch_is_split_over_all_devices_and_comes_back_whole(runs, num_devices):
    facts = runs[num_devices]
    assert facts["round_trip"]
    assert facts["devices_used"] == num_devices
    part = [1, BATCH_SIZE // num_devices, 9, 7, 2]
    assert facts["part_shapes"].tolist() == [part] * num_devices


def test_batch_that_can_not_be_split_is_refused_with_both_numbers(runs):
    assert "error" not in runs[1]
    message = str(runs[4]["error"])
    assert "a batch of 6 can not be split over 4 devices" in message
    assert "--config.train.batch_size to a multiple of 4" in message


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_batches", [0, 1, 2, 5])
def test_prefetch_keeps_order_and_number_and_is_ahead_by_its_size(size, num_batches):
    per_batch = jax.local_device_count()
    pulled, numbers = [], []

    def batches():
        for number in range(num_batches):
            pulled.append(number)
            yield {"number": np.full(per_batch, number)}

    for count, batch in enumerate(parallel.prefetch_to_device(batches(), size), start=1):
        assert len(pulled) == min(count - 1 + size, num_batches)
        numbers += set(unshard(batch["number"]).tolist())
    assert numbers == list(range(num_batches))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    np.savez(sys.argv[2], **spread_a_batch(forget_the_sum(train_and_look({}))))
