"""Memory: what the compiler says of a step, what is there, and plans that are made to fit."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import config_planned
from jaxseg.config import ConfigProblems, base_config
from jaxseg.experiment import build, fitting, setup, step_memory, targets, train
from jaxseg.experiment.gather import find_data
from jaxseg.run import log as run_log

GIB = 2.0**30


@pytest.fixture(scope="module")
def found(boxes, tmp_path_factory):
    """Cases of 20 x 18 x 8 voxels."""
    return find_data(config_of(boxes, tmp_path_factory.mktemp("found")), run_log.SilentLog())


def config_of(boxes, tmp_path, **changes):
    config = config_planned.open_config()
    config.plan.preset = "nnunet"
    config.data.dir, config.data.cache_dir = str(boxes), str(tmp_path / "cache")
    config.workdir = str(tmp_path / "run")
    config.update_from_flattened_dict(changes)
    return config


def test_bytes_are_those_of_arguments_results_and_temporaries():
    def step(state, batch):
        return state + jnp.sin(batch @ batch.T @ batch).sum(), batch

    state, batch = jnp.zeros((100, 100)), jnp.ones((1000, 200))
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    given, returned = 4 * (100 * 100 + 1000 * 200), 4 * 1000 * 200  # the state's are used again
    product = 4 * 1000 * 1000
    slack = 4 * 1000 * 200 + 100_000
    assert (
        given + returned + product
        <= step_memory.bytes_of(compiled)
        <= (given + returned + product + slack)
    )


def test_a_step_is_compiled_as_it_is_run():
    """The bytes of the described step are those of the step on real arrays; four times a batch
    of one takes more than twice as much."""
    config = base_config("unet")
    config.update_from_flattened_dict(
        {"model.features": (4, 8), "data.patch_size": (32, 32), "train.batch_size": 1}
    )
    layout = build.create_layout(config)
    one = step_memory.step_bytes(config, 1, 3, layout)
    config.train.batch_size = 4
    four = step_memory.step_bytes(config, 1, 3, layout)
    assert 2 * one < four < 4 * one
    apart = build.create_layout(config, jax.devices())
    assert not apart.is_pmap
    np.testing.assert_allclose(step_memory.step_bytes(config, 1, 3, apart), four, rtol=0.1)


def test_what_there_is_is_known():
    assert 1e6 < step_memory.bytes_there() < 1e15


def taking(monkeypatch, gib_of):
    """Steps take what `gib_of` says of (batch size, patch size); returns which were asked for."""
    asked = []

    def step_bytes(config, num_channels, num_classes, layout, options):
        asked.append((config.train.batch_size, tuple(config.data.patch_size)))
        assert (num_channels, num_classes) == (1, 3)
        return gib_of(*asked[-1]) * GIB

    monkeypatch.setattr(fitting, "step_bytes", step_bytes)
    return asked


def test_a_plan_that_fits_is_left_alone(boxes, found, tmp_path, monkeypatch):
    asked = taking(monkeypatch, lambda batch, patch: 1.0)
    config = config_of(boxes, tmp_path, **{"plan.memory_gib": 8.0})
    fitted = fitting.fit_to_memory(config, found)
    assert asked == [(fitted.config.train.batch_size, fitted.config.data.patch_size)]
    what, value, why = fitted.reason
    assert (what, why) == ("memory", "as compiled; 8 GiB may be used")
    assert value == "2 patches of 20 x 20 x 8 take 1 GiB"


def test_a_plan_is_made_smaller_until_it_fits_and_what_was_tried_is_told(
    boxes, found, tmp_path, monkeypatch
):
    monkeypatch.setattr(fitting, "bytes_there", lambda: 10 * GIB)
    asked = taking(monkeypatch, lambda batch, patch: 0.006 * batch * np.prod(patch))
    fitted = fitting.fit_to_memory(config_of(boxes, tmp_path), found)
    assert asked[0] == (2, (20, 20, 8)) and len(asked) > 1
    sizes = [batch * np.prod(patch) for batch, patch in asked]
    assert sizes == sorted(sizes, reverse=True)
    assert 0.006 * sizes[-1] <= 9 < 0.006 * sizes[-2]
    assert asked[-1] == (fitted.config.train.batch_size, fitted.config.data.patch_size)
    assert (
        "9 GiB may be used, before it: 2 patches of 20 x 20 x 8 take 38.4 GiB" in fitted.reason[2]
    )


def test_more_memory_makes_presets_of_an_accelerator_larger(boxes, found, tmp_path, monkeypatch):
    taking(monkeypatch, lambda batch, patch: 0.1)
    batches = [
        fitting.fit_to_memory(
            config_of(boxes, tmp_path, **{"plan.memory_gib": gib, "plan.configuration": "2d"}),
            found,
        ).config.train.batch_size
        for gib in (0.0, 8.0, 4.0)
    ]
    assert batches[0] == batches[1] >= batches[2]


def test_what_does_not_fit_however_small_is_refused(boxes, found, tmp_path, monkeypatch):
    taking(monkeypatch, lambda batch, patch: 5.0)
    config = config_of(boxes, tmp_path, **{"plan.memory_gib": 1.0, "train.batch_size": 7})
    with pytest.raises(
        ConfigProblems, match=r"no plan fits into 1 GiB: 7 patches of .* take 5 GiB"
    ):
        fitting.fit_to_memory(config, found)


def test_a_batch_is_what_devices_and_parts_can_share(boxes, found, tmp_path, monkeypatch):
    taking(monkeypatch, lambda batch, patch: 0.1)
    config = config_of(boxes, tmp_path, **{"optim.accumulate_steps": 3})
    fitted = fitting.fit_to_memory(config, found)
    assert fitted.config.train.batch_size == 3
    setup.check_fits(fitted.config, build.create_layout(fitted.config))


def test_training_refuses_a_step_that_does_not_fit_before_it_begins(boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(step_memory, "bytes_there", lambda: 1000.0)
    changes = {
        "data.dir": str(boxes),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.patch_size": (16, 16),
        "model.features": (4, 4),
        "workdir": str(tmp_path / "run"),
        "train.batch_size": 2,
    }
    config = base_config("unet")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigProblems, match=r"2 patches of 16 x 16 voxels takes .* GiB of"):
        train.train(config)
    assert not (tmp_path / "run" / "trace.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.txtpb", "no such file"),
        ("v9z:2x2", "no slice of TPUs"),
        ("empty.txtpb", "device_"),
    ],
)
def test_targets_that_are_none(name, message, tmp_path):
    (tmp_path / "empty.txtpb").write_text("platform_name: 'CUDA'\n")
    path = str(tmp_path / name) if name.endswith("txtpb") else name
    with pytest.raises(targets.TargetProblem, match=message):
        targets.described_target(path)


def test_a_target_without_its_compiler_says_what_to_install(tmp_path, monkeypatch):
    described = tmp_path / "card.txtpb"
    described.write_text("gpu_device_info {\n  device_memory_size: 85899345920\n}\n")

    def no_plugin(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(targets.topologies, "get_topology_desc", no_plugin)
    with pytest.raises(targets.TargetProblem, match=rf"jax\[cuda12\]=={jax.__version__}"):
        targets.described_target(str(described))
    monkeypatch.setattr(
        targets.topologies,
        "get_topology_desc",
        lambda name, platform, **options: types.SimpleNamespace(
            devices=[platform, options["topology"]]
        ),
    )
    found = targets.described_target(str(described))
    assert found.devices == ("cuda", "1x1x1") and found.num_bytes == 80 * GIB
