"""One run on 1, 2, 4 and 8 devices: the same parameters, and the same bits on every device.

The number of CPU devices can not change once JAX has started, so each run is a process of its own:
this file as a script, which writes what it saw as an .npz file, begun where imports are done.
"""

import concurrent.futures
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import parallel
from jaxseg.config import base_config, transforms_of
from jaxseg.models.unet import UNet
from jaxseg.training.augment import augment_batch
from jaxseg.training.losses import dice_cross_entropy_loss
from jaxseg.training.optim import create_optimizer
from jaxseg.training.state import TrainState
from jaxseg.training.steps import eval_step, over_members, train_step

pytestmark = pytest.mark.multiprocess

COUNTS = (1, 2, 4, 8)
FEW_STEPS = 4
SEEDS = (0, 1)
TOLERANCE = 2e-5  # of a parameter, after up to 50 steps of 0.01
NUM_STEPS = 50
BATCH_SIZE = 8
MODEL = UNet(3, features=(4, 8), num_convs=1, norm="batch", dropout=0.5)
STRICT_MODEL = UNet(3, features=(4,), num_convs=1, dropout=0.5)
AUGMENTED = {"patch_size": (6, 5), "params": transforms_of(base_config())}
TX = create_optimizer("adamw", lambda _: 1.0, weight_decay=0.1, clip_norm=1.0)
RATE = np.float32(0.01)


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


def regions_of(batch, number):
    """A batch as of regions, with labels as they are stored and the examples' numbers."""
    examples = number * BATCH_SIZE + np.arange(BATCH_SIZE, dtype=np.int32)
    return batch | {"label": batch["label"].astype(np.uint8), "example": examples[:, np.newaxis]}


def make_state(model, seed=0):
    """A state of noise that keeps the scale of what passes through."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), make_batch(0)["image"])
    variables = jax.tree.map(fill, shapes)
    params, stats = variables["params"], jax.tree.map(np.abs, variables.get("batch_stats", {}))
    # On the host, since a step takes the memory of what it is given.
    return jax.device_get(TrainState(np.int32(0), params, stats, TX.init(params)))


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


def mapped_step(layout, model=MODEL, by=None, **options):
    """A training step over all devices and, if told how, over members."""
    axes = {"axis_name": parallel.AXIS_NAME}
    inside = model if "virtual_shards" in options else model.clone(**axes)
    step = functools.partial(
        train_step,
        model=inside,
        tx=TX,
        **axes,
        **({"loss_fn": dice_cross_entropy_loss} | options),
    )
    return parallel.map_train_step(over_members(step, by) if by else step, layout)


def train_and_look(facts):
    """Trains, and evaluates."""
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    layout = parallel.create_layout()
    step = mapped_step(layout)
    state = parallel.place(make_state(MODEL), layout)
    key, rate = parallel.place((jax.random.key(3), RATE), layout)
    undeleted, metrics, counts = [], [], []
    batches = (make_batch(seed) for seed in range(NUM_STEPS))
    for batch in parallel.prefetch_to_device(batches, layout):
        old = state
        state, step_metrics = step(state, batch, key, rate)
        counts.append(len(compilations))
        metrics.append(step_metrics)
        undeleted += [leaf for leaf in jax.tree.leaves(old) if not leaf.is_deleted()]
    facts["differing"] = differing_leaves((state, metrics))
    facts["num_undeleted"] = len(undeleted)
    facts["batch_and_key_live"] = not batch["image"].is_deleted() and not key.is_deleted()
    facts["compilations"] = counts
    for name in metrics[0]:
        facts[name] = [np.asarray(m[name]) for m in metrics]
    facts["step"] = int(state.step)
    facts |= flatten(state.params, "params") | flatten(state.batch_stats, "batch_stats")

    axes = {"axis_name": parallel.AXIS_NAME}
    evaluate = functools.partial(
        eval_step, model=MODEL.clone(**axes), loss_fn=dice_cross_entropy_loss, **axes
    )
    mapped = parallel.map_eval_step(evaluate, layout)
    sums = mapped(state, parallel.shard(make_batch(99), layout))
    facts["eval_loss"], facts["eval_count"] = float(sums["loss"]), float(sums["count"])
    return facts


def train_for(num_steps, layout, step, states, seeds, given=lambda batch, number: batch):
    """State of one member, or of several stacked, after some steps on each seed's batches."""

    def batch_of(number):
        batches = [given(make_batch(1000 * seed + number), number) for seed in seeds]
        return stacked(batches) if layout.has_members else batches[0]

    keys = [jax.random.key(seed) for seed in seeds]
    rates = [RATE * (1 + seed) for seed in seeds]
    several = (stacked(states), jnp.stack(keys), jnp.stack(rates))
    alone = (states[0], keys[0], rates[0])
    state, key, rate = parallel.place(several if layout.has_members else alone, layout)
    for batch in parallel.prefetch_to_device(map(batch_of, range(num_steps)), layout):
        state, _ = step(state, batch, key, rate)
    return jax.device_get(state)


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def differing(tree, other):
    """Number of leaves of two trees that are not the same bits."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return sum(np.asarray(x).tobytes() != np.asarray(y).tobytes() for x, y in pairs)


def compare_ways(facts):
    """Sums in one order, by pmap and by shard_map; two members in one program, and each alone."""
    strict = {"model": STRICT_MODEL, "virtual_shards": 8}
    starts = [make_state(STRICT_MODEL, seed) for seed in SEEDS]
    pmap, shard_map = (parallel.create_layout(mode) for mode in ("pmap", "shard_map"))
    alone = mapped_step(pmap, **strict)
    facts |= flatten(train_for(NUM_STEPS, pmap, alone, starts, [0]), "strict")

    few = [train_for(FEW_STEPS, pmap, alone, [starts[seed]], [seed]) for seed in SEEDS]
    by_shard_map = train_for(FEW_STEPS, shard_map, mapped_step(shard_map, **strict), starts, [0])
    facts["ways_differ_in"] = differing(few[0], by_shard_map)

    augmented = strict | {"augment_fn": functools.partial(augment_batch, **AUGMENTED)}
    by_pmap, by_shard_map = (
        train_for(FEW_STEPS, layout, mapped_step(layout, **augmented), starts, [0], regions_of)
        for layout in (pmap, shard_map)
    )
    facts |= flatten(by_pmap.params, "augmented")
    facts["augmented_ways_differ_in"] = differing(by_pmap, by_shard_map)
    if jax.device_count() > 2:
        return facts
    # One device takes the members by turns; of two, each has its own.
    layout = parallel.create_layout("shard_map", len(SEEDS))
    together = train_for(FEW_STEPS, layout, mapped_step(layout, by="map", **strict), starts, SEEDS)
    facts["members_differ_in"] = differing(stacked(few), together)
    facts["devices_along_members"] = layout.mesh.shape[parallel.MEMBER_AXIS]
    return facts


def train_members_in_any_order(facts):
    """Members by turns and in one sweep, and alone, where sums may be taken in any order."""
    one, several = (parallel.create_layout(num_members=n) for n in (1, len(SEEDS)))
    starts = [make_state(STRICT_MODEL, seed) for seed in SEEDS]
    step = mapped_step(one, STRICT_MODEL)
    alone = stacked([train_for(FEW_STEPS, one, step, [starts[s]], [s]) for s in SEEDS])
    for by in ("map", "vmap"):
        step = mapped_step(several, STRICT_MODEL, by)
        together = train_for(FEW_STEPS, several, step, starts, SEEDS)
        errors = jax.tree.map(
            lambda x, y: np.abs(x - y).max(initial=0), alone.params, together.params
        )
        facts[f"{by} error"] = max(jax.tree.leaves(errors))
    return facts


def train_on_dice_of_the_batch(facts):
    """A step whose Dice is of all examples, on whichever device they are."""
    layout = parallel.create_layout()
    loss_fn = functools.partial(
        dice_cross_entropy_loss, over_batch=True, batch_axis=parallel.AXIS_NAME
    )
    step = mapped_step(layout, STRICT_MODEL.clone(dropout=0.0), loss_fn=loss_fn)
    state = train_for(FEW_STEPS, layout, step, [make_state(STRICT_MODEL)], [0])
    return facts | flatten(state.params, "of the batch")


def forget_the_sum(facts):
    """A step that is told of no device axis: every device goes its own way, and nothing is said."""
    layout = parallel.create_layout()
    model = UNet(3, features=(4,), num_convs=1)
    forgetful = functools.partial(train_step, model=model, loss_fn=dice_cross_entropy_loss, tx=TX)
    state, _ = parallel.map_train_step(forgetful, layout)(
        parallel.place(make_state(model), layout),
        parallel.shard(make_batch(0), layout),
        jax.random.key(0),
        RATE,
    )
    facts["differing_when_forgetful"] = differing_leaves(state.params)
    return facts


def spread_a_batch(facts):
    batch, layout = make_batch(0), parallel.create_layout()
    placed = parallel.shard(batch, layout)
    facts["round_trip"] = all(
        np.array_equal(unshard(placed[name]), batch[name])
        and placed[name].dtype == batch[name].dtype
        for name in batch
    )
    shards = placed["image"].addressable_shards
    facts["devices_used"] = len({shard.device for shard in shards})
    facts["part_shapes"] = [shard.data.shape for shard in shards]
    try:
        parallel.shard({"image": np.zeros((6, 2))}, layout)
    except ValueError as error:
        facts["error"] = str(error)
    return facts


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_script, quick):
    """What the runs on 1, 2, 4 and 8 devices saw."""
    folder = tmp_path_factory.mktemp("runs")
    # XLA's sums on CPU depend on the size of its pool of threads: cores, or devices if more.
    environment = {"JAX_PLATFORMS": "cpu", "NPROC": str(max(COUNTS))}
    # Where every bit is to be the same it is compiled as a user's process does.
    flags = {"strict": {}, "loose": quick}

    def run(count, kind):
        path = folder / f"{count}{kind}.npz"
        own = {"jax_compilation_cache_dir": None}  # each compiles for itself
        run_script(__file__, count, kind, path, settings=own, **environment, **flags[kind])
        return count, dict(np.load(path))

    seen = {count: {} for count in COUNTS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for count, facts in pool.map(run, COUNTS * 2, ["strict"] * 4 + ["loose"] * 4):
            seen[count] |= facts
    return seen


def names_of(facts, *prefixes, at_least=11):
    names = [name for name in facts if name.startswith(prefixes)]
    assert len(names) >= at_least
    return names


@pytest.mark.parametrize("num_devices", COUNTS[1:])
def test_fifty_steps_on_many_devices_give_the_parameters_and_statistics_of_one(runs, num_devices):
    one, many = runs[1], runs[num_devices]
    for name in names_of(one, "params[", "batch_stats["):
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=TOLERANCE, err_msg=name)
    assert one["step"] == many["step"] == NUM_STEPS


@pytest.mark.parametrize("num_devices", COUNTS[1:])
def test_many_devices_see_the_batches_of_one_and_give_its_losses(runs, num_devices):
    one, many = runs[1], runs[num_devices]
    assert len(set(one["batch_checksum"].tolist())) == NUM_STEPS
    assert many["batch_checksum"].tolist() == one["batch_checksum"].tolist()
    for name in ("loss", "grad_norm"):
        assert len(set(one[name].tolist())) == NUM_STEPS
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)


@pytest.mark.parametrize("num_devices", COUNTS[1:])
def test_many_devices_give_the_predictions_and_sums_of_one(runs, num_devices):
    one, many = runs[1], runs[num_devices]
    np.testing.assert_allclose(many["eval_loss"], one["eval_loss"], rtol=1e-5)
    assert one["eval_count"] == many["eval_count"] == BATCH_SIZE - 1


@pytest.mark.parametrize("num_devices", COUNTS[1:])
def test_dice_of_the_batch_is_that_of_all_devices(runs, num_devices):
    one, many = runs[1], runs[num_devices]
    for name in names_of(one, "of the batch", at_least=5):
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("num_devices", COUNTS[1:])
def test_sums_in_one_order_give_the_same_bits_on_any_number_of_devices(runs, num_devices):
    one, many = runs[1], runs[num_devices]
    for name in names_of(one, "strict", at_least=5):
        assert many[name].tobytes() == one[name].tobytes(), name


@pytest.mark.parametrize("num_devices", COUNTS[1:])
def test_augmented_on_the_devices_bits_are_the_same_too(runs, num_devices):
    one, many = runs[1], runs[num_devices]
    for name in names_of(one, "augmented[", "augmented.", at_least=5):
        assert many[name].tobytes() == one[name].tobytes(), name
    assert one["augmented_ways_differ_in"] == many["augmented_ways_differ_in"] == 0


def test_without_that_order_the_bits_differ(runs):
    names = names_of(runs[1], "params[")
    assert any(runs[8][name].tobytes() != runs[1][name].tobytes() for name in names)


@pytest.mark.parametrize("num_devices", COUNTS)
def test_pmap_and_shard_map_give_the_same_bits(runs, num_devices):
    assert runs[num_devices]["ways_differ_in"] == 0


@pytest.mark.parametrize("num_devices", [1, 2])
def test_members_in_one_program_are_to_the_bit_those_trained_alone(runs, num_devices):
    assert runs[num_devices]["members_differ_in"] == 0
    assert runs[num_devices]["devices_along_members"] == num_devices


@pytest.mark.parametrize("by", ["map", "vmap"])
def test_members_summed_in_any_order_are_nearly_those_trained_alone(runs, by):
    assert runs[1][f"{by} error"] < TOLERANCE


@pytest.mark.parametrize("num_devices", COUNTS)
def test_state_and_metrics_are_the_same_bits_on_every_device(runs, num_devices):
    assert list(runs[num_devices]["differing"]) == []


def test_step_that_forgets_its_sum_is_caught_by_the_same_check(runs):
    assert len(runs[4]["differing_when_forgetful"]) > 0


@pytest.mark.parametrize("num_devices", COUNTS)
def test_old_state_is_given_back_and_batch_and_key_are_not(runs, num_devices):
    assert runs[num_devices]["num_undeleted"] == 0
    assert runs[num_devices]["batch_and_key_live"]


@pytest.mark.parametrize("num_devices", COUNTS)
def test_only_the_first_step_compiles(runs, num_devices):
    counts = runs[num_devices]["compilations"]
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


@pytest.mark.parametrize("num_devices", COUNTS)
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

    layout = parallel.create_layout()
    for count, batch in enumerate(parallel.prefetch_to_device(batches(), layout, size), start=1):
        assert len(pulled) == min(count - 1 + size, num_batches)
        numbers += set(unshard(batch["number"]).tolist())
    assert numbers == list(range(num_batches))


if __name__ == "__main__":
    count, kind, path = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(count))
    if kind == "strict":
        facts = compare_ways({})
    else:
        facts = train_on_dice_of_the_batch(spread_a_batch(train_and_look({})))
        if count == "1":
            facts = train_members_in_any_order(facts)
        if count == "4":
            facts = forget_the_sum(facts)
    np.savez(path, **facts)
