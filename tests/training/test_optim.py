"""Schedules and optimisers against hand computation and a NumPy re-implementation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseg.models.registry import create_model
from jaxseg.run import checkpoint
from jaxseg.training.optim import create_optimizer, create_schedule
from jaxseg.training.state import TrainState

LEARNING_RATE = 0.2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 1, 50: 1, 100: 1}),
        ("polynomial", {0: 1, 25: 0.75**0.9, 50: 0.5**0.9, 99: 0.01**0.9, 100: 0}),
        ("cosine", {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0}),
    ],
)
def test_schedule_without_warm_up_by_hand(name, expected):
    schedule = create_schedule(name, learning_rate=LEARNING_RATE, num_steps=100)
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), LEARNING_RATE * share, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [("constant", 1, 1), ("polynomial", 0.5**0.9, 0), ("cosine", 0.5, 0)],
)
def test_schedule_with_warm_up_rises_to_the_highest_value_and_ends_with_the_run(name, middle, end):
    schedule = create_schedule(name, learning_rate=LEARNING_RATE, num_steps=100, warmup_steps=20)
    expected = {0: 0, 5: 0.25, 19: 0.95, 20: 1, 60: middle, 100: end}
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), LEARNING_RATE * share, rtol=1e-5, atol=1e-8)


def test_unknown_schedule_is_an_error():
    with pytest.raises(KeyError, match="linear"):
        create_schedule("linear", learning_rate=1.0, num_steps=10)


def example():
    """Parameters, and gradients of two steps: the first one longer than 1, the second shorter."""
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, 3, 2, 4)),
        "bias": rng.normal(size=4),
        "scale": rng.normal(size=4),
    }
    grads = [
        {name: size * rng.normal(size=p.shape) for name, p in params.items()}
        for size in (2.0, 0.01)
    ]
    return params, grads


def clip(grads, clip_norm):
    norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
    return {name: g * min(1, clip_norm / norm) for name, g in grads.items()}


def nesterov_in_numpy(params, steps, schedule, weight_decay, momentum, clip_norm):
    velocity = {name: 0.0 for name in params}
    for count, grads in enumerate(steps):
        for name, grad in clip(grads, clip_norm).items():
            if name == "kernel":
                grad = grad + weight_decay * params[name]
            velocity[name] = grad + momentum * velocity[name]
            update = grad + momentum * velocity[name]
            params = params | {name: params[name] - schedule[count] * update}
    return params


def adamw_in_numpy(params, steps, schedule, weight_decay, clip_norm, b1=0.9, b2=0.999, eps=1e-8):
    mean = {name: 0.0 for name in params}
    square = {name: 0.0 for name in params}
    for count, grads in enumerate(steps):
        for name, grad in clip(grads, clip_norm).items():
            mean[name] = b1 * mean[name] + (1 - b1) * grad
            square[name] = b2 * square[name] + (1 - b2) * grad**2
            update = (mean[name] / (1 - b1 ** (count + 1))) / (
                np.sqrt(square[name] / (1 - b2 ** (count + 1))) + eps
            )
            if name == "kernel":
                update = update + weight_decay * params[name]
            params = params | {name: params[name] - schedule[count] * update}
    return params


def muon_in_numpy(params, steps, schedule, weight_decay, clip_norm, beta=0.95):
    """Kernels by their singular values, which Newton and Schulz's iteration moves one by one."""
    others = {name: param for name, param in params.items() if name != "kernel"}
    clipped = [clip(grads, clip_norm) for grads in steps]
    without = [{name: grads[name] for name in others} for grads in clipped]
    after = adamw_in_numpy(others, without, schedule, weight_decay, np.inf)
    if "kernel" not in params:
        return after
    kernel, mean = params["kernel"], 0.0
    for count, grads in enumerate(clipped, start=1):
        grad = grads["kernel"]
        mean = beta * mean + (1 - beta) * grad
        ahead = beta * mean / (1 - beta ** (count + 1)) + (1 - beta) * grad / (1 - beta**count)
        matrix = ahead.reshape(-1, ahead.shape[-1])
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        values = values / np.sqrt(np.sum(values**2))
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        orthogonal = ((left * values) @ right).reshape(kernel.shape)
        update = 0.2 * math.sqrt(max(matrix.shape)) * orthogonal + weight_decay * kernel
        kernel = kernel - schedule[count - 1] * update
    return after | {"kernel": kernel}


# XLA's own choice, which conftest gives up: here every bit counts, those of tiny numbers too.
AS_FOR_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def run(tx, params, steps):
    @functools.partial(jax.jit, compiler_options=AS_FOR_USERS)
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(np.float32, params)
    opt_state = tx.init(params)
    for grads in steps:
        params, opt_state = step(params, opt_state, jax.tree.map(np.float32, grads))
    return params


def polynomial():
    schedule = create_schedule("polynomial", learning_rate=LEARNING_RATE, num_steps=4)
    return schedule, [LEARNING_RATE * (1 - count / 4) ** 0.9 for count in range(2)]


def assert_close(params, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_sgd_is_nesterov_with_clipping_before_decay():
    params, steps = example()
    schedule, values = polynomial()
    tx = create_optimizer("sgd", schedule, weight_decay=0.3, momentum=0.9, clip_norm=1.0)
    expected = nesterov_in_numpy(params, steps, values, 0.3, 0.9, 1.0)
    assert_close(run(tx, params, steps), expected)


def test_adamw_decays_apart_from_the_gradient():
    params, steps = example()
    schedule, values = polynomial()
    tx = create_optimizer("adamw", schedule, weight_decay=0.3, clip_norm=1.0)
    assert_close(run(tx, params, steps), adamw_in_numpy(params, steps, values, 0.3, 1.0))


def test_muon_makes_the_momentum_of_kernels_orthogonal_and_leaves_the_rest_to_adam():
    params, steps = longer_example()
    schedule = create_schedule("polynomial", learning_rate=LEARNING_RATE, num_steps=10)
    values = [LEARNING_RATE * (1 - count / 10) ** 0.9 for count in range(5)]
    tx = create_optimizer("muon", schedule, weight_decay=0.3, clip_norm=1.0)
    after = run(tx, params, steps)
    assert_close(after, muon_in_numpy(params, steps, values, 0.3, 1.0))


def test_updates_of_muon_are_as_large_as_those_of_adamw():
    rng = np.random.default_rng(0)
    for shape in ((3, 3, 3, 16, 32), (2, 2, 64, 8), (1, 1, 4, 48)):
        params = {"kernel": np.zeros(shape, np.float32)}
        grads = {"kernel": rng.normal(size=shape)}
        after = run(create_optimizer("muon", lambda _: 1.0), params, [grads])
        # The iteration leaves singular values between 0.7 and 1.2.
        assert np.sqrt(np.mean(after["kernel"] ** 2)) == pytest.approx(0.2, rel=0.2)


# Nesterov's first step is 1 + momentum times the gradient, and so is its decay.
@pytest.mark.parametrize(
    ("name", "factor"),
    [("sgd", 1 - 0.5 * 0.1 * 1.9), ("adamw", 1 - 0.5 * 0.1), ("muon", 1 - 0.5 * 0.1)],
)
def test_without_gradient_kernels_decay_and_all_else_stays(name, factor):
    params, _ = example()
    zeros = jax.tree.map(np.zeros_like, params)
    tx = create_optimizer(name, lambda _: 0.5, weight_decay=0.1, momentum=0.9)
    after = run(tx, params, [zeros])
    np.testing.assert_allclose(after["kernel"], factor * params["kernel"], rtol=1e-5)
    for other in ("bias", "scale"):
        np.testing.assert_array_equal(after[other], np.float32(params[other]))


def test_no_clipping_by_default():
    params, steps = example()
    tx = create_optimizer("sgd", lambda _: 1.0, momentum=0.0)
    after = run(tx, params, steps[:1])
    assert_close(after, {name: params[name] - steps[0][name] for name in params})


@pytest.mark.parametrize("name", ["unet", "fcn"])
def test_what_decays_in_a_network_is_its_kernels(name):
    features = (8, 8) if name == "unet" else (8,) * 5
    model = create_model(name, 2, features=features, num_convs=1, norm="group")
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes["params"])
    tx = create_optimizer("adamw", lambda _: 0.5, weight_decay=0.1)
    after = run(tx, ones, [jax.tree.map(np.zeros_like, ones)])
    for path, leaf in jax.tree.leaves_with_path(after):
        is_kernel = path[-1].key == "kernel"
        np.testing.assert_allclose(leaf, 0.95 if is_kernel else 1, err_msg=str(path))


def longer_example():
    """As `example`, with three more steps; the third gradient is longer than 1 too."""
    params, steps = example()
    rng = np.random.default_rng(1)
    steps += [
        {name: size * rng.normal(size=p.shape) for name, p in params.items()}
        for size in (2.0, 0.5, 0.01)
    ]
    return params, steps


def in_groups_in_numpy(params, steps, reference):
    """Bias from the first step on, the kernel from the third at half the rate, the scale never.

    Before the third step the network is the bias alone. From then on bias and kernel are clipped
    together; each is stepped as if it were alone, which all but clipping allow.
    """
    moving = [{"bias"}, {"bias"}, *[{"bias", "kernel"}] * 3]
    steps = [
        clip({name: g for name, g in grads.items() if name in names}, 1.0)
        for grads, names in zip(steps, moving, strict=True)
    ]
    bias = reference({"bias": params["bias"]}, [{"bias": g["bias"]} for g in steps], 0)
    kernel = {"kernel": params["kernel"]}
    moved = reference(kernel, [{"kernel": g["kernel"]} for g in steps[2:]], 2)
    return bias | moved | {"scale": params["scale"]}


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_groups_scale_freeze_and_unfreeze(name):
    params, steps = longer_example()
    rates = [LEARNING_RATE * (1 - count / 10) ** 0.9 for count in range(5)]
    schedule = create_schedule("polynomial", learning_rate=LEARNING_RATE, num_steps=10)
    groups = (("kern", 0.5, 2), ("scale", 0.0, 0))

    def reference(params, steps, first_step):
        values = [rate * (0.5 if "kernel" in params else 1.0) for rate in rates[first_step:]]
        if name == "sgd":
            return nesterov_in_numpy(params, steps, values, 0.3, 0.9, np.inf)
        in_numpy = adamw_in_numpy if name == "adamw" else muon_in_numpy
        return in_numpy(params, steps, values, 0.3, np.inf)

    tx = create_optimizer(
        name, schedule, weight_decay=0.3, momentum=0.9, clip_norm=1.0, groups=groups
    )
    after = run(tx, params, steps)
    assert_close(after, in_groups_in_numpy(params, steps, reference))


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_what_is_frozen_stays_to_the_bit_whatever_its_gradient(name):
    params = {"encoder": {"kernel": np.float32([[-0.0, 0.0, 1e-40, 0.1]])}, "head": np.ones(2)}
    params = jax.tree.map(np.float32, params)
    grads = {"encoder": {"kernel": np.float32([[1.0, np.nan, np.inf, -1.0]])}, "head": np.ones(2)}
    for group in (("encoder/", 0.0, 0), ("encoder/kernel$", 1.0, 3)):
        tx = create_optimizer(name, lambda _: 0.5, weight_decay=0.1, clip_norm=1.0, groups=(group,))
        after = run(tx, params, [grads] * 3)
        frozen = np.asarray(after["encoder"]["kernel"])
        np.testing.assert_array_equal(
            frozen.view(np.uint32), params["encoder"]["kernel"].view(np.uint32)
        )
        assert np.all(after["head"] < 0.99)


def test_the_first_pattern_that_matches_the_beginning_decides():
    params = {"a": {"kernel": np.zeros(2)}, "b": {"kernel": np.zeros(2)}, "c": np.zeros(2)}
    grads = jax.tree.map(np.ones_like, params)
    groups = (("a/", 0.25, 0), (".*kernel", 0.5, 0))
    tx = create_optimizer("sgd", lambda _: 1.0, momentum=0.0, groups=groups)
    after = run(tx, params, [grads])
    expected = {"a": {"kernel": -0.25}, "b": {"kernel": -0.5}, "c": -1.0}
    jax.tree.map(np.testing.assert_array_equal, after, jax.tree.map(np.float32, expected))


@pytest.mark.parametrize(
    ("patterns", "named"), [(("scale", "ernel"), "'ernel'"), (("k", "kernel"), "'kernel'")]
)
def test_a_pattern_that_decides_nothing_is_an_error(patterns, named):
    groups = tuple((pattern, 0.1, 0) for pattern in patterns)
    tx = create_optimizer("adamw", lambda _: 1.0, groups=groups)
    with pytest.raises(ValueError, match=f"{named} decides about no parameter"):
        tx.init(example()[0])


def test_a_resumed_run_unfreezes_when_it_should(tmp_path):
    params, steps = jax.tree.map(np.float32, longer_example())
    tx = create_optimizer("adamw", lambda _: 0.1, groups=(("kernel", 1.0, 3), ("bias", 0.5, 0)))
    state = TrainState(jnp.int32(0), params, {}, tx.init(params))
    update = jax.jit(tx.update)

    def advance(state, steps):
        for grads in steps:
            updates, opt_state = update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            state = TrainState(state.step + 1, params, {}, opt_state)
        return state

    manager = checkpoint.open_checkpoints(str(tmp_path / "checkpoints"), keep=1)
    saved = advance(state, steps[:2])
    checkpoint.save(manager, 2, saved, config_json="{}", plan_json="{}", data={}, metrics=None)
    manager.wait_until_finished()
    resumed = advance(checkpoint.restore(manager, 2, state), steps[2:])
    checkpoint.close_checkpoints(manager)
    np.testing.assert_array_equal(saved.params["kernel"], params["kernel"])
    assert np.any(resumed.params["kernel"] != params["kernel"])
    jax.tree.map(np.testing.assert_array_equal, resumed, advance(state, steps))


def test_without_groups_the_state_is_as_it_always_was():
    params = jax.tree.map(np.float32, example()[0])
    schedule, _ = polynomial()

    def mask(params):
        return jax.tree.map(lambda param: param.ndim > 1, params)

    old = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=mask)
    )
    tx = create_optimizer("adamw", schedule, weight_decay=0.1, clip_norm=1.0)
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(old.init(params))
