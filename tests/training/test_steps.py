"""The steps against plain `jax.grad`, and what must make no difference to them.

Devices are stood in for by `vmap` with an axis name: the same collectives, on one device, and
`out_axes=None` is refused for whatever differs between them. Real ones: `test_parallel.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseg.models.blocks import Dropout, Norm
from jaxseg.models.unet import UNet
from jaxseg.training.checksum import checksum
from jaxseg.training.losses import dice_cross_entropy_loss
from jaxseg.training.optim import create_optimizer
from jaxseg.training.state import TrainState
from jaxseg.training.steps import eval_step, over_members, train_step

NUM_CLASSES = 3
LEARNING_RATE = 0.5
CLIP_NORM = 0.1
TX = create_optimizer("sgd", lambda _: LEARNING_RATE, momentum=0.0, clip_norm=CLIP_NORM)


class Pixelwise(nn.Module):
    """Two 1x1 layers: the smallest network with a normalisation and dropout."""

    norm: str = "instance"
    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Dense(8, name="first")(image)
        x = Norm(self.norm, self.axis_name, name="norm")(x, train=train)
        x = Dropout(self.dropout, self.axis_name)(jnp.tanh(x), train=train)
        return nn.Dense(NUM_CLASSES, name="last")(x)


def make_batch(batch_size=8, seed=0):
    """Noise with uneven `valid`: example i misses i columns."""
    rng = np.random.default_rng(seed)
    valid = np.ones((batch_size, 6, 10), np.float32)
    for i in range(batch_size):
        valid[i, :, :i] = 0
    return {
        "image": rng.normal(size=(batch_size, 6, 10, 2)).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, (batch_size, 6, 10)).astype(np.int32),
        "valid": valid,
    }


def with_fillers(batch, number):
    """Puts examples without a valid voxel in front; what they hold must not matter."""
    filler = make_batch(number, seed=7)
    filler = filler | {"image": 50 * filler["image"], "valid": np.zeros_like(filler["valid"])}
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), filler, batch)


def make_state(model, tx=TX, image_shape=(6, 10, 2)):
    """A state of noise that keeps the scale of what passes through."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *image_shape), np.float32))
    variables = jax.tree.map(fill, shapes)
    stats = jax.tree.map(np.abs, variables.get("batch_stats", {}))
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))


def step_fn(model, tx=TX, **options):
    return functools.partial(
        train_step, model=model, loss_fn=dice_cross_entropy_loss, tx=tx, **options
    )


@functools.cache
def compiled_step(model, num_devices, accumulate_steps):
    """The compiled step, spread over stand-ins for devices, and a list that grows by each trace."""
    axis_name = None if num_devices == 1 else "batch"
    model = model.clone(axis_name=axis_name)
    step = step_fn(model, axis_name=axis_name, accumulate_steps=accumulate_steps)
    if num_devices > 1:
        step = jax.vmap(step, in_axes=(None, 0, None), out_axes=None, axis_name=axis_name)
    traces = []

    def counted(state, batch, key):
        traces.append(batch["image"].shape)
        return step(state, batch, key)

    return jax.jit(counted), traces


def run(model, batch, num_devices=1, accumulate_steps=1, state=None, seed=0):
    """One compiled step from `make_state`, or from `state`."""
    step, _ = compiled_step(model, num_devices, accumulate_steps)
    if num_devices > 1:
        batch = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
    return step(state or make_state(model), batch, jax.random.key(seed))


def assert_same(result, expected, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, result, expected)


@pytest.fixture(scope="module")
def plain_gradient():
    """A batch with three fillers, and the mean loss over the rest with its gradient."""
    model, batch = Pixelwise(), with_fillers(make_batch(5), 3)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        logits = model.apply({"params": params}, batch["image"])
        return dice_cross_entropy_loss(logits, batch["label"], valid=batch["valid"])[3:].mean()

    return batch, *mean_loss(make_state(model).params)


@pytest.mark.parametrize(
    ("num_devices", "accumulate_steps"), [(1, 1), (1, 2), (1, 4), (4, 1), (2, 2)]
)
def test_step_follows_the_mean_over_examples_that_count_however_they_are_spread(
    plain_gradient, num_devices, accumulate_steps
):
    batch, loss, grads = plain_gradient
    params = make_state(Pixelwise()).params
    grad_norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert grad_norm > 2 * CLIP_NORM

    new_state, metrics = run(Pixelwise(), batch, num_devices, accumulate_steps)
    assert set(metrics) == {"loss", "grad_norm", "batch_checksum", "params_checksum"}
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], grad_norm, rtol=1e-4)
    rate = LEARNING_RATE * CLIP_NORM / grad_norm
    expected = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    assert_same(new_state.params, expected)
    assert new_state.step == 1


def test_batch_norm_and_dropout_do_not_depend_on_devices_while_accumulating():
    model, batch = Pixelwise(norm="batch", dropout=0.5), make_batch()
    (expected, expected_metrics), (state, metrics) = (
        run(model, batch, num_devices, accumulate_steps=2) for num_devices in (1, 4)
    )
    assert_same(state, expected)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    assert metrics["batch_checksum"] == expected_metrics["batch_checksum"]


def test_running_statistics_follow_the_accumulated_parts_in_turn():
    model, batch = Pixelwise(norm="batch", dropout=0.5), make_batch()
    state = make_state(model)
    first = state.params["first"]
    x = batch["image"].astype(np.float64) @ first["kernel"] + first["bias"]
    stats = state.batch_stats["norm"]
    mean, var = stats["mean"], stats["var"]
    for part in range(2):
        mean = 0.9 * mean + 0.1 * x[part::2].mean((0, 1, 2))
        var = 0.9 * var + 0.1 * x[part::2].var((0, 1, 2))
    new_state, _ = run(model, batch, 1, accumulate_steps=2)
    new_stats = new_state.batch_stats["norm"]
    np.testing.assert_allclose(new_stats["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new_stats["var"], var, rtol=1e-4, atol=1e-5)


def test_step_without_its_sum_over_devices_is_refused_by_the_stand_in():
    forgetful = jax.vmap(
        step_fn(Pixelwise()), in_axes=(None, 0, None), out_axes=None, axis_name="batch"
    )
    parts = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), make_batch())
    with pytest.raises(ValueError, match="out_axes"):
        jax.eval_shape(forgetful, make_state(Pixelwise()), parts, jax.random.key(0))


def test_batch_of_fillers_alone_moves_nothing():
    batch = make_batch()
    batch["valid"][:] = 0
    new_state, metrics = run(Pixelwise(), batch)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, new_state.params, make_state(Pixelwise()).params)


@pytest.mark.parametrize("virtual_shards", [1, 4, 8])
def test_virtual_shards_give_the_mean_over_examples_too(plain_gradient, virtual_shards):
    batch, loss, grads = plain_gradient
    state = make_state(Pixelwise())
    step = jax.jit(functools.partial(step_fn(Pixelwise()), virtual_shards=virtual_shards))
    new_state, metrics = step(state, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    grad_norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], grad_norm, rtol=1e-4)
    rate = LEARNING_RATE * CLIP_NORM / grad_norm
    expected = jax.tree.map(lambda p, g: p - rate * g, state.params, grads)
    assert_same(new_state.params, expected)


def test_every_virtual_shard_drops_other_channels():
    # Four shards of the same two examples: one mask for all would give one shard's loss.
    half = jax.tree.map(lambda x: np.concatenate([x] * 4), make_batch(2))
    model = Pixelwise(dropout=0.5)
    losses = {
        shards: jax.jit(functools.partial(step_fn(model), virtual_shards=shards))(
            make_state(model), half, jax.random.key(0)
        )[1]["loss"]
        for shards in (1, 4)
    }
    alone = jax.tree.map(lambda x: x[:2], half)
    one_shard = run(model, alone)[1]["loss"]
    assert abs(losses[4] - one_shard) > 1e-3
    assert abs(losses[4] - losses[1]) > 1e-3


def test_the_learning_rate_scales_the_update():
    model, batch = Pixelwise(), make_batch()
    start = make_state(model)
    moved = {
        rate: jax.jit(step_fn(model))(start, batch, jax.random.key(0), rate)[0].params
        for rate in (1.0, 0.25)
    }
    expected = jax.tree.map(lambda p, new: p + 0.25 * (new - p), start.params, moved[1.0])
    assert_same(moved[0.25], expected, rtol=1e-5, atol=1e-7)


def test_checksum_is_the_sum_of_the_bits_by_place():
    tree = {"a": np.float32([1.5, -2.0]), "b": np.int32([[-1], [7]])}
    expected = 0
    for leaf in tree.values():
        for place, word in np.ndenumerate(leaf.view(np.uint32)):
            factor = 1 + sum(2 * p * 2654435761 ** (k + 1) for k, p in enumerate(place))
            expected += factor * int(word)
    assert int(checksum(tree)) == expected % 2**32
    few = np.uint8([3, 250])  # of one byte
    assert int(checksum(few)) == int(checksum(few.astype(np.uint32)))


def test_checksum_sees_what_was_exchanged_and_adds_up_over_parts():
    a = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    whole = int(checksum(a))
    assert int(checksum(a[::-1])) != whole
    assert int(checksum(a.swapaxes(0, 1).reshape(a.shape))) != whole
    one_up, one_down = a.copy(), a.copy()
    words = one_up.view(np.uint32)
    words[0, 0, 0] += 1
    words[1, 0, 0] -= 1
    assert int(checksum(one_up)) != int(checksum(one_down)) == whole
    parts = [(slice(i, i + 2), slice(j, j + 3)) for i in (0, 2) for j in (0, 3)]
    summed = sum(int(checksum(a[i, j], (i.start, j.start))) for i, j in parts)
    assert summed % 2**32 == whole


@pytest.mark.parametrize("by", ["map", "vmap"])
def test_members_are_stepped_apart(by):
    model = Pixelwise()
    states = [make_state(model), jax.tree.map(lambda x: 2 * x, make_state(model))]
    batches, keys = [make_batch(seed=0), make_batch(seed=1)], jax.random.split(jax.random.key(0))
    rates = np.float32([1.0, 0.5])

    def stack(trees):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    step = step_fn(model)
    together = jax.jit(over_members(step, by))(stack(states), stack(batches), keys, rates)
    alone = [jax.jit(step)(*one) for one in zip(states, batches, keys, rates, strict=True)]
    new_state, metrics = stack(alone)
    assert_same(together[0], new_state)
    np.testing.assert_allclose(together[1]["loss"], metrics["loss"], rtol=1e-5)
    assert metrics["loss"][0] != metrics["loss"][1]


def test_loss_that_is_not_finite_is_not_hidden():
    batch = make_batch()
    batch["image"][3, 2, 9] = np.nan
    _, metrics = run(Pixelwise(), batch)
    assert np.isnan(metrics["loss"])


def test_many_steps_are_traced_once():
    state = None
    for seed in range(4):
        state, _ = run(Pixelwise(), make_batch(seed=seed), state=state)
    assert state.step == 4
    _, traces = compiled_step(Pixelwise(), 1, 1)
    assert traces == [(8, 6, 10, 2)]


def test_step_does_the_same_uncompiled():
    def squared_error(logits, label, *, valid):
        return jnp.sum((logits - label[..., None]) ** 2 * valid[..., None], axis=(1, 2, 3))

    model = Pixelwise(norm="none")
    step = functools.partial(train_step, model=model, loss_fn=squared_error, tx=TX)
    args = make_state(model), make_batch(), jax.random.key(0)
    (state, metrics), (expected, expected_metrics) = jax.jit(step)(*args), step(*args)
    assert_same(state, expected)
    assert_same(metrics["loss"], expected_metrics["loss"])
    assert metrics["batch_checksum"] == expected_metrics["batch_checksum"]


def test_dropout_is_fixed_by_key_and_step():
    model, batch = Pixelwise(norm="batch", dropout=0.5), make_batch()

    def loss(step_number, seed):
        state = make_state(model).replace(step=jnp.int32(step_number))
        _, metrics = run(model, batch, accumulate_steps=2, state=state, seed=seed)
        return float(metrics["loss"])

    assert loss(0, seed=0) == loss(0, seed=0)
    assert len({loss(0, seed=0), loss(1, seed=0), loss(0, seed=1)}) == 3


@pytest.mark.parametrize("num_devices", [1, 4])
def test_evaluation_sums_over_examples_that_count(num_devices):
    model, batch = Pixelwise(norm="batch", dropout=0.5), make_batch(5)
    state = make_state(model)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = np.asarray(model.apply(variables, batch["image"]), np.float64)
    losses = dice_cross_entropy_loss(np.float32(logits), batch["label"], valid=batch["valid"])

    batch = with_fillers(batch, 3)
    axis_name = None
    if num_devices > 1:
        axis_name = "batch"
        batch = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
    step = functools.partial(
        eval_step,
        model=model.clone(axis_name=axis_name),
        loss_fn=dice_cross_entropy_loss,
        axis_name=axis_name,
    )
    if num_devices > 1:
        step = jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name=axis_name)
    sums = jax.jit(step)(state, batch)
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)
    assert sums["count"] == 5


def test_unet_learns_squares_and_repeats_itself():
    rng = np.random.default_rng(0)
    label = np.zeros((4, 16, 16), np.int32)
    for example, (x, y) in zip(label, rng.integers(1, 9, (4, 2)), strict=True):
        example[x : x + 6, y : y + 6] = 1
    image = (label + rng.normal(0, 0.3, label.shape))[..., None].astype(np.float32)
    batch = {"image": image, "label": label, "valid": np.ones(label.shape, np.float32)}

    model, tx = UNet(2, features=(4, 8), num_convs=1), optax.adam(0.03)
    step = jax.jit(step_fn(model, tx))

    def losses():
        state, values = make_state(model, tx, (16, 16, 1)), []
        for _ in range(40):
            state, metrics = step(state, batch, jax.random.key(1))
            values.append(float(metrics["loss"]))
        return values

    first = losses()
    assert first[-1] < 0.2 * first[0]
    assert first == losses()


def test_a_step_that_augments_is_one_on_what_was_augmented():
    batch = make_batch() | {"example": np.arange(8, dtype=np.int32)[:, np.newaxis]}
    key, seen = jax.random.key(5), []

    def augment_fn(part, key):
        seen.append(key)
        noise = jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n[0]), (6, 10, 2)))
        image = part["image"] + noise(part["example"])
        return {"image": image, "label": part["label"], "valid": part["valid"]}

    model = Pixelwise()
    state = make_state(model)
    options = {"model": model, "loss_fn": dice_cross_entropy_loss, "tx": TX}
    augmented, metrics = train_step(state, batch, key, augment_fn=augment_fn, **options)
    plain, expected = train_step(state, augment_fn(batch, seen[0]), key, **options)
    for one, other in zip(jax.tree.leaves(augmented), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (
        metrics["loss"] == expected["loss"] != train_step(state, batch, key, **options)[1]["loss"]
    )
    # The draws are of the run and the example, whatever the step and the part.
    parts, _ = train_step(
        state.replace(step=state.step + 3),
        batch,
        key,
        augment_fn=augment_fn,
        accumulate_steps=2,
        **options,
    )
    np.testing.assert_allclose(
        parts.params["last"]["kernel"], plain.params["last"]["kernel"], rtol=1e-5, atol=1e-6
    )
