"""Who may import whom: a file imports from its own layer and those below it, and nothing else."""

import ast
import concurrent.futures
import os
import pathlib
import subprocess
import sys

import pytest

import jaxseg

ROOT = pathlib.Path(jaxseg.__file__).parent

# "data" stands for every file in that folder, as "models" does.
LAYERS = {
    "config": 0,
    "geometry": 0,
    "models": 1,
    "losses": 1,
    "metrics": 1,
    "calibration": 1,
    "familiarity": 1,
    "inference": 1,
    "normalisation": 1,
    "postprocess": 1,
    "resampling": 1,
    "statistics": 1,
    "surfaces": 1,
    "explain": 2,
    "maps": 2,
    "program": 2,
    "optim": 2,
    "train_state": 2,
    "steps": 2,
    "transfer": 2,
    "parallel": 2,
    "data": 3,
    "checkpoint": 3,
    "weights": 3,
    "command": 3,
    "identity": 3,
    "ownership": 3,
    "writers": 3,
    "plots": 3,
    "report": 3,
    "experiment": 4,
    "evaluate": 4,
    "export": 4,
    "finish": 4,
    "predict": 4,
    "predictor": 4,
    "reproduce": 4,
    "train": 4,
    "main": 5,
}
LIBRARIES = {
    0: {"numpy", "scipy", "ml_collections"},
    1: {"numpy", "scipy", "ml_collections", "jax", "flax"},
    2: {"numpy", "scipy", "ml_collections", "jax", "flax", "optax"},
}
HEAVY = {"tensorflow", "tensorflow_datasets", "orbax", "nibabel", "matplotlib"}

FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(("jaxseg", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in FILES
}


def layer_of(module):
    """Layer of a module of ours; the package itself holds nothing and is below them all."""
    parts = module.split(".")
    return LAYERS[parts[1]] if len(parts) > 1 else -1


def imports_of(source):
    """Full names of what a source text imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def imports_too_high(module, source):
    """The imports that this module's layer does not allow."""
    layer, wrong = layer_of(module), []
    for name in imports_of(source):
        top = name.partition(".")[0]
        if top == "jaxseg":
            allowed = layer_of(name) <= layer
        elif top in sys.stdlib_module_names or layer not in LIBRARIES:
            allowed = True
        else:
            allowed = top in LIBRARIES[layer]
        if not allowed:
            wrong.append(name)
    return wrong


def names_in(source):
    """Every identifier that a source text reads, imports or looks up as an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")


def test_every_file_has_a_layer_and_every_layer_entry_a_file():
    assert {module.split(".")[1] for module in MODULES if module != "jaxseg"} == set(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_file_imports_from_its_own_or_lower_layers(module):
    assert imports_too_high(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("jaxseg.steps", "from jaxseg import train", ["jaxseg.train"]),
        ("jaxseg.models.unet", "from jaxseg.optim import create_schedule", ["jaxseg.optim"]),
        ("jaxseg.losses", "def f():\n    import optax", ["optax"]),
        ("jaxseg.config", "import jax.numpy as jnp, os", ["jax.numpy"]),
        ("jaxseg.models.unet", "from jaxseg.models.blocks import UpConv\nimport jax", []),
        ("jaxseg.data.cases", "import tensorflow\nfrom jaxseg import geometry", []),
    ],
)
def test_the_check_above_can_fail(module, source, wrong):
    assert imports_too_high(module, source) == wrong


def test_pmap_is_named_in_parallel_alone():
    assert [path.name for path in FILES if "pmap" in names_in(path.read_text())] == ["parallel.py"]


def test_orbax_is_imported_in_checkpoint_alone():
    assert [path.name for path in FILES if "orbax" in names_in(path.read_text())] == [
        "checkpoint.py"
    ]


def test_nothing_is_pickled():
    picklers = {
        "pickle",
        "cPickle",
        "_pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
    }
    named = {path.name: picklers & set(names_in(path.read_text())) for path in FILES}
    # Whose error torch raises when a file holds more than arrays.
    assert {name: found for name, found in named.items() if found} == {"weights.py": {"pickle"}}


def test_package_files_import_nothing_heavy():
    assert list(imports_of((ROOT / "__init__.py").read_text())) == []
    assert list(imports_of((ROOT / "data" / "__init__.py").read_text())) == []


def test_layers_0_to_2_load_nothing_heavy():
    light = [module for module in MODULES if 0 <= layer_of(module) <= 2]
    assert len(light) >= 13

    def heavy_after_importing(module):
        code = f"import sys, {module}; print(*({HEAVY} & set(sys.modules)))"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = dict(zip(light, pool.map(heavy_after_importing, light), strict=True))
    assert loaded == {module: [] for module in light}
