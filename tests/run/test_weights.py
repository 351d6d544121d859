"""Every kind of file is read to the same arrays; everything else is refused by name."""

import json
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.run import checkpoint
from jaxseg.run.weights import WeightsProblem, read_weights
from jaxseg.training.state import TrainState

CONV = np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float32)
STATE = {
    "encoder.conv1.weight": CONV,
    "encoder.bn1.weight": np.float32([1, 2, 3, 4]),
    "encoder.bn1.running_mean": np.float32([0.5, 0, 0, 0.25]),
    "encoder.bn1.num_batches_tracked": np.int64(7),
}


def assert_is_state(source, atol=0.0):
    assert {name: sorted(arrays) for name, arrays in source.items()} == {
        "params": ["encoder/bn1/scale", "encoder/conv1/kernel"],
        "batch_stats": ["encoder/bn1/mean"],
    }
    kernel = source["params"]["encoder/conv1/kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, CONV.transpose(2, 3, 1, 0), rtol=0, atol=atol)
    np.testing.assert_array_equal(source["params"]["encoder/bn1/scale"], [1, 2, 3, 4])
    np.testing.assert_array_equal(source["batch_stats"]["encoder/bn1/mean"], [0.5, 0, 0, 0.25])


def save_torch(path, content=None, **options):
    """Saves the state, or what `content` makes of it, as torch does."""
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in STATE.items()}
    torch.save(content(tensors) if content else tensors, path, **options)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {n: np.asarray(jnp.asarray(a, dtype)) for n, a in STATE.items()}
    safetensors.save_file(arrays, tmp_path / "w.safetensors")
    assert_is_state(
        read_weights(str(tmp_path / "w.safetensors")),
        {"float32": 0.0, "float16": 2e-3, "bfloat16": 2e-2}[dtype],
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_npz(tmp_path, dtype):
    np.savez(tmp_path / "w.npz", **{n: a.astype(dtype) for n, a in STATE.items()})
    assert_is_state(read_weights(str(tmp_path / "w.npz")), 2e-3 if dtype == "float16" else 0.0)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".PTH"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_new_and_old(tmp_path, suffix, zipped):
    path = save_torch(tmp_path / f"w{suffix}", _use_new_zipfile_serialization=zipped)
    assert_is_state(read_weights(path))


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_torch_files_that_hold_more_than_a_state_dict(tmp_path, name):
    path = save_torch(tmp_path / "w.pth", lambda tensors: {"epoch": 3, name: tensors})
    assert_is_state(read_weights(path))


def test_half_precision_parameters_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    path = save_torch(
        tmp_path / "w.pth",
        lambda tensors: {n: torch.nn.Parameter(t.bfloat16(), False) for n, t in tensors.items()},
    )
    assert_is_state(read_weights(path), 2e-2)


@pytest.mark.parametrize(
    "content", [lambda t: {"net": t}, lambda t: list(t.values()), lambda t: t | {"lr": 0.1}]
)
def test_torch_files_of_something_else_are_refused(tmp_path, content):
    path = save_torch(tmp_path / "w.pth", content)
    with pytest.raises(WeightsProblem, match=r"w\.pth is no dict from names to tensors"):
        read_weights(path)


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, suffix):
    pytest.importorskip("torch")
    proof, path = tmp_path / "executed", tmp_path / f"w{suffix}"
    if suffix == ".npz":
        np.savez(path, **STATE, evil=np.array([Hostile(proof)], dtype=object))
    elif suffix == ".pth":
        save_torch(path, lambda tensors: tensors | {"evil": Hostile(proof)})
    else:
        path.write_bytes(pickle.dumps(Hostile(proof)))
    with pytest.raises(WeightsProblem, match=f"w{suffix}") as error:
        read_weights(str(path))
    assert "weights_only" not in str(error.value)
    assert not proof.exists()


def test_the_hostile_pickle_above_would_run(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def save_any(path):
    if path.suffix == ".npz":
        np.savez(path, **STATE)
    elif path.suffix == ".safetensors":
        arrays = {name: np.asarray(array) for name, array in STATE.items()}
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    else:
        save_torch(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path, suffix, share):
    path = tmp_path / f"w{suffix}"
    save_any(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsProblem, match=rf"w\{suffix}.*(damaged)"):
        read_weights(str(path))


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_file_of_another_format_is_named(tmp_path, suffix):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"w{suffix}"
    path.write_text("<html>404: not found</html>" * 100)
    with pytest.raises(WeightsProblem, match=rf"w\{suffix}.*(damaged)"):
        read_weights(str(path))


def test_arrays_of_text_or_complex_numbers_are_refused(tmp_path):
    for name, array in (("text", np.array(["a"])), ("complex", np.ones(2, complex))):
        np.savez(tmp_path / f"{name}.npz", **STATE, odd=array)
        with pytest.raises(WeightsProblem, match=f"{name}.npz"):
            read_weights(str(tmp_path / f"{name}.npz"))


def test_an_unknown_ending_is_refused(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(WeightsProblem, match=r"w\.h5 has none of the known endings \.safetensors,"):
        read_weights(str(tmp_path / "w.h5"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_reported(tmp_path, value):
    bad = np.array([1.0, value, 1.0, 1.0])
    np.savez(tmp_path / "w.npz", **STATE | {"encoder.bn1.weight": bad})
    with pytest.raises(WeightsProblem, match=r"w\.npz .*not finite, in 1 of 3 arrays, enc"):
        read_weights(str(tmp_path / "w.npz"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vgg16", "vgg16-397923af.pth"),
        ("vgg16-397923af.pth", "vgg16-397923af.pth"),
        ("resnet18.safetensors", "resnet18-f37072fd.pth"),
        ("resnet34", "resnet34-b627a593.pth"),
        ("resnet50", "resnet50-11ad3fa6.pth"),
        ("resnet50-0676ba61.pth", "resnet50-0676ba61.pth"),
    ],
)
def test_a_missing_published_file_says_what_to_fetch_and_where_to_put_it(tmp_path, name, file):
    with pytest.raises(WeightsProblem, match="nothing is downloaded at run time") as error:
        read_weights(str(tmp_path / name))
    command = f"`curl -L -o {tmp_path / file} https://download.pytorch.org/models/{file}`"
    assert command in str(error.value)


@pytest.mark.parametrize("name", ["mine.npz", "vgg16_bn-6c64b313.pth", "resnet501"])
def test_another_missing_file_is_just_missing(name):
    with pytest.raises(WeightsProblem, match=rf"there is no {name}: name a run's folder or a "):
        read_weights(name)


def without(package, code):
    """Runs code in a Python that lacks a package; returns what it prints."""
    code = f"import sys; sys.modules[{package!r}] = None\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_without_torch_all_but_its_files_are_read_and_those_can_be_converted(tmp_path):
    torch_path = save_torch(tmp_path / "it's.pth")
    save_any(tmp_path / "w.npz")
    code = f"""
from jaxseg.run.weights import WeightsProblem, read_weights
print(len(read_weights({str(tmp_path / "w.npz")!r})["params"]))
try:
    read_weights({torch_path!r})
except WeightsProblem as error:
    print(error)
"""
    num, message = without("torch", code).splitlines()
    assert num == "2" and "pip install torch" in message
    pytest.importorskip("safetensors")
    command = message[message.index("python -c ") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert_is_state(read_weights(str(tmp_path / "it's.safetensors")))


def test_without_safetensors_the_error_says_what_to_install(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    code = f"""
from jaxseg.run.weights import WeightsProblem, read_weights
try:
    read_weights({str(tmp_path / "w.safetensors")!r})
except WeightsProblem as error:
    print(error)
"""
    assert "pip install safetensors" in without("safetensors", code)


def save_run(workdir, dice_by_step, batch_stats=True):
    """Saves steps of a run whose every parameter is the step."""
    manager = checkpoint.open_checkpoints(str(workdir / "checkpoints"), keep=9)
    for step, dice in dice_by_step.items():
        params = {"up0": {"conv0": {"kernel": jnp.full((3, 3, 2), step, jnp.float32)}}}
        stats = {"up0": {"norm0": {"mean": jnp.full(2, -step, jnp.float32)}}} if batch_stats else {}
        state = TrainState(jnp.int32(step), params, stats, (jax.tree.map(jnp.zeros_like, params),))
        checkpoint.save(
            manager,
            step,
            state,
            config_json=json.dumps({"any": "config"}),
            plan_json="{}",
            data={},
            metrics=None if dice is None else {"val_dice": dice},
        )
    checkpoint.close_checkpoints(manager)


@pytest.mark.parametrize(
    ("dice_by_step", "step"), [({1: 0.2, 2: 0.9, 3: 0.4, 4: None}, 2), ({1: None, 5: None}, 5)]
)
@pytest.mark.parametrize("folder", ["run", "run/checkpoints"])
def test_a_run_gives_its_best_step_or_its_last(tmp_path, dice_by_step, step, folder):
    save_run(tmp_path / "run", dice_by_step)
    source = read_weights(str(tmp_path / folder))
    assert [(name, list(arrays)) for name, arrays in sorted(source.items())] == [
        ("batch_stats", ["up0/norm0/mean"]),
        ("params", ["up0/conv0/kernel"]),
    ]
    kernel = source["params"]["up0/conv0/kernel"]
    assert isinstance(kernel, np.ndarray)
    np.testing.assert_array_equal(kernel, np.full((3, 3, 2), step, np.float32))
    np.testing.assert_array_equal(source["batch_stats"]["up0/norm0/mean"], [-step, -step])


def test_a_run_without_batch_statistics_and_a_relative_path(tmp_path, monkeypatch):
    save_run(tmp_path / "run", {3: 0.5}, batch_stats=False)
    monkeypatch.chdir(tmp_path)
    source = read_weights("run")
    assert source["batch_stats"] == {} and list(source["params"]) == ["up0/conv0/kernel"]


def test_a_run_on_more_devices_is_read(tmp_path):
    code = f"""
import jax, pathlib, sys
jax.config.update("jax_num_cpu_devices", 3)
sys.path.insert(0, {os.path.dirname(__file__)!r})
import jax.numpy as jnp
from jaxseg import parallel
from jaxseg.run import checkpoint
from jaxseg.training.state import TrainState
params = parallel.replicate({{"head": {{"bias": jnp.arange(4.0)}}}})
assert len(params["head"]["bias"].sharding.device_set) == 3
manager = checkpoint.open_checkpoints({str(tmp_path / "checkpoints")!r}, keep=1)
state = TrainState(jnp.int32(1), params, {{}}, ())
checkpoint.save(manager, 1, state, config_json="{{}}", plan_json="{{}}", data={{}}, metrics=None)
checkpoint.close_checkpoints(manager)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    np.testing.assert_array_equal(
        read_weights(str(tmp_path))["params"]["head/bias"], [0.0, 1.0, 2.0, 3.0]
    )


def test_a_folder_that_is_no_run_or_a_damaged_one_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsProblem, match=r"empty is no folder of .*no checkpoint"):
        read_weights(str(tmp_path / "empty"))
    save_run(tmp_path / "run", {3: 0.5})
    for file in (tmp_path / "run" / "checkpoints" / "3" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(WeightsProblem, match="run is no folder of a jaxseg run with a readable"):
        read_weights(str(tmp_path / "run"))
    assert os.listdir(tmp_path / "run" / "checkpoints" / "3")  # nothing is cleaned up
